"""Run notebooks from the command line, with parameters.

A notebook is executed by papermill in the environment that runs this code. Its cell tagged
``parameters`` holds lines ``name = literal  # comment``; a preset is a YAML file
``notebooks/presets/<notebook>/<preset>.yaml`` that maps some of these names to values.

A parameter's comment is also its rule: "at least 3" bounds a number, or each entry of a list; "at
least 3 times chunk_size" and "a multiple of chunk_size" hold it to another parameter, or to a
number; "one or more" asks for a list that is not empty, "scanlm among them" for one that has this
entry; a "registry id" of a "scan model" is a model of that family; only where it speaks of ``None``
may that be the value.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from scanlm.errors import ScanLMError, nearest
from scanlm.values import named_file, read_mapping


class NotebookFailed(RuntimeError):
    """A cell raised, or the kernel died; the message is one line and names the notebook kept."""


def notebooks_folder() -> Path:
    """The folder ``notebooks`` here or above, else the one of the checkout scanlm runs from.

    Raises:
        ScanLMError: there is none.
    """
    here = Path.cwd()
    checkout = Path(__file__).resolve().parent.parent
    for folder in (here, *here.parents, checkout):
        if any((folder / "notebooks").glob("*.ipynb")):
            return folder / "notebooks"
    raise ScanLMError(
        f"no folder notebooks/ in {here} or above: run this in a clone of the repository, or give "
        "the path of a notebook"
    )


def find_notebook(name: str | Path) -> Path:
    """A notebook by path, stem (``01_scan_visualization``) or the number it starts with (``01``).

    Raises:
        ScanLMError: there is none, or the name fits several.
    """
    path = Path(name).expanduser()
    if path.suffix == ".ipynb":
        if path.is_file():
            return path.resolve()
        raise ScanLMError(f"no notebook {str(name)!r}: no such file")
    folder = notebooks_folder()
    stems = sorted(found.stem for found in folder.glob("*.ipynb"))
    fitting = [stem for stem in stems if stem == str(name)]
    fitting = fitting or [stem for stem in stems if stem.split("_")[0] == str(name)]
    if not fitting:
        raise ScanLMError(f"no notebook {str(name)!r} in {folder}.{nearest(str(name), stems)}")
    if len(fitting) > 1:
        raise ScanLMError(f"notebook {str(name)!r} is one of {', '.join(fitting)}: name it in full")
    return (folder / f"{fitting[0]}.ipynb").resolve()


def notebook_parameters(notebook: str | Path) -> dict[str, Any]:
    """Names and defaults of a notebook's parameters.

    Raises:
        ScanLMError: a file that is no notebook.
    """
    return {name: default for name, (default, _) in _inspect(notebook).items()}


def _inspect(notebook: str | Path) -> dict[str, tuple[Any, str]]:
    """Of each parameter the default and the comment."""
    import papermill

    _quiet_papermill()
    try:
        inspected = papermill.inspect_notebook(str(notebook))
    # nbformat raises its own exceptions, json's and jsonschema's
    except Exception as error:
        raise ScanLMError(f"{notebook} is not a notebook: {last_line(error)}") from error
    return {n: (_literal(found["default"]), found["help"]) for n, found in inspected.items()}


def read_preset(notebook: str | Path, preset: str | Path) -> dict[str, Any]:
    """The parameters of a preset: its name, or the path of a YAML file.

    Raises:
        ScanLMError: no such preset, or a file that is no mapping.
    """
    notebook = Path(notebook)
    what = f"preset {str(preset)!r} for notebook {notebook.stem}"
    presets = notebook.parent / "presets" / notebook.stem
    return read_mapping(named_file(preset, lambda: presets, what))


def resolve_parameters(
    notebook: str | Path,
    preset: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What to inject: the preset's values, overridden by ``parameters``.

    papermill only warns about a name that the notebook does not have, and knows no types; here
    both are checked before anything runs, and what the parameter's comment asks for.

    Raises:
        ScanLMError: an unknown name, a value of another type than the notebook's default, or one
            that the comment rules out.
    """
    known = _inspect(notebook)
    stem = Path(notebook).stem
    values = read_preset(notebook, preset) if preset is not None else {}
    for source, given in ((f" (preset {preset})", values), ("", dict(parameters or {}))):
        for name, value in given.items():
            if name not in known:
                hint = nearest(name, known) if known else " It has no parameters."
                raise ScanLMError(f"notebook {stem} has no parameter {name!r}{source}.{hint}")
            default, comment = known[name]
            if value is None and "None" in comment:
                continue
            if not _fits(value, default):
                raise ScanLMError(
                    f"{name}={value!r}{source}: expected {_kind(default)}, like the default "
                    f"{default!r} of notebook {stem}"
                )
    given = values | dict(parameters or {})
    chosen = {name: given.get(name, default) for name, (default, _) in known.items()}
    # all of them, since what is given may not go with another's default
    for name, (default, comment) in known.items():
        if not _allowed(chosen[name], comment, chosen, Path(notebook).parent):
            own = name not in values or name in (parameters or {})
            source = "" if own else f" (preset {preset})"
            beside = [f"{other}={chosen[other]!r}" for other in _others(comment, chosen)]
            raise ScanLMError(
                f"{name}={chosen[name]!r}{source}: notebook {stem} expects {comment!r}, "
                + (f"here {', '.join(beside)}" if beside else f"like the default {default!r}")
            )
    return given


def run_notebook(
    name: str | Path,
    preset: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    progress: bool | None = None,
) -> Path:
    """Execute a notebook with this Python, its folder as working directory.

    Args:
        name: number, stem or path, as for ``find_notebook``.
        preset: name of a preset, or a YAML file.
        parameters: override the preset's and the notebook's values.
        output: the executed notebook; default
            ``data/runs/notebooks/<notebook>[-<preset>][-<hash of values>].ipynb`` in the folder
            that holds ``notebooks``. It is written beside as ``*.partial.ipynb`` while it runs, so
            its existence means that it is complete.
        progress: a progress bar; default if stderr is a terminal.

    Returns:
        The executed notebook.

    Raises:
        ScanLMError: an unknown notebook, preset or parameter; or a cell raised one.
        NotebookFailed: a cell raised something else, or the kernel died.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    notebook = find_notebook(name)
    values = resolve_parameters(notebook, preset, parameters)
    done = Path(output) if output is not None else default_output(notebook, preset, values)
    if done.suffix != ".ipynb":
        raise ScanLMError(f"output {str(done)!r} must end in .ipynb")
    if done.resolve() == notebook:
        raise ScanLMError(f"output {str(done)!r} is the notebook itself: choose another file")
    done = done.resolve()
    partial = done.with_name(f"{done.stem}.partial.ipynb")
    try:
        done.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise ScanLMError(f"cannot write {done}: {error.strerror}") from error
    _quiet_papermill()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(partial),
            parameters=values,
            # a user's own kernel of this name must not replace the environment that we run in
            kernel_manager_class=_kernel_manager(),
            kernel_name="python3",
            language="python",
            progress_bar=sys.stderr.isatty() if progress is None else progress,
            cwd=str(notebook.parent),
        )
    except PapermillExecutionError as error:
        what = f"{error.ename}: {last_line(error.evalue)}".rstrip(": ")
        line = f"notebook {notebook.stem}, cell [{error.exec_count}]: {what} (see {partial})"
        raise (ScanLMError if error.ename == "ScanLMError" else NotebookFailed)(line) from error
    except DeadKernelError as error:
        raise NotebookFailed(
            f"notebook {notebook.stem}: its kernel died, perhaps out of memory (see {partial})"
        ) from error
    os.replace(partial, done)
    return done


def _quiet_papermill() -> None:
    """papermill logs what its caller says better, and to stderr at that."""
    import logging

    logging.getLogger("papermill").setLevel(logging.ERROR)


def _kernel_manager() -> Any:
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """Starts kernels of this interpreter, whatever kernel specifications are installed."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(
                argv=[
                    *(sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"),
                    # else it warns of its own connection, and of an end in the middle of a cell, to
                    # stderr
                    "--log-level=CRITICAL",
                ],
                display_name="Python 3",
                language="python",
            )

    return ThisPython


def default_output(notebook: Path, preset: str | Path | None, values: Mapping[str, Any]) -> Path:
    """Where ``run_notebook`` puts the executed notebook unless it is told.

    Args:
        notebook: path of the notebook.
        preset: its name or path, for the name alone: what it holds is in ``values``.
        values: what ``resolve_parameters`` returned.
    """
    parts = [notebook.stem]
    if preset is not None:
        parts.append(Path(preset).stem)
    if values:
        text = json.dumps(dict(values), sort_keys=True, default=str)
        parts.append(hashlib.sha256(text.encode()).hexdigest()[:8])
    root = notebook.parent.parent if notebook.parent.name == "notebooks" else notebook.parent
    return root / "data" / "runs" / "notebooks" / f"{'-'.join(parts)}.ipynb"


def _literal(source: str) -> Any:
    """The value of a parameter's default; as text where it is not a literal."""
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return source


def _fits(value: Any, default: Any) -> bool:
    """Is a value of the default's type, and are its entries of that of the default's entries?"""
    if default is None:
        return True
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, dict | list | tuple):
        like = _entry(default)
        entries = value.values() if isinstance(value, dict) else value
        kind = dict if isinstance(default, dict) else (list, tuple)
        return isinstance(value, kind) and all(_fits(entry, like) for entry in entries)
    return isinstance(value, type(default))


def _entry(default: Any) -> Any:
    """An entry of a list whose entries are of one type, or of a mapping to mappings; else ``None``.

    Another mapping is one of fields, which are of any type.
    """
    entries = [*default.values()] if isinstance(default, dict) else default
    alike = isinstance(entries, list | tuple) and len({type(entry) for entry in entries}) == 1
    if not alike or (isinstance(default, dict) and not isinstance(entries[0], dict)):
        return None
    return entries[0]


def _kind(default: Any) -> str:
    entry = _entry(default)
    return type(default).__name__ + ("" if entry is None else f" of {type(entry).__name__}")


def _allowed(value: Any, comment: str, chosen: Mapping[str, Any], folder: Path) -> bool:
    """Is a value within what the parameter's comment says?

    Args:
        value: of the parameter's type.
        comment: the rule.
        chosen: the values of all parameters.
        folder: the notebook's, from which files are named.

    Raises:
        ScanLMError: no model of that name, or of that file.
    """
    if value is None:
        return True
    entries = value if isinstance(value, list | tuple) else [value]
    if "one or more" in comment and not entries:
        return False
    member = re.search(r"(\w+) among them", comment)
    if member is not None and member[1] not in entries:
        return False
    if "registry id" in comment and "scan model" in comment and not _is_scan_model(value, folder):
        return False
    numbers = [entry for entry in entries if isinstance(entry, int | float)]
    for count, word in re.findall(r"at least (\d+)(?: times (\w+))?", comment):
        if any(number < int(count) * _size(word, chosen) for number in numbers):
            return False
    return not any(
        number % _size(word, chosen)
        for word in re.findall(r"multiple of (\w+)", comment)
        for number in numbers
    )


def _size(word: str, chosen: Mapping[str, Any]) -> int:
    """A number, or the value of a parameter; 1 of any other word, which bounds nothing."""
    size = int(word) if word.isdecimal() else chosen.get(word)
    return size if isinstance(size, int) and size > 0 else 1


def _others(comment: str, names: Container[str]) -> list[str]:
    """The other parameters that a comment holds its own to."""
    found = re.findall(r"(?:multiple of|times) (\w+)", comment)
    return [name for name in dict.fromkeys(found) if name in names]


def _is_scan_model(name: str, folder: Path) -> bool:
    from scanlm.baselines import load_entry  # not above: every command loads this module

    file = name.endswith((".yaml", ".yml")) or "/" in name
    return load_entry(folder / Path(name).expanduser() if file else name).family == "scanlm"


def last_line(error: object) -> str:
    """What an error, or an output of several lines, says in the end; without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
