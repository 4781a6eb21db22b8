"""What models cost: operations per token by part of the model, and bytes of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from scanlm.errors import ScanLMError
from scanlm.plotting.inference import LABELS, PLAIN
from scanlm.plotting.style import (
    MUTED,
    T1_COLOR,
    T2_COLOR,
    caption,
    model_styles,
    new_figure,
    style,
    text_on,
)

if TYPE_CHECKING:
    import pandas as pd

# parts of scanlm.flops, in the order of the computation
PARTS = {
    "t1": ("T1, aggregates", T1_COLOR),
    "t2": ("T2, predicts", T2_COLOR),
    "blocks": ("blocks", "#3F444C"),
    "head": ("head, scores the vocabulary", "#B8BEC7"),
}


def flops_by_part(table: pd.DataFrame, source: str | None = None) -> Figure:
    """Training operations per token as stacked bars, with each part's share of its bar.

    Args:
        table: one row a model, its index the label; columns ``t1``, ``t2``, ``blocks`` or
            ``head``: operations per token of forward and backward (``scanlm.flops``). A part that
            a model does not have is NaN.
        source: caption.

    Raises:
        ScanLMError: a table without a known part.
    """
    parts = [part for part in PARTS if part in table]
    if not parts or table.empty:
        raise ScanLMError(
            f"the table has none of the parts {', '.join(PARTS)}; it has: "
            f"{', '.join(map(str, table.columns)) or 'nothing'}"
        )
    values = table[parts].astype(float).fillna(0) / 1e6
    totals = values.sum(axis=1)
    rows = np.arange(len(values))[::-1]
    with style():
        figure = new_figure(8.6, 0.5 * len(values) + 1.5)
        ax = figure.subplots()
        left = np.zeros(len(values))
        for part in parts:
            label, color = PARTS[part]
            width = values[part].to_numpy()
            ax.barh(rows, width, left=left, color=color, height=0.64, label=label)
            for row, start, wide, total in zip(rows, left, width, totals, strict=True):
                if wide > 0.03 * totals.max():
                    share = f"{100 * wide / total:.0f} %"
                    ax.text(
                        start + wide / 2,
                        row,
                        share,
                        ha="center",
                        va="center",
                        fontsize=8.5,
                        color=text_on(color),
                    )
            left += width
        for row, total in zip(rows, totals, strict=True):
            ax.text(
                total + 0.012 * totals.max(),
                row,
                f"{total:,.0f}" if totals.max() >= 100 else f"{total:.2f}",
                va="center",
                fontsize=9,
                color=MUTED,
            )
        ax.set_yticks(rows, list(map(str, table.index)))
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.grid(axis="x")
        ax.margins(x=0.08)
        ax.set_xlabel("million operations per token, forward and backward")
        ax.set_title("Arithmetic of training", pad=30)
        ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=len(parts))
        if source:
            caption(figure, source)
    return figure


def state_bytes(metrics: pd.DataFrame, source: str | None = None) -> Figure:
    """Size of the streaming state by position, both axes logarithmic.

    Args:
        metrics: rows with ``model``, ``position``, ``value`` (bytes of one sequence's state), and
            ``name`` == "state_bytes" where there are other metrics too. The scan model's plain
            paths are left out.
        source: caption.

    Raises:
        ScanLMError: no such rows.
    """
    rows = metrics[metrics["name"] == "state_bytes"] if "name" in metrics else metrics
    rows = rows.dropna(subset=["position", "value"])
    rows = rows[~rows["model"].isin(PLAIN)]
    if rows.empty:
        raise ScanLMError("the records have no state_bytes with a position: nothing to draw")
    looks = model_styles(list(rows["model"].unique()))
    with style():
        figure = new_figure(7.4, 4.4)
        ax = figure.subplots()
        for model, part in rows.groupby("model", sort=False):
            look = looks[str(model)]
            values = part.groupby("position")["value"].max()
            label = LABELS.get(str(model), look.label)
            ax.plot(values.index, values, color=look.color, ls=look.linestyle, label=label)
        ax.set_xscale("log", base=4)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        ax.yaxis.set_major_formatter(EngFormatter(unit="B"))
        ax.set(xlabel="tokens read", ylabel="state of one sequence")
        ax.set_title("What has to be kept to go on")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        if source:
            caption(figure, source)
    return figure


def memory_bars(
    values: Mapping[str, float], title: str, label: str, source: str | None = None
) -> Figure:
    """Bytes as bars, one a model.

    Args:
        values: bytes by model id, drawn from top to bottom.
        title: of the figure.
        label: of the axis.
        source: caption.

    Raises:
        ScanLMError: no values.
    """
    if not values:
        raise ScanLMError("no values to draw")
    looks = model_styles(list(values))
    megabytes = {model: value / 1e6 for model, value in values.items()}
    with style():
        figure = new_figure(7.4, 0.45 * len(values) + 1.3)
        ax = figure.subplots()
        rows = range(len(values))[::-1]
        for row, (model, value) in zip(rows, megabytes.items(), strict=True):
            ax.barh(row, value, color=looks[model].color, height=0.62)
            ax.annotate(
                f"{value:,.1f} MB",
                (value, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=MUTED,
            )
        ax.set_yticks(list(rows), [looks[model].label for model in values])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        ax.grid(False, axis="y")
        ax.set_xlim(0, 1.18 * max(megabytes.values()))
        ax.set(xlabel=label, title=title)
        if source:
            caption(figure, source)
    return figure
