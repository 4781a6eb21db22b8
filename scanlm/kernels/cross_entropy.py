# mypy: disable-error-code="no-untyped-def"
"""Cross-entropy of rows of logits and its gradient, reading them once from memory.

A program walks over one row twice: for the largest logit and the sum, then for the gradient. A row
of 50,304 is 100 kB, so that the second walk finds it in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits that a program holds at once


@triton.jit
def cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, grad_ptr, STRIDE, V,
    IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of one row; its gradient too if asked for, zero beyond the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    logits, grad = logits_ptr + row * STRIDE, grad_ptr + row * STRIDE
    scored = target != IGNORE
    place = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # a running maximum and sum for each lane
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + place, start + place < V, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.exp(x - finite)
        top = higher
    highest = tl.max(top, 0)
    log_norm = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    own = tl.load(logits + tl.where(scored, target, 0)).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(scored, log_norm - own, 0.0))
    if GRADIENT:
        scale = tl.where(scored, 1.0, 0.0)
        for start in range(0, STRIDE, BLOCK):
            at = start + place
            x = tl.load(logits + at, at < V, float("-inf")).to(tl.float32)
            p = tl.exp(x - log_norm) - tl.where(at == target, 1.0, 0.0)
            tl.store(grad + at, (p * scale).to(grad_ptr.dtype.element_ty), at < STRIDE)


@torch.library.custom_op("scanlm::cross_entropy_rows", mutates_args=())
def cross_entropy_rows(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and the gradient of their sum.

    Args:
        logits: ``(rows, columns)``, contiguous; those from ``vocab_size`` on do not count.
        targets: ``(rows,)`` int64; rows with ``ignore`` have no loss.
        vocab_size: at most ``columns``.
        ignore: see ``targets``.
        gradient: whether to compute it.

    Returns:
        Losses ``(rows,)`` in float32, in nats; the gradient in the dtype of the logits, empty if
        it was not asked for.
    """
    rows, columns = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    grad = torch.empty_like(logits) if gradient else logits.new_empty(0)
    cross_entropy_kernel[(rows,)](
        logits,
        targets,
        losses,
        grad,
        columns,
        vocab_size,
        IGNORE=ignore,
        GRADIENT=gradient,
        BLOCK=min(BLOCK, triton.next_power_of_2(columns)),
        num_warps=8,
    )
    return losses, grad


@cross_entropy_rows.register_fake
def _(logits, targets, vocab_size, ignore, gradient):
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(logits) if gradient else logits.new_empty(0)
