"""GPT-2 with keys and values in one static buffer and a captured, compiled step.

The scan model's counterpart in the comparison: same treatment (no host work, one graph a step), but
the buffer has a slot for every position and the step reads all of them. With many positions or rows
transformers' StaticCache is faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from scanlm.decoder import captured


class StaticGPT2:
    """Greedy streams of a transformers GPT-2.

    Args:
        model: a ``GPT2LMHeadModel``.
        batch_size: rows.
        capacity: positions the buffers hold.
        compiled: compile the step with torch; default on a GPU.
        graphs: capture it as a CUDA graph; default on a GPU.
        tuned: let the compiler turn products of one row into reductions and search their tile
            sizes, which takes it longer.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        batch_size: int,
        capacity: int,
        compiled: bool | None = None,
        graphs: bool | None = None,
        tuned: bool = False,
    ) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.heads, self.capacity = model, config.n_head, capacity
        shape = (batch_size, config.n_head, capacity, config.n_embd // config.n_head)
        # one tensor a block: the compiler updates arguments in place, parts of them by copying all
        self.keys = [weight.new_zeros(shape) for _ in range(config.n_layer)]
        self.values = [weight.new_zeros(shape) for _ in range(config.n_layer)]
        self.token = weight.new_zeros(batch_size, dtype=torch.long)
        self.position = weight.new_zeros(1, dtype=torch.long)
        self.slots = torch.arange(capacity, device=weight.device)
        self.compiled = weight.is_cuda if compiled is None else compiled
        self.step: Callable[[], None] = self._step
        if self.compiled:
            options: Any = {"coordinate_descent_tuning": True} if tuned else None
            self.step = torch.compile(self._step, dynamic=False, fullgraph=True, options=options)
        if weight.is_cuda if graphs is None else graphs:
            self.step = captured(self.step, torch.cuda.graph_pool_handle(), weight.device)

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values up to the position (one wait for the device)."""
        held = sum(t.nbytes for t in (*self.keys, *self.values))
        return held * int(self.position) // self.capacity

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> None:
        """Read prompts ``(b, t)`` in parallel and choose the first tokens."""
        t = input_ids.shape[1]
        cache: Any = DynamicCache(config=self.model.config)
        out = self.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for keys, values, layer in zip(self.keys, self.values, cache.layers, strict=True):
            keys[:, :, :t], values[:, :, :t] = layer.keys, layer.values
        self.position.fill_(t)
        self.token.copy_(out.logits[:, -1].argmax(-1))

    @torch.no_grad()
    def _step(self) -> None:
        """Feed ``token`` at ``position``, choose the next."""
        transformer = self.model.transformer
        x = transformer.wte(self.token) + transformer.wpe(self.position)
        hidden = self.slots > self.position
        for block, keys, values in zip(transformer.h, self.keys, self.values, strict=True):
            qkv = block.attn.c_attn(block.ln_1(x))
            q, k, v = (t.unflatten(-1, (self.heads, -1)).unsqueeze(2) for t in qkv.chunk(3, dim=-1))
            keys[:, :, self.position] = k
            values[:, :, self.position] = v
            scale = q.shape[-1] ** -0.5
            # compiled, a sum of products reads the buffer once; else it would be written out
            score = (q * keys).sum(-1) if self.compiled else (q @ keys.transpose(2, 3)).squeeze(2)
            p = (score.float() * scale).masked_fill(hidden, -torch.inf).softmax(-1)
            p = p.to(values.dtype)
            out = (
                (p.unsqueeze(-1) * values).sum(2)
                if self.compiled
                else (p.unsqueeze(2) @ values).squeeze(2)
            )
            x = x + block.attn.c_proj(out.flatten(1))
            inner = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
            x = x + block.mlp.c_proj(inner)
        logits = self.model.lm_head(transformer.ln_f(x))
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
