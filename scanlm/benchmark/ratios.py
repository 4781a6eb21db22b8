"""What the inference benchmark is aimed at: ratios within a record, so that the machine cancels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROWS = 64  # of the batch whose throughput is compared with one row's
# by name: what was aimed at, for the scan model at base size where nothing else is said
AIMS = {
    "a token at the longest position, over the shortest": "at most 1.03",
    "a token over the best GPT-2's, at the shortest position": "at most 0.45; original size 0.5",
    "a token over the best GPT-2's, at 40,000": "at most 0.25",
    "a token over the best GPT-2's, at the longest position": "at most 0.1",
    "a token over the time to read weights and state once, most": "at most 3.5",
    "the original's loop over a token": "at least 10, original size",
    "GLA or Gated DeltaNet over a token, least": "at least 2",
    "reading the longest prompt: the fastest GPT-2 over the scan model": "at least 5",
    "the most of the state up to the longest position, over the shortest": "at most 1.5",
    f"tokens a second of {ROWS} rows, over one row's": "at least 40",
}


def most_states(parameters: Mapping[str, Any], tokens: int) -> dict[str, int]:
    """Parts of the most that the scan model's decoder held at any position up to ``tokens``.

    The counter after n chunks holds a root for each 1 among the binary digits of n, and beside each
    its fold, but the largest root is its own fold. At a power of two chunks that is one state, one
    chunk earlier it was the most.

    Args:
        parameters: of a record of the inference benchmark.
        tokens: of a sequence, at least one.

    Returns:
        ``window`` of T2 and ``chunk`` so far, which have one size, and ``counter``; all counted in
        states, of as many vectors as a chunk has.
    """
    chunks = tokens // parameters["chunk_size"]
    ones = (chunks + 1).bit_length() - 1  # the most of any number up to that of the chunks
    blocks = parameters["sizes"]["scan"]["t2_layers"]
    # each block's window: keys and values of [prefix ; chunk]
    return {"window": 2 * 2 * blocks, "chunk": 1, "counter": max(2 * ones - 1, 0)}


def most_state_bytes(parameters: Mapping[str, Any], tokens: int) -> int:
    """The same in bytes, all parts together."""
    import torch

    dtype: torch.dtype = getattr(torch, parameters["dtype"])
    vectors = parameters["batch_size"] * parameters["chunk_size"]
    state = vectors * parameters["sizes"]["scan"]["n_embd"] * dtype.itemsize
    return sum(most_states(parameters, tokens).values()) * state


def inference_ratios(metrics: pd.DataFrame, parameters: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of one record, by the names in ``AIMS``; NaN what it does not hold.

    Args:
        metrics: of one inference record, as ``records.read_metrics`` has them.
        parameters: of that record.
    """
    from scanlm.plotting.inference import best_gpt2

    steady = metrics[metrics["part"] == "positions"]
    positions = sorted(steady["position"].unique())
    first, last = positions[0], positions[-1]
    table = steady.pivot_table(index=["name", "model"], columns="position", values="value")

    def value(name: str, model: str, position: float) -> float:
        if (name, model) not in table.index or position not in table:
            return math.nan
        return float(table[position][name, model])

    def of_gpt2(name: str, position: float) -> float:
        return float(best_gpt2(steady[steady["name"] == name]).get(position, math.nan))

    def token(model: str, position: float) -> float:
        return value("ms_per_token", model, position)

    def to_floor(position: float) -> float:
        read = value("read_bytes", "scanlm", position) / bandwidth
        return token("scanlm", position) / (1e3 * read)

    bandwidths = metrics.loc[metrics["name"] == "bandwidth", "value"]
    bandwidth = float(bandwidths.iloc[0]) if len(bandwidths) else math.nan
    batches = metrics[(metrics["part"] == "batches") & (metrics["model"] == "scanlm")]
    batches = batches[batches["name"] == "tokens_per_second"]
    rates = dict(zip(batches.get("batch_size", ()), batches["value"], strict=True))
    recurrent = [
        token(model, position) / token("scanlm", position)
        for model in ("gla", "gated_deltanet")
        for position in positions
    ]
    found = (
        token("scanlm", last) / token("scanlm", first),
        token("scanlm", first) / of_gpt2("ms_per_token", first),
        token("scanlm", 40_000) / of_gpt2("ms_per_token", 40_000),
        token("scanlm", last) / of_gpt2("ms_per_token", last),
        max(to_floor(position) for position in positions),
        token("scanlm_original", first) / token("scanlm", first),
        min((ratio for ratio in recurrent if ratio == ratio), default=math.nan),
        of_gpt2("prefill_seconds", last) / value("prefill_seconds", "scanlm", last),
        most_state_bytes(parameters, int(last)) / most_state_bytes(parameters, int(first)),
        rates.get(ROWS, math.nan) / rates.get(1, math.nan),
    )
    return dict(zip(AIMS, found, strict=True))
