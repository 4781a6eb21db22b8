"""Figures of inference scaling, from the metrics of ``scanlm.benchmark.inference``.

Every function takes the frame of ``records.read_metrics`` for one run: ``part``, ``model``,
``position``, ``batch_size``, ``chunk_size``, ``name`` and ``value``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, NullFormatter, NullLocator

from scanlm.errors import ScanLMError, nearest
from scanlm.plotting.style import (
    FAINT,
    FAMILIES,
    INK,
    MUTED,
    T1_COLOR,
    T2_COLOR,
    FamilyStyle,
    caption,
    model_styles,
    new_figure,
    sequence_colors,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {
    "scanlm": FAMILIES["scanlm"].label,
    "scanlm_plain": "scan model, forward token by token",
    "scanlm_original": "original's loop (another function)",
    "gpt2_best": "GPT-2, the least of several ways",
    "gpt2_graph": "GPT-2, static KV buffer",
    "gpt2_tuned": "GPT-2, static KV buffer, tuned",
    "gpt2_static": "GPT-2, transformers' StaticCache",
    "gpt2_dynamic": "GPT-2, transformers' DynamicCache",
    "gpt2_math": "GPT-2, math kernel, float32",
    "gla": FAMILIES["gla"].label,
    "gated_deltanet": FAMILIES["gated_deltanet"].label,
    "mamba2": "Mamba-2, without its kernels",
}
PALE = "#9AA1AB"
# of the ways to run one model: line style, marker, and a colour unless it is the family's; the
# same in every figure, whichever of them it shows
WAYS = {
    "scanlm_plain": ("--", "P", None),
    "scanlm_original": (":", "X", None),
    "gpt2_graph": ("-", "s", None),
    "gpt2_tuned": ("--", "P", None),
    "gpt2_static": (":", "X", None),
    "gpt2_dynamic": ("-.", "*", None),
    "gpt2_math": ("--", "v", PALE),
}
# of the scan model, but not its decoder: prompts they read as ``scanlm`` does, and their state has
# no fixed size, since T2's window is dropped at a chunk border and grows from there
PLAIN = ("scanlm_plain", "scanlm_original")

# kernels of the decoder's step; those of products and norms also fill the window of a few rows
NOT_PRODUCTS = ("window_kernel", "best_part_kernel", "best_kernel", "embed_kernel")
STEP_KERNELS = ("vector_kernel", "matrix_kernel", "norm_kernel", *NOT_PRODUCTS)


def select(metrics: pd.DataFrame, name: str, part: str | None = None) -> pd.DataFrame:
    """Rows of one metric, of one part of the benchmark.

    Raises:
        ScanLMError: the records have none.
    """
    rows = metrics[metrics["name"] == name]
    if part is not None and "part" in rows:
        rows = rows[rows["part"] == part]
    if rows.empty:
        if part and name in set(metrics["name"]):
            raise ScanLMError(f"the records have no {name!r} in the part {part!r}: it was not run")
        raise ScanLMError(f"the records have no {name!r}.{nearest(name, metrics['name'].unique())}")
    return rows


def _fair_gpt2(rows: pd.DataFrame) -> pd.Series:
    return rows["model"].str.startswith("gpt2") & (rows["model"] != "gpt2_math")


def best_gpt2(rows: pd.DataFrame, x: str = "position") -> pd.Series:
    """The least value of any GPT-2 (but the handicapped one), by ``x``."""
    return rows[_fair_gpt2(rows)].groupby(x)["value"].min()


def _one_gpt2(rows: pd.DataFrame) -> pd.DataFrame:
    """The best of several ways to run GPT-2 in place of all, where they hardly differ."""
    fair = _fair_gpt2(rows)
    if rows.loc[fair, "model"].nunique() < 2:
        return rows
    return pd.concat([rows[~fair], best_gpt2(rows).reset_index().assign(model="gpt2_best")])


def crossover(metrics: pd.DataFrame, part: str = "positions") -> float | None:
    """The position from which a token of the scan model costs less than one of the best GPT-2.

    Between positions that were measured the ratio is taken as linear in the logarithm of the
    position. ``None``: the curves do not cross where they were measured.
    """
    rows = select(metrics, "ms_per_token", part)
    ratio = (rows[rows["model"] == "scanlm"].groupby("position")["value"].min()) / best_gpt2(rows)
    ratio = ratio.dropna()
    points = zip(np.log(ratio.index.to_numpy(float)), np.log(ratio.to_numpy()), strict=True)
    for (x, before), (next_x, after) in pairwise(points):
        if before >= 0 > after:
            return float(np.exp(x + (next_x - x) * before / (before - after)))
    return None


def _looks(rows: pd.DataFrame) -> list[tuple[str, FamilyStyle, pd.DataFrame]]:
    models = sorted(rows["model"].unique(), key=[*LABELS, *rows["model"].unique()].index)
    styles = model_styles(models)
    for model in WAYS.keys() & styles:
        line, marker, color = WAYS[model]
        look = styles[model]
        styles[model] = replace(look, linestyle=line, marker=marker, color=color or look.color)
    return [(LABELS.get(m, m), styles[m], rows[rows["model"] == m]) for m in models]


def _lines(ax: Axes, rows: pd.DataFrame, x: str, many: bool = False) -> None:
    for label, look, part in _looks(rows):
        table = part.groupby(x)["value"].median()
        ax.plot(
            table.index,
            table.to_numpy(),
            color=look.color,
            ls=look.linestyle,
            marker=None if many else look.marker,
            ms=4,
            lw=1.4 if many else 1.8,
            label=label,
        )


def _end(figure: Figure, source: str | None) -> Figure:
    axes = figure.axes
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside right upper")
    if source:
        caption(figure, source)
    return figure


def _logarithmic(ax: Axes, positions: pd.Series) -> None:
    """Both axes; a few positions are named, of many the decades are."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    places = sorted(positions.unique())
    if len(places) <= 8:
        ax.set_xticks(places, [f"{place:,.0f}" for place in places])
        ax.xaxis.set_minor_locator(NullLocator())
    _log_times(ax)


class _PlainLog(LogFormatter):
    """0.2 instead of 2e-01."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:g}"


def _log_times(ax: Axes) -> None:
    ax.set_yscale("log")
    for place in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        place(_PlainLog(minor_thresholds=(2, 0.5)))


def timeline(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Time a token and in total while tokens are generated one after another."""
    rows = select(metrics, "ms_per_token", "timeline")
    rows = rows[rows["n"] == rows["n"].max()]  # the last median may be of a few tokens only
    means = select(metrics, "ms_per_token_mean", "timeline")
    totals = means.sort_values("position").assign(value=means["value"] * means["n"] / 1e3)
    totals["value"] = totals.groupby("model")["value"].cumsum()
    with style():
        figure = new_figure(11.5, 3.9)
        left, right = figure.subplots(1, 2)
        _lines(left, rows, "position", many=True)
        _lines(right, totals, "position", many=True)
        left.set(xlabel="position", ylabel="ms per token (median of 64)", title="Time a token")
        _log_times(left)
        right.set(xlabel="position", ylabel="seconds", title="Time in total")
        right.set_ylim(bottom=0)
        for ax in (left, right):
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _end(figure, source)


def time_by_position(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Median time a token at each position, and where scanlm and the best GPT-2 cross."""
    rows = select(metrics, "ms_per_token", "positions")
    with style():
        figure = new_figure(9.6, 4.4)
        ax = figure.subplots()
        _lines(ax, rows, "position")
        _logarithmic(ax, rows["position"])
        position = crossover(metrics)
        if position is not None:
            ax.axvline(position, color=MUTED, lw=1, ls=":")
            ax.annotate(
                f"crossover at {position:,.0f}",
                (position, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                color=MUTED,
                fontsize=9,
            )
        ax.set(xlabel="position", ylabel="ms per token (median)", title="Time a token by position")
        return _end(figure, source)


def prefill(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Seconds to read a prompt, by its length; all GPT-2 read it with the same forward pass."""
    rows = select(metrics, "prefill_seconds", "positions")
    rows = _one_gpt2(rows[~rows["model"].isin(PLAIN)])
    with style():
        figure = new_figure(9.6, 4.4)
        ax = figure.subplots()
        _lines(ax, rows, "position")
        _logarithmic(ax, rows["position"])
        ax.set(xlabel="tokens of the prompt", ylabel="seconds", title="Reading a prompt")
        return _end(figure, source)


def memory(
    metrics: pd.DataFrame,
    part: str = "positions",
    source: str | None = None,
    most: pd.Series | None = None,
) -> Figure:
    """Memory of the streaming state by position, on logarithmic axes.

    Args:
        metrics: of one run.
        part: of the benchmark.
        source: caption.
        most: by position, the most that the scan model held up to there. What it holds at one
            position depends on the binary digits of the number of chunks.
    """
    rows = select(metrics, "state_bytes", part)
    rows = _one_gpt2(rows[~rows["model"].isin(PLAIN)])
    with style():
        figure = new_figure(9.6, 4.4)
        ax = figure.subplots()
        _lines(ax, rows, "position", many=part == "timeline")
        if most is not None:
            marked = [*most.index.isin(rows["position"])]
            ax.plot(most.index, most, color=T1_COLOR, lw=1, ls=":", drawstyle="steps-post",
                    marker="o", ms=4, mfc="none", markevery=marked,
                    label="scan model, the most up to there")  # fmt: skip
        _logarithmic(ax, rows["position"])
        ax.yaxis.set_major_formatter(EngFormatter(unit="B"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="position", ylabel="state", title="Memory of the state by position")
        return _end(figure, source)


def staircase(table: pd.DataFrame, source: str | None = None) -> Figure:
    """The counter's memory chunk by chunk, under its logarithmic bound.

    Args:
        table: columns ``chunks``, ``states`` (states held) and ``bound``.
        source: caption.
    """
    with style():
        figure = new_figure(9.6, 3.6)
        ax = figure.subplots()
        ax.plot(table["chunks"], table["states"], drawstyle="steps-post", color=T1_COLOR, lw=1.1)
        ax.plot(table["chunks"], table["bound"], drawstyle="steps-post", color=INK, lw=1.2, ls="--")
        ax.set(xlabel="chunks seen", ylabel="states held", title="The staircase of log n")
        ax.annotate("bound", (table["chunks"].iloc[-1], table["bound"].iloc[-1]), xytext=(4, -3),
                    textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
        if source:
            caption(figure, source)
        return figure


def _after_pauses(metrics: pd.DataFrame) -> range:
    """Places in the chunk whose token always comes first after a pause of the clock.

    The clock stops after each window of tokens. The next one then includes the time to start a
    step on an idle device; if windows and chunks keep step, that falls on the same places.
    """
    windows = select(metrics, "ms_per_token", "timeline")
    first = windows[windows["model"] == "scanlm"].sort_values("position").iloc[0]
    c, n = int(first["chunk_size"]), int(first["n"])
    return range(0) if c % n else range(int(first["position"]) % n, c, n)


def borders(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Time by place in the chunk, what a border adds by its combines, and how many it takes."""
    places = select(metrics, "ms_at_place", "timeline")
    places = places[places["model"] == "scanlm"].sort_values("place")
    costs = select(metrics, "border_ms", "timeline")
    costs = costs[costs["model"] == "scanlm"].sort_values("combines")
    with style():
        figure = new_figure(11.5, 3.6)
        by_place, by_combines, histogram = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        usual, pauses = places["value"].median(), _after_pauses(metrics)
        paused = places["place"].isin(pauses) & (places["value"] > 1.02 * usual)
        colors = [FAINT if pause else T2_COLOR for pause in paused]
        by_place.bar(places["place"], places["value"], width=1.0, color=colors)
        for row in places[paused].itertuples():
            by_place.annotate("first after a pause\nof the clock", (row.place, row.value), (0, 6),
                              textcoords="offset points", ha="center", color=MUTED,
                              fontsize=8)  # fmt: skip
        by_place.set(xlabel="place in the chunk", ylabel="ms per token (median)")
        by_place.set_title("Where a token takes longer")
        names = costs["combines"].astype(int).astype(str)
        by_combines.bar(names, costs["value"], color=T1_COLOR)
        by_combines.set(xlabel="combines at the border", ylabel="ms added", title="By how much")
        histogram.bar(names, 100 * costs["n"] / costs["n"].sum(), color=FAINT, edgecolor=MUTED)
        histogram.set(xlabel="combines at the border", ylabel="% of chunks", title="How often")
        if source:
            caption(figure, source)
        return figure


def _where(rows: pd.DataFrame) -> str:
    places = rows["position"].dropna().unique()
    return f", at position {places[0]:,.0f}" if len(places) == 1 else ""


def _by_chunk_size(metrics: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows of the part on chunk sizes, and that of the usual one, from the part on batches."""
    rows = select(metrics, name, "chunks")
    batches = metrics[
        (metrics["part"] == "batches")
        & (metrics["name"] == name)
        & (metrics["model"] == "scanlm")
        & metrics["batch_size"].isin(rows["batch_size"])
        & ~metrics["chunk_size"].isin(rows["chunk_size"])
    ]
    return pd.concat([rows, batches]).sort_values("chunk_size")


def chunk_sizes(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Median and mean time a token, and memory, by chunk size."""
    with style():
        figure = new_figure(10.0, 3.6)
        left, right = figure.subplots(1, 2)
        colors = sequence_colors(2)
        for name, label, color in (
            ("ms_per_token", "median", colors[0]),
            ("ms_per_token_mean", "mean, borders included", colors[1]),
        ):
            rows = _by_chunk_size(metrics, name)
            left.plot(rows["chunk_size"], rows["value"], "o-", ms=4, color=color, label=label)
        rows = _by_chunk_size(metrics, "state_bytes")
        right.plot(rows["chunk_size"], rows["value"], "o-", ms=4, color=T2_COLOR)
        left.set(ylabel="ms per token", title=f"Time by chunk size{_where(rows)}")
        left.set_ylim(bottom=0)
        left.legend()
        right.set(ylabel="state", title=f"Memory by chunk size{_where(rows)}")
        right.set_ylim(bottom=0)
        right.yaxis.set_major_formatter(EngFormatter(unit="B"))
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            ax.set_xticks(rows["chunk_size"], [f"{c:g}" for c in rows["chunk_size"]])
            ax.minorticks_off()
            ax.set_xlabel("chunk size (tokens)")
        if source:
            caption(figure, source)
        return figure


def throughput(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Tokens per second of all rows together, by batch size."""
    rows = select(metrics, "tokens_per_second", "batches")
    with style():
        figure = new_figure(9.6, 4.4)
        ax = figure.subplots()
        _lines(ax, rows, "batch_size")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        sizes = sorted(rows["batch_size"].unique())
        ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
        ax.yaxis.set_minor_formatter(NullFormatter())
        title = f"Throughput by batch size{_where(rows)}"
        ax.set(xlabel="batch size", ylabel="tokens per second", title=title)
        return _end(figure, source)


def floor_table(metrics: pd.DataFrame, by: str = "position") -> pd.DataFrame:
    """Each model and position against the time of reading weights and state once.

    Args:
        metrics: of one record.
        by: "position", or "batch_size" for the part on throughput.

    Returns:
        Index ``model, <by>``; columns ``ms_per_token`` (of a step, all rows together), ``mean``,
        ``read_MB``, ``floor_ms``, ``times_floor`` and ``to_best_gpt2`` (the median over that of the
        best GPT-2 there).
    """
    part = {"position": "positions", "batch_size": "batches"}[by]
    bandwidth = float(select(metrics, "bandwidth")["value"].iloc[0])
    medians = select(metrics, "ms_per_token", part)
    steady = metrics[metrics["part"] == part]
    table = steady.pivot_table(index=["model", by], columns="name", values="value")
    floor = 1e3 * table["read_bytes"] / bandwidth
    result = pd.DataFrame(
        {
            "ms_per_token": table["ms_per_token"],
            "mean": table["ms_per_token_mean"],
            "read_MB": table["read_bytes"] / 1e6,
            "floor_ms": floor,
            "times_floor": table["ms_per_token"] / floor,
        }
    )
    best = best_gpt2(medians, by).reindex(result.index.get_level_values(by))
    result["to_best_gpt2"] = result["ms_per_token"].to_numpy() / best.to_numpy()
    return result


def batch_gains(metrics: pd.DataFrame) -> pd.DataFrame:
    """How many times the tokens of one row several rows of the scan model bring, and why not more.

    Args:
        metrics: of one record, with the part on throughput.

    Returns:
        Index ``batch_size``; columns ``read_MB`` and ``times_floor`` of a step, then factors over
        one row: ``at_equal_floors`` (a step as near to its floor as that of one row: what the bytes
        allow), ``without_borders`` (of the median steps) and ``measured``.
    """
    table = floor_table(metrics, "batch_size").loc["scanlm"]
    one, rows = table.loc[1], table.index.to_series()
    return pd.DataFrame(
        {
            "read_MB": table["read_MB"],
            "times_floor": table["times_floor"],
            "at_equal_floors": rows * one["read_MB"] / table["read_MB"],
            "without_borders": rows * one["ms_per_token"] / table["ms_per_token"],
            "measured": rows * one["mean"] / table["mean"],
        }
    )


def kernel_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a step of the scan model spends in each kernel, chunk borders shared out.

    On a GPU a kernel begins while the one before it still runs, and what is counted of it includes
    its waiting. So a kernel's time is the most that it can have cost, and the sum of all exceeds
    the step. Subtracted from the timed step they leave the least that the rest costs.

    Args:
        metrics: of one record, with the part on throughput.

    Returns:
        A column each batch size. First the timed step (the mean and the median, which is that of a
        step without a border) and the sum of all kernels, then those of the decoder's step and the
        sum of the others; last, if the decoder's kernels ran, what the median step takes at least
        without ``NOT_PRODUCTS``: for its products and norms. Empty if the record has no profile.
    """
    rows = metrics[metrics["name"] == "kernel_milliseconds"]
    if rows.empty:
        return rows
    kernels = rows.pivot_table(index="kernel", columns="batch_size", values="value", fill_value=0.0)
    timed = metrics[(metrics["part"] == "batches") & (metrics["model"] == "scanlm")]
    steps = timed.pivot_table(index="name", columns="batch_size", values="value")[kernels.columns]
    median = steps.loc["ms_per_token"]
    own = kernels.reindex([kernel for kernel in STEP_KERNELS if kernel in kernels.index])
    table = {
        "the step, mean": steps.loc["ms_per_token_mean"],
        "the step, median": median,
        "all kernels": kernels.sum(),
        **{str(kernel): times for kernel, times in own.iterrows()},
        "others": kernels.drop(own.index).sum(),
    }
    if len(own):
        known = own.reindex(NOT_PRODUCTS, fill_value=0.0).sum()
        table["products and norms, at least"] = (median - known).clip(lower=0.0)
    result = pd.DataFrame(table).T
    result.columns = result.columns.astype(int)
    return result
