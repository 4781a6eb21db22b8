"""The recurrences of GLA, Gated DeltaNet and Mamba-2, chunk by chunk, in plain torch.

A head's memory is a matrix S of shape (k, v). Per token, with query q, key k, value v:

    GLA              S <- diag(exp(g)) S + k v^T                      g: one log decay a key feature
    Gated DeltaNet   S <- exp(g) S,  S <- S + beta k (v - S^T k)^T    g: one log decay a head
    Mamba-2          S <- exp(g) S + k v^T                            g: one log decay a head
    all              o = S^T q, of the first two over sqrt(k's size)

Token by token this is slow to train. Within a chunk of c tokens all have a matrix form, and only
the chunks' states follow one another. With c = 1 the same code is the decoding step.

Shapes: ``b`` sequences, ``t`` tokens, ``h`` heads, ``k`` and ``v`` features of keys and values,
``n`` chunks of ``c`` tokens. Log decays are at most 0. All is computed in float32 at least, outside
of autocast: products of decays do not survive in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_SIZE = 64

Result = tuple[Tensor, Tensor]


def softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))`` of any shape.

    The backward pass of torch's own fails under ``torch.compile``'s "aot_eager".
    """
    return -F.logsigmoid(-x)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None
) -> Result:
    """GLA's recurrence (Yang et al. 2024, arXiv 2312.06635, equation 4 and section 4.1).

    Args:
        q, k: ``(b, t, h, k)``.
        v: ``(b, t, h, v)``.
        g: log decays ``(b, t, h, k)``.
        state: ``(b, h, k, v)`` to continue from; default zeros.

    Returns:
        Outputs ``(b, t, h, v)`` in v's type, and the state after the last token.
    """
    return _chunked(_gla_chunks, [q, k, v, g], state)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> Result:
    """Gated DeltaNet's recurrence (Yang et al. 2025, arXiv 2412.06464, equations 10 and 14-17).

    Args:
        q, k: ``(b, t, h, k)``, k of unit length (else the state may grow without bounds).
        v: ``(b, t, h, v)``.
        g: log decays ``(b, t, h)``.
        beta: writing strengths ``(b, t, h)``, from 0 to 1, or to 2 to let eigenvalues be negative.
        state: ``(b, h, k, v)`` to continue from; default zeros.

    Returns:
        Outputs ``(b, t, h, v)`` in v's type, and the state after the last token.
    """
    return _chunked(_delta_chunks, [q, k, v, g, beta], state)


def state_space_dual(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None
) -> Result:
    """Mamba-2's recurrence (Dao and Gu 2024, arXiv 2405.21060, section 6; q and k are its C and B).

    Args:
        q, k: ``(b, t, m, k)``, each for h / m heads one after another.
        v: ``(b, t, h, v)``, the inputs times their step sizes.
        g: log decays ``(b, t, h)``.
        state: ``(b, h, k, v)`` to continue from; default zeros.

    Returns:
        Outputs ``(b, t, h, v)`` in v's type, and the state after the last token.
    """
    return _chunked(_state_space_chunks, [q, k, v, g], state)


def _chunked(chunks: Callable[..., Result], streams: list[Tensor], state: Tensor | None) -> Result:
    """Cut the sequence into chunks, ``(b, h, n, c, ...)``, and put the outputs together again.

    Where there is no state yet nothing is read of it: in short sequences that is most of the work.
    """
    v = streams[2]
    t, kind = v.shape[1], v.dtype
    exact = torch.promote_types(kind, torch.float32)
    c = min(CHUNK_SIZE, 1 << (t - 1).bit_length())

    def cut(x: Tensor) -> Tensor:
        x = x.to(exact).transpose(1, 2)
        # padding neither decays the state (g = 0) nor writes to it (k = 0)
        if missing := -t % c:
            x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
        return x.unflatten(2, (-1, c))

    with torch.autocast(v.device.type, enabled=False):
        inputs = [cut(x) for x in streams]
        o, state = chunks(*inputs, None if state is None else state.to(exact))
    return o.flatten(2, 3)[:, :, :t].transpose(1, 2).to(kind), state


def _states(writes: Tensor, kept: Tensor, state: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The states that chunks read, of the first one only if there was one before, and the last.

    Args:
        writes: ``(b, h, n, k, v)``, what each chunk adds.
        kept: what it keeps, ``(b, h, n, k or 1, 1)``.
    """
    states = []
    for write, keep in zip(writes.unbind(2), kept.unbind(2), strict=True):
        if state is None:
            state = write
        else:
            states.append(state)
            state = keep * state + write
    assert state is not None  # there is at least one chunk
    return states, state


def _add_reads(o: Tensor, reads: Tensor) -> Tensor:
    """To outputs ``(b, h, n, c, v)`` what the last chunks' queries find in the states they read."""
    first = o.shape[2] - reads.shape[2]
    return torch.cat([o[:, :, :first], o[:, :, first:] + reads], 2) if first else o + reads


def _gla_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> Result:
    q = q * q.shape[-1] ** -0.5
    b = g.cumsum(3)  # log decay from the chunk's start to each token
    last = b[..., -1:, :]
    writes = (k * (last - b).exp()).transpose(3, 4) @ v  # (b, h, n, k, v)
    kept = last.transpose(3, 4).exp()  # (b, h, n, k, 1)
    states, state = _states(writes, kept, state)
    o = _decayed_scores(q, k, b) @ v
    if states:
        o = _add_reads(o, (q * b.exp())[:, :, -len(states) :] @ torch.stack(states, 2))
    return o, state


def _state_space_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> Result:
    heads = v.shape[1] // q.shape[1]
    b = g.cumsum(3)  # (b, h, n, c)
    o = (q @ k.transpose(-1, -2)).repeat_interleave(heads, 1) * _decays(b) @ v
    # decays go to the values and to what is read, where heads differ anyway: so heads that share
    # their keys and queries are columns of one product, and nothing is copied for each
    late = v * (b[..., -1:] - b).exp().unsqueeze(-1)
    writes = _heads_apart(k.transpose(-1, -2) @ _heads_as_columns(late, heads), heads)
    states, state = _states(writes, b[..., -1, None, None].exp(), state)
    if states:
        last = slice(-len(states), None)
        columns = q[:, :, last] @ _heads_as_columns(torch.stack(states, 2), heads)
        o = _add_reads(o, _heads_apart(columns, heads) * b[:, :, last].exp().unsqueeze(-1))
    return o, state


def _heads_as_columns(x: Tensor, heads: int) -> Tensor:
    """``(b, m * heads, n, r, v)`` to ``(b, m, n, r, heads * v)``."""
    return x.unflatten(1, (-1, heads)).permute(0, 1, 3, 4, 2, 5).flatten(4)


def _heads_apart(x: Tensor, heads: int) -> Tensor:
    """The other way round."""
    return x.unflatten(4, (heads, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)


def _decays(b: Tensor) -> Tensor:
    """From each token to each later one, ``exp(b_i - b_j)`` for j <= i, else 0: ``(.., c, c)``."""
    c = b.shape[-1]
    past = torch.ones(c, c, dtype=torch.bool, device=b.device).tril()
    # masked before exp: above the diagonal the exponent is positive and may overflow
    return (b.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill(~past, -torch.inf).exp()


def _decayed_scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """``A[i, j] = sum_f q[i, f] k[j, f] exp(b[i, f] - b[j, f])`` for j <= i, else 0.

    ``exp(b_i) exp(-b_j)`` would overflow where the decay is strong. So the square is built from
    halves: queries of the second half and keys of the first, each relative to the border between
    them, where no exponent is positive; then halves of the halves, down to the diagonal.

    Args:
        q, k, b: ``(.., c, k)``, c a power of two.

    Returns:
        ``(.., c, c)``.
    """
    c = q.shape[-2]
    scores = (q * k).sum(-1)[..., None, None]  # (.., c, 1, 1): blocks of one token
    size = 1
    while size < c:
        q2, k2, b2 = (x.unflatten(-2, (c // size // 2, 2, size)) for x in (q, k, b))
        border = b2[..., 0, -1:, :]
        queries = q2[..., 1, :, :] * (b2[..., 1, :, :] - border).exp()
        keys = k2[..., 0, :, :] * (border - b2[..., 0, :, :]).exp()
        if size == 1:  # GPUs are slow at matrix products of single rows
            across = (queries * keys).sum(-1, keepdim=True)
        else:
            across = queries @ keys.transpose(-1, -2)
        first, second = scores[..., 0::2, :, :], scores[..., 1::2, :, :]
        upper = torch.cat([first, torch.zeros_like(across)], dim=-1)
        scores = torch.cat([upper, torch.cat([across, second], dim=-1)], dim=-2)
        size *= 2
    return scores.squeeze(-3)


def _delta_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> Result:
    q = q * q.shape[-1] ** -0.5
    b = g.cumsum(3)  # (b, h, n, c)
    decay = _decays(b)
    # what token i writes is its value less what it reads of the state and of the writes before it:
    # (1 + T) writes = beta v - (beta exp(b) k) S, T strictly lower triangular
    beta = beta.unsqueeze(-1)
    before = ((beta * k) @ k.transpose(-1, -2) * decay).tril(-1)
    known = beta * v
    if state is not None or q.shape[2] > 1:  # else no chunk has a state to read
        known = torch.cat([known, beta * b.unsqueeze(-1).exp() * k], dim=-1)
    solved = torch.linalg.solve_triangular(before, known, upper=False, unitriangular=True)
    values, reads = solved.tensor_split([v.shape[-1]], dim=-1)
    scores = q @ k.transpose(-1, -2) * decay
    q = q * b.unsqueeze(-1).exp()
    k = k * (b[..., -1:] - b).unsqueeze(-1).exp()
    kept = b[..., -1, None, None].exp()
    outputs = []
    for n in range(q.shape[2]):
        write = values[:, :, n]
        if state is None:
            outputs.append(scores[:, :, n] @ write)
            state = k[:, :, n].transpose(-1, -2) @ write
        else:
            write = write - reads[:, :, n] @ state
            outputs.append(q[:, :, n] @ state + scores[:, :, n] @ write)
            state = kept[:, :, n] * state + k[:, :, n].transpose(-1, -2) @ write
    assert state is not None  # there is at least one chunk
    return torch.stack(outputs, 2), state
