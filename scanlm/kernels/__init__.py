"""Triton kernels for what no library has: windows, their activations and the loss; decoding.

Each computes what plain torch computes elsewhere in the package, which is the definition: on a CPU,
in float32 or without Triton nothing here is imported.
"""

from __future__ import annotations

import importlib.util

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
    half = dtype in (torch.bfloat16, torch.float16)
    return half and torch.cuda.get_device_capability(x.device) >= (8, 0)
