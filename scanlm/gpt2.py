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

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from scanlm.cache import KeyValues
from scanlm.config import ScanLMConfig

TINY_WINDOW = 4  # tokens; longer windows go to a fused attention kernel

window_kernels: Any = None  # Triton is looked for where there is a GPU to run it
if torch.cuda.is_available():
    with contextlib.suppress(ImportError):
        from scanlm import window_kernels


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
        d = x.shape[-1]
        query = None
        if only_kept:
            weight, bias = self.c_attn.weight, self.c_attn.bias
            query = torch.addmm(bias[:d], take_kept(x, groups), weight[:, :d])
            packed = torch.addmm(bias[d:], x, weight[:, d:])
        else:
            packed = self.c_attn(x)
        dropout = self.attn_pdrop if self.training else 0.0
        if past is None and not dropout and self._kernels_fit(packed, groups):
            out = window_kernels.window_attention(
                packed,
                query,
                [g.count for g in groups],
                [g.length for g in groups],
                [g.keep for g in groups],
                self.n_head,
                self.causal,
            )
            return self.resid_dropout(self.c_proj(out))
        if query is None:
            query, key, value = packed.split(d, dim=-1)
        else:
            key, value = packed.split(d, dim=-1)
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

    def _kernels_fit(self, packed: Tensor, groups: Sequence[Windows]) -> bool:
        longest = max(g.length for g in groups)
        return (
            window_kernels is not None
            and longest > TINY_WINDOW
            and window_kernels.fits(packed, longest, self.c_attn.weight.shape[0] // self.n_head)
        )

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
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=triangle)
        return out.transpose(1, 2)


class MLP(nn.Module):
    """GPT-2's feed-forward part."""

    def __init__(self, config: ScanLMConfig, num_layers: int) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = ResidualProjection(config, num_layers, inner)
        name = config.activation_function
        # the same function in one kernel instead of eight
        self.act = ACT2FN["gelu_pytorch_tanh" if name == "gelu_new" else name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d) -> (..., d)``."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


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
        groups: Sequence[Windows],
        only_kept: bool = False,
        past: KeyValues | None = None,
    ) -> Tensor:
        """``(sum n * s, d) -> (sum n * s, d)``, or the kept positions alone."""
        residual = take_kept(x, groups) if only_kept else x
        x = residual + self.attn(self.ln_1(x), groups, only_kept, past)
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    """Blocks and a final LayerNorm over windows: T1 (not causal) or T2 (causal)."""

    def __init__(self, config: ScanLMConfig, num_layers: int, causal: bool) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.h = nn.ModuleList([Block(config, num_layers, causal) for _ in range(num_layers)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

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
        for i, block in enumerate(self.h):
            x = block(x, groups, skip and i == last, past[i] if past is not None else None)
        x = self.ln_f(x).to(x.dtype)
        kept = x.split([g.count * g.keep for g in groups])
        return [t.view(g.count, g.keep, -1) for t, g in zip(kept, groups, strict=True)]


def init_weights(module: nn.Module, std: float) -> None:
    """GPT-2's initialisation of one module; residual projections are scaled by depth."""
    if isinstance(module, Conv1D | nn.Linear | nn.Embedding):
        # decided here: transformers ignores a second initialisation of the same weight
        init.normal_(
            module.weight,
            std=module.initial_std if isinstance(module, ResidualProjection) else std,
        )
        if isinstance(module, Conv1D):
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
