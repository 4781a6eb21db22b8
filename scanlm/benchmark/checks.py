"""Checks that the settings of every benchmark share."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from scanlm.errors import ScanLMError, nearest


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known, with the nearest that is."""
    if name not in known:
        raise ScanLMError(f"unknown {what} {name!r}.{nearest(name, known)}")


def usable_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        ScanLMError: a device that is not known or not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ScanLMError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; "
            "use cpu, or cuda where torch sees a GPU"
        ) from error
    return device
