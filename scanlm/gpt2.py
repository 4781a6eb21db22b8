"""GPT-2's pre-norm blocks over a batch of windows of several lengths.

T1 and T2 are both a ``Stack`` of these blocks. Parameter names and numerics are those of
transformers' GPT-2, so weights can be copied either way. Two things differ from it, for speed:

*One token matrix.* Windows of different lengths (the first chunk has no prefix, the last chunk may
be partial) are concatenated into one ``(tokens, n_embd)`` matrix for the norms and products and
split only for attention, so a layer is a handful of large calls and nothing is padded.

*Kept positions.* Only the last ``keep`` positions of a window are wanted (T1 keeps its right half,
T2 the chunk without its prefix). The last block computes queries, MLP and outputs for those alone.

Shapes: ``n`` windows, ``s`` tokens a window, ``d`` = n_embd, ``h`` heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from scanlm import kernels
from scanlm.cache import KeyValues
from scanlm.config import ScanLMConfig

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
TINY_WINDOW = 4  # tokens; longer windows go to a fused attention kernel
# for keys that grow with every call: cuDNN, which torch prefers on Hopper, would build a plan for
# each new length, some 40 ms
GROWING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

if kernels.available:
    from scanlm.kernels import gelu, tiny_windows, windows


@dataclass(frozen=True)
class Windows:
    """``count`` windows of ``length`` tokens each, of which the last ``keep`` are wanted."""

    count: int
    length: int
    keep: int

    @property
    def kept(self) -> Windows:
        """The same windows cut down to the kept positions."""
        return Windows(self.count, self.keep, self.keep)


def take_kept(x: Tensor, groups: Sequence[Windows]) -> Tensor:
    """Rows of the token matrix that are wanted: ``(sum n * s, d) -> (sum n * keep, d)``."""
    parts = []
    for rows, g in zip(x.split([g.count * g.length for g in groups]), groups, strict=True):
        windows = rows.view(g.count, g.length, -1)
        parts.append(windows[:, g.length - g.keep :].reshape(g.count * g.keep, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def tiny_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Softmax attention within windows of very few tokens, as elementwise operations.

    A fused attention kernel gives each window and head a tile of 64 or more rows. Where chunks
    hold one token (state tracking) a window has two, and such a kernel would take most of a
    training step.

    Args:
        query: ``(n, h, a, f)``.
        key, value: ``(n, h, s, f)``.
        mask: ``(a, s)``, True where a query may read; ``None``: everywhere.
        dropout: probability of dropping a weight.

    Returns:
        ``(n, h, a, f)``.
    """
    exact = torch.promote_types(query.dtype, torch.float32)  # sums as a fused kernel has them
    scores = (query.unsqueeze(3).to(exact) * key.unsqueeze(2)).sum(-1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = F.dropout(scores.softmax(-1), dropout)
    return (weights.unsqueeze(-1) * value.unsqueeze(2)).sum(3).to(query.dtype)


class ResidualProjection(Conv1D):
    """A product whose result is added to the residual stream: initially smaller in deep stacks."""

    def __init__(self, config: ScanLMConfig, num_layers: int, inner: int) -> None:
        super().__init__(config.n_embd, inner)
        self.initial_std: float = config.initializer_range / math.sqrt(2 * num_layers)


class PrefixEmbedding(nn.Embedding):
    """A vector that marks prefix states, at first not lost beside leaves of size 1."""

    initial_std = 0.3

    def __init__(self, config: ScanLMConfig) -> None:
        super().__init__(1, config.n_embd)


class Attention(nn.Module):
    """Multi-head self-attention within each window."""

    def __init__(self, config: ScanLMConfig, num_layers: int, causal: bool) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.causal = causal
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = ResidualProjection(config, num_layers, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, groups: Sequence[Windows], only_kept: bool, past: KeyValues | None
    ) -> Tensor:
        """``(sum n * s, d) -> (sum n * s, d)``, or ``(sum n * keep, d)`` if ``only_kept``.

        ``past`` (for a single group) holds earlier tokens of the windows and is extended by ``x``.
        """
        if past is None and self._kernel_fits(x, groups):
            return self.resid_dropout(self.c_proj(self._by_kernel(x, groups, only_kept)))
        d = x.shape[-1]
        weight, bias = self.c_attn.weight, self.c_attn.bias
        if only_kept:
            query = torch.addmm(bias[:d], take_kept(x, groups), weight[:, :d])
            key, value = torch.addmm(bias[d:], x, weight[:, d:]).split(d, dim=-1)
        else:
            query, key, value = self.c_attn(x).split(d, dim=-1)
        asked = [g.kept if only_kept else g for g in groups]
        q_rows, kv_rows = [g.count * g.length for g in asked], [g.count * g.length for g in groups]
        outputs = []
        for q, k, v, g in zip(
            query.split(q_rows), key.split(kv_rows), value.split(kv_rows), groups, strict=True
        ):
            q, k, v = (t.view(g.count, -1, self.n_head, d // self.n_head) for t in (q, k, v))
            outputs.append(self._attend(q, k, v, past).reshape(-1, d))
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.resid_dropout(self.c_proj(out))

    def _kernel_fits(self, x: Tensor, groups: Sequence[Windows]) -> bool:
        """Whether a kernel computes this; that for longer windows drops no weights."""
        longest = max(g.length for g in groups)
        return (
            (longest <= TINY_WINDOW or not (self.training and self.attn_pdrop))
            and kernels.usable(x)
            and max(longest, x.shape[-1] // self.n_head) <= windows.LONGEST
        )

    def _by_kernel(self, x: Tensor, groups: Sequence[Windows], only_kept: bool) -> Tensor:
        weight, bias, d = self.c_attn.weight, self.c_attn.bias, x.shape[-1]
        counts, lengths = [g.count for g in groups], [g.length for g in groups]
        keeps = [g.keep for g in groups]
        if max(lengths) <= TINY_WINDOW:  # a product of all is faster than one of few queries
            asked = keeps if only_kept else lengths
            drop = None
            if self.training and self.attn_pdrop:
                weights = tiny_windows.num_weights(counts, lengths, asked, self.n_head)
                drop = F.dropout(x.new_ones(weights, dtype=torch.float32), self.attn_pdrop)
            return tiny_windows.tiny_window_attention(
                torch.mm(x, weight), drop, bias, counts, lengths, asked, self.n_head, self.causal
            )[0]
        queries = torch.mm(take_kept(x, groups), weight[:, :d]) if only_kept else None
        return windows.window_attention(
            torch.mm(x, weight[:, d:] if only_kept else weight),
            queries,
            bias,
            counts,
            lengths,
            keeps,
            self.n_head,
            self.causal,
        )[0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, past: KeyValues | None) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = past.extend(k, v)
        asked, total = q.shape[2], k.shape[2]
        dropout = self.attn_pdrop if self.training else 0.0
        tiny = total <= TINY_WINDOW
        triangle = self.causal and asked == total and not tiny  # the kernel's own mask
        mask = None
        if self.causal and asked > 1 and not triangle:  # queries are the *last* tokens
            mask = torch.ones(asked, total, dtype=torch.bool, device=q.device).tril(total - asked)
        if tiny:
            out = tiny_attention(q, k, v, mask, dropout)
        else:
            with nullcontext() if past is None else sdpa_kernel(GROWING):
                out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=triangle)
        return out.transpose(1, 2)


class MLP(nn.Module):
    """GPT-2's feed-forward part."""

    def __init__(self, config: ScanLMConfig, num_layers: int) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = ResidualProjection(config, num_layers, inner)
        self.tanh_gelu = config.activation_function in TANH_GELU
        # of several forms of one function the one that is a single kernel
        self.act = ACT2FN[TANH_GELU[-1] if self.tanh_gelu else config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d) -> (..., d)``."""
        if self.tanh_gelu and x.dim() == 2 and kernels.usable(x):
            inner = gelu.bias_gelu(torch.mm(x, self.c_fc.weight), self.c_fc.bias)
        else:
            inner = self.act(self.c_fc(x))
        return self.dropout(self.c_proj(inner))


class Block(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ScanLMConfig, num_layers: int, causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, num_layers, causal)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, num_layers)

    def forward(
        self,
        x: Tensor,
        added: Tensor | None,
        groups: Sequence[Windows],
        only_kept: bool = False,
        past: KeyValues | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A block leaves its last addition to the next one, whose norm then reads both at once.

        Args:
            x: the residual stream ``(sum n * s, d)``.
            added: what the block before adds to it.
            groups: the windows.
            only_kept: return the kept positions alone.
            past: see ``Attention``.

        Returns:
            The residual stream, and what its MLP adds to it.
        """
        if added is not None:
            x = x + added
        residual = take_kept(x, groups) if only_kept else x
        x = residual + self.attn(self.ln_1(x), groups, only_kept, past)
        return x, self.mlp(self.ln_2(x))


class Stack(nn.Module):
    """Blocks and a final LayerNorm over windows: T1 (not causal) or T2 (causal)."""

    def __init__(self, config: ScanLMConfig, num_layers: int, causal: bool) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.h = nn.ModuleList([Block(config, num_layers, causal) for _ in range(num_layers)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.disturb: Callable[[Tensor], Tensor] | None = None  # of what is returned, in training

    def forward(
        self,
        windows: Sequence[Tensor],
        keep: Sequence[int],
        past: list[KeyValues] | None = None,
    ) -> list[Tensor]:
        """Run all windows at once.

        Args:
            windows: groups of equally long windows, each ``(n, s, d)``.
            keep: how many positions at the end of the group's windows are wanted.
            past: one ``KeyValues`` a block (for a single group): the windows' earlier tokens,
                extended in place by these.

        Returns:
            Per group the kept positions after the final norm, ``(n, keep, d)``.
        """
        groups = [Windows(w.shape[0], w.shape[1], k) for w, k in zip(windows, keep, strict=True)]
        rows = [w.flatten(0, 1) for w in windows]
        x = rows[0] if len(rows) == 1 else torch.cat(rows)
        last = len(self.h) - 1
        skip = any(g.keep < g.length for g in groups)
        added: Any = None
        for i, block in enumerate(self.h):
            x, added = block(x, added, groups, skip and i == last, past[i] if past else None)
        x = self.finish(x, added)
        if self.disturb is not None and self.training:
            x = self.disturb(x)
        kept = x.split([g.count * g.keep for g in groups])
        return [t.view(g.count, g.keep, -1) for t, g in zip(kept, groups, strict=True)]

    def finish(self, x: Tensor, added: Tensor) -> Tensor:
        """The final norm of the residual stream and the last block's addition, in its dtype."""
        return self.ln_f(x + added).to(x.dtype)


def init_weights(module: nn.Module, std: float) -> None:
    """GPT-2's initialisation of one module; residual projections are scaled by depth."""
    if isinstance(module, Conv1D | nn.Linear | nn.Embedding):
        # decided here: transformers ignores a second initialisation of the same weight
        init.normal_(module.weight, std=getattr(module, "initial_std", std))
        if isinstance(module, Conv1D):
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
