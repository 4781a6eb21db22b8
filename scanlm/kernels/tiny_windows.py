# mypy: disable-error-code="no-untyped-def"
"""Attention within windows of a few tokens: one kernel each way.

Where chunks hold one token (state tracking), T1 and T2 read windows of two, thousands of them a
step. Matrix products would be mostly padding; here one program owns one head of some windows and
sums elementwise. As for longer windows (``scanlm.kernels.windows``) the bias of the product before
is added here and its gradient summed, since everything is at hand.

Shapes: groups of ``n`` windows of ``s`` tokens, of which the last ``a`` ask; ``d`` = n_embd.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from scanlm.kernels.windows import Group, groups_of, shape

BLOCK = 32  # windows of a program


@triton.jit
def _places(
    N, S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    A_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a program: where its windows and their queries begin, and what of the tiles exists."""
    head, dims = tl.program_id(1), tl.arange(0, D_TILE)
    windows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    asked = tl.arange(0, A_TILE)
    inside = (windows < N)[:, None] & (dims < D)[None, :]
    asking = (windows < N)[:, None] & (asked < A)[None, :]
    first = windows[:, None] * (S * 3 * H * D) + head * D + dims[None, :]
    rows = windows[:, None] * A + asked[None, :]
    q_at = first[:, None, :] + (S - A + asked)[None, :, None] * (3 * H * D)
    return first, inside, rows, asking, q_at


@triton.jit
def _bias(bias_ptr, which, H: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr):
    """A head's part of the bias of queries (0), keys (1) or values (2)."""
    dims = tl.arange(0, D_TILE)
    at = bias_ptr + (which * H + tl.program_id(1)) * D + dims
    return tl.load(at, dims < D, 0.0).to(tl.float32)


@triton.jit
def _scores(
    q, k, j, S: tl.constexpr, A: tl.constexpr, A_TILE: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores to the base 2 of key ``j`` for all queries, minus infinity where it is not read."""
    score = tl.sum(q * k[:, None, :], 2) * (SCALE * 1.4426950408889634)
    if CAUSAL:
        seen = j <= S - A + tl.arange(0, A_TILE)
        score = tl.where(seen[None, :], score, float("-inf"))
    return score


@triton.jit
def tiny_forward_kernel(
    packed_ptr, bias_ptr, drop_ptr, out_ptr, norm_ptr, N,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    A_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Attention of one head of some windows, and the logarithm of each query's sum of weights."""
    first, inside, rows, asking, q_at = _places(N, S, A, H, D, A_TILE, D_TILE, BLOCK)
    head, live = tl.program_id(1), asking[:, :, None] & inside[:, None, :]
    q = tl.load(packed_ptr + q_at, live, 0.0).to(tl.float32)
    q += _bias(bias_ptr, 0, H, D, D_TILE)[None, None, :]
    bias_k, bias_v = _bias(bias_ptr, 1, H, D, D_TILE), _bias(bias_ptr, 2, H, D, D_TILE)
    top = tl.full((BLOCK, A_TILE), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK, A_TILE), tl.float32)
    out = tl.zeros((BLOCK, A_TILE, D_TILE), tl.float32)
    for j in tl.static_range(S):  # the first key is read by every query
        at = first + j * (3 * H * D)
        k = tl.load(packed_ptr + at + H * D, inside, 0.0).to(tl.float32) + bias_k[None, :]
        v = tl.load(packed_ptr + at + 2 * H * D, inside, 0.0).to(tl.float32) + bias_v[None, :]
        score = _scores(q, k, j, S, A, A_TILE, SCALE, CAUSAL)
        new_top = tl.maximum(top, score)
        shrunk, p = tl.exp2(top - new_top), tl.exp2(score - new_top)
        total, top = total * shrunk + p, new_top
        if DROP:
            p *= tl.load(drop_ptr + (rows * H + head) * S + j, asking, 0.0)
        out = out * shrunk[:, :, None] + p[:, :, None] * v[:, None, :]
    out_at = rows[:, :, None] * (H * D) + head * D + tl.arange(0, D_TILE)[None, None, :]
    tl.store(out_ptr + out_at, (out / total[:, :, None]).to(out_ptr.dtype.element_ty), live)
    tl.store(norm_ptr + rows * H + head, top + tl.log2(total), asking)


@triton.jit
def tiny_backward_kernel(
    packed_ptr, bias_ptr, drop_ptr, out_ptr, norm_ptr, grad_ptr, d_packed_ptr, part_ptr, N,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    A_TILE: tl.constexpr, D_TILE: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of some windows, and their sums over the tokens for the bias."""
    first, inside, rows, asking, q_at = _places(N, S, A, H, D, A_TILE, D_TILE, BLOCK)
    head, live = tl.program_id(1), asking[:, :, None] & inside[:, None, :]
    dims = tl.arange(0, D_TILE)
    dtype = d_packed_ptr.dtype.element_ty
    bias_k, bias_v = _bias(bias_ptr, 1, H, D, D_TILE), _bias(bias_ptr, 2, H, D, D_TILE)
    q = tl.load(packed_ptr + q_at, live, 0.0).to(tl.float32)
    q += _bias(bias_ptr, 0, H, D, D_TILE)[None, None, :]
    at = rows[:, :, None] * (H * D) + head * D + dims[None, None, :]
    grad = tl.load(grad_ptr + at, live, 0.0).to(tl.float32)
    mean = tl.sum(grad * tl.load(out_ptr + at, live, 0.0).to(tl.float32), 2)  # of d_p
    # queries that are none have no weights
    norm = tl.load(norm_ptr + rows * H + head, asking, float("inf"))
    d_q = tl.zeros((BLOCK, A_TILE, D_TILE), tl.float32)
    d_bias_k = tl.zeros((D_TILE,), tl.float32)
    d_bias_v = tl.zeros((D_TILE,), tl.float32)
    for j in tl.static_range(S):
        at = first + j * (3 * H * D)
        if j < S - A:  # nobody reads its query
            tl.store(d_packed_ptr + at, tl.zeros((BLOCK, D_TILE), dtype), inside)
        k = tl.load(packed_ptr + at + H * D, inside, 0.0).to(tl.float32) + bias_k[None, :]
        v = tl.load(packed_ptr + at + 2 * H * D, inside, 0.0).to(tl.float32) + bias_v[None, :]
        p = tl.exp2(_scores(q, k, j, S, A, A_TILE, SCALE, CAUSAL) - norm)
        d_p, dropped = tl.sum(grad * v[:, None, :], 2), p
        if DROP:
            drop = tl.load(drop_ptr + (rows * H + head) * S + j, asking, 0.0)
            d_p, dropped = d_p * drop, p * drop
        slope = p * (d_p - mean) * SCALE
        d_q += slope[:, :, None] * k[:, None, :]
        d_k = tl.sum(slope[:, :, None] * q, 1)
        d_v = tl.sum(dropped[:, :, None] * grad, 1)
        tl.store(d_packed_ptr + at + H * D, d_k.to(dtype), inside)
        tl.store(d_packed_ptr + at + 2 * H * D, d_v.to(dtype), inside)
        d_bias_k += tl.sum(d_k, 0)
        d_bias_v += tl.sum(d_v, 0)
    tl.store(d_packed_ptr + q_at, d_q.to(dtype), live)
    part = part_ptr + tl.program_id(0).to(tl.int64) * (3 * H * D) + head * D + dims
    tl.store(part, tl.sum(tl.sum(d_q, 1), 0), dims < D)
    tl.store(part + H * D, d_bias_k, dims < D)
    tl.store(part + 2 * H * D, d_bias_v, dims < D)


def num_weights(counts: list[int], lengths: list[int], keeps: list[int], heads: int) -> int:
    """How many weights there are for dropout to multiply."""
    groups = zip(counts, lengths, keeps, strict=True)
    return heads * sum(n * s * a for n, s, a in groups)


def _launches(
    drop: Tensor | None, counts: list[int], lengths: list[int], keeps: list[int], heads: int
) -> Iterator[tuple[Group, Tensor | None, int]]:
    """Of each group where it lies, its part of ``drop``, and its number of programs."""
    groups = groups_of(counts, lengths, keeps)
    sizes = [n * s * a * heads for n, s, a, _, _ in groups]
    drops = [None] * len(groups) if drop is None else drop.split(sizes)
    for group, own in zip(groups, drops, strict=True):
        yield group, own, triton.cdiv(group[0], BLOCK)


def _constants(
    queries: Tensor, drop: Tensor | None, s: int, a: int, heads: int, causal: bool
) -> dict[str, object]:
    tiles = {"A_TILE": triton.next_power_of_2(a), "BLOCK": BLOCK, "DROP": drop is not None}
    return shape(queries, heads, s, a, causal) | tiles


@torch.library.custom_op("scanlm::tiny_window_attention", mutates_args=())
def tiny_window_attention(
    packed: Tensor,
    drop: Tensor | None,
    bias: Tensor,
    counts: list[int],
    lengths: list[int],
    keeps: list[int],
    heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention within windows of few tokens.

    Args:
        packed: ``(sum n s, 3 d)``, queries, keys and values side by side.
        drop: ``(sum n a h s,)`` float32, what each weight is multiplied with; ``None``: nothing.
        bias: ``(3 d,)``, added to queries, keys and values.
        counts, lengths, keeps: n, s and a of each group.
        heads: attention heads h.
        causal: whether a token reads no later one.

    Returns:
        ``(sum n a, d)``; and for the way back the logarithm (base 2) of each query's and head's sum
        of weights, flat.
    """
    packed = packed.contiguous()
    queries = sum(n * a for n, a in zip(counts, keeps, strict=True))
    out = packed.new_empty(queries, packed.shape[1] // 3)
    norms = packed.new_empty(queries * heads, dtype=torch.float32)
    for (n, s, a, asked, rows), own, programs in _launches(drop, counts, lengths, keeps, heads):
        tiny_forward_kernel[programs, heads](
            packed[rows],
            bias,
            bias if own is None else own,
            out[asked],
            norms[asked.start * heads :],
            n,
            **_constants(out, own, s, a, heads, causal),
        )
    return out, norms


@tiny_window_attention.register_fake
def _(packed, drop, bias, counts, lengths, keeps, heads, causal):
    queries = sum(n * a for n, a in zip(counts, keeps, strict=True))
    out = packed.new_empty(queries, packed.shape[1] // 3)
    return out, packed.new_empty(queries * heads, dtype=torch.float32)


@torch.library.custom_op("scanlm::tiny_window_attention_backward", mutates_args=())
def tiny_window_attention_backward(
    grad: Tensor,
    out: Tensor,
    norms: Tensor,
    packed: Tensor,
    drop: Tensor | None,
    bias: Tensor,
    counts: list[int],
    lengths: list[int],
    keeps: list[int],
    heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``packed`` and ``bias``."""
    packed, grad, out = packed.contiguous(), grad.contiguous(), out.contiguous()
    d_packed = torch.empty_like(packed)
    all_programs = sum(triton.cdiv(n, BLOCK) for n in counts)
    parts = packed.new_empty(all_programs, len(bias), dtype=torch.float32)
    first = 0
    for (n, s, a, asked, rows), own, programs in _launches(drop, counts, lengths, keeps, heads):
        tiny_backward_kernel[programs, heads](
            packed[rows],
            bias,
            bias if own is None else own,
            out[asked],
            norms[asked.start * heads :],
            grad[asked],
            d_packed[rows],
            parts[first:],
            n,
            **_constants(out, own, s, a, heads, causal),
        )
        first += programs
    return d_packed, parts.sum(0).to(bias.dtype)


@tiny_window_attention_backward.register_fake
def _(grad, out, norms, packed, drop, bias, counts, lengths, keeps, heads, causal):
    return packed.new_empty(packed.shape), torch.empty_like(bias)


def _save(ctx, inputs, output):
    packed, drop, bias, *rest = inputs
    ctx.save_for_backward(*output, packed, drop, bias)
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    out, norms, packed, drop, bias = ctx.saved_tensors
    d_packed, d_bias = tiny_window_attention_backward(
        grad, out, norms, packed, drop, bias, *ctx.rest
    )
    return d_packed, None, d_bias, None, None, None, None, None


tiny_window_attention.register_autograd(_backward, setup_context=_save)
