"""A sweep file, and the values of each run that it means.

    run: train                    # or notebook, state_tracking
    description: Two sizes.       # optional
    base: {corpus: embedded}      # of all runs
    grid:                         # every combination; the last name varies fastest
      lr: [1e-3, 3e-3]
      seed: [0, 1]
    runs:                         # each with the base and the whole grid
      - {model: scanlm_tiny}
      - {model: gpt2_tiny, lr: 2e-3}   # what a run sets itself wins, and is not varied

At least one of ``grid`` and ``runs`` is needed. A name at the top that starts with ``_`` or ``x-``
is left alone: a place for YAML's anchors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scanlm.errors import ScanLMError, nearest
from scanlm.values import read_mapping

KINDS = ("train", "notebook", "state_tracking")
KEYS = ("run", "description", "base", "grid", "runs")

Values = dict[str, Any]


@dataclass(frozen=True)
class SweepFile:
    """What a file says.

    Attributes:
        path: of the file.
        kind: one of ``KINDS``.
        description: for readers.
        names: every name that has a value, those that runs set themselves first.
        runs: the values of each run, in order.
    """

    path: Path
    kind: str
    description: str
    names: list[str]
    runs: list[Values]

    @property
    def varying(self) -> list[str]:
        """The names whose values are not the same in all runs."""
        return [name for name in self.names if len({_text(v, name) for v in self.runs}) > 1]


def read_sweep(path: str | Path) -> SweepFile:
    """Read a file and expand it; the values themselves are not looked at.

    Raises:
        ScanLMError: no such file, not YAML (the message names the line), or another form.
    """
    path = Path(path)
    content = {k: v for k, v in read_mapping(path).items() if not k.startswith(("_", "x-"))}
    unknown = next((name for name in content if name not in KEYS), None)
    if unknown is not None:
        raise ScanLMError(f"{path}: unknown key {unknown!r}.{nearest(unknown, KEYS)}")
    kind = content.get("run")
    if kind is None:
        raise ScanLMError(f"{path}: no 'run': say what runs, one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ScanLMError(f"{path}: unknown run {kind!r}.{nearest(str(kind), KINDS)}")
    description = content.get("description", "")
    if not isinstance(description, str):
        raise ScanLMError(f"{path}: description={description!r}: expected a text")
    if "grid" not in content and "runs" not in content:
        raise ScanLMError(
            f"{path}: neither grid nor runs: give lists of values by name (grid), or a list of runs"
        )
    base = _mapping(path, "base", content.get("base", {}))
    grid = _mapping(path, "grid", content.get("grid", {}))
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ScanLMError(
                f"{path}: grid: {name}={values!r}: expected a list of values; what all runs share "
                "belongs into base"
            )
    listed = content.get("runs", [{}])
    if not isinstance(listed, list) or not listed:
        raise ScanLMError(f"{path}: runs={listed!r}: expected a list of mappings, name: value")
    own = [_mapping(path, f"runs[{place}]", entry) for place, entry in enumerate(listed)]
    names = list(dict.fromkeys(name for source in (*own, grid, base) for name in source))
    return SweepFile(path, kind, description.strip(), names, list(_expand(base, grid, own)))


def _mapping(path: Path, where: str, value: Any) -> Values:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ScanLMError(f"{path}: {where}={value!r}: expected a mapping, name: value")
    return dict(value)


def _expand(base: Values, grid: Values, runs: list[Values]) -> Iterator[Values]:
    for own in runs:
        axes = {name: values for name, values in grid.items() if name not in own}
        for point in product(*axes.values()):
            merged: Values = {}
            for source in (base, dict(zip(axes, point, strict=True)), own):
                for name in source:
                    merged.pop(name, None)  # a name stands where it was set last
                merged |= source
            yield deepcopy(merged)  # what anchors share is changed for one run only


def _text(values: Values, name: str) -> str:
    return json.dumps(values[name], default=str) if name in values else "not given"
