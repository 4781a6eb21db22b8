"""Whether the training kernels compute what plain torch computes, on this GPU and this Triton.

Kernels are only as good as the compiler that made them, and a wrong gradient would go unnoticed:
training gets a little worse and nothing else. So they are tried once before they are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AGREEMENT = 0.05  # relative: bfloat16 rounds to 0.005, a wrong kernel is off by about 1

Case = tuple[str, Callable[..., Any], Callable[..., Any], list[Tensor]]


def passes(device: torch.device) -> bool:
    """Try all kernels; a warning says which failed and why."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for name, kernel, plain, inputs in _cases(device):
            try:
                problem = _difference(kernel, plain, inputs)
            except Exception as error:  # triton's compiler has many of its own
                problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if problem is not None:
                warnings.warn(
                    f"the Triton kernel for {name} cannot be used here ({problem}): training goes "
                    "on without the kernels, slower; another version of triton may help",
                    stacklevel=2,
                )
                return False
    return True


def _difference(
    kernel: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor]
) -> str | None:
    """How values or gradients differ, if they do."""
    mine, theirs = _run(kernel, inputs), _run(plain, [x.float() for x in inputs])
    for what, actual, expected in zip(("values", "gradients"), mine, theirs, strict=True):
        for a, e in zip(actual, expected, strict=True):
            distance, size = (a.float() - e).norm(), e.norm()
            if not bool(distance <= AGREEMENT * size):  # a NaN is no agreement
                return f"its {what} are off by {float(distance / size):.2g}"
    return None


def _run(function: Callable[..., Any], inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out = function(*leaves)
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), leaves)
    return [out.detach()], list(gradients)


def _cases(device: torch.device) -> Iterator[Case]:
    from scanlm.kernels.cross_entropy import cross_entropy_rows
    from scanlm.kernels.gelu import bias_gelu
    from scanlm.kernels.tiny_windows import num_weights, tiny_window_attention
    from scanlm.kernels.windows import LONGEST, window_attention

    # Triton's interpreter, which runs kernels on a CPU, has no bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    heads, d, half = 2, 128, LONGEST // 2

    def windows(packed: Tensor, bias: Tensor, causal: bool) -> Tensor:
        whole = [LONGEST]
        return window_attention(packed, None, bias, [2], whole, whole, heads, causal)[0]

    def asked(packed: Tensor, q: Tensor, bias: Tensor) -> Tensor:
        return window_attention(packed, q, bias, [2], [LONGEST], [half], heads, True)[0]

    def attention(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, count: int = 2, drop: Tensor | None = None
    ) -> Tensor:
        q, k, v = (x.reshape(count, -1, heads, d // heads).transpose(1, 2) for x in (q, k, v))
        total, queries = k.shape[2], q.shape[2]
        score = q @ k.mT / (d // heads) ** 0.5
        if causal:
            seen = torch.ones(queries, total, dtype=torch.bool, device=device)
            score = score.masked_fill(~seen.tril(total - queries), float("-inf"))
        weights = score.softmax(-1)
        if drop is not None:
            weights = weights * drop.view(count, queries, heads, total).transpose(1, 2)
        return (weights @ v).transpose(1, 2).reshape(-1, d)

    def plain_windows(packed: Tensor, bias: Tensor, causal: bool) -> Tensor:
        q, k, v = (packed + bias).split(d, dim=1)
        return attention(q, k, v, causal)

    def plain_asked(packed: Tensor, q: Tensor, bias: Tensor) -> Tensor:
        k, v = (packed + bias[d:]).split(d, dim=1)
        return attention(q + bias[:d], k, v, True)

    counts, lengths, keeps = [2, 20], [1, 3], [1, 2]
    drop = torch.arange(num_weights(counts, lengths, keeps, heads), device=device) % 3 / 2

    def tiny(packed: Tensor, bias: Tensor) -> Tensor:
        return tiny_window_attention(packed, drop, bias, counts, lengths, keeps, heads, True)[0]

    def plain_tiny(packed: Tensor, bias: Tensor) -> Tensor:
        outputs, drops = [], drop.split([heads * 2, heads * 20 * 3 * 2])
        parts = (packed + bias).split([2, 20 * 3])
        for rows, count, keep, own in zip(parts, counts, keeps, drops, strict=True):
            q, k, v = rows.split(d, dim=1)
            last = q.view(count, -1, d)[:, -keep:]
            outputs.append(attention(last, k, v, True, count, own))
        return torch.cat(outputs)

    inputs = [randn(2 + 20 * 3, 3 * d), randn(3 * d)]
    yield "attention within tiny windows", tiny, plain_tiny, inputs
    rows = 2 * LONGEST
    for causal in (True, False):
        yield (
            "attention within windows",
            lambda x, b, causal=causal: windows(x, b, causal),
            lambda x, b, causal=causal: plain_windows(x, b, causal),
            [randn(rows, 3 * d), randn(3 * d)],
        )
    inputs = [randn(rows, 2 * d), randn(2 * half, d), randn(3 * d)]
    yield "attention within windows", asked, plain_asked, inputs
    yield (
        "bias and GELU",
        bias_gelu,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        [randn(rows, 4 * d), randn(4 * d)],
    )
    targets = torch.arange(rows, device=device)
    size, columns = rows + 5, rows + 64

    def loss(logits: Tensor) -> Tensor:
        losses, gradient = cross_entropy_rows(logits.detach(), targets, size, -100, True)
        return losses + ((logits - logits.detach()) * gradient).sum(1)  # carries the gradient

    def plain_loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :size], targets, reduction="none")

    yield "the loss", loss, plain_loss, [3 * randn(rows, columns)]
