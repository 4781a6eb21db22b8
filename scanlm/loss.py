"""Output projection and cross-entropy in one, without ever holding all logits.

A batch of 64 x 512 tokens over 50,257 words has 1.6 billion logits: 6.6 GB in float32, and as much
again for their gradient. ``linear_cross_entropy`` walks over the tokens in slices: a slice's logits
are made, turned into its loss *and* its gradients, and dropped. So the backward pass has nothing
left to compute. The products are padded to a vocabulary that suits tensor cores (a width of 50,257
runs several times slower than 50,304); the extra columns are minus infinity, so no result changes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlm import kernels
from scanlm.errors import ScanLMError
from scanlm.generation import readable

if kernels.available:
    from scanlm.kernels import cross_entropy

IGNORE = -100
LOGITS_PER_SLICE = 2**28  # half a gigabyte in bf16: large enough products, small against a model


def pad_vocabulary(weight: Tensor, multiple: int = 64) -> Tensor:
    """``(v, d)`` with zero rows added up to a multiple that tensor cores like."""
    missing = -weight.shape[0] % multiple
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def rows_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, and the gradient of the sum.

    Args:
        logits: ``(rows, columns)``; columns from ``vocab_size`` on do not count.
        targets: ``(rows,)``; rows with ``IGNORE`` have no loss.
        vocab_size: at most ``columns``.
        gradient: whether it is wanted.

    Returns:
        Losses ``(rows,)``, at least float32, and the gradient in the dtype of the logits (empty if
        it is not wanted).
    """
    if kernels.usable(logits):
        return cross_entropy.cross_entropy_rows(logits, targets, vocab_size, IGNORE, gradient)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    columns = torch.arange(logits.shape[1], device=logits.device)
    if vocab_size < len(columns):
        exact = exact.masked_fill(columns >= vocab_size, -torch.inf)
    scored = targets != IGNORE
    index = targets.where(scored, 0).unsqueeze(1)
    log_norm = exact.logsumexp(dim=1, keepdim=True)
    losses = (log_norm - exact.gather(1, index)).squeeze(1).where(scored, 0)
    if not gradient:
        return losses, logits.new_empty(0)
    # an in-place write would break the compiler's fusion of these lines
    grad = (exact - log_norm).exp() - (columns == index).to(exact.dtype)
    return losses, (grad * scored.unsqueeze(1)).to(logits.dtype)


class _SummedLoss(torch.autograd.Function):
    """Summed cross-entropy; the gradients are computed along with it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        padded = pad_vocabulary(weight.to(hidden.dtype))
        training = any(ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=exact)
        grads_hidden = []
        grad_weight = torch.zeros_like(padded, dtype=exact) if training else None
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            losses, grad = rows_loss(h @ padded.T, t, weight.shape[0], training)
            total = total + losses.sum()
            if grad_weight is not None:
                grads_hidden.append(grad @ padded)
                grad_weight = grad_weight + (grad.T @ h).to(exact)
        if grad_weight is not None:
            grad_weight = grad_weight[: weight.shape[0]].to(weight.dtype)
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    num_items: Tensor | int | None = None,
    rows: int | None = None,
) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` against ``targets``, in nats.

    Args:
        hidden: ``(n, d)``; under autocast it is used in the autocast precision.
        weight: ``(v, d)``.
        targets: ``(n,)``, ``-100`` where nothing is scored, else below v, which is not checked.
        num_items: divisor of the sum; by default the number of scored targets.
        rows: tokens a slice; by default as many as make ``LOGITS_PER_SLICE`` logits.

    Returns:
        A scalar in float32 (float64 for float64 inputs). NaN, as in transformers, if nothing is
        scored and ``num_items`` is not given.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if rows is None:  # a power of two: whole tiles, and equal slices of the usual batches
        rows = 1 << max(LOGITS_PER_SLICE // weight.shape[0], 1).bit_length() - 1
    with torch.autocast(hidden.device.type, enabled=False):
        total = _SummedLoss.apply(hidden, weight, targets, rows)
        if num_items is None:
            num_items = (targets != IGNORE).sum()
        return total / num_items


def next_tokens(
    input_ids: Tensor, labels: Tensor | None, shift_labels: Tensor | None, vocab_size: int
) -> Tensor | None:
    """What each position is scored against, ``(b, t)``; ``None`` without labels.

    Args:
        input_ids: ``(b, t)``.
        labels: ``(b, t)``; position i is scored against entry i + 1.
        shift_labels: ``(b, t)``, already shifted; takes precedence.
        vocab_size: entries of the vocabulary.

    Raises:
        ScanLMError: labels of another shape than ``input_ids``, or (looked for on the CPU only, as
            at input tokens) outside the vocabulary and not -100.
    """
    if shift_labels is not None:
        _check_labels("shift_labels", shift_labels, input_ids, vocab_size)
        return shift_labels
    if labels is None:
        return None
    _check_labels("labels", labels, input_ids, vocab_size)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def _check_labels(name: str, labels: Tensor, input_ids: Tensor, vocab_size: int) -> None:
    if labels.shape != input_ids.shape:
        raise ScanLMError(
            f"{name} must be (batch, tokens) = {tuple(input_ids.shape)} like input_ids, got "
            f"{tuple(labels.shape)}"
        )
    # on a GPU every step would wait for the answer
    if not readable(labels):
        return
    wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != IGNORE)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise ScanLMError(
            f"label {labels[tuple(where)].item()} is not in the vocabulary of {vocab_size} (0 to "
            f"{vocab_size - 1}), at {name}{where}: use {IGNORE} where nothing is scored"
        )


def loss_only(model: Any) -> dict[str, bool]:
    """What to give ``forward`` besides labels, for a loss without all logits where a model can."""
    can = "return_logits" in inspect.signature(model.forward).parameters
    return {"return_logits": False} if can else {}
