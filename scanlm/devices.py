"""The device that a user names, or the best there is."""

from __future__ import annotations

import torch

from scanlm.errors import ScanLMError


def usable_device(name: str | torch.device | None) -> torch.device:
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
            f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}; "
            "use cpu, or cuda where torch sees a GPU"
        ) from error
    return device
