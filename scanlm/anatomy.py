"""What a ScanLM is made of: its parts, their sizes, and the shapes that pass through them; and the
sizes of other models beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scanlm.flops import scanlm_parts, training_flops
from scanlm.model import ScanLMForCausalLM

if TYPE_CHECKING:
    import pandas as pd


def _count(*modules: nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def parameter_table(model: ScanLMForCausalLM, seq_len: int) -> pd.DataFrame:
    """Parameters and training arithmetic of T0, T1, T2 (with its prefix embedding) and the head.

    Args:
        model: any ScanLM.
        seq_len: tokens a training sequence, on which T1's and T2's work depends.

    Returns:
        Columns ``part``, ``role``, ``parameters``, ``share`` (of all parameters) and
        ``mflop_per_token`` (forward and backward, in millions). A head tied to T0 has none of its
        own.

    Raises:
        ScanLMError: a sequence of no tokens.
    """
    import pandas as pd

    work = {part: 3 * n / seq_len / 1e6 for part, n in scanlm_parts(model.config, seq_len).items()}
    tied = model.lm_head.weight is model.wte.weight
    reader = [model.t2] if model.wse is None else [model.t2, model.wse]
    rows = [
        ("T0", "embeds tokens", _count(model.wte, model.wpe, model.leaf_norm), 0.0),
        ("T1", "aggregates two states", _count(model.t1), work["t1"]),
        ("T2", "predicts within a chunk", _count(*reader), work["t2"]),
        ("head", "scores the vocabulary", 0 if tied else _count(model.lm_head), work["head"]),
    ]
    table = pd.DataFrame(rows, columns=["part", "role", "parameters", "mflop_per_token"])
    table.insert(3, "share", table.parameters / _count(model))
    return table


def size_table(names: Sequence[str], seq_len: int) -> pd.DataFrame:
    """Sizes of registered models, from their shapes alone: no weight is made.

    Args:
        names: ids of the registry, or paths of files like its own.
        seq_len: tokens a training sequence, on which the operations depend.

    Returns:
        Indexed by ``model``: ``family``, ``parameters``, ``without embeddings`` (nor a head of its
        own), and ``MFLOP per token``, forward and backward; NaN of families not counted.

    Raises:
        ScanLMError: an unknown model, or a sequence of no tokens.
    """
    import pandas as pd

    from scanlm.baselines import build_model, load_entry

    rows = []
    for name in names:
        model: Any = build_model(name, device="meta")
        tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        counts = {id(p): p.numel() for p in model.parameters()}
        work = training_flops(model, seq_len)
        rows.append(
            {
                "model": name,
                "family": load_entry(name).family,
                "parameters": sum(counts.values()),
                "without embeddings": sum(n for key, n in counts.items() if key not in tables),
                "MFLOP per token": sum(work.values()) / 1e6 if work else math.nan,
            }
        )
    return pd.DataFrame(rows).set_index("model")


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
