"""State tracking: words drawn by hand, curricula, error by length and by depth of the tree.

Curves take the long frame of ``scanlm.records.read_metrics`` with a column ``series``, which
``label_series`` adds; the figures of a single model take the frames of ``scanlm.state_probe``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from scanlm.errors import ScanLMError
from scanlm.plotting.style import (
    EXTRA_COLORS,
    FAINT,
    FAMILIES,
    INK,
    MUTED,
    PAPER,
    FamilyStyle,
    caption,
    family_of,
    new_figure,
    sequence_colors,
    style,
)

if TYPE_CHECKING:
    import pandas as pd

    from scanlm.groups import Group

SCAN = FAMILIES["scanlm"].color
SHADE = "#F1E9DC"  # lengths that were trained on
OTHER = "#5F7F9B"  # what is no family, where names tell it apart
STRIP = "#EEF0F3"  # where no error was found
APART = 1.6  # factor between rows of series without errors, on the axis of errors
NEAR = 1.2  # factor between two reaches below which their points cover one another
NARROWEST = 0.04  # share of the steps that a stage needs for a label of its own
LEVELS = "the stage before known, the rest guessed"
# five items in a hand of cards, told apart without their colours by their letters
ITEM_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
TITLES = {
    "accuracy": "Error over all positions",
    "accuracy_last": "Error at the last position",
    "accuracy_sequence": "Share of words with an error",
}


# Series


def run_label(model: str, parameters: Mapping[str, Any]) -> str:
    """What a run is called in figures: its family, and what makes it differ within it."""
    family = "scanlm" if model == "scan" else family_of(model)
    label = FAMILIES[family].label if family else model
    if family == "gated_deltanet":
        negative = (parameters.get("config") or {}).get("allow_neg_eigval")
        if negative is not None:
            label += ", negative eigenvalues" if negative else ", positive eigenvalues"
    return label


def label_series(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Metrics with a column ``series``: the label of each row's run.

    Args:
        metrics: of ``records.read_metrics``.
        runs: of ``records.read_runs``, the same records.
    """
    labels = {
        run["run_id"]: run_label(run["model"], run["parameters"]) for _, run in runs.iterrows()
    }
    return metrics.assign(series=metrics["run_id"].map(labels))


def _looks(series: Sequence[str], other: str | None = None) -> dict[str, FamilyStyle]:
    """A style per label: families by their colour, what is none in ``other`` or in order."""
    by_label = {f.label: f for f in FAMILIES.values()}
    unknown = [s for s in series if s.split(", ")[0] not in by_label and s not in by_label]
    # settings of one model (chunk sizes, ablations) are not families
    colors = sequence_colors(len(unknown)) if len(unknown) > len(EXTRA_COLORS) else EXTRA_COLORS
    looks = {}
    # a family's own label has its own line; its variants ("scan model, dropout 0") come after
    taken = {name: {0} for name in series if name in by_label}
    for name in series:
        if name in by_label:
            looks[name] = by_label[name]
            continue
        root = name.split(", ")[0]
        base = by_label.get(root)
        if base is None:
            looks[name] = FamilyStyle(name, other or colors[unknown.index(name)], "o")
            continue
        places = taken.setdefault(root, set())
        # positive eigenvalues are dashed, before their counterpart and without it, too
        place = next(i for i in count("positive" in name) if i not in places)
        places.add(place)
        looks[name] = base.member(place, name)
    return looks


def _ordered(series: pd.Series) -> list[str]:
    """Labels in the order of their first row, the scan model in front."""
    labels = list(series.dropna().unique())
    return sorted(labels, key=lambda label: label != "scan model")


def _seeds(rows: pd.DataFrame) -> int:
    return int(rows["run_id"].nunique())


def _need(metrics: pd.DataFrame, what: str, rows: pd.DataFrame) -> pd.DataFrame:
    if rows.empty:
        known = ", ".join(sorted(metrics["name"].unique())) or "none"
        raise ScanLMError(f"the records have no {what}; their metrics are: {known}")
    return rows


def _column(metrics: pd.DataFrame, name: str) -> pd.Series:
    return metrics[name] if name in metrics else metrics["value"] * np.nan


def _in_precision(rows: pd.DataFrame, dtype: str | None) -> pd.DataFrame:
    """Of each run what was measured in ``dtype``, or all if it has nothing in it."""
    if not dtype or "dtype" not in rows:
        return rows
    fits = rows["dtype"] == dtype
    return rows[fits | ~fits.groupby(rows["run_id"]).transform("any")]


def evaluated(
    metrics: pd.DataFrame, name: str = "accuracy", dtype: str | None = "float32"
) -> pd.DataFrame:
    """Evaluations by length of the test words: of a run in several precisions, those in ``dtype``.

    Raises:
        ScanLMError: the records have none.
    """
    rows = metrics[
        (metrics["name"] == name)
        & (_column(metrics, "split") == "test")
        & _column(metrics, "length").notna()
        & _column(metrics, "position").isna()
    ]
    rows = _in_precision(rows, dtype)
    return _need(metrics, f"{name!r} by length on test words", rows)


# The task


def circuit_depth(length: int = 65536, layers: int = 12, composed: int = 2) -> Figure:
    """Rounds of composing that different machines spend on the product of n elements.

    Args:
        length: greatest n.
        layers: of a network of fixed depth.
        composed: elements that one round joins.
    """
    n = np.unique(np.geomspace(2, length, 200).astype(int))
    tree = np.ceil(np.log(n) / np.log(composed))
    with style():
        figure = new_figure(7.4, 3.7)
        ax = figure.subplots()
        ax.plot(n, n - 1, color=FAMILIES["gla"].color, label="one after another")
        ax.plot(n, tree, color=SCAN, label="a tree of pairs", drawstyle="steps-pre")
        ax.axhline(layers, color=FAMILIES["gpt2"].color, ls="--", label=f"{layers} layers")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.set_xlim(2, length)
        ax.set_ylim(1, length)
        plain = FuncFormatter(lambda v, _: f"{v:,.0f}")
        ax.xaxis.set_major_formatter(plain)
        ax.set_yticks([4**k for k in range(9) if 4**k <= length])
        ax.yaxis.set_major_formatter(plain)
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set(
            xlabel="elements in the word",
            ylabel="rounds, one after another",
            title="Depth that a product needs",
        )
        ax.legend(loc="upper left")
    return figure


def braid(group: Group, word: Sequence[int], shown: int | None = None) -> Figure:
    """A word of permutations, played: every item's line from place to place.

    Places count from 0, and a move is written as the images of 0, 1, 2, ...: as the group's
    ``elements`` are.

    Args:
        group: a group of permutations.
        word: indices of its elements.
        shown: how many steps have been played; the rest stays covered. ``None``: all.

    Raises:
        ScanLMError: a group of residues, an empty word, or more steps than the word has.
    """
    if not isinstance(group.elements[0], tuple):
        raise ScanLMError(f"{group.name} has no items to move: draw a group of permutations")
    if not len(word) or not 0 <= (len(word) if shown is None else shown) <= len(word):
        raise ScanLMError(f"shown={shown} of a word of {len(word)}: choose 0 to its length")
    shown = len(word) if shown is None else shown
    size = len(group.elements[0])
    places = [list(range(size))]
    for element in word[:shown]:
        permutation: Any = group.elements[element]
        places.append([permutation[p] for p in places[-1]])
    t = np.linspace(0, 1, 30)
    ease = t * t * (3 - 2 * t)
    with style():
        figure = new_figure(min(1.1 + 0.95 * len(word), 13), 0.5 * size + 1.5)
        ax = figure.subplots()
        for item in range(size):
            color = ITEM_COLORS[item % len(ITEM_COLORS)]
            for i in range(shown):
                a, b = places[i][item], places[i + 1][item]
                y = a + (b - a) * ease
                ax.plot(i + t, y, color=PAPER, lw=6, solid_capstyle="butt", zorder=2)
                ax.plot(i + t, y, color=color, lw=2.4, solid_capstyle="butt", zorder=2)
            for i in range(shown + 1):
                ax.plot(i, places[i][item], "o", ms=13, color=color, zorder=3)
                ax.annotate(
                    "abcde"[item],
                    (i, places[i][item]),
                    ha="center",
                    va="center",
                    color=PAPER,
                    fontsize=8.5,
                    fontweight="bold",
                    zorder=4,
                )
        for i, element in enumerate(word):
            images = "".join(str(x) for x in group.elements[element])  # type: ignore[union-attr]
            known = i < shown
            ax.annotate(
                images,
                (i + 0.5, -0.85),
                ha="center",
                fontsize=8.5,
                color=INK if known else MUTED,
                annotation_clip=False,
            )
            if not known:
                ax.annotate("?", (i + 1, (size - 1) / 2), ha="center", color=FAINT, fontsize=16)
        ax.set_ylim(size - 0.5, -1.15)
        ax.set_xlim(-0.4, len(word) + 0.4)
        ax.set_yticks(range(size))
        ax.set_xticks(range(len(word) + 1))
        ax.set(xlabel="elements read", ylabel="place")
        ax.grid(False)
        ax.tick_params(length=0)
        ax.set_title(f"A word of {group.name}: which item lies where?", pad=16)
    return figure


# Training


def curriculum_curves(
    metrics: pd.DataFrame, references: bool = True, source: str | None = None
) -> Figure:
    """Training loss and validation accuracy over the steps, with the stages' lengths.

    Each run has stages of its own length; borders and lengths are those of one run, the first of
    the first series, which a note names if there are others. Of a last stage that takes more than
    twice the steps of all before, as much as these took is shown.

    Args:
        metrics: with ``series``; of runs that differ in the seed the first is drawn strongly.
        references: draw what a model loses that knows only the products of the stage before
            (needs ``order``, the group's, in the frame).
        source: caption.

    Raises:
        ScanLMError: the records have no losses by stage.
    """
    has_length = _column(metrics, "length").notna()
    loss = metrics[(metrics["name"] == "loss") & has_length]
    worst = metrics[
        (metrics["name"] == "accuracy_last")
        & has_length
        & (_column(metrics, "split") == "validation")
    ]
    _need(metrics, "losses by stage", loss)
    labels = _ordered(metrics["series"])
    looks = _looks(labels)
    with style():
        figure = new_figure(9.4, 5.6)
        top, bottom = figure.subplots(2, 1, sharex=True)
        for ax, rows in ((top, loss), (bottom, worst)):
            for label in labels:
                look = looks[label]
                for number, (_, run) in enumerate(rows[rows["series"] == label].groupby("run_id")):
                    run = run.sort_values("step")
                    ax.plot(
                        run["step"],
                        run["value"],
                        color=look.color,
                        ls=look.linestyle,
                        lw=1.3,
                        alpha=0.9 if number == 0 else 0.3,
                        label=label if number == 0 else None,
                    )
        first = loss[loss["series"] == labels[0]]
        stages = first[first["run_id"] == first["run_id"].iloc[0]]
        order = float(stages["order"].iloc[0]) if "order" in stages else None
        ends = stages.groupby("length")["step"].max().sort_index()
        shown = _shown(ends.to_numpy(float), float(metrics["step"].max()))
        _stages(top, bottom, ends, shown, order if references else None)
        _whose_stages(top, loss, first, references)
        top.set(xlim=(-0.02 * shown, shown), ylabel="training loss\n(nats per position)")
        top.set_title("The curriculum", pad=24)  # the lengths stand below it
        top.set_ylim(bottom=0)
        bottom.set(xlabel="optimiser steps", ylabel="validation:\nlast position right")
        bottom.set_ylim(-0.03, 1.03)
        bottom.yaxis.set_major_formatter(PercentFormatter(1))
        if len(labels) > 1:
            bottom.legend(loc="lower left", handlelength=2.6)
        if source:
            caption(figure, source)
    return figure


def _shown(ends: np.ndarray, last: float) -> float:
    """Up to which step the curves are drawn, of stages that end at these steps."""
    if len(ends) > 1 and ends[-1] > 3 * ends[-2]:
        return float(2 * ends[-2])
    return 1.02 * last


def _stages(top: Axes, bottom: Axes, ends: pd.Series, shown: float, order: float | None) -> None:
    """Borders of stages that end at these steps, by length; above them the lengths; and, of a
    group of this order, what chance would lose."""
    start, before = 0.0, 0.0
    narrow: list[tuple[float, float, float]] = []  # neighbours without room for their own labels
    labels: list[tuple[float, str]] = []

    def close() -> None:
        if narrow:
            text = ", ".join(f"{length:g}" for length, _, _ in narrow)
            labels.append(((narrow[0][1] + narrow[-1][2]) / 2, text))
            narrow.clear()

    for length, end in zip(ends.index.to_numpy(float), ends.to_numpy(float), strict=True):
        for ax in (top, bottom):
            if start:
                ax.axvline(start, color=FAINT, lw=1, zorder=0)
        if end - start > NARROWEST * shown:
            close()
            until = f" (until step {end:,.0f})" if end > shown else ""
            labels.append(((start + min(end, shown)) / 2, f"{length:g}{until}"))
        else:
            narrow.append((length, start, end))
        if order is not None:
            level = (length - (before or 1)) / length * np.log(order)
            (dashed,) = top.plot([start, end], [level] * 2, color=MUTED, ls=(0, (4, 3)), lw=1.1)
            dashed.set(zorder=1, label=LEVELS)
            top.legend(handles=[dashed], loc="upper right")
        start, before = end, length
    close()
    for x, text in labels:
        _above(top, text, ("data", "axes fraction"), x, "center")
    _above(top, "length of words: ", "axes fraction", 0, "right")


def _above(ax: Axes, text: str, coordinates: Any, x: float, align: str, points: float = 4) -> None:
    """A small text above the axes."""
    ax.annotate(
        text,
        (x, 1.0),
        xycoords=coordinates,
        xytext=(0, points),
        textcoords="offset points",
        ha=align,
        fontsize=8.5,
        color=MUTED,
        annotation_clip=False,
    )


def _whose_stages(top: Axes, loss: pd.DataFrame, first: pd.DataFrame, references: bool) -> None:
    """Whose run the borders are of, if several are drawn."""
    if _seeds(loss) == 1:
        return
    owner = first["series"].iloc[0]
    seeds = _seeds(first)
    if seeds > 1:
        owner = f"seed {first['seed'].iloc[0]:g}" if "seed" in first else "the first run"
    whose = ["strong line"] * (seeds > 1) + ["lengths", "borders"] + ["dashes"] * references
    _above(top, f"{', '.join(whose)}: {owner}", "axes fraction", 1, "right", points=20)


# Length


def error_by_length(
    metrics: pd.DataFrame,
    trained_length: float | Mapping[str, float] | None = None,
    name: str = "accuracy",
    chance: float | None = None,
    chunk_size: int = 1,
    by: str = "series",
    dtype: str | None = "float32",
    title: str | None = None,
    source: str | None = None,
) -> Figure:
    """Error against length: the headline.

    A share of errors of exactly 0 lies in a strip at the lower edge, as a hollow point, each series
    in a row of its own: the true one is below 3 in the number of words measured. Of several seeds
    the strong line is the median and thin ones are the seeds; of one, the band is the 95 % interval
    if it was recorded.

    Args:
        metrics: with the column ``by``.
        trained_length: lengths up to this one are shaded; one length for all, or the greatest of
            them by series.
        name: "accuracy" (all positions), "accuracy_last" or "accuracy_sequence".
        chance: error of a guess among all elements, drawn as a line.
        chunk_size: of the scan model, for the tree's depth on the upper axis.
        by: column that tells series apart.
        dtype: where several precisions were measured, which.
        title: instead of the usual one.
        source: caption.

    Raises:
        ScanLMError: the records have no such evaluation.
    """
    from scanlm.state_probe import prefix_depth

    rows = evaluated(metrics, name, dtype)
    rows = rows.assign(error=1 - rows["value"])
    labels = _ordered(rows[by])
    looks = _looks(labels)
    positive = rows.loc[rows["error"] > 0, "error"]
    floor = min(positive.min() / 2, 1e-4) if len(positive) else 1e-4
    # rows of what has no errors: in a strip at the lower edge, the first series lowest
    without = set(rows.loc[rows["error"] == 0, by])
    faultless = [label for label in reversed(labels) if label in without]
    heights = {label: floor / APART**i for i, label in enumerate(faultless)}
    top, bottom = floor * APART**0.5, min(heights.values(), default=2 * floor) / APART**0.5
    with style():
        figure = new_figure(9.4, 5.0)
        ax = figure.subplots()
        longest = rows["length"].max()
        notes = []
        if trained_length is not None:
            reach = (
                trained_length
                if isinstance(trained_length, (int, float))
                else max(trained_length.values())
            )
            ax.axvspan(rows["length"].min() * 0.9, reach, color=SHADE, lw=0, zorder=0)
            ax.annotate(
                "trained on",
                (0, 0.3),  # below a guess, above what short words are learned to
                xycoords=("axes fraction", "data"),
                xytext=(5, 0),
                va="center",
                textcoords="offset points",
                fontsize=8.5,
                color="#8A6D3B",
            )
        for label in labels:
            look, part = looks[label], rows[rows[by] == label]
            several = _seeds(part) > 1
            middle = part.groupby("length")["error"].median()
            x, y = middle.index.to_numpy(float), middle.to_numpy()
            none = heights.get(label, floor)
            ax.plot(
                x,
                np.where(y > 0, y, none),
                color=look.color,
                ls=look.linestyle,
                marker=look.marker,
                ms=4.5,
                label=textwrap.fill(f"{label} ({_seeds(part)} seeds)" if several else label, 26),
            )
            zero = y == 0
            ax.plot(
                x[zero],
                np.full(zero.sum(), none),
                look.marker,
                ms=4.5,
                mfc=PAPER,
                mec=look.color,
                clip_on=False,
                zorder=4,
            )
            if several:
                notes.append("strong: median, thin: each seed")
                for _, seed in part.sort_values("length").groupby("run_id"):
                    ax.plot(
                        seed["length"],
                        np.where(seed["error"] > 0, seed["error"], none),
                        color=look.color,
                        lw=0.9,
                        alpha=0.5,
                        zorder=1.5,
                    )
            elif {"low", "high"} <= set(part):
                notes.append("band: 95 % interval")
                bounds = part.groupby("length")[["low", "high"]].mean()
                ax.fill_between(
                    x,
                    np.maximum(1 - bounds["high"], floor),
                    np.maximum(1 - bounds["low"], floor),
                    where=~zero,  # the interval of no error at all would cover everything
                    color=look.color,
                    alpha=0.14,
                    lw=0,
                )
        ax.axhline(0.01, color=MUTED, lw=0.9, ls=(0, (2, 3)), zorder=1)
        if chance is not None:
            ax.axhline(chance, color=MUTED, lw=1.0, ls=(0, (5, 3)), zorder=1)
            ax.annotate(
                "guessing",
                (1.0, chance),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color=MUTED,
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlim(rows["length"].min() * 0.9, longest * 1.1)
        ax.set_ylim(bottom, 2.5)
        if faultless:
            ax.axhspan(bottom, top, color=STRIP, lw=0, zorder=0.5)
            ax.annotate(
                "none found",
                (0, (top * bottom) ** 0.5),
                xycoords=("axes fraction", "data"),
                xytext=(-9, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
                color=MUTED,
            )
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        # in the strip there are no shares, and just above it no place for one
        least = 2 * floor if faultless else bottom
        decades = range(math.floor(math.log10(least)) + 1, 1)
        ax.set_yticks([10.0**k for k in decades])
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(_percent))
        ax.set(xlabel="length of the word", ylabel="share of errors")
        ax.set_title(title or TITLES.get(name, name))
        depth = ax.secondary_xaxis("top")
        ticks = [t for t in ax.get_xticks() if rows["length"].min() <= t <= longest]
        depth.set_xticks(
            ticks, [str(prefix_depth(max(int(t) - 1, 0) // chunk_size)) for t in ticks]
        )
        depth.xaxis.set_minor_locator(NullLocator())
        chunk = "one token a chunk" if chunk_size == 1 else f"{chunk_size} tokens a chunk"
        what = f"depth of the tree behind the last prefix ({chunk})"
        depth.set_xlabel(what, fontsize=8.5, color=MUTED)
        depth.tick_params(labelsize=8, length=2)
        depth.spines["top"].set_visible(False)
        if len(labels) > 1 or notes:
            note = "; ".join(sorted(set(notes))) or None
            ax.legend(  # outside: thin lines of seeds may be anywhere
                loc="center left",
                bbox_to_anchor=(1.0, 0.5),
                title=note and note.replace("; ", "\n"),
                title_fontsize=8.5,
                alignment="left",
                handlelength=2.6,
            )
        if source:
            caption(figure, source)
    return figure


def _percent(value: float, _: object = None) -> str:
    return f"{np.format_float_positional(100 * value, 4, fractional=False, trim='-')} %"


def reach_points(reaches: pd.DataFrame, source: str | None = None) -> Figure:
    """The greatest length with 99 % of all positions right, one point a run.

    Families stand above what is none, the greatest median first, then the greatest least reach.
    Points that would cover one another stand side by side; of several runs the median is marked and
    written there, of two both values: their median is the reach of neither.

    Args:
        reaches: rows with ``series`` and ``reach``, and perhaps ``trained``: the greatest length a
            run was trained on, the same in a series; marked in its row.
        source: caption.
    """
    ranks = reaches.groupby("series")["reach"].agg(["median", "min"])
    order = list(ranks.sort_values(["median", "min"]).index)
    looks = _looks(order, OTHER)  # rows have their names: only families need a colour
    order.sort(key=lambda label: looks[label].color != OTHER)  # above them, what others change
    with style():
        figure = new_figure(7.8, (0.55 if len(order) <= 10 else 0.44) * len(order) + 1.5)
        ax = figure.subplots()
        for row, label in enumerate(order):
            found = reaches.loc[reaches["series"] == label, "reach"]
            values = found.clip(lower=1)  # a reach of 0 has no place on a logarithmic axis
            look, middle, several = looks[label], values.median(), len(values) > 1
            centred = several and middle > 2  # at the edge the label would cross the axis
            ax.plot([1, middle], [row, row], color=look.color, lw=2, alpha=0.35)
            values = values.sort_values()
            near = values.groupby((values > NEAR * values.shift()).cumsum())
            beside = near.transform("size") - 1
            step = (0.4 / beside.clip(lower=1)).clip(upper=0.16)  # below the label, however many
            aside = step * (near.cumcount() - beside / 2)
            ax.plot(values, row + aside, look.marker, color=look.color, ms=8, mec=PAPER, mew=0.8)
            if several:
                ax.plot([middle] * 2, [row - 0.24, row + 0.24], color=look.color, lw=1.4)
            ax.annotate(
                f"median {found.median():,.0f}"
                if len(found) > 2
                else " and ".join(f"{value:,.0f}" for value in sorted(found)),
                (middle, row + 0.24 * several),
                xytext=(0 if centred else 3 if several else 9, 2 if several else 0),
                textcoords="offset points",
                ha="center" if centred else "left",
                va="bottom" if several else "center",
                color=MUTED,
                fontsize=9,
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
                zorder=1.5,  # over the dashes, under the points
            )
        longest = reaches["reach"].max()
        if "trained" in reaches:
            longest = max(longest, reaches["trained"].max())
            trained = reaches.groupby("series")["trained"].first()[order].to_numpy()
            rows = np.arange(len(order))
            dashes = (0, (4, 3))
            ax.vlines(trained, rows - 0.45, rows + 0.45, color=MUTED, lw=1, ls=dashes, zorder=1)
            ax.annotate(
                "trained on",
                (trained[-1], 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2),
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color=MUTED,
            )
        ax.set_xscale("log", base=2)
        ax.set_xlim(1, max(longest, 1) * 2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        ax.set_yticks(range(len(order)), order)
        ax.set_ylim(-0.6, len(order) - 0.15)
        ax.tick_params(axis="y", length=0)
        ax.grid(False, axis="y")
        ax.grid(axis="x")
        ax.set(xlabel="length", title="Reach: 99 % of all positions right up to this length")
        if source:
            caption(figure, source)
    return figure


def position_heatmap(
    metrics: pd.DataFrame,
    trained_length: float | None = None,
    dtype: str | None = "float32",
    source: str | None = None,
) -> Figure:
    """Accuracy by position, a row for each run; positions far out are averaged in bins.

    Args:
        metrics: with ``series``.
        trained_length: marked as a line.
        dtype: where several precisions were measured, which.
        source: caption.

    Raises:
        ScanLMError: the records have no accuracy by position.
    """
    rows = metrics[(metrics["name"] == "accuracy") & _column(metrics, "position").notna()]
    rows = _need(metrics, "accuracy by position", rows)
    rows = _in_precision(rows, dtype)
    shared = rows.groupby("run_id")["length"].max()  # the same words for each position of a row
    rows = rows[rows["length"] == rows["run_id"].map(shared)]
    runs = []
    for label in _ordered(rows["series"]):
        for _, run in rows[rows["series"] == label].groupby("run_id"):
            runs.append((label, run.sort_values("position")))
    with style():
        figure = new_figure(9.4, 0.42 * len(runs) + 1.7)
        ax = figure.subplots()
        norm = mpl.colors.Normalize(0, 1)
        for row, (_, run) in enumerate(runs):
            edges = np.concatenate([[0.5], run["position"].to_numpy(float) + 0.5])
            mesh = ax.pcolormesh(
                edges, [row - 0.45, row + 0.45], run["value"].to_numpy()[None], norm=norm
            )
        if trained_length is not None:
            ax.axvline(trained_length + 0.5, color=INK, lw=1.2, ls=(0, (4, 3)))
            ax.annotate(
                "trained up to here",
                (trained_length + 0.5, -0.5),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=8.5,
                color=MUTED,
                annotation_clip=False,
            )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else ""))
        ax.set_ylim(len(runs) - 0.5, -0.5)
        several = len({id_ for _, run in runs for id_ in run["seed"]}) > 1
        names = [
            f"{label}, seed {run['seed'].iloc[0]:g}" if several else label for label, run in runs
        ]
        ax.set_yticks(range(len(runs)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(False)
        ax.set_xlabel("position in the word")
        ax.set_title("Right answers by position", pad=22)
        bar = figure.colorbar(mesh, ax=ax, format=PercentFormatter(1), pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        if source:
            caption(figure, source)
    return figure


# Depth: frames of state_probe.by_depth


def _by_depth(ax: Axes, table: pd.DataFrame, name: str, look: FamilyStyle, label: str) -> None:
    """Each prefix as a faint point, and the mean of each depth as a line."""
    ax.plot(table["depth"], table[name], ".", color=look.color, ms=4, alpha=0.25, mew=0)
    means = table.groupby("depth")[name].mean()
    ax.plot(
        means.index,
        means,
        color=look.color,
        ls=look.linestyle,
        marker=look.marker,
        ms=5,
        label=label,
    )


def _depth_axis(ax: Axes, deepest: float, trained_depth: int | None) -> None:
    ax.set_xlabel("depth of the tree (T1 nodes on the longest way)")
    ax.set_xlim(-0.4, deepest + 0.4)
    ax.set_xticks(range(0, int(deepest) + 1, 1 if deepest <= 16 else 2))
    if trained_depth is not None:
        ax.axvspan(-0.4, trained_depth, color=SHADE, lw=0, zorder=0)


def _depth_panels(
    tables: Mapping[str, pd.DataFrame],
    kinds: Mapping[str, FamilyStyle],
    title: str,
    trained_depth: int | None,
    source: str | None,
) -> Figure:
    """A panel for each table, side by side on one scale, with a line for each column it has."""
    with style():
        figure = new_figure(8.2 if len(tables) == 1 else 4.9 * len(tables), 4.2)
        panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        deepest = max(table["depth"].max() for table in tables.values())
        for ax, (label, table) in zip(panels, tables.items(), strict=True):
            for name, look in kinds.items():
                if name in table:
                    _by_depth(ax, table, name, look, look.label)
            _depth_axis(ax, deepest, trained_depth)
            ax.set_title(title if len(tables) == 1 else label)
        if len(tables) > 1:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        panels[0].legend(loc="best")
        if source:
            caption(figure, source)
    return figure


def error_by_depth(
    tables: Mapping[str, pd.DataFrame],
    trained_depth: int | None = None,
    source: str | None = None,
) -> Figure:
    """Errors of the answers, of a linear probe and of the nearest leaf, by depth of the tree.

    Args:
        tables: frames of ``state_probe.by_depth`` by label, a panel each.
        trained_depth: depths up to this one are shaded.
        source: caption.
    """
    kinds = {
        "error": FamilyStyle("the model's answer", SCAN, "o"),
        "probe_error": FamilyStyle("linear probe of the state", "#0072B2", "s"),
        "nearest_error": FamilyStyle("nearest leaf", "#009E73", "^", "--"),
    }
    figure = _depth_panels(tables, kinds, "Error by depth of the tree", trained_depth, source)
    first = figure.axes[0]
    first.set(ylabel="share of errors", ylim=(-0.03, 1.03))
    first.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def state_distance(
    tables: pd.DataFrame | Mapping[str, pd.DataFrame],
    trained_depth: int | None = None,
    source: str | None = None,
) -> Figure:
    """How far the states lie from the leaves, by depth: a line that rises is drift.

    Args:
        tables: of ``state_probe.by_depth``, of a model with one token a chunk; or several such
            tables by label, a panel each.
        trained_depth: depths up to this one are shaded.
        source: caption.

    Raises:
        ScanLMError: a table without distances.
    """
    named = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    if not all("distance" in table for table in named.values()):
        raise ScanLMError("no distances to leaves: they need a model with chunk_size=1")
    kinds = {
        "distance_right": FamilyStyle("to the leaf of its product", "#0072B2", "s"),
        "distance": FamilyStyle("to the nearest leaf", SCAN, "o"),
    }
    title = "Distance of prefix states to the leaves"
    figure = _depth_panels(named, kinds, title, trained_depth, source)
    for ax in figure.axes:
        ax.axhline(1, color=MUTED, lw=1, ls=(0, (5, 3)))
    figure.axes[0].annotate(
        "mean distance between two leaves",
        (1.0, 1.0),
        xycoords=("axes fraction", "data"),
        xytext=(-3, -12),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=MUTED,
    )
    figure.axes[0].set(ylabel="distance", ylim=(0, None))
    return figure


def gain(table: pd.DataFrame, source: str | None = None) -> Figure:
    """Gain of T1 by size of the error in its left operand; below 1 it repairs.

    Args:
        table: of ``state_probe.repair_gain``, optionally with ``series``.
        source: caption.
    """
    parts = {"scan model": table}
    if "series" in table:
        parts = {label: table[table["series"] == label] for label in _ordered(table["series"])}
    looks = _looks(list(parts))
    with style():
        figure = new_figure(7.4, 3.9)
        ax = figure.subplots()
        for label, part in parts.items():
            groups = part.groupby("size")["gain"]
            mean, low, high = groups.mean(), groups.quantile(0.1), groups.quantile(0.9)
            look = looks[label]
            ax.plot(
                mean.index,
                mean,
                color=look.color,
                ls=look.linestyle,
                marker=look.marker,
                ms=5,
                label=label,
            )
            ax.fill_between(mean.index, low, high, color=look.color, alpha=0.14, lw=0)
        ax.axhline(1, color=MUTED, lw=1, ls=(0, (5, 3)))
        for text, offset in (("errors grow", 4), ("errors are repaired", -11)):
            ax.annotate(
                text,
                (1.0, 1.0),
                xycoords=("axes fraction", "data"),
                xytext=(-3, offset),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color=MUTED,
            )
        ax.set_xscale("log")
        ax.set_ylim(bottom=0)
        ax.xaxis.set_major_formatter(FuncFormatter(_percent))
        ax.set(
            xlabel="error in the left operand, as a share of its norm",
            ylabel="what is left of it",
            title="Does T1 repair its inputs?",
        )
        if len(parts) > 1:
            ax.legend(handlelength=2.6)
        if source:
            caption(figure, source)
    return figure
