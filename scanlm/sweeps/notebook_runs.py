"""Notebook runs of a sweep: a notebook, a preset and parameters, as ``scanlm run`` takes them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from scanlm.batch import default_output, find_notebook, last_line, resolve_parameters
from scanlm.sweeps.plans import State, optional_text, text
from scanlm.values import format_value


def notebook_run(values: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The fields of a ``SweepRun``.

    Args:
        values: ``notebook``, perhaps ``preset``, and parameters of the notebook.
        out: executed notebooks go to ``<out>/notebooks``; default as ``scanlm run``.

    Raises:
        ScanLMError: an unknown notebook, preset or parameter, or a value of another type.
    """
    name = text(values, "notebook", "a notebook (01, or its path)")
    preset = optional_text(values, "preset")
    notebook = find_notebook(name)
    output = default_output(notebook, preset, resolve_parameters(notebook, preset, values))
    words = ["run", name]
    if preset is not None:
        words += ["--preset", preset]
    for parameter, value in values.items():
        words += ["-p", f"{parameter}={format_value(value)}"]
    if out is not None:
        output = out / "notebooks" / output.name
        words += ["--output", str(output)]
    return {
        "words": words,
        "label": output.stem,
        "root": output.parent.parent,
        "identity": str(output),
        "find": partial(_state, output),
    }


def _state(output: Path) -> State:
    """An executed notebook is complete; beside it may be one that was left in the middle."""
    partly = output.with_name(f"{output.stem}.partial.ipynb")
    if output.is_file():
        return State("finished", output)
    if not partly.is_file():
        return State("new", output)
    try:
        content = json.loads(partly.read_text(encoding="utf-8"))
    except ValueError:  # cut off while it was written
        return State("unfinished", partly)
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", ())]
    errors = [output for output in outputs if output["output_type"] == "error"]
    if not errors:
        return State("unfinished", partly)
    return State("failed", partly, note=f"{errors[-1]['ename']}: {last_line(errors[-1]['evalue'])}")
