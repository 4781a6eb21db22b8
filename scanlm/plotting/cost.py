"""What models cost: operations per token by part of the model, and bytes of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from scanlm.errors import ScanLMError
from scanlm.plotting.style import (
    MUTED,
    T1_COLOR,
    T2_COLOR,
    caption,
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
