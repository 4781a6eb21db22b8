"""GPT-2 decoding at its best: keys and values in one static buffer, a captured, compiled step.

The scan model's counterpart in the comparison: same treatment (no host work, one graph a step), but
the buffer has a slot for every position and the step reads all of them.
"""

from __future__ import annotations

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
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        batch_size: int,
        capacity: int,
        compiled: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        config, weight = model.config, model.lm_head.weight
        self.model, self.heads = model, config.n_head
        shape = (
            config.n_layer,
            batch_size,
            config.n_head,
            capacity,
            config.n_embd // config.n_head,
        )
        self.keys, self.values = weight.new_zeros(shape), weight.new_zeros(shape)
        self.token = weight.new_zeros(batch_size, dtype=torch.long)
        self.position = weight.new_zeros(1, dtype=torch.long)
        self.slots = torch.arange(capacity, device=weight.device)
        self.step = self._step
        if weight.is_cuda if compiled is None else compiled:
            self.step = torch.compile(self._step, dynamic=False, fullgraph=True)
        if weight.is_cuda if graphs is None else graphs:
            self.step = captured(self.step, torch.cuda.graph_pool_handle())

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values up to the position read (one wait for the device)."""
        share = int(self.position) / self.keys.shape[3]
        return int(share * (self.keys.nbytes + self.values.nbytes))

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> None:
        """Read prompts ``(b, t)`` in parallel and choose the first tokens."""
        t = input_ids.shape[1]
        cache: Any = DynamicCache(config=self.model.config)
        out = self.model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for i, layer in enumerate(cache.layers):
            self.keys[i, :, :, :t], self.values[i, :, :, :t] = layer.keys, layer.values
        self.position.fill_(t)
        self.token.copy_(out.logits[:, -1].argmax(-1))

    @torch.no_grad()
    def _step(self) -> None:
        """Feed ``token`` at ``position``, choose the next."""
        transformer = self.model.transformer
        x = transformer.wte(self.token) + transformer.wpe(self.position)
        hidden = (self.slots > self.position)[None, None, None]
        for block, keys, values in zip(transformer.h, self.keys, self.values, strict=True):
            qkv = block.attn.c_attn(block.ln_1(x))
            q, k, v = (t.unflatten(-1, (self.heads, -1)).unsqueeze(2) for t in qkv.chunk(3, dim=-1))
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            score = (q @ keys.transpose(2, 3)) * q.shape[-1] ** -0.5
            p = score.float().masked_fill(hidden, -torch.inf).softmax(-1).to(values.dtype)
            x = x + block.attn.c_proj((p @ values).flatten(1))
            inner = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
            x = x + block.mlp.c_proj(inner)
        logits = self.model.lm_head(transformer.ln_f(x))
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
