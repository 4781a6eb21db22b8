"""Mamba-2 from transformers, with a token mixer that trains at a useful speed in plain torch.

Without the package ``mamba_ssm``, transformers' mixer holds the state after every chunk, even of a
sequence that is one chunk, and products of all pairs of chunks. Here sequences without a cache go
through ``scanlm.recurrence`` instead; decoding, and reading into a cache, are transformers' own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from scanlm.recurrence import softplus, state_space_dual
from scanlm.short_convolution import causal_convolution


class MatrixFormMixer(Mamba2Mixer):
    """transformers' mixer, by chunks in matrix form where nothing is cached."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``(b, t, d)`` to ``(b, t, d)``; ``attention_mask (b, t)`` is 0 at padding."""
        if cache_params is not None:
            return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
        dtype = hidden_states.dtype
        exact = torch.promote_types(dtype, torch.float32)
        inner, states = self.intermediate_size, self.n_groups * self.ssm_state_size
        hidden_states = _masked(hidden_states, attention_mask)
        gate, mixed, steps = self.in_proj(hidden_states).split(
            [inner, inner + 2 * states, self.num_heads], dim=-1
        )
        mixed = F.pad(mixed, (0, 0, self.conv_kernel_size - 1, 0))
        mixed = self.act(causal_convolution(mixed, self.conv1d.weight, self.conv1d.bias))
        x, b, c = _masked(mixed, attention_mask).split([inner, states, states], dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim)).to(exact)
        steps = softplus(steps.to(exact) + self.dt_bias.to(exact)).clamp(*self.time_step_limit)
        log_decay = -self.A_log.to(exact).exp() * steps
        b, c = (y.unflatten(-1, (self.n_groups, -1)) for y in (b, c))
        y, _ = state_space_dual(c, b, x * steps.unsqueeze(-1), log_decay)
        y = (y + self.D.to(exact).unsqueeze(-1) * x).flatten(-2)
        return self.out_proj(self.norm(y, gate).to(dtype))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)


def _has_kernels() -> bool:
    """Whether transformers finds a kernel in ``mamba_ssm``, which may be there and not work."""
    try:
        module = import_module("mamba_ssm.ops.triton.ssd_combined")
        return hasattr(module, "mamba_chunk_scan_combined")
    # built for another torch or CUDA it raises whatever its extensions do
    except Exception:
        return False


def use_matrix_form(model: Any) -> None:
    """Give a ``Mamba2ForCausalLM`` mixers in matrix form, unless ``mamba_ssm`` has its kernels."""
    if not _has_kernels():
        for block in model.backbone.layers:
            # the parameters, and what transformers' versions put beside them, stay as they are
            block.mixer.__class__ = MatrixFormMixer
