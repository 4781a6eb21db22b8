"""Checks that the settings of the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scanlm.errors import ScanLMError


def check_some(what: str, names: Sequence[str] | None, known: Iterable[str]) -> None:
    """Refuse a list without any name; ``None`` is no list."""
    if names is not None and not names:
        raise ScanLMError(f"no {what} given: name some of {', '.join(known)}")


def check_filled(settings: Any, *fields: str) -> None:
    """Refuse lists of a benchmark's settings, by name, without an entry; ``None`` is no list."""
    for name in fields:
        if getattr(settings, name) == ():
            raise ScanLMError(f"{name} is empty: name at least one, or leave it out")


def check_positive(counts: Mapping[str, Iterable[int]]) -> None:
    """Refuse numbers below 1, by what they are."""
    for name, values in counts.items():
        for value in values:
            if value < 1:
                raise ScanLMError(f"{name}: {value} is not possible; expected >= 1")


def check_seed(seed: int) -> None:
    """Refuse what is no seed of all generators, as training does."""
    if not 0 <= seed < 2**32:
        raise ScanLMError(f"seed={seed}: expected an integer >= 0 and below {2**32}")


def check_once(settings: Any) -> None:
    """Refuse lists of a benchmark's settings, by name, that hold an entry twice."""
    for name, values in vars(settings).items():
        for place, value in enumerate(values if isinstance(values, tuple) else ()):
            if value in values[:place]:
                raise ScanLMError(f"{name}: {value!r} is given twice: leave one out")
