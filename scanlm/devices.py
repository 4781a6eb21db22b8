"""The device that a user names, or the best there is."""

from __future__ import annotations

import torch

from scanlm.errors import ScanLMError
from scanlm.provenance import device_info


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises:
        ScanLMError: a device that is not known or not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # lists all that torch was ever built for
        raise _unusable(name, "it is none of cpu, cuda, cuda:<number> and mps") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(name, str(error).splitlines()[0]) from error
    return device


def _unusable(name: str | torch.device, why: str) -> ScanLMError:
    return ScanLMError(
        f"device {str(name)!r} cannot be used: {why}; use cpu, or cuda where torch sees a GPU"
    )


def machine_name(device: torch.device) -> str:
    """What a benchmark's figures are of: the GPU's name, or "cpu" (or "mps") and the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {device_info()['cpu']}"
