"""One token through the model with the streaming state in preallocated buffers.

What ``ScanCache`` holds in tensors that grow lies here at fixed addresses, so that the same
kernels serve every position: T2's window is ``2 c`` slots of keys and values a block, the prefix
in slots 0 ... c - 1 and the chunk in slots c ... 2 c - 1. How full it is follows from the
position, which is on the device and may differ from row to row; slots that hold nothing are
masked. Nothing here looks at a value on the host, so every function can be captured.

Shapes: ``b`` rows, ``c`` = chunk_size, ``d`` = n_embd, ``h`` heads, ``v`` = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlm.sampling import Sampling

Rows = slice | Tensor


@dataclass(frozen=True)
class Buffers:
    """State of a batch of streams, at fixed addresses.

    Attributes:
        token: ``(b,)``, the token to feed next.
        position: ``(b,)``, tokens fed so far.
        chunk: ``(b, c, d)``, embeddings of the current chunk.
        keys, values: ``(blocks, b, h, 2 c, d / h)``, T2's window.
        logits: ``(b, v)`` of the last token fed, at least float32.
        prefix: ``(b, c, d)``, a new prefix on its way into the window.
    """

    token: Tensor
    position: Tensor
    chunk: Tensor
    keys: Tensor
    values: Tensor
    logits: Tensor
    prefix: Tensor

    @classmethod
    def allocate(cls, model: Any, batch_size: int) -> Buffers:
        """Empty buffers for a model, on its device and in its dtype."""
        config, weight = model.config, model.lm_head.weight
        c, d, h = config.chunk_size, config.n_embd, config.n_head
        window = (config.t2_layers, batch_size, h, 2 * c, d // h)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return cls(
            token=weight.new_zeros(batch_size, dtype=torch.long),
            position=weight.new_zeros(batch_size, dtype=torch.long),
            chunk=weight.new_zeros(batch_size, c, d),
            keys=weight.new_zeros(window),
            values=weight.new_zeros(window),
            logits=weight.new_zeros(batch_size, config.vocab_size, dtype=wide),
            prefix=weight.new_zeros(batch_size, c, d),
        )


class TorchStep:
    """The step in plain torch operations: any device, dtype and activation."""

    def __init__(self, model: Any, buffers: Buffers) -> None:
        self.model, self.buffers = model, buffers
        config, device = model.config, buffers.token.device
        self.rows = torch.arange(len(buffers.token), device=device)
        self.slots = torch.arange(2 * config.chunk_size, device=device)

    def refresh(self) -> None:
        """Called when a stream begins: the model's weights may have changed."""

    def step(self) -> None:
        """Feed ``token`` at ``position``: window, chunk and logits are updated."""
        model, s = self.model, self.buffers
        c, h = model.config.chunk_size, model.config.n_head
        fill = s.position % c
        places = fill if model.config.position_embedding == "chunk" else s.position
        x = model.leaf_norm(model.wte(s.token) + model.wpe(places))
        s.chunk[self.rows, fill] = x
        slot = c + fill
        visible = (self.slots <= slot[:, None]) & (
            (self.slots >= c) | (s.position >= c)[:, None]  # the first chunk has no prefix
        )
        for block, keys, values in zip(model.t2.h, s.keys, s.values, strict=True):
            qkv = block.attn.c_attn(block.ln_1(x))
            q, k, v = (t.unflatten(-1, (h, -1)) for t in qkv.chunk(3, dim=-1))
            keys[self.rows, :, slot] = k
            values[self.rows, :, slot] = v
            mask = visible[:, None, None]
            out = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask)
            x = x + block.attn.c_proj(out.flatten(1))
            x = x + block.mlp(block.ln_2(x))
        s.logits.copy_(model.lm_head(model.t2.ln_f(x)))

    def advance(self, sampling: Sampling) -> None:
        """Choose the next token from the logits and count the one fed."""
        s = self.buffers
        s.token.copy_(sampling.choose(s.logits))
        s.position.add_(1)

    def fill(self, prefix: Tensor, rows: Rows) -> None:
        """Put the prefix ``(n, c, d)`` of some rows into T2's window.

        Causally masked, the prefix's positions do not see the chunk's: their keys and values are
        those of a pass over the prefix alone, whose last block needs nothing else.
        """
        model, s, x = self.model, self.buffers, prefix
        c, h = model.config.chunk_size, model.config.n_head
        last = len(model.t2.h) - 1
        for i, block in enumerate(model.t2.h):
            qkv = block.attn.c_attn(block.ln_1(x))
            q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
            s.keys[i][rows, :, :c] = k
            s.values[i][rows, :, :c] = v
            if i == last:
                return
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block.attn.c_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
