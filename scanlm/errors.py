"""The one exception for mistakes a user can mend, and the hint at the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class ScanLMError(ValueError):
    """A user's mistake; the message is one line: the value, what was expected, how to fix it."""


def check_name(what: str, name: object, known: Collection[str]) -> None:
    """Refuse a name that is not known.

    Args:
        what: is named, for the message.
        name: what was given.
        known: the names there are.

    Raises:
        ScanLMError: names the nearest, see ``nearest``.
    """
    if name not in known:
        raise ScanLMError(f"unknown {what} {name!r}.{nearest(name, known)}")


def nearest(name: object, options: Iterable[str]) -> str:
    """A hint to append to an "unknown name" message: the nearest option, else all of them.

    Args:
        name: what was given; something else than a string is near to none of them.
        options: the names there are.

    Returns:
        ``" Did you mean 'x'?"`` or ``" Known: a, b."``.
    """
    known = sorted(options)
    lowered = {option.lower(): option for option in known}
    close = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {lowered[close[0]]!r}?"
    return f" Known: {', '.join(known)}."
