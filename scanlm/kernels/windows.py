# mypy: disable-error-code="no-untyped-def"
"""Attention within windows of at most 128 tokens: one kernel each way.

T2 reads windows [prefix ; chunk] and T1 windows [left ; right], thousands of them a step. Kernels
made for long sequences walk over a window in blocks, keep sums for the way back, and want queries,
keys and values apart. Here one program owns one head of one window. All its scores fit in a tile,
so the softmax is plain; the backward pass makes the scores again and writes the gradients of
queries, keys and values side by side, as the product before it wants them. The bias of that product
is added here, and its gradient summed, since everything is at hand.

Shapes: groups of ``n`` windows of ``s`` tokens, of which the last ``a`` ask; ``d`` = n_embd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128  # tokens of a window, features of a head: what one tile holds
SHORTEST = 16  # side of the smallest tile that tensor cores multiply
BLOCK = 64  # tokens that the way back takes at once
WARPS = 4  # of a program; where the way there holds the largest tile twice as many are faster


@triton.jit
def _rows(first, stride, tile: tl.constexpr, D_TILE: tl.constexpr):
    """Offsets ``(tile, D_TILE)`` of some features in consecutive rows."""
    rows = first.to(tl.int64) + tl.arange(0, tile)
    return rows[:, None] * stride + tl.arange(0, D_TILE)[None, :]


@triton.jit
def _with_bias(x_ptr, at, live, bias_ptr, D: tl.constexpr, D_TILE: tl.constexpr):
    """A head's features of some rows, with their bias, in the dtype of the rows."""
    x = tl.load(x_ptr + at, live, 0.0)
    dims = tl.arange(0, D_TILE)
    bias = tl.load(bias_ptr + dims, dims < D, 0.0).to(tl.float32)
    return (x.to(tl.float32) + bias[None, :]).to(x.dtype)


@triton.jit
def _scores(
    q, k, first_q, first_k, S: tl.constexpr, A: tl.constexpr, Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores to the base 2 of some queries and keys, minus infinity where nothing is read."""
    places = S - A + first_q + tl.arange(0, Q_TILE)
    others = first_k + tl.arange(0, K_TILE)
    seen = others[None, :] < S
    if CAUSAL:
        seen = seen & (others[None, :] <= places[:, None])
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * 1.4426950408889634)
    return tl.where(seen, score, float("-inf"))


@triton.jit
def window_forward_kernel(
    q_ptr, kv_ptr, bias_ptr, out_ptr, norm_ptr, Q_STRIDE, KV_STRIDE,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S_TILE: tl.constexpr, A_TILE: tl.constexpr, D_TILE: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attention of one head of one window, and the logarithm of each query's sum of weights."""
    head, window = tl.program_id(0), tl.program_id(1)
    live = tl.arange(0, D_TILE)[None, :] < D
    lanes = tl.arange(0, A_TILE)
    asked = (lanes[:, None] < A) & live
    present = (tl.arange(0, S_TILE)[:, None] < S) & live
    q_at = _rows(window * A, Q_STRIDE, A_TILE, D_TILE) + head * D
    kv_at = _rows(window * S, KV_STRIDE, S_TILE, D_TILE) + head * D
    bias = bias_ptr + head * D
    q = _with_bias(q_ptr, q_at, asked, bias, D, D_TILE)
    k = _with_bias(kv_ptr, kv_at, present, bias + H * D, D, D_TILE)
    v = _with_bias(kv_ptr + H * D, kv_at, present, bias + 2 * H * D, D, D_TILE)
    score = _scores(q, k, 0, 0, S, A, A_TILE, S_TILE, SCALE, CAUSAL)
    top = tl.max(score, 1)
    p = tl.exp2(score - top[:, None])
    total = tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
    out_at = _rows(window * A, H * D, A_TILE, D_TILE) + head * D
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), asked)
    norm_at = (window.to(tl.int64) * H + head) * A + lanes
    tl.store(norm_ptr + norm_at, top + tl.log2(total), lanes < A)


@triton.jit
def window_backward_kernel(
    q_ptr, kv_ptr, bias_ptr, out_ptr, norm_ptr, grad_ptr, dq_ptr, dkv_ptr, part_ptr,
    Q_STRIDE, KV_STRIDE,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, D_TILE: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of one window, and their sums over its tokens for the bias.

    It goes in at most two blocks of keys and two of queries, so that all sums stay in registers;
    a block of queries that sees nothing of the keys is left out.
    """
    head, window = tl.program_id(0), tl.program_id(1)
    dims, lanes = tl.arange(0, D_TILE), tl.arange(0, TILE)
    live = dims[None, :] < D
    bias = bias_ptr + head * D
    part = part_ptr + window.to(tl.int64) * (3 * H * D) + head * D + dims
    norms = norm_ptr + (window.to(tl.int64) * H + head) * A
    dq_0 = tl.zeros((TILE, D_TILE), tl.float32)
    dq_1 = tl.zeros((TILE, D_TILE), tl.float32)
    dk_sum = tl.zeros((D_TILE,), tl.float32)
    dv_sum = tl.zeros((D_TILE,), tl.float32)
    for j in tl.static_range(0, S, TILE):
        present = (j + lanes[:, None] < S) & live
        kv_at = _rows(window * S + j, KV_STRIDE, TILE, D_TILE) + head * D
        k = _with_bias(kv_ptr, kv_at, present, bias + H * D, D, D_TILE)
        v = _with_bias(kv_ptr + H * D, kv_at, present, bias + 2 * H * D, D, D_TILE)
        dk = tl.zeros((TILE, D_TILE), tl.float32)
        dv = tl.zeros((TILE, D_TILE), tl.float32)
        for i in tl.static_range(0, A, TILE):
            if not CAUSAL or S - A + i + TILE > j:
                asked = (i + lanes[:, None] < A) & live
                q_at = _rows(window * A + i, Q_STRIDE, TILE, D_TILE) + head * D
                out_at = _rows(window * A + i, H * D, TILE, D_TILE) + head * D
                q = _with_bias(q_ptr, q_at, asked, bias, D, D_TILE)
                grad = tl.load(grad_ptr + out_at, asked, 0.0)
                out = tl.load(out_ptr + out_at, asked, 0.0).to(tl.float32)
                mean = tl.sum(out * grad.to(tl.float32), 1)  # of dp under the weights
                # queries that are none have no weights
                norm = tl.load(norms + i + lanes, i + lanes < A, float("inf"))
                score = _scores(q, k, i, j, S, A, TILE, TILE, SCALE, CAUSAL)
                p = tl.exp2(score - norm[:, None])
                dv = tl.dot(tl.trans(p.to(q.dtype)), grad, dv, input_precision="ieee")
                dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
                ds = (p * (dp - mean[:, None]) * SCALE).to(q.dtype)
                dk = tl.dot(tl.trans(ds), q, dk, input_precision="ieee")
                if i == 0:
                    dq_0 = tl.dot(ds, k, dq_0, input_precision="ieee")
                else:
                    dq_1 = tl.dot(ds, k, dq_1, input_precision="ieee")
        tl.store(dkv_ptr + kv_at, dk.to(dkv_ptr.dtype.element_ty), present)
        tl.store(dkv_ptr + H * D + kv_at, dv.to(dkv_ptr.dtype.element_ty), present)
        dk_sum += tl.sum(dk, 0)
        dv_sum += tl.sum(dv, 0)
    q_at = _rows(window * A, Q_STRIDE, TILE, D_TILE) + head * D
    tl.store(dq_ptr + q_at, dq_0.to(dq_ptr.dtype.element_ty), (lanes[:, None] < A) & live)
    if A > TILE:
        asked = (TILE + lanes[:, None] < A) & live
        tl.store(dq_ptr + q_at + TILE * Q_STRIDE, dq_1.to(dq_ptr.dtype.element_ty), asked)
    tl.store(part, tl.sum(dq_0, 0) + tl.sum(dq_1, 0), dims < D)
    tl.store(part + H * D, dk_sum, dims < D)
    tl.store(part + 2 * H * D, dv_sum, dims < D)


Group = tuple[int, int, int, slice, slice]  # n, s, a, rows of the queries, rows of the keys


def groups_of(counts: list[int], lengths: list[int], keeps: list[int]) -> list[Group]:
    """Where the groups lie in the matrices of queries and of keys."""
    groups, first_q, first = [], 0, 0
    for count, length, keep in zip(counts, lengths, keeps, strict=True):
        asked = slice(first_q, first_q + count * keep)
        rows = slice(first, first + count * length)
        groups.append((count, length, keep, asked, rows))
        first_q, first = asked.stop, rows.stop
    return groups


def _split(packed: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries ``(rows, d)``, and keys beside values ``(rows, 2 d)``."""
    if q is not None:
        return q, packed
    d = packed.shape[1] // 3
    return packed[:, :d], packed[:, d:]


def shape(queries: Tensor, heads: int, length: int, keep: int, causal: bool) -> dict[str, object]:
    """What kernels are compiled for: a group's and a head's sizes."""
    features = queries.shape[1] // heads
    return {
        "S": length,
        "A": keep,
        "H": heads,
        "D": features,
        "D_TILE": _tile(features),
        "SCALE": features**-0.5,
        "CAUSAL": causal,
    }


def _tile(n: int) -> int:
    return max(triton.next_power_of_2(n), SHORTEST)


@torch.library.custom_op("scanlm::window_attention", mutates_args=())
def window_attention(
    packed: Tensor,
    q: Tensor | None,
    bias: Tensor,
    counts: list[int],
    lengths: list[int],
    keeps: list[int],
    heads: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention within windows.

    Args:
        packed: ``(sum n s, 3 d)``, queries, keys and values side by side; or ``(sum n s, 2 d)``,
            keys and values, if ``q`` is given.
        q: ``(sum n a, d)``, queries of the last ``a`` tokens of each window.
        bias: ``(3 d,)``, added to queries, keys and values.
        counts, lengths, keeps: n, s and a of each group; a counts if ``q`` is given.
        heads: attention heads.
        causal: whether a token reads no later one.

    Returns:
        ``(sum n s, d)``, or ``(sum n a, d)`` if ``q`` is given; and for the way back the logarithm
        (base 2) of each query's and head's sum of weights, flat.
    """
    queries, kv = _split(packed, q)
    out = queries.new_empty(queries.shape)
    norms = queries.new_empty(len(queries) * heads, dtype=torch.float32)
    for count, length, keep, asked, rows in groups_of(
        counts, lengths, lengths if q is None else keeps
    ):
        window_forward_kernel[(heads, count)](
            queries[asked],
            kv[rows],
            bias,
            out[asked],
            norms[asked.start * heads :],
            queries.stride(0),
            kv.stride(0),
            S_TILE=_tile(length),
            A_TILE=_tile(keep),
            num_warps=2 * WARPS if _tile(length) == LONGEST else WARPS,
            **shape(queries, heads, length, keep, causal),
        )
    return out, norms


@window_attention.register_fake
def _(packed, q, bias, counts, lengths, keeps, heads, causal):
    shape = q.shape if q is not None else (len(packed), packed.shape[1] // 3)
    return packed.new_empty(shape), packed.new_empty(shape[0] * heads, dtype=torch.float32)


@torch.library.custom_op("scanlm::window_attention_backward", mutates_args=())
def window_attention_backward(
    grad: Tensor,
    out: Tensor,
    norms: Tensor,
    packed: Tensor,
    q: Tensor | None,
    bias: Tensor,
    counts: list[int],
    lengths: list[int],
    keeps: list[int],
    heads: int,
    causal: bool,
) -> list[Tensor]:
    """Gradients of ``packed``, of ``bias`` and, if it is given, of ``q``."""
    queries, kv = _split(packed, q)
    d_packed = packed.new_empty(packed.shape)
    d_q = None if q is None else q.new_empty(q.shape)
    d_queries, d_kv = _split(d_packed, d_q)
    grad, out = grad.contiguous(), out.contiguous()
    parts = packed.new_empty(sum(counts), len(bias), dtype=torch.float32)
    first = 0
    for count, length, keep, asked, rows in groups_of(
        counts, lengths, lengths if q is None else keeps
    ):
        window_backward_kernel[(heads, count)](
            queries[asked],
            kv[rows],
            bias,
            out[asked],
            norms[asked.start * heads :],
            grad[asked],
            d_queries[asked],
            d_kv[rows],
            parts[first:],
            queries.stride(0),
            kv.stride(0),
            TILE=min(_tile(length), BLOCK),
            num_warps=WARPS,
            **shape(queries, heads, length, keep, causal),
        )
        first += count
    d_bias = parts.sum(0).to(bias.dtype)
    return [d_packed, d_bias] if d_q is None else [d_packed, d_bias, d_q]


@window_attention_backward.register_fake
def _(grad, out, norms, packed, q, bias, counts, lengths, keeps, heads, causal):
    made = [packed.new_empty(packed.shape), bias.new_empty(bias.shape)]
    return made if q is None else [*made, q.new_empty(q.shape)]


def _save(ctx, inputs, output):
    packed, q, bias, *rest = inputs
    ctx.save_for_backward(*output, packed, q, bias)
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    out, norms, packed, q, bias = ctx.saved_tensors
    made = window_attention_backward(grad, out, norms, packed, q, bias, *ctx.rest)
    d_q = made[2] if q is not None else None
    return made[0], d_q, made[1], None, None, None, None, None


window_attention.register_autograd(_backward, setup_context=_save)
