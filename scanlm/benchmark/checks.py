"""A check that the settings of every benchmark share."""

from __future__ import annotations

from collections.abc import Iterable

from scanlm.errors import ScanLMError, nearest


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with the nearest that is."""
    if name not in known:
        raise ScanLMError(f"unknown {what} {name!r}.{nearest(name, known)}")
