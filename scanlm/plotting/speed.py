"""Training speed and memory from the records of ``scanlm benchmark training``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scanlm.errors import ScanLMError
from scanlm.plotting.training import throughput

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PLAIN_MODES = ("blelloch", "default")
MODE_NAMES = {"flash": "flash attention", "transformers": "as in transformers"}


def measured(metrics: pd.DataFrame, part: str = "step") -> pd.DataFrame:
    """Rows of one part of the benchmark, with ``variant``: model and what is special about it.

    Raises:
        ScanLMError: records of another kind, or none of this part.
    """
    if "part" not in metrics:
        raise ScanLMError("the records have no part: they are not of scanlm benchmark training")
    rows = metrics[metrics["part"] == part]
    if rows.empty:
        known = ", ".join(map(str, metrics["part"].dropna().unique()))
        raise ScanLMError(f"the records have no part {part!r}; they have: {known}")
    return rows.assign(variant=rows.apply(_variant, axis=1))


def _variant(row: pd.Series) -> str:
    words = [str(row["model"])]
    if row["mode"] not in PLAIN_MODES:
        words.append(MODE_NAMES.get(row["mode"], str(row["mode"])))
    if row["compiled"] == "no" and row["mode"] in ("blelloch", "transformers"):
        words.append("not compiled")
    if row["compiled"] == "whole":
        words.append("compiled whole")
    return ", ".join(words)


def by_model(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Bars of tokens a second at the first sequence length, every model and way of running it.

    Args:
        metrics: frame of ``records.read_metrics``.
        source: caption.

    Raises:
        ScanLMError: as ``measured``.
    """
    rows = measured(metrics)
    length = rows["length"].iloc[0]
    figure = throughput(rows[rows["length"] == length], by="variant", source=source)
    figure.axes[0].set_title(f"Training speed at {int(length):,} tokens a sequence")
    return figure


def by_length(
    metrics: pd.DataFrame, name: str = "tokens_per_second", source: str | None = None
) -> Figure:
    """A metric over the sequence length, one line a model and way of running it.

    Args:
        metrics: frame of ``records.read_metrics``.
        name: "tokens_per_second" or "peak_memory_bytes".
        source: caption.

    Raises:
        ScanLMError: as ``measured``; records of one length only, or without the metric.
    """
    rows = measured(metrics)
    several = rows.groupby("variant")["length"].transform("nunique") > 1
    if not several.any():
        raise ScanLMError("the records have one sequence length only: nothing to draw over it")
    figure = throughput(rows[several], x="length", by="variant", name=name, source=source)
    memory = name == "peak_memory_bytes"
    axes = figure.axes[0]
    axes.set_title("Memory of a training step" if memory else "Training speed by length")
    axes.set_xlabel("tokens a sequence, at about as many tokens a step")
    if memory:
        axes.set_ylabel("peak memory (bytes)")
    return figure


def by_chunk_size(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Tokens a second of the scan model over its chunk size, at the first sequence length.

    Args:
        metrics: frame of ``records.read_metrics``.
        source: caption.

    Raises:
        ScanLMError: as ``measured``; records without chunk sizes.
    """
    rows = measured(metrics)
    first = (rows["length"] == rows["length"].iloc[0]) & (rows["mode"] == "blelloch")
    rows = rows[first & (rows["compiled"] == rows["compiled"].iloc[0])]
    rows = rows.assign(model=rows["model"].str.replace(r"_c\d+$", "", regex=True))
    figure = throughput(rows, x="chunk_size", source=source)
    figure.axes[0].set_title("Training speed by chunk size")
    figure.axes[0].set_xlabel("chunk size (tokens)")
    return figure


__all__ = ["by_chunk_size", "by_length", "by_model", "measured"]
