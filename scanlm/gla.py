"""Gated Linear Attention (Yang et al. 2024, arXiv 2312.06635) in plain torch.

Weights, configuration and function are those of flash-linear-attention's ``GLAForCausalLM``; only
the speed differs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlm.errors import ScanLMError
from scanlm.recurrence import gated_linear_attention
from scanlm.recurrent_model import (
    GatedRMSNorm,
    LayerState,
    RecurrentConfig,
    RecurrentForCausalLM,
    add_convolutions,
    project,
)

GATE_RANK = 16  # of the low-rank projection that makes the decays
GATE_NORMALIZER = 16  # log decays are log sigmoid / 16: close to 0, so memories are long


class GLAConfig(RecurrentConfig):
    """Shape of a ``GLAForCausalLM``; see ``RecurrentConfig`` for the other fields.

    Args:
        expand_k, expand_v: width of all keys and of all values over the model's.
        num_kv_heads: heads of keys and values, each shared by several queries; ``None``: all.
        use_output_gate: a gate on the mixer's normed output.
        elementwise_affine: weights in that norm.
        clamp_min: least log decay.
        feature_map, use_gk, use_gv: of the fused models only.

    Raises:
        ScanLMError: sizes that do not divide; a field that only the fused kernels have.
    """

    model_type = "gla"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    expand_k: float = 0.5
    expand_v: float = 1.0
    num_hidden_layers: int = 24
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_output_gate: bool = True
    clamp_min: float | None = None
    elementwise_affine: bool | None = True
    use_gk: bool = True
    use_gv: bool = False


class GatedLinearAttention(nn.Module):
    """The token mixer; keys decay by data-dependent gates (paper, section 4.4)."""

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        config.require(feature_map=None, use_gk=True, use_gv=False)
        d, heads = config.hidden_size, config.num_heads
        self.groups = heads // (config.num_kv_heads or heads)
        keys, values = round(d * config.expand_k), round(d * config.expand_v)
        if keys % heads or values % heads or heads % (config.num_kv_heads or heads):
            raise ScanLMError(
                f"hidden_size={d}, expand_k={config.expand_k} and expand_v={config.expand_v} make "
                f"{keys} key and {values} value features, which num_heads={heads} (num_kv_heads="
                f"{config.num_kv_heads}) does not divide"
            )
        self.k_size, self.v_size = keys // heads, values // heads
        self.use_short_conv, self.clamp_min = config.use_short_conv, config.clamp_min
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys // self.groups, bias=False)
        self.v_proj = nn.Linear(d, values // self.groups, bias=False)
        if config.use_short_conv:
            add_convolutions(self, config.conv_size)
        self.g_proj = nn.Linear(d, values, bias=False) if config.use_output_gate else None
        self.gk_proj = nn.Sequential(
            nn.Linear(d, GATE_RANK, bias=False), nn.Linear(GATE_RANK, keys // self.groups)
        )
        self.o_proj = nn.Linear(values, d, bias=False)
        norm = GatedRMSNorm(self.v_size, config.norm_eps, affine=bool(config.elementwise_affine))
        # flash-linear-attention has two names for it
        fused = config.fuse_norm and config.use_output_gate
        self.norm_name = "g_norm_swish_gate" if fused else "g_norm"
        self.add_module(self.norm_name, norm)

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Tokens ``(b, t, d)`` after those in ``state``, which is advanced: ``(b, t, d)``."""
        q, k, v = project(self, x, state)
        gate = self.gk_proj(x)
        log_decay = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
        log_decay = log_decay / GATE_NORMALIZER
        if self.clamp_min is not None:
            log_decay = log_decay.clamp_min(self.clamp_min)
        q = q.unflatten(-1, (-1, self.k_size))
        k, log_decay = self._share(k, self.k_size), self._share(log_decay, self.k_size)
        v = self._share(v, self.v_size)
        o, state.recurrent = gated_linear_attention(q, k, v, log_decay, state.recurrent)
        output_gate = None
        if self.g_proj is not None:
            output_gate = self.g_proj(x).unflatten(-1, (-1, self.v_size))
        return self.o_proj(self.get_submodule(self.norm_name)(o, output_gate).flatten(-2))

    def _share(self, x: Tensor, size: int) -> Tensor:
        """``(b, t, features)`` to heads ``(b, t, h, size)``, one repeated for its queries."""
        x = x.unflatten(-1, (-1, size))
        return x.repeat_interleave(self.groups, dim=2) if self.groups > 1 else x


class GLAForCausalLM(RecurrentForCausalLM):
    """A GLA language model."""

    config: GLAConfig
    config_class = GLAConfig

    def __init__(self, config: GLAConfig) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(config, [GatedLinearAttention(config) for _ in layers])
