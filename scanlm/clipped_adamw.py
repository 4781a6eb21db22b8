"""The end of a training step as one function of tensors: clipping, AdamW, and copies of weights.

The parts are torch's. As methods of an optimiser each reads and writes all weights or gradients
again; as one function of lists they can be compiled to a pass or two over the memory, and once for
all the runs of a process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, a float32 scalar whatever their dtypes."""
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(t.dtype for t in tensors):  # what foreach kernels take at once
        same = [t for t in tensors if t.dtype == dtype]
        norms += torch._foreach_norm(same, 2, torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def adamw_step(
    weights: list[Tensor],
    gradients: list[Tensor],
    copies: list[Tensor | None],
    means: list[Tensor],
    squares: list[Tensor],
    counts: list[Tensor],
    factor: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019), in place.

    Args:
        weights: float32.
        gradients: of any dtype.
        copies: of each weight one in another dtype to keep equal, or ``None``.
        means, squares, counts: the optimiser's state: running means of the gradients and of their
            squares, and the number of steps, a float32 scalar.
        factor: of all gradients, a scalar.
        lr: the rate, a scalar.
        betas, weight_decay, eps: as in ``torch.optim.AdamW``.
    """
    compiling = torch.compiler.is_compiling()  # which fuses plain operations better than a kernel
    adamw(
        weights,
        [g.to(w.dtype) * factor for g, w in zip(gradients, weights, strict=True)],
        means,
        squares,
        [],
        counts,
        foreach=compiling,
        fused=not compiling,
        capturable=compiling or lr.is_cuda,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    for weight, copy in zip(weights, copies, strict=True):
        if copy is not None:
            copy.copy_(weight)


def clipping_factor(gradients: Sequence[Tensor], clip: float) -> Tensor:
    """What brings the norm of all gradients down to ``clip``, a float32 scalar of at most 1."""
    return (clip / (total_norm(gradients) + 1e-6)).clamp(max=1.0)
