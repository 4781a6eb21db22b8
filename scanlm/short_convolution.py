"""The short convolutions of GLA, Gated DeltaNet and Mamba-2: a few weights of its own per feature.

As a sum of shifted products instead of a convolution of as many groups as features: of that a GPU
makes more work than of all of a block's matrix products, and a CPU takes longer for its gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each feature's last ``w`` inputs times its weights, summed in float32 at least.

    Args:
        x: ``(b, w - 1 + t, f)``: what came before the first output, and the inputs.
        weight: ``(f, 1, w)`` as ``nn.Conv1d`` has it, the present's last.
        bias: ``(f,)``.

    Returns:
        ``(b, t, f)`` in x's type.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    first, *others = weight[:, 0].to(exact).unbind(1)
    t = x.shape[1] - len(others)
    y = x[:, :t] * first
    for i, w in enumerate(others, 1):
        y = y + x[:, i : i + t] * w
    return (y if bias is None else y + bias.to(exact)).to(x.dtype)


class ShortConvolution(nn.Conv1d):
    """Causal convolution of every feature with its own few weights, then SiLU."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__(features, features, width, groups=features, bias=False)

    def step(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens ``(b, t, features)`` after the ``width - 1`` of ``past``: outputs, new past."""
        width = self.kernel_size[0]
        if past is None:
            past = x.new_zeros(x.shape[0], width - 1, x.shape[2])
        x = torch.cat([past.to(x.dtype), x], dim=1)
        return F.silu(causal_convolution(x, self.weight)), x[:, x.shape[1] - width + 1 :]
