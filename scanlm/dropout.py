"""The rate of a model's dropout, wherever its modules keep it."""

from __future__ import annotations

from typing import Any

from torch import nn

from scanlm.errors import ScanLMError
from scanlm.values import is_number


def no_dropout(model: Any, rate: float, instead: str) -> ScanLMError:
    """That a model without dropout was asked for some, and what to do instead."""
    return ScanLMError(
        f"dropout={rate}: a model of type {model.config.model_type!r} has no dropout; {instead}"
    )


def set_dropout(model: nn.Module, p: float, where: str = "all") -> None:
    """Dropout probability of a whole model, or of its part ``t1`` or ``t2`` (0 elsewhere)."""
    for name, module in model.named_modules():
        rate = p if where == "all" or name.split(".")[0] == where else 0.0
        if isinstance(module, nn.Dropout):
            module.p = rate
        for field in ("dropout", "attn_pdrop"):  # attention keeps its rate as a number
            if is_number(getattr(module, field, None)):  # a given 0 is an integer
                setattr(module, field, rate)
