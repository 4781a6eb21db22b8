"""Curves from run records: loss by training, by position, by chunk size, and speed.

Every function takes the long frame of ``scanlm.records.read_metrics``: one row a metric, with
``run_id``, ``experiment``, ``model``, ``seed``, ``split``, ``step``, ``tokens``, ``name``,
``value`` and the axes that apply (``position``, ``length``, ``chunk_size``, ...). Runs of one
series that differ in the seed only become a mean line in a band from the least to the greatest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from scanlm.errors import ScanLMError, nearest
from scanlm.plotting.style import (
    FAINT,
    FAMILIES,
    INK,
    MUTED,
    FamilyStyle,
    caption,
    model_styles,
    new_figure,
    sequence_colors,
    style,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

X_LABELS = {
    "tokens": "tokens trained on",
    "step": "optimiser steps",
    "seconds": "seconds of training (start and validation included)",
    "flops": "training compute (FLOP)",
}
NAME_LABELS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity (per token)",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "tokens_per_second": "tokens per second",
}


def _rows(
    metrics: pd.DataFrame, name: str, needs: tuple[str, ...], split: str | None
) -> pd.DataFrame:
    """Rows of one metric that have the axes in ``needs``; perplexities are made from losses."""
    for column in needs:
        if column not in metrics:
            raise ScanLMError(
                f"the records have no column {column!r}.{nearest(column, metrics.columns)}"
            )
    rows = metrics[metrics["name"] == name]
    if rows.dropna(subset=list(needs)).empty and name == "perplexity":
        rows = metrics[metrics["name"] == "loss"].assign(name=name)
        rows = rows.assign(value=np.exp(rows["value"]))
    known = ", ".join(sorted(metrics["name"].unique())) or "none"
    if rows.empty:
        raise ScanLMError(f"the records have no metric {name!r}; they have: {known}")
    if split is not None:
        splits = sorted(rows["split"].dropna().unique())
        rows = rows[rows["split"] == split]
        if rows.empty:
            raise ScanLMError(f"no {name!r} on split {split!r}.{nearest(split, splits)}")
    rows = rows.dropna(subset=[*needs, "value"])
    if rows.empty:
        raise ScanLMError(f"no {name!r} has the axis {' and '.join(needs)}: nothing to draw")
    return rows


def last_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Each run's rows of its last step."""
    if "step" not in rows or rows["step"].isna().all():
        return rows
    return rows[rows["step"] == rows.groupby("run_id")["step"].transform("max")]


def final_rows(metrics: pd.DataFrame, name: str, split: str | None) -> pd.DataFrame:
    """Each run's last value of a metric, a row a run.

    Curves score a part of a split, and at the end all of it is scored by position: where that is
    recorded it is the final loss.

    Raises:
        ScanLMError: the records have no such metric or split.
    """
    last = last_rows(loss_rows(metrics, name, "step", split))
    if name not in ("loss", "perplexity") or not {"position", "n"} <= set(metrics.columns):
        return last
    losses = metrics[(metrics["name"] == "loss") & (metrics["split"] == split)]
    whole = last_rows(losses.dropna(subset=["position", "n"]))
    sums = whole.assign(nats=whole["value"] * whole["n"]).groupby("run_id")[["nats", "n"]].sum()
    means = last["run_id"].map(sums["nats"] / sums["n"])
    values = np.exp(means) if name == "perplexity" else means
    return last.assign(value=values.fillna(last["value"]))


def _medians(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row a run and combination of ``keys``: the median of its values."""
    return rows.groupby(["run_id", *keys], sort=False)["value"].median().reset_index()


def _series(rows: pd.DataFrame, by: str) -> list[tuple[str, FamilyStyle, pd.DataFrame]]:
    """Split rows into series with their styles: models by family, other columns in order."""
    if by not in rows:
        raise ScanLMError(f"the records have no column {by!r}.{nearest(by, rows.columns)}")
    keys = list(rows[by].dropna().unique())
    if by in ("model", "variant"):  # a variant's name begins with its model's
        styles = model_styles(keys)
        return [(styles[k].label, styles[k], rows[rows[by] == k]) for k in keys]
    keys = sorted(keys)
    word = by.replace("_size", "").replace("_", " ")
    named = [f"{word} {k:g}" if isinstance(k, Real) else f"{k}" for k in keys]
    looks = [FamilyStyle(n, c, "o") for n, c in zip(named, sequence_colors(len(keys)), strict=True)]
    return [(s.label, s, rows[rows[by] == k]) for k, s in zip(keys, looks, strict=True)]


def seed_spread(rows: pd.DataFrame, x: str) -> pd.DataFrame:
    """Mean, least and greatest value over runs, by step where ``x`` differs between runs."""
    key = "step" if x == "seconds" and rows["step"].notna().all() else x
    groups = rows.groupby(key)
    table = groups["value"].agg(["mean", "min", "max"])
    return table.assign(x=groups[x].mean()).sort_values("x")


def _draw(ax: Axes, rows: pd.DataFrame, x: str, look: FamilyStyle, label: str, faint: bool) -> None:
    table = seed_spread(rows, x)
    few = len(table) <= 25 and not faint
    ax.plot(
        table["x"],
        table["mean"],
        color=look.color,
        ls=look.linestyle,
        lw=0.9 if faint else 1.9,
        alpha=0.45 if faint else 1.0,
        marker=look.marker if few else None,
        ms=4,
        label=None if faint else label,
    )
    if rows["run_id"].nunique() > 1:
        ax.fill_between(table["x"], table["min"], table["max"], color=look.color, alpha=0.15, lw=0)


def _references(ax: Axes, values: Mapping[str, float] | None) -> None:
    """Dashed lines across the axes, each named at its right end."""
    for name, value in (values or {}).items():
        ax.axhline(value, color=MUTED, lw=1.0, ls=(0, (5, 3)), zorder=1)
        ax.annotate(
            name,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=MUTED,
        )


def _finish(ax: Axes, source: str | None) -> None:
    count = len(ax.get_legend_handles_labels()[0])
    if count > 3:  # beside the axes, where no curve runs
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif count > 1:
        ax.legend()
    if source:
        caption(ax.figure, source)  # type: ignore[arg-type]


def loss_rows(metrics: pd.DataFrame, name: str, x: str, split: str | None) -> pd.DataFrame:
    """Rows of a metric over ``x``: if there are any that belong to no position or length, those.

    Raises:
        ScanLMError: the records have no such metric, axis or split.
    """
    rows = _rows(metrics, name, (x,), split)
    for axis in ("position", "length"):
        if axis in rows and rows[axis].isna().any():
            rows = rows[rows[axis].isna()]
    return rows


def loss_curves(
    metrics: pd.DataFrame,
    x: str = "tokens",
    name: str = "loss",
    split: str | None = "validation",
    by: str = "model",
    references: Mapping[str, float] | None = None,
    source: str | None = None,
) -> Figure:
    """A metric over the course of training.

    Args:
        metrics: frame of ``records.read_metrics``.
        x: "tokens", "step", "seconds" or "flops".
        name: "loss", "perplexity", "accuracy" or another metric of the records.
        split: which split; ``None`` draws the training split faintly behind the others.
        by: column that tells series apart: "model", "chunk_size", ...
        references: values to compare with, by name, drawn as dashed lines: what a unigram model
            reaches, say.
        source: caption, see ``records.source_line``.

    Raises:
        ScanLMError: the records have no such column, metric or split.
    """
    rows = loss_rows(metrics, name, x, split)
    if "split" not in rows:
        rows = rows.assign(split=None)
    with style():
        figure = new_figure(7.4, 4.2)
        ax = figure.subplots()
        behind = False
        for label, look, part in _series(rows, by):
            others = [s for s in part["split"].dropna().unique() if s != "train"]
            for part_split, lines in part.groupby("split", dropna=False):
                faint = part_split == "train" and bool(others)
                behind |= faint
                several = len(others) > 1 and not faint
                _draw(ax, lines, x, look, f"{label}, {part_split}" if several else label, faint)
        if behind:
            ax.plot([], [], color=MUTED, lw=0.9, alpha=0.45, label="while training")
        ax.set(xlabel=X_LABELS.get(x, x), ylabel=NAME_LABELS.get(name, name))
        if x in ("tokens", "flops", "step"):
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        title = {"train": "Training", "validation": "Validation", "test": "Test"}
        ax.set_title(f"{title.get(split or '', split or 'Training and validation')} {name}")
        _references(ax, references)
        _finish(ax, source)
    return figure


def loss_by_position(
    metrics: pd.DataFrame,
    chunk_size: int | None = None,
    name: str = "loss",
    split: str | None = "validation",
    by: str = "model",
    window: int = 1,
    source: str | None = None,
) -> Figure:
    """A metric by position in the sequence, at each run's last step.

    Args:
        metrics: frame of ``records.read_metrics``.
        chunk_size: draw chunk borders at its multiples, in tokens.
        name: "loss" or "perplexity".
        split: which split; ``None`` for records without splits.
        by: column that tells series apart.
        window: positions in the running mean drawn over the raw values (1: only the raw values;
            the raw values of more than three series would hide the means and are left out).
        source: caption.

    Raises:
        ScanLMError: the records have no values by position.
    """
    rows = last_rows(_rows(metrics, name, ("position",), split))
    with style():
        figure = new_figure(9.6, 3.9)
        ax = figure.subplots()
        if chunk_size:
            for border in np.arange(chunk_size, rows["position"].max() + 1, chunk_size):
                ax.axvline(border - 0.5, color=FAINT, lw=0.9, zorder=0)
        series = _series(rows, by)
        for label, look, part in series:
            table = seed_spread(part, "position")
            # a running mean over a border would show its effect before it
            chunks = table["x"] // (chunk_size or len(table))
            smooth = (
                table["mean"]
                .groupby(chunks)
                .transform(lambda mean: mean.rolling(window, center=True, min_periods=1).mean())
            )
            if window > 1 and len(series) <= 3:
                ax.plot(table["x"], table["mean"], color=look.color, lw=0.6, alpha=0.35)
            ax.plot(table["x"], smooth, color=look.color, ls=look.linestyle, lw=1.5, label=label)
            if part["run_id"].nunique() > 1 and (window == 1 or len(series) <= 3):
                ax.fill_between(
                    table["x"], table["min"], table["max"], color=look.color, alpha=0.15, lw=0
                )
        ax.set(xlabel="position in the sequence", ylabel=NAME_LABELS.get(name, name))
        ax.set_xlim(-0.5, rows["position"].max() + 0.5)
        ax.set_title(f"{name.capitalize()} by position")
        _finish(ax, source)
    return figure


def loss_within_chunk(
    metrics: pd.DataFrame,
    chunk_size: int,
    name: str = "loss",
    split: str | None = "validation",
    source: str | None = None,
) -> Figure:
    """A metric by place in the chunk: the first chunk, which has no past, and all later ones.

    The distance between the two lines is what the prefix state is worth at that place.

    Args:
        metrics: frame of ``records.read_metrics``.
        chunk_size: tokens per chunk.
        name: "loss" or "perplexity".
        split: which split; ``None`` for records without splits.
        source: caption.

    Raises:
        ScanLMError: the records have no values by position, or of one chunk only.
    """
    rows = last_rows(_rows(metrics, "loss", ("position",), split))
    rows = rows.assign(place=rows["position"] % chunk_size, first=rows["position"] < chunk_size)
    if rows["first"].all():
        raise ScanLMError(
            f"the records end at position {rows['position'].max():g}, within the first chunk of "
            f"{chunk_size}: there is no prefix to see"
        )
    # a position that counts more tokens (the last block is partial) weighs more
    weight = rows["n"] if "n" in rows else rows["value"] * 0 + 1
    sums = rows.assign(nats=rows["value"] * weight, n=weight).groupby(["first", "place"])
    mean = sums["nats"].sum() / sums["n"].sum()
    with style():
        figure = new_figure(7.4, 4.0)
        ax = figure.subplots()
        for first, label, color in (
            (True, "first chunk: nothing before it", MUTED),
            (False, "later chunks: a prefix state before them", FAMILIES["scanlm"].color),
        ):
            values = mean.loc[first]
            shown = np.exp(values) if name == "perplexity" else values
            ax.plot(values.index, shown, color=color, marker=".", ms=5, label=label)
        ax.set(xlabel="place in the chunk", ylabel=NAME_LABELS.get(name, name))
        ax.set_title(f"{name.capitalize()} by place in the chunk")
        _finish(ax, source)
    return figure


def chunk_size_comparison(
    metrics: pd.DataFrame,
    name: str = "loss",
    split: str | None = "validation",
    by: str = "model",
    source: str | None = None,
) -> Figure:
    """Final value of a metric by chunk size, and beside it the speed if the records have it.

    Models whose ids differ in the chunk size only (``scanlm_base_c32``, ``scanlm_base_c64``) are
    one series.

    Args:
        metrics: frame of ``records.read_metrics``; runs without a chunk size are left out.
        name: "loss" or "perplexity".
        split: which split.
        by: column that tells series apart.
        source: caption.

    Raises:
        ScanLMError: the records have no chunk sizes or no such metric.
    """
    if "model" in metrics:
        metrics = metrics.assign(model=metrics["model"].str.replace(r"_c\d+$", "", regex=True))
    rows = final_rows(metrics, name, split)
    if "chunk_size" not in rows or rows["chunk_size"].isna().all():
        raise ScanLMError(f"no {name!r} has the axis chunk_size: nothing to draw")
    speed = metrics[metrics["name"] == "tokens_per_second"].dropna(subset=["chunk_size", "value"])
    panels: list[tuple[pd.DataFrame, str, str]] = [
        (rows, NAME_LABELS.get(name, name), f"Final {split or ''} {name}")
    ]
    if not speed.empty:
        runs = _medians(speed, [by, "chunk_size"])
        panels.append((runs, "tokens per second", "Training speed"))
    with style():
        figure = new_figure(4.8 * len(panels) + 0.4, 3.9)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (values, ylabel, title) in zip(axes, panels, strict=True):
            for label, look, part in _series(values, by):
                table = seed_spread(part, "chunk_size")
                ax.plot(part["chunk_size"], part["value"], ".", color=look.color, alpha=0.4)
                ax.plot(
                    table["x"],
                    table["mean"],
                    color=look.color,
                    ls=look.linestyle,
                    marker=look.marker,
                    ms=6,
                    label=label,
                )
            sizes = sorted(values["chunk_size"].unique())
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, [f"{size:g}" for size in sizes])
            ax.minorticks_off()
            ax.set(xlabel="chunk size (tokens)", ylabel=ylabel, title=" ".join(title.split()))
        if len(panels) > 1:
            axes[1].set_ylim(0, 1.08 * axes[1].dataLim.y1)
            axes[1].yaxis.set_major_formatter(EngFormatter(sep=""))
        _finish(axes[0], source)
    return figure


def name_places(ax: Axes, places: Iterable[float]) -> None:
    """Ticks of a logarithmic axis at the places that are drawn, where their numbers have room."""
    ordered = sorted(set(places))
    ticks = ordered[:1]
    for place in ordered[1:]:
        if place / ticks[-1] > (ordered[-1] / ordered[0]) ** 0.2:  # a fifth of the axis
            ticks.append(place)
    ax.set_xticks(ticks, [f"{place:,.0f}" for place in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def throughput(
    metrics: pd.DataFrame,
    x: str | None = None,
    by: str = "model",
    name: str = "tokens_per_second",
    source: str | None = None,
    title: str = "Speed",
) -> Figure:
    """Tokens per second: bars by model, or lines over an axis of the records.

    A run that recorded many values (one every few steps) counts with their median.

    Args:
        metrics: frame of ``records.read_metrics``.
        x: "length", "chunk_size", "batch_size", ... for lines; ``None`` for bars.
        by: column that tells series apart.
        name: metric to draw.
        source: caption.
        title: of the figure.

    Raises:
        ScanLMError: the records have no such metric or axis.
    """
    rows = _rows(metrics, name, (x,) if x else (), None)
    values = _medians(rows, [by, *([x] if x else [])])
    with style():
        if x:
            figure = new_figure(7.4, 4.2)
            ax = figure.subplots()
            for label, look, part in _series(values, by):
                if values[x].nunique() < 3:  # a line would look like measurements between them
                    look = replace(look, linestyle="")
                _draw(ax, part.assign(step=np.nan), x, look, label, faint=False)
            ax.set_xscale("log", base=2)
            name_places(ax, values[x])
            ax.set(xlabel=x.replace("_", " "), ylabel=NAME_LABELS.get(name, name))
            ax.set_ylim(0, 1.08 * values["value"].max())
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            series = _series(values, by)
            series.sort(key=lambda item: item[2]["value"].mean())
            figure = new_figure(7.4, 0.55 * len(series) + 1.3)
            ax = figure.subplots()
            for row, (_, look, part) in enumerate(series):
                mean = part["value"].mean()
                ax.barh(row, mean, color=look.color, height=0.62)
                ax.plot(part["value"], [row] * len(part), ".", color=INK, ms=4, alpha=0.6)
                ax.annotate(
                    f"{mean:,.0f}",
                    (part["value"].max(), row),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                    color=MUTED,
                )
            ax.set_yticks(range(len(series)), [label for label, _, _ in series])
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="x")
            ax.grid(False, axis="y")
            ax.margins(x=0.14)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.set_xlabel(NAME_LABELS.get(name, name))
        ax.set_title(title)
        _finish(ax, source)
    return figure
