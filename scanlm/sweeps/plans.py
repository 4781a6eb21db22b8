"""The runs that a sweep file means, checked before any of them starts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scanlm.errors import ScanLMError
from scanlm.values import format_value

if TYPE_CHECKING:
    from scanlm.curriculum_settings import StateTrackingSettings
    from scanlm.sweeps.files import SweepFile

WIDEST = 40  # characters of a value in a line


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        name: "new", "finished", "unfinished" or "failed".
        place: folder of the record, or file of the executed notebook; of a new training run, whose
            id depends on its tokens, with an ellipsis.
        step: from which an unfinished one goes on, where that is known.
        note: the result of a finished run, why a failed one failed.
    """

    name: str
    place: Path
    step: int | None = None
    note: str = ""

    def __str__(self) -> str:
        """``unfinished (step 1,000)``."""
        return self.name if self.step is None else f"{self.name} (step {self.step:,})"


@dataclass(frozen=True)
class SweepRun:
    """One run, whoever carries it out.

    Attributes:
        number: from 1, in the order of the file.
        varies: ``name=value`` of what is not the same in all runs of the file.
        words: the command that does this run alone, behind ``scanlm``.
        label: a short name, which may be that of other runs too.
        root: the folder that its record is kept in.
        identity: runs of equal identity would write one record.
        find: looks up how far it is.
        sizes: of a training run, see ``training.sizes``.
        settings: of a state-tracking run.
    """

    number: int
    varies: str
    words: list[str]
    label: str
    root: Path
    identity: str
    find: Callable[[], State]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    settings: StateTrackingSettings | None = None

    @property
    def command(self) -> str:
        """The command as text, for a shell."""
        return shlex.join(["scanlm", *self.words])

    def state(self) -> State:
        """How far it is now; a record that cannot be read is a failed run."""
        try:
            return self.find()
        except ScanLMError as error:
            return State("failed", self.root, note=str(error))


def plan(file: SweepFile, out: str | Path | None = None) -> list[SweepRun]:
    """All runs of a file, their settings built and checked; nothing is written.

    Args:
        file: from ``read_sweep``.
        out: folder of the records, instead of what the file says or ``data/runs``.

    Raises:
        ScanLMError: names the first run that cannot be, or two that are the same.
    """
    make = _maker(file.kind)
    runs: list[SweepRun] = []
    known: dict[str, SweepRun] = {}
    for number, values in enumerate(file.runs, 1):
        try:
            facts = make(dict(values), None if out is None else Path(out))
        except ScanLMError as error:
            raise ScanLMError(f"{file.path}, run {number}: {error}") from error
        run = SweepRun(number=number, varies=_varies(file, values), **facts)
        other = known.setdefault(run.identity, run)
        if other is not run:
            raise ScanLMError(
                f"{file.path}: runs {other.number} and {number} are the same "
                f"({run.varies or run.label}): leave one out"
            )
        runs.append(run)
    return runs


def _maker(kind: str) -> Callable[[dict[str, Any], Path | None], dict[str, Any]]:
    if kind == "train":
        from scanlm.sweeps.training_runs import training_run

        return training_run
    if kind == "notebook":
        from scanlm.sweeps.notebook_runs import notebook_run

        return notebook_run
    from scanlm.sweeps.state_tracking_runs import state_tracking_run

    return state_tracking_run


def choose(runs: Sequence[SweepRun], only: str | None) -> list[SweepRun]:
    """The runs whose numbers are named: ``1,3-5``; all if nothing is.

    Raises:
        ScanLMError: something else than numbers, or a number that no run has.
    """
    if only is None:
        return list(runs)
    wanted: set[int] = set()
    for part in only.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match:
            raise ScanLMError(f"only={only!r}: expected numbers of runs, e.g. 1,3-5")
        first, last = int(match.group(1)), int(match.group(2) or match.group(1))
        if not 1 <= first <= last <= len(runs):
            raise ScanLMError(f"only={only!r}: the file has the runs 1 to {len(runs)}")
        wanted.update(range(first, last + 1))
    return [run for run in runs if run.number in wanted]


def text(values: dict[str, Any], name: str, what: str) -> str:
    """Take out a value that must be there and be a text.

    Raises:
        ScanLMError: it is not; ``what`` says what it would be.
    """
    if name not in values:
        raise ScanLMError(f"no {name!r}: name {what}")
    return optional_text(values, name) or ""


def optional_text(values: dict[str, Any], name: str) -> str | None:
    """Take out a text, or ``None``.

    Raises:
        ScanLMError: something else.
    """
    value = values.pop(name, None)
    if value is not None and not isinstance(value, str):
        raise ScanLMError(f"{name}={value!r}: expected a text")
    return value


def _varies(file: SweepFile, values: Mapping[str, Any]) -> str:
    parts = []
    for name in file.varying:
        if name in values:
            value = format_value(values[name])
            short = value if len(value) <= WIDEST else f"{value[: WIDEST - 3]}..."
            parts.append(f"{name}={short}")
    return " ".join(parts)
