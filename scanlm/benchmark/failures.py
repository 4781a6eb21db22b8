"""What stops one measurement but not the others."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = ("out of memory", "can't allocate", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no room left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)
