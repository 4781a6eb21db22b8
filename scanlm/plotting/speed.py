"""Training speed and memory from the records of ``scanlm benchmark training``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import EngFormatter

from scanlm.errors import ScanLMError
from scanlm.plotting.style import (
    FAINT,
    MUTED,
    caption,
    display_name,
    model_styles,
    new_figure,
    style,
)
from scanlm.plotting.training import name_places, throughput

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SIZED = re.compile(r"_c\d+$")  # the end of an id that names a chunk size
PLAIN_MODES = ("blelloch", "default")
MODE_NAMES = {"flash": "flash attention", "transformers": "as in transformers"}


def measured(metrics: pd.DataFrame, part: str = "step") -> pd.DataFrame:
    """Rows of one part of the benchmark, with ``variant``: model and what is special about it.

    Raises:
        ScanLMError: records of another kind, or none of this part.
    """
    if "part" not in metrics:
        raise ScanLMError("the records have no part: they are not of scanlm benchmark training")
    rows = metrics[metrics["part"] == part].reset_index(drop=True)
    if rows.empty:
        known = ", ".join(map(str, metrics["part"].dropna().unique()))
        raise ScanLMError(f"the records have no part {part!r}; they have: {known}")
    told = rows["compiled"].nunique() > 1
    sizes = rows.groupby("model")["chunk_size"].transform("nunique") > 1
    rows = rows.assign(told_size=rows["chunk_size"].where(sizes))
    return rows.assign(variant=rows.apply(_variant, axis=1, compilation=told))


def _variant(row: pd.Series, compilation: bool) -> str:
    words = [str(row["model"])]
    if row["told_size"] == row["told_size"]:
        words = [SIZED.sub("", words[0])]  # whose name may tell another
        words.append(f"chunk {row['told_size']:.0f}")
    if row["mode"] not in PLAIN_MODES:
        words.append(MODE_NAMES.get(row["mode"], str(row["mode"])))
    if row["compiled"] == "no" and compilation:
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
    title = f"Training speed at {int(length):,} tokens a sequence"
    return throughput(rows[rows["length"] == length], by="variant", source=source, title=title)


def by_length(
    metrics: pd.DataFrame,
    name: str = "tokens_per_second",
    source: str | None = None,
    title: str | None = None,
) -> Figure:
    """A metric over the sequence length, one line a model and way of running it.

    Args:
        metrics: frame of ``records.read_metrics``.
        name: "tokens_per_second" or "peak_memory_bytes".
        source: caption.
        title: instead of one that says what the metric is.

    Raises:
        ScanLMError: as ``measured``; records of one length only, or without the metric.
    """
    rows = measured(metrics)
    memory = name == "peak_memory_bytes"
    if memory:  # attention called otherwise keeps the same
        rows = rows[rows["mode"].isin(PLAIN_MODES)]
    several = rows.groupby("variant")["length"].transform("nunique") > 1
    if not several.any():
        raise ScanLMError("the records have one sequence length only: nothing to draw over it")
    step = rows["length"] * rows["batch_size"]
    usual = step[several].mode()[0]
    title = title or ("Memory of a training step" if memory else "Training speed by length")
    figure = throughput(rows[several & (step == usual)], "length", "variant", name, source, title)
    axes = figure.axes[0]
    label = f"tokens a sequence, {int(usual):,} tokens a step"
    larger = rows[several & (step != usual) & (rows["name"] == name)]
    for line in list(axes.lines):  # a sequence longer than the usual step is a step of its own
        part = larger[larger["variant"].map(display_name) == line.get_label()]
        look: Any = {"marker": line.get_marker(), "color": line.get_color(), "mfc": "none"}
        axes.plot(part["length"], part["value"], ls="", **look)
    if len(larger):
        label += f" (hollow: {', '.join(f'{int(n):,}' for n in sorted(set(step[larger.index])))})"
        axes.set_ylim(0, 1.08 * rows.loc[several & (rows["name"] == name), "value"].max())
        name_places(axes, rows.loc[several, "length"])
    axes.set_xlabel(label)
    if memory:
        axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
        axes.set_ylabel("peak memory")
    return figure


def by_chunk_size(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Tokens a second of the scan model over its chunk size, at the first sequence length.

    Args:
        metrics: frame of ``records.read_metrics``.
        source: caption.

    Raises:
        ScanLMError: as ``measured``; records of one chunk size only.
    """
    rows = measured(metrics)
    first = (rows["length"] == rows["length"].iloc[0]) & (rows["mode"] == "blelloch")
    rows = rows[first & (rows["compiled"] == rows["compiled"].iloc[0])]
    rows = rows.assign(model=rows["model"].str.replace(SIZED, "", regex=True))
    if rows["chunk_size"].nunique() < 2:
        raise ScanLMError("the records have one chunk size only: nothing to draw over it")
    figure = throughput(rows, "chunk_size", source=source, title="Training speed by chunk size")
    figure.axes[0].set_xlabel("chunk size (tokens)")
    return figure


def by_kernel(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Where the time of a training step goes: one bar a kind of kernel, and what lies between.

    Args:
        metrics: frame of ``records.read_metrics``.
        source: caption.

    Raises:
        ScanLMError: as ``measured``, for the part "kernels".
    """
    rows = measured(metrics, "kernels")
    last = rows[rows["run_id"] == rows["run_id"].iloc[-1]]
    times = last[last["name"] == "kernel_milliseconds"].set_index("kind")["value"]
    step = float(last.loc[last["name"] == "step_milliseconds", "value"].iloc[0])
    times = times.sort_values()
    gap = max(step - float(times.sum()), 0.0)
    named = {"gaps": gap, **times.to_dict()}
    row = last.iloc[0]
    color = model_styles([row["model"]])[row["model"]].color
    with style():
        figure = new_figure(7.4, 0.38 * len(named) + 1.3)
        ax = figure.subplots()
        bars = ax.barh(list(named), list(named.values()), height=0.62, color=color)
        bars[0].set_color(FAINT)
        ax.bar_label(bars, fmt="{:.1f}", padding=6, fontsize=9, color=MUTED)
        ax.set_xlabel("milliseconds a step")
        batch = f"{row['batch_size']:.0f} x {row['length']:,.0f}"
        ax.set_title(f"{display_name(row['variant'])}: a step of {batch}, {step:,.1f} ms")
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.margins(x=0.14)
        ax.set_xlim(left=0)
        if source:
            caption(figure, source)
    return figure


__all__ = ["by_chunk_size", "by_kernel", "by_length", "by_model", "measured"]
