"""Triton kernels for what no library has: windows, their activations and the loss; decoding.

Each computes what plain torch computes elsewhere in the package, which is the definition: on a CPU,
in float32 or without Triton nothing here is imported. Those of training are tried against plain
torch before they are used (``trial``), those of decoding by the decoder that uses them.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

available = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether products of ``x`` are computed where and in the precision that the kernels are for.

    Args:
        x: on any device; under autocast its own dtype does not count.
    """
    if not (available and x.is_cuda):
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    # what is being compiled cannot try: whoever compiles does (scanlm.compiling)
    return torch.compiler.is_compiling() or trusted(x.device)


@cache
def trusted(device: torch.device) -> bool:
    """Whether the training kernels run on this device and agree with plain torch, tried once."""
    global available
    if not available or device.type != "cuda":
        return False
    from scanlm.kernels.trial import passes

    if torch.cuda.get_device_capability(device) < (8, 0) or not passes(device):
        available = False  # on no device: that is what compiled code looks at
    return available
