"""What a ScanLM is made of: its parts, their sizes, and the shapes that pass through them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scanlm.flops import scanlm_parts
from scanlm.model import ScanLMForCausalLM

if TYPE_CHECKING:
    import pandas as pd


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def parameter_table(model: ScanLMForCausalLM, seq_len: int) -> pd.DataFrame:
    """Parameters and training arithmetic of T0, T1, T2 and the head.

    Args:
        model: any ScanLM.
        seq_len: tokens a training sequence, on which T1's and T2's work depends.

    Returns:
        Columns ``part``, ``role``, ``parameters``, ``share`` (of all parameters) and
        ``mflop_per_token`` (forward and backward, in millions). A head tied to T0 has none of its
        own.
    """
    import pandas as pd

    work = {part: 3 * n / seq_len / 1e6 for part, n in scanlm_parts(model.config, seq_len).items()}
    tied = model.lm_head.weight is model.wte.weight
    rows = [
        ("T0", "embeds tokens", _count(model.wte, model.wpe, model.leaf_norm), 0.0),
        ("T1", "aggregates two states", _count(model.t1), work["t1"]),
        ("T2", "predicts within a chunk", _count(model.t2), work["t2"]),
        ("head", "scores the vocabulary", 0 if tied else _count(model.lm_head), work["head"]),
    ]
    table = pd.DataFrame(rows, columns=["part", "role", "parameters", "mflop_per_token"])
    table.insert(3, "share", table.parameters / _count(model))
    return table


@torch.no_grad()
def shape_table(model: ScanLMForCausalLM, input_ids: Tensor) -> pd.DataFrame:
    """The tensors of one forward pass of whole chunks, in order.

    Args:
        model: any ScanLM.
        input_ids: ``(b, m * chunk_size)`` with at least two chunks.

    Returns:
        Columns ``step``, ``tensor``, ``shape``.
    """
    import pandas as pd

    c = model.config.chunk_size
    x = model.embed(input_ids)
    leaves = x.unflatten(1, (-1, c))
    prefixes = model.prefix_states(leaves[:, :-1])
    hidden = model.predict(x, prefixes)
    rows = [
        ("tokens", "input_ids", input_ids),
        ("T0 embeds", "x", x),
        ("cut into chunks", "leaves", leaves),
        ("scan of T1", "prefix states", prefixes),
        ("T2 reads [prefix ; chunk]", "hidden", hidden),
        ("head", "logits", model.lm_head(hidden)),
    ]
    return pd.DataFrame(
        [(step, name, tuple(t.shape)) for step, name, t in rows],
        columns=["step", "tensor", "shape"],
    )
