"""Which irreducible representations trained models use for the elements of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from scanlm.plotting.style import (
    EXTRA_COLORS,
    INK,
    MUTED,
    PAPER,
    caption,
    new_figure,
    style,
)

if TYPE_CHECKING:
    import pandas as pd

GAP = 1.3  # rows between two series, where the second one's name stands


def _colors(names: list[str]) -> dict[str, str | tuple[float, ...]]:
    """A colour a degree, paler for the second component of it (with a prime)."""
    degree = {name: name.rstrip("'").partition(" ")[0] for name in names}
    degrees = list(dict.fromkeys(degree.values()))
    found: dict[str, str | tuple[float, ...]] = {}
    for name in names:
        place = degrees.index(degree[name])
        color = MUTED if place == 0 else EXTRA_COLORS[(place - 1) % len(EXTRA_COLORS)]
        pale = name.endswith("'") and place > 0
        found[name] = tuple(0.45 * c + 0.55 for c in to_rgb(color)) if pale else color
    return found


def representation_shares(table: pd.DataFrame, source: str | None = None) -> Figure:
    """One bar a run: what its code is made of; beside it how far the model reaches.

    Args:
        table: a row a run and component: ``series``, ``seed``, ``irrep`` (a name of
            ``representations.components``), ``value`` (its share) and ``reach``.
        source: caption.
    """
    names = list(dict.fromkeys(table["irrep"]))
    colors = _colors(names)
    shares = table.pivot_table(index=["series", "seed"], columns="irrep", values="value")[names]
    reach = table.groupby(["series", "seed"])["reach"].first()
    order = list(dict.fromkeys(table["series"]))
    rows = len(shares) + GAP * len(order)
    with style():
        figure = new_figure(7.6, 0.2 * rows + 1.5)
        ax = figure.subplots()
        y, ticks = 0.0, {}
        for label in order:
            y += GAP
            ax.annotate(
                label, (0, y - 0.65), va="bottom", fontsize=9.5, fontweight="bold", color=INK
            )
            part = shares.loc[label]
            runs = part.assign(main=part.to_numpy().argmax(1), reach=reach.loc[label])
            for seed, run in runs.sort_values(
                ["main", "reach"], ascending=[True, False]
            ).iterrows():
                left = 0.0
                for name in names:
                    ax.barh(y, run[name], 0.84, left, color=colors[name], ec=PAPER, lw=0.4)
                    left += run[name]
                ax.annotate(
                    f"{run['reach']:,.0f}",
                    (1.01, y),
                    va="center",
                    fontsize=8,
                    color=INK,
                    annotation_clip=False,
                )
                ticks[y] = f"seed {seed}"
                y += 1
        for name in names:
            ax.barh(0, 0, color=colors[name], label=name)
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=len(names),
            title="degree",
            title_fontsize=9,
            alignment="left",
            columnspacing=1.2,
            handlelength=1.2,
        )
        ax.annotate(
            "reach",
            (1.01, GAP - 0.65),
            va="bottom",
            fontsize=8.5,
            color=MUTED,
            annotation_clip=False,
        )
        ax.set_yticks(list(ticks), ticks.values(), fontsize=7.5)
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(y - 0.3, -0.2)
        ax.set_xlim(0, 1)
        ax.grid(False)
        ax.set_xlabel("share of the differences between the codes")
        ax.set_title("Representations in the codes of single elements", pad=46)
        if source:
            caption(figure, source)
    return figure
