# mypy: disable-error-code="no-untyped-def"
"""Bias and GELU in one pass each way; the way back also sums the bias' gradient.

Left to the compiler, the gradient of the pre-activations (the widest tensor of a block) is written
by one kernel and read again by another for the bias alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, STEP = 64, 512, 16  # of a program, and rows it holds at once


@triton.jit
def _sigmoid_argument(x):
    """GELU's tanh form is ``x sigmoid(2 u)``: this is ``2 u``."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def gelu_forward_kernel(
    x_ptr, bias_ptr, out_ptr, R, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``gelu(x + bias)`` of a tile."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    bias = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    for start in range(0, ROWS, STEP):
        rows = tl.program_id(1) * ROWS + start + tl.arange(0, STEP)
        at = rows[:, None].to(tl.int64) * N + columns[None, :]
        live = (rows < R)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, live, 0.0).to(tl.float32) + bias[None, :]
        out = x * tl.sigmoid(_sigmoid_argument(x))
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), live)


@triton.jit
def gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, part_ptr, R, N: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile, and its sum over the tile's rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < N
    bias = tl.load(bias_ptr + columns, inside, 0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, ROWS, STEP):
        rows = tl.program_id(1) * ROWS + start + tl.arange(0, STEP)
        at = rows[:, None].to(tl.int64) * N + columns[None, :]
        live = (rows < R)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, live, 0.0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + at, live, 0.0).to(tl.float32)
        s = tl.sigmoid(_sigmoid_argument(x))
        slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * x * x)
        dx = grad * s * (1.0 + x * (1.0 - s) * slope)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), live)
        total += tl.sum(dx, 0)
    tl.store(part_ptr + tl.program_id(1).to(tl.int64) * N + columns, total, inside)


def _grid(rows: int, n: int) -> tuple[int, int]:
    return triton.cdiv(n, COLUMNS), triton.cdiv(rows, ROWS)


@torch.library.custom_op("scanlm::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU's tanh form of ``x + bias``.

    Args:
        x: ``(rows, n)``.
        bias: ``(n,)``.

    Returns:
        ``(rows, n)`` in the dtype of ``x``; sums and products are float32.
    """
    x, (rows, n) = x.contiguous(), x.shape
    out = torch.empty_like(x)
    gelu_forward_kernel[_grid(rows, n)](x, bias, out, rows, n, ROWS, COLUMNS, STEP)
    return out


@bias_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("scanlm::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``bias``."""
    grad, x, (rows, n) = grad.contiguous(), x.contiguous(), x.shape
    dx = torch.empty_like(x)
    grid = _grid(rows, n)
    parts = x.new_empty(grid[1], n, dtype=torch.float32)
    gelu_backward_kernel[grid](grad, x, bias, dx, parts, rows, n, ROWS, COLUMNS, STEP)
    return dx, parts.sum(0).to(bias.dtype)


@bias_gelu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return bias_gelu_backward(grad, *ctx.saved_tensors)


bias_gelu.register_autograd(_backward, setup_context=_save)
