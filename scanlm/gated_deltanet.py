"""Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464) in plain torch.

Weights, configuration and function are those of flash-linear-attention's
``GatedDeltaNetForCausalLM``; only the speed differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from scanlm.errors import ScanLMError, nearest
from scanlm.recurrence import gated_delta_rule, softplus
from scanlm.recurrent_model import (
    GatedRMSNorm,
    LayerState,
    RecurrentConfig,
    RecurrentForCausalLM,
    add_convolutions,
    project,
)

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}
STEP_RANGE = (0.001, 0.1)  # initial softplus(dt_bias), as in Mamba-2
DECAY_RANGE = (0, 16)  # initial exp(A_log)


class GatedDeltaNetConfig(RecurrentConfig):
    """Shape of a ``GatedDeltaNetForCausalLM``; see ``RecurrentConfig`` for the other fields.

    Args:
        head_dim: key features a head, whatever the model's width.
        expand_v: value features a head over ``head_dim``.
        num_v_heads: heads of values, several to a query; ``None``: ``num_heads``.
        use_gate: a gate on the mixer's normed output.
        output_gate_activation: "swish" ("silu") or "sigmoid".
        allow_neg_eigval: writing strengths up to 2, which state tracking needs (arXiv 2411.12537).

    Raises:
        ScanLMError: sizes that do not divide; a field that only the fused kernels have.
    """

    model_type = "gated_deltanet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    expand_v: float = 2.0
    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    num_hidden_layers: int = 21
    output_gate_activation: str = "swish"


class GatedDeltaNet(nn.Module):
    """The token mixer: decay, forget what a key held, write its new value (paper, section 3)."""

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__()
        config.require()
        d, heads = config.hidden_size, config.num_heads
        v_heads = config.num_v_heads or heads
        self.k_size, self.v_size = config.head_dim, round(config.head_dim * config.expand_v)
        if not math.isclose(self.v_size, config.head_dim * config.expand_v) or v_heads % heads:
            raise ScanLMError(
                f"head_dim={config.head_dim} times expand_v={config.expand_v} must be an integer "
                f"and num_v_heads={v_heads} a multiple of num_heads={heads}"
            )
        if config.output_gate_activation not in GATES:
            raise ScanLMError(
                f"unknown output_gate_activation {config.output_gate_activation!r}."
                f"{nearest(config.output_gate_activation, GATES)}"
            )
        self.groups = v_heads // heads
        self.use_short_conv = config.use_short_conv
        self.strength = 2.0 if config.allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(d, heads * self.k_size, bias=False)
        self.k_proj = nn.Linear(d, heads * self.k_size, bias=False)
        self.v_proj = nn.Linear(d, v_heads * self.v_size, bias=False)
        if config.use_short_conv:
            add_convolutions(self, config.conv_size)
        self.a_proj = nn.Linear(d, v_heads, bias=False)
        self.b_proj = nn.Linear(d, v_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(v_heads))
        self.g_proj = nn.Linear(d, v_heads * self.v_size, bias=False) if config.use_gate else None
        self.o_norm = GatedRMSNorm(
            self.v_size, config.norm_eps, GATES[config.output_gate_activation]
        )
        self.o_proj = nn.Linear(v_heads * self.v_size, d, bias=False)

    def draw_weights(self) -> None:
        """Initial decays as in Mamba-2; the projections are drawn with all others."""
        low, high = (math.log(x) for x in STEP_RANGE)
        step = torch.empty_like(self.dt_bias).uniform_(low, high).exp()
        init.copy_(self.dt_bias, step + (-(-step).expm1()).log())  # softplus' inverse
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*DECAY_RANGE).log())

    def forward(self, x: Tensor, state: LayerState) -> Tensor:
        """Tokens ``(b, t, d)`` after those in ``state``, which is advanced: ``(b, t, d)``."""
        q, k, v = project(self, x, state)
        if not self.use_short_conv:  # else the convolutions have done it
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        exact = torch.promote_types(x.dtype, torch.float32)
        step = softplus(self.a_proj(x).to(exact) + self.dt_bias.to(exact))
        log_decay = -self.A_log.to(exact).exp() * step
        beta = self.strength * self.b_proj(x).to(exact).sigmoid()
        q, k = (self._unit(y.unflatten(-1, (-1, self.k_size)).to(exact)) for y in (q, k))
        v = v.unflatten(-1, (-1, self.v_size))
        o, state.recurrent = gated_delta_rule(q, k, v, log_decay, beta, state.recurrent)
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (-1, self.v_size))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    def _unit(self, x: Tensor) -> Tensor:
        """Rows ``(b, t, h, k)`` at unit length, repeated for the value heads that share them."""
        x = x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        return x.repeat_interleave(self.groups, dim=2) if self.groups > 1 else x


class GatedDeltaNetForCausalLM(RecurrentForCausalLM):
    """A Gated DeltaNet language model."""

    config: GatedDeltaNetConfig
    config_class = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config, [GatedDeltaNet(config) for _ in range(config.num_hidden_layers)])
