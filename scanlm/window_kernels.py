# mypy: disable-error-code="no-untyped-def"
"""Attention within windows of at most 128 tokens: one Triton kernel each way.

T2 reads windows [prefix ; chunk] and T1 windows [left ; right], thousands of them a step. Kernels
made for long sequences walk over a window in blocks, keep sums for the way back, and want queries,
keys and values apart. Here one program owns one head of one window. All its scores fit in a tile,
so the softmax is plain and nothing but the input is saved: the backward pass makes the scores
again and writes the gradients of queries, keys and values side by side, as the product before it
wants them.

Shapes: groups of ``n`` windows of ``s`` tokens, of which the last ``a`` ask; ``d`` = n_embd.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 128  # tokens of a window, features of a head: what one tile holds
SHORTEST = 16  # side of the smallest tile that tensor cores multiply


@triton.jit
def _rows(first, stride, tile: tl.constexpr, head, D: tl.constexpr, D_TILE: tl.constexpr):
    """Offsets ``(tile, D_TILE)`` of a head's features in consecutive rows."""
    rows = first.to(tl.int64) + tl.arange(0, tile)
    return rows[:, None] * stride + head * D + tl.arange(0, D_TILE)[None, :]


@triton.jit
def _softmax(
    q, k, S: tl.constexpr, A: tl.constexpr, A_TILE: tl.constexpr, S_TILE: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attention weights ``(A_TILE, S_TILE)``, zero outside the window and above the diagonal."""
    places = S - A + tl.arange(0, A_TILE)
    others = tl.arange(0, S_TILE)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * (SCALE * 1.4426950408889634)
    seen = others[None, :] < S
    if CAUSAL:
        seen = seen & (others[None, :] <= places[:, None])
    score = tl.where(seen, score, float("-inf"))
    p = tl.exp2(score - tl.max(score, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def forward_kernel(
    q_ptr, kv_ptr, out_ptr, Q_STRIDE, KV_STRIDE,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S_TILE: tl.constexpr, A_TILE: tl.constexpr, D_TILE: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Attention of one head of one window."""
    head, window = tl.program_id(0), tl.program_id(1)
    live = tl.arange(0, D_TILE)[None, :] < D
    asked = (tl.arange(0, A_TILE)[:, None] < A) & live
    present = (tl.arange(0, S_TILE)[:, None] < S) & live
    q_at = _rows(window * A, Q_STRIDE, A_TILE, head, D, D_TILE)
    kv_at = _rows(window * S, KV_STRIDE, S_TILE, head, D, D_TILE)
    q = tl.load(q_ptr + q_at, asked, 0.0)
    k = tl.load(kv_ptr + kv_at, present, 0.0)
    v = tl.load(kv_ptr + H * D + kv_at, present, 0.0)
    p = _softmax(q, k, S, A, A_TILE, S_TILE, SCALE, CAUSAL)
    out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
    out_at = _rows(window * A, H * D, A_TILE, head, D, D_TILE)
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), asked)


@triton.jit
def backward_kernel(
    q_ptr, kv_ptr, grad_ptr, dq_ptr, dkv_ptr, Q_STRIDE, KV_STRIDE, GRAD_STRIDE,
    S: tl.constexpr, A: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    S_TILE: tl.constexpr, A_TILE: tl.constexpr, D_TILE: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of one window; those lie in memory as queries, keys and values do."""
    head, window = tl.program_id(0), tl.program_id(1)
    live = tl.arange(0, D_TILE)[None, :] < D
    asked = (tl.arange(0, A_TILE)[:, None] < A) & live
    present = (tl.arange(0, S_TILE)[:, None] < S) & live
    q_at = _rows(window * A, Q_STRIDE, A_TILE, head, D, D_TILE)
    kv_at = _rows(window * S, KV_STRIDE, S_TILE, head, D, D_TILE)
    grad_at = _rows(window * A, GRAD_STRIDE, A_TILE, head, D, D_TILE)
    q = tl.load(q_ptr + q_at, asked, 0.0)
    k = tl.load(kv_ptr + kv_at, present, 0.0)
    grad = tl.load(grad_ptr + grad_at, asked, 0.0)
    p = _softmax(q, k, S, A, A_TILE, S_TILE, SCALE, CAUSAL)
    dv = tl.dot(tl.trans(p.to(q.dtype)), grad, input_precision="ieee")
    tl.store(dkv_ptr + H * D + kv_at, dv.to(dkv_ptr.dtype.element_ty), present)
    v = tl.load(kv_ptr + H * D + kv_at, present, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * SCALE
    ds = ds.to(q.dtype)
    dq = tl.dot(ds, k, input_precision="ieee")
    tl.store(dq_ptr + q_at, dq.to(dq_ptr.dtype.element_ty), asked)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee")
    tl.store(dkv_ptr + kv_at, dk.to(dkv_ptr.dtype.element_ty), present)


def fits(x: Tensor, longest: int, features: int) -> bool:
    """Whether the kernels can attend within such windows.

    Args:
        x: the queries, in the precision of the products.
        longest: tokens of the longest window.
        features: of a head.
    """
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and max(longest, features) <= LONGEST
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _groups(
    packed: Tensor, q: Tensor | None, counts: list[int], lengths: list[int], keeps: list[int]
) -> list[tuple[slice, slice]]:
    """Rows of the queries and rows of the keys of each group."""
    slices, first_q, first = [], 0, 0
    for count, length, keep in zip(counts, lengths, keeps, strict=True):
        asked = count * (length if q is None else keep)
        slices.append((slice(first_q, first_q + asked), slice(first, first + count * length)))
        first_q, first = first_q + asked, first + count * length
    return slices


def _split(packed: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries ``(rows, d)``, and keys beside values ``(rows, 2 d)``."""
    if q is not None:
        return q, packed
    d = packed.shape[1] // 3
    return packed[:, :d], packed[:, d:]


def _shape(queries: Tensor, heads: int, length: int, keep: int, causal: bool) -> dict[str, object]:
    features = queries.shape[1] // heads
    tiles = [max(triton.next_power_of_2(n), SHORTEST) for n in (length, keep, features)]
    return {
        "S": length,
        "A": keep,
        "H": heads,
        "D": features,
        "S_TILE": tiles[0],
        "A_TILE": tiles[1],
        "D_TILE": tiles[2],
        "SCALE": features**-0.5,
        "CAUSAL": causal,
        "num_warps": 8 if tiles[0] > 64 else 4,
    }


@torch.library.custom_op("scanlm::window_attention", mutates_args=())
def window_attention(
    packed: Tensor,
    q: Tensor | None,
    counts: list[int],
    lengths: list[int],
    keeps: list[int],
    heads: int,
    causal: bool,
) -> Tensor:
    """Attention within windows.

    Args:
        packed: ``(sum n s, 3 d)``, queries, keys and values side by side; or ``(sum n s, 2 d)``,
            keys and values, if ``q`` is given.
        q: ``(sum n a, d)``, queries of the last ``a`` tokens of each window.
        counts, lengths, keeps: n, s and a of each group; a counts if ``q`` is given.
        heads: attention heads.
        causal: whether a token reads no later one.

    Returns:
        ``(sum n s, d)``, or ``(sum n a, d)`` if ``q`` is given.
    """
    queries, kv = _split(packed, q)
    out = queries.new_empty(queries.shape)
    for count, length, keep, (asked, rows) in zip(
        counts, lengths, keeps, _groups(packed, q, counts, lengths, keeps), strict=True
    ):
        keep = length if q is None else keep
        forward_kernel[(heads, count)](
            queries[asked],
            kv[rows],
            out[asked],
            queries.stride(0),
            kv.stride(0),
            **_shape(queries, heads, length, keep, causal),
        )
    return out


@window_attention.register_fake
def _(packed, q, counts, lengths, keeps, heads, causal):  # type: ignore[no-untyped-def]
    return (
        packed.new_empty(packed.shape[0], packed.shape[1] // 3)
        if q is None
        else q.new_empty(q.shape)
    )


@torch.library.custom_op("scanlm::window_attention_backward", mutates_args=())
def window_attention_backward(
    grad: Tensor,
    packed: Tensor,
    q: Tensor | None,
    counts: list[int],
    lengths: list[int],
    keeps: list[int],
    heads: int,
    causal: bool,
) -> list[Tensor]:
    """Gradients of ``packed`` and, if it is given, of ``q``."""
    queries, kv = _split(packed, q)
    d_packed = packed.new_empty(packed.shape)
    d_q = None if q is None else q.new_empty(q.shape)
    d_queries, d_kv = _split(d_packed, d_q)
    grad = grad.contiguous()
    for count, length, keep, (asked, rows) in zip(
        counts, lengths, keeps, _groups(packed, q, counts, lengths, keeps), strict=True
    ):
        keep = length if q is None else keep
        backward_kernel[(heads, count)](
            queries[asked],
            kv[rows],
            grad[asked],
            d_queries[asked],
            d_kv[rows],
            queries.stride(0),
            kv.stride(0),
            grad.stride(0),
            **_shape(queries, heads, length, keep, causal),
        )
    return [d_packed] if d_q is None else [d_packed, d_q]


@window_attention_backward.register_fake
def _(grad, packed, q, counts, lengths, keeps, heads, causal):  # type: ignore[no-untyped-def]
    made = [packed.new_empty(packed.shape)]
    return made if q is None else [*made, q.new_empty(q.shape)]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    packed, q, *rest = inputs
    ctx.save_for_backward(packed, q)
    ctx.rest = rest


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    packed, q = ctx.saved_tensors
    made = window_attention_backward(grad, packed, q, *ctx.rest)
    return made[0], (made[1] if q is not None else None), None, None, None, None, None


window_attention.register_autograd(_backward, setup_context=_save)
