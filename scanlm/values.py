"""Values as users write them: ``key=value`` on the command line, mappings in YAML files.

Both follow YAML 1.2, not PyYAML's 1.1: ``1e-3`` is a number, ``on`` and ``12:30`` are strings. Of
YAML 1.1 only the merge key ``<<`` is kept, for files that repeat themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from scanlm.errors import ScanLMError, nearest

PICTURES = (".png", ".pdf", ".svg")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, and Python's ``None``, ``True`` and ``False``.

    A key that stands twice in one mapping is an error; a merged one may be set again.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"{name!r} is given twice", key.start_mark
                )
            seen.add(name)
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|None|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(rf"^(?:{_pattern})$"),
        ["" if first == "\0" else first for first in _first],
    )


def _null(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> None:
    return None


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML's reads 010 as octal


_Loader.add_constructor("tag:yaml.org,2002:null", _null)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def parse_value(text: str) -> Any:
    """A value from the command line: number, true/false, null, ``[list]``, else the text itself."""
    if text == "":
        return ""
    try:
        # a Loader subclass of SafeLoader: no arbitrary objects
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text
    # "a: b" and " #" would be read as structure; a word is meant as it is
    return text if isinstance(value, dict) and not text.startswith("{") else value


def format_value(value: Any) -> str:
    """A value as text that ``parse_value`` reads back: JSON unless the plain text will do."""
    plain = isinstance(value, str) and parse_value(value) == value
    return str(value) if plain else json.dumps(value)


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key by which numbers in names count as numbers: 2 before 10."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """``["a=1", "b.c=x"]`` as ``{"a": 1, "b.c": "x"}``.

    Raises:
        ScanLMError: one without ``=``, or a key given twice.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ScanLMError(f"{assignment!r} is no assignment: expected key=value, e.g. lr=3e-4")
        if key in values:
            raise ScanLMError(f"{key!r} is given twice: leave one out")
        values[key] = parse_value(text.strip())
    return values


def is_number(value: Any) -> bool:
    """Whether it is a real number; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_duration(name: str, seconds: float | None) -> None:
    """Refuse what is no time to wait or to work; ``None`` is no limit.

    Raises:
        ScanLMError: negative, infinite or not a number.
    """
    if seconds is not None and not 0 <= seconds < math.inf:
        raise ScanLMError(f"{name}={seconds}: expected seconds, a finite number >= 0")


def check_picture(path: str | Path) -> None:
    """Refuse a file that no picture can be saved as, before anything is measured for it.

    Nothing is left behind by looking: folders that are missing are made when the picture is saved.

    Raises:
        ScanLMError: another ending than a picture's, a folder, or a place that is not writable.
    """
    path = Path(path)
    if path.suffix not in PICTURES:
        raise ScanLMError(f"figure {str(path)!r} must end in {', '.join(PICTURES)}")
    try:
        if path.exists():
            path.open("ab").close()
        else:
            # root has every permission, even where the system lets no file be made: so one is made
            TemporaryFile(dir=next(p for p in path.absolute().parents if p.exists())).close()
    except OSError as error:
        raise ScanLMError(
            f"cannot write figure {str(path)!r}: {error.strerror}; choose another file or make "
            "its folder writable"
        ) from error


def mapping_or_empty(value: Any) -> Mapping[str, Any]:
    """A mapping as it is, and an empty one for what is none: a missing cell of a table, say."""
    return value if isinstance(value, Mapping) else {}


def named_file(name: str | Path, find_folder: Callable[[], Path], what: str) -> Path:
    """A YAML file by its path, or by its name in a folder, without the ending.

    Args:
        name: either.
        find_folder: where names are looked up; not asked about a path.
        what: is named, for the message.

    Raises:
        ScanLMError: no such name; a path is not looked at.
    """
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return path
    folder = find_folder()
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = [found.stem for found in folder.glob("*.yaml")]
        hint = nearest(str(name), known) if known else f" There are none in {folder}."
        raise ScanLMError(f"no {what}.{hint} Or name a YAML file.")
    return path


def read_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; an empty file is an empty mapping.

    Raises:
        ScanLMError: not YAML (the message names the line), or something else than a mapping.
    """
    path = Path(path)
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ScanLMError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ScanLMError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}," if mark else ""
        raise ScanLMError(f"{path},{line} is not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ScanLMError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ScanLMError(f"{path} must hold one mapping, name: value; got {type(value).__name__}")
    return value
