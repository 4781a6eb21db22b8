"""Drawings of the scan: its tree by steps, the binary counter, work and depth, influence.

Everything is drawn from a trace (the list of ``scanlm.scan.Combine`` that a scan fills), so a
picture shows what the algorithm did and not what it is believed to do.

Trees are laid out as prefix networks: one column a chunk, one row a step, a node standing in the
column of the last chunk that it covers. Its right operand lies below it in the same column, its
left operand comes from an earlier column, and no two nodes ever collide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.textpath import TextPath

from scanlm.errors import ScanLMError
from scanlm.plotting.style import (
    FAINT,
    INK,
    MUTED,
    PAPER,
    new_figure,
    sequence_colors,
    style,
    text_on,
)
from scanlm.trees import formula, is_perfect, levels

if TYPE_CHECKING:
    import pandas as pd

    from scanlm.scan import Combine, Span

LEAF, BAND = "#E9ECF0", "#F7F8FA"
RING = 0.032  # distance of an outline from its box, in inches


def _math(text: str) -> str:
    """``((x0x1)x12)`` as mathtext with subscripts."""
    out, i = "", 0
    while i < len(text):
        j = i + 1
        while text[i] == "x" and j < len(text) and text[j].isdigit():
            j += 1
        out += f"x_{{{text[i + 1 : j]}}}" if text[i] == "x" else text[i]
        i = j
    return f"${out}$"


def _span_text(span: Span) -> str:
    return f"{span[0]}" if span[1] - span[0] == 1 else f"{span[0]}–{span[1] - 1}"


def _fit(text: str, size: float, width: float) -> float:
    """Font size, at most ``size`` points, at which ``text`` is at most ``width`` inches wide."""
    inches = TextPath((0, 0), text, size=size).get_extents().width / 72
    return size * min(1.0, width / inches)


def _box(
    ax: Axes,
    center: tuple[float, float],
    size: tuple[float, float],
    lines: Sequence[str],
    face: str,
    *,
    outlined: bool = False,
    fontsize: float = 8.5,
    pill: bool = False,
    ink: str | None = None,
) -> None:
    """A rounded box with one or two lines of text, which shrink to fit; a ring around a result."""
    w, h = size
    x, y = center
    roundness = 0.42 if pill else 0.14
    ring = FancyBboxPatch(
        (x - w / 2 - RING, y - h / 2 - RING),
        w + 2 * RING,
        h + 2 * RING,
        boxstyle=f"round,pad=0,rounding_size={h * roundness + RING}",
        facecolor=PAPER,
        edgecolor=INK,
        linewidth=1.3,
        zorder=2.8,
    )
    if outlined:
        ring.set_gid("ring")
        ax.add_patch(ring)
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2),
            w,
            h,
            boxstyle=f"round,pad=0,rounding_size={h * roundness}",
            facecolor=face,
            edgecolor="none",
            zorder=3,
        )
    )
    room = w - (0.3 * h if pill else 0.1)
    offsets = (0.0,) if len(lines) == 1 else (0.19 * h, -0.2 * h)
    for line, offset in zip(lines, offsets, strict=True):
        ax.text(
            center[0],
            center[1] + offset,
            line,
            ha="center",
            va="center",
            fontsize=_fit(line, fontsize, room),
            color=ink or text_on(face),
            zorder=4,
        )


def _edge(
    ax: Axes, low: tuple[float, float], high: tuple[float, float], color: str, width: float
) -> None:
    """A smooth curve that leaves and arrives vertically."""
    bend = 0.55 * (high[1] - low[1])
    points = [low, (low[0], low[1] + bend), (high[0], high[1] - bend), high]
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    ax.add_patch(
        PathPatch(Curve(points, codes), facecolor="none", edgecolor=color, lw=width, zorder=1.5)
    )


def _rows(trace: Sequence[Combine]) -> dict[Span, int]:
    """Row of each node: the step that made it, steps numbered 1, 2, ... without gaps."""
    steps = sorted({node.step for node in trace})
    number = {step: row for row, step in enumerate(steps, start=1)}
    return {node.out: number[node.step] for node in trace}


def _require(trace: Sequence[Combine]) -> None:
    if not trace:
        raise ScanLMError(
            "the trace is empty: run a scan over at least 3 chunks with trace=[] and pass that list"
        )


def _node_lines(trace: Sequence[Combine], span: Span, labels: str) -> list[str]:
    if labels == "span":
        return [_span_text(span)]
    name = f"prefix({span[1]})" if span[0] == 0 else f"tree{span}"
    return [name, _math(formula(trace, span))]


def draw_network(
    ax: Axes,
    trace: Sequence[Combine],
    *,
    step: int | None = None,
    labels: str = "formula",
    rows: Mapping[Span, int] | None = None,
    color_of: Callable[[Combine], str] | None = None,
    row_names: bool = True,
    column: float = 1.5,
    row: float = 0.98,
    fontsize: float = 8.5,
) -> None:
    """Draw the nodes of a trace as a prefix network on ``ax``.

    Args:
        ax: is given inches as data units, so that boxes and letters keep their proportions.
        trace: of one scan.
        step: draw the nodes of this step strongly, earlier ones pale and later ones not at all;
            ``None`` draws all of them strongly.
        labels: what stands in a node: "formula" (its name and bracketing) or "span" (first and
            last chunk).
        rows: row of each node; by default the step that made it.
        color_of: colour of a node; by default by row.
        row_names: name each row on its left.
        column, row: distances in inches.
        fontsize: of the labels, in points.
    """
    _require(trace)
    rows = _rows(trace) if rows is None else rows
    leaves = max(node.out[1] for node in trace)
    top = max(rows.values())
    palette = [MUTED, *sequence_colors(top)]
    formulas = labels == "formula"
    width, height = (0.9 if formulas else 0.84) * column, (0.52 if formulas else 0.44) * row
    left, right = -0.6 * column, (leaves - 0.4) * column

    def place(span: Span) -> tuple[float, float]:
        return (span[1] - 1) * column, rows.get(span, 0) * row

    for r in range(top + 1):
        shown = step is None or r <= step
        if r % 2 == 1 and row_names:
            ax.fill_between([left, right], (r - 0.5) * row, (r + 0.5) * row, color=BAND, lw=0)
        if row_names:
            made = sum(1 for node in trace if rows[node.out] == r)
            ax.annotate(
                f"call {r}" if r else "chunks",
                (left, r * row),
                xytext=(-8, 6 if r else 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=fontsize + 1,
                color=palette[r] if shown else FAINT,
                fontweight="bold",
            )
            if r:
                ax.annotate(
                    f"{made} combine" + ("s" if made > 1 else ""),
                    (left, r * row),
                    xytext=(-8, -7),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=fontsize - 0.5,
                    color=MUTED if shown else FAINT,
                )

    for j in range(leaves):
        _box(
            ax,
            place((j, j + 1)),
            (min(0.5 * column, 1.4 * height), height),
            [_math(f"x{j}")],
            LEAF,
            outlined=j == 0,
            fontsize=fontsize + 2,
        )
    for node in trace:
        r = rows[node.out]
        if step is not None and r > step:
            continue
        strong = step is None or r == step
        color = color_of(node) if color_of else palette[r]
        here = place(node.out)
        for operand in (node.left, node.right):
            below = place(operand)
            _edge(
                ax,
                (below[0], below[1] + height / 2),
                (here[0], here[1] - height / 2),
                color if strong else FAINT,
                1.7 if strong else 1.0,
            )
        _box(
            ax,
            here,
            (width, height),
            _node_lines(trace, node.out, labels),
            color if strong else "#E4E7EB",
            outlined=node.out[0] == 0 and strong,
            fontsize=fontsize,
            pill=not is_perfect(node.out),
            ink=None if strong else MUTED,
        )
    ax.set_xlim(left - (0.85 if row_names else 0), right)
    ax.set_ylim(-0.45 * row, (top + 0.45) * row)
    ax.set_aspect("equal")
    ax.axis("off")


NOTE = (
    "square: perfect subtree (up-sweep)      pill: prefix folded with a subtree (down-sweep)      "
    "outlined: a prefix, that is a result"
)


def tree(trace: Sequence[Combine], step: int | None = None, title: str | None = None) -> Figure:
    """The tree of a scan: rows are batched calls, columns are chunks, each node with its formula.

    Squares are perfect subtrees (the up-sweep), pills are folds of a prefix with a subtree (the
    down-sweep), a dark outline marks the prefixes, that is the results. From nine leaves on, a
    node shows the first and last chunk it covers instead of its formula.

    Args:
        trace: of one scan over at least 3 chunks.
        step: show the state after this many calls (0: only the chunks); ``None`` shows all.
        title: of the figure.

    Raises:
        ScanLMError: an empty trace, or a step that the trace does not have.
    """
    _require(trace)
    top, leaves = max(_rows(trace).values()), max(node.out[1] for node in trace)
    if step is not None and not 0 <= step <= top:
        raise ScanLMError(f"step must be between 0 and {top} for this trace, got {step}")
    labels = "formula" if leaves <= 8 else "span"
    column = 1.5 if leaves <= 8 else max(0.5, 10.5 / (leaves + 1))
    row = 0.98 if labels == "formula" else 0.72
    with style():
        # axes of exactly as many inches as data units: letters fit the boxes they were measured for
        left, low, high = -0.6 * column - 0.9, 0.85, 0.5
        width = max((leaves - 0.4) * column - left, 8.4)  # the note needs as much
        height = (top + 0.5) * row + low + (high if title else 0.0)
        figure = Figure(figsize=(width, height))
        ax = figure.add_axes((0, 0, 1, 1))
        draw_network(ax, trace, step=step, labels=labels, column=column, row=row)
        ax.set_xlim(left, left + width)
        ax.set_ylim(-low, height - low)
        ax.text(left + width / 2, 0.1 - low, NOTE, ha="center", fontsize=8, color=MUTED)
        if title:
            ax.text(left, height - low, title, va="top", fontsize=11.5, fontweight="bold")
    return figure


def tree_steps(trace: Sequence[Combine], columns: int = 2) -> Figure:
    """The same tree call by call, one panel each, with the formulas of the new nodes.

    Raises:
        ScanLMError: an empty trace.
    """
    _require(trace)
    rows = _rows(trace)
    top, leaves = max(rows.values()), max(node.out[1] for node in trace)
    panels = -(-top // columns)
    column, row = 5.6 / leaves, 0.6
    palette = [MUTED, *sequence_colors(top)]
    with style():
        figure = new_figure(5.9 * columns, panels * (row * (top + 1) + 0.35))
        axes = figure.subplots(panels, columns, squeeze=False).ravel()
        for ax, step in zip(axes, range(1, top + 1), strict=False):
            draw_network(
                ax,
                trace,
                step=step,
                labels="span",
                row_names=False,
                column=column,
                row=row,
                fontsize=8,
            )
            new = [node.out for node in trace if rows[node.out] == step]
            made = f"{len(new)} combine" + ("s" if len(new) > 1 else "") + " in one batch"
            ax.text(
                0.0,
                1.0,
                f"Call {step}",
                transform=ax.transAxes,
                va="top",
                fontsize=12,
                fontweight="bold",
                color=palette[step],
            )
            # the upper left of the network is always empty: a node needs earlier ones below it
            lines = [_math(formula(trace, span)) for span in new] if leaves <= 8 else []
            ax.annotate(
                "\n".join([made, *lines]),
                (0.0, 1.0),
                xycoords="axes fraction",
                xytext=(0, -20),
                textcoords="offset points",
                va="top",
                fontsize=9,
                linespacing=1.5,
                color=INK,
            )
        for ax in axes[top:]:
            ax.axis("off")
    return figure


def _forest(ax: Axes, trace: Sequence[Combine], pushes: int, color: str, top: int) -> None:
    """The live trees of a binary counter after some pushes, and the running fold above them."""
    roots, stop = [], 0
    for height in reversed(range(pushes.bit_length())):
        if pushes >> height & 1:
            roots.append((stop, stop + (1 << height)))
            stop += 1 << height
    inside = [
        node
        for node in trace
        if node.step < pushes
        and any(a <= node.out[0] and node.out[1] <= b for a, b in roots)
        and is_perfect(node.out)
    ]

    def place(span: Span) -> tuple[float, float]:
        size = span[1] - span[0]
        return (span[0] + span[1] - 1) / 2, float(size.bit_length() - 1)

    for node in inside:
        fresh = node.step == pushes - 1
        for operand in (node.left, node.right):
            (x0, y0), (x1, y1) = place(operand), place(node.out)
            ax.plot(
                [x0, x1],
                [y0, y1],
                color=color if fresh else "#C3C8CF",
                lw=1.6 if fresh else 1.1,
                zorder=1,
            )
    for span in [(j, j + 1) for j in range(pushes)] + [node.out for node in inside]:
        fresh = span[1] == pushes and (span in roots or span[1] - span[0] > 1)
        fresh = fresh or span == (pushes - 1, pushes)
        ax.plot(
            *place(span),
            marker="o" if span[1] - span[0] == 1 else "s",
            ms=8 if span in roots else 6,
            mfc=color if fresh else ("#9AA1AB" if span in roots else "#E1E4E8"),
            mec="none",
            zorder=2,
        )
    rail = top + 1.0
    stations = [(place(root)[0], rail) for root in roots]
    for k, root in enumerate(roots):
        x, y = place(root)
        fresh = k == len(roots) - 1
        ax.plot([x, x], [y, rail], color=FAINT, lw=1, ls=(0, (2, 2)), zorder=0)
        if k:
            left = stations[k - 1][0]
            ax.plot([left, x], [rail, rail], color=color if fresh else "#C3C8CF", lw=1.6, zorder=1)
        ax.plot(
            x,
            rail,
            marker="D",
            ms=8 if fresh else 6,
            mfc=(color if fresh else "#E1E4E8") if k else PAPER,
            mec=INK if fresh else "#9AA1AB",
            mew=1.4 if fresh else 0.8,
            zorder=3,
        )


def counter(trace: Sequence[Combine]) -> Figure:
    """The binary counter chunk by chunk, above the tree that it builds.

    Upper panels, one a push: the live trees (one for each 1 of the binary number of chunks), what
    this push made in colour, and on top the running fold of the live trees, whose last station is
    the prefix. Below: the same nodes in the network, coloured by the push that made them.

    Args:
        trace: of an ``OnlineScan`` after at most 8 pushes.

    Raises:
        ScanLMError: an empty trace, or one that is too long to draw.
    """
    _require(trace)
    pushes = max(node.out[1] for node in trace)
    if pushes > 8:
        raise ScanLMError(f"at most 8 pushes can be drawn legibly, the trace has {pushes}")
    palette = sequence_colors(pushes)
    top = (pushes).bit_length() - 1
    with style():
        figure = new_figure(11.6, 9.4)
        halves = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.0, 0.88], hspace=0.04)
        upper, lower = halves[:, 0]
        axes = upper.subplots(2, 4).ravel()
        for ax, k in zip(axes, range(1, pushes + 1), strict=False):
            _forest(ax, trace, k, palette[k - 1], top)
            made = sum(1 for node in trace if node.step == k - 1)
            ax.set_title(f"{k} = ${k:0{pushes.bit_length()}b}_2$", color=palette[k - 1], pad=4)
            ax.text(
                1.0,
                1.0,
                f"+{made} combine" + ("" if made == 1 else "s"),
                transform=ax.transAxes,
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=MUTED,
            )
            ax.set_xlabel(_math(formula(trace, (0, k))), fontsize=8.5, labelpad=3)
            ax.set_xlim(-0.6, pushes - 0.4)
            ax.set_ylim(-0.5, top + 1.5)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            ax.set_facecolor(BAND)
        for ax in axes[pushes:]:
            ax.axis("off")
        upper.supxlabel(
            "circle: chunk      square: perfect subtree      diamonds: the running fold of the "
            "live trees, its last one is the prefix      in colour: made by this push",
            fontsize=8.5,
            color=MUTED,
        )
        rows = levels(trace)
        ax = lower.subplots()
        draw_network(
            ax,
            trace,
            labels="span",
            rows=rows,
            color_of=lambda node: palette[node.step],
            row_names=False,
            column=1.34,
            row=0.72,
            fontsize=9,
        )
        ax.set_title("The same nodes in the tree, coloured by the push that made them")
    return figure


# Work, depth and other trees

SCAN_COLORS = {
    "parallel scan": "#0072B2",
    "same tree, node by node": "#E69F00",
    "left fold": "#3F444C",
}


def work_and_depth(costs: pd.DataFrame) -> Figure:
    """Work (combines) and depth (rounds) of ways to compute all exclusive prefixes.

    Args:
        costs: columns ``n`` (chunks), ``scan`` (a name), ``combines`` and ``rounds``, as
            ``scanlm.trees.scan_costs`` counts them.
    """
    costs = costs[costs["n"] > 2]  # two chunks need no combine: prefix(1) is the first chunk
    with style():
        figure = new_figure(10.4, 3.9)
        left, right = figure.subplots(1, 2)
        for name, rows in costs.groupby("scan", sort=False):
            color = SCAN_COLORS.get(str(name), MUTED)
            look: dict[str, Any] = {"color": color, "label": name}
            if name == "same tree, node by node":  # as much work as the scan: dashes over its line
                look |= {"ls": "--", "zorder": 3}
            left.plot(rows["n"], rows["combines"], **look)
            right.plot(rows["n"], rows["rounds"], **look)
        n = np.array(sorted(costs["n"].unique()))
        bound = {"color": MUTED, "lw": 1, "ls": ":"}
        left.plot(n, 2 * (n - 1), label=r"bound $2(n-1)$", **bound)
        right.plot(n, 2 * np.ceil(np.log2(n)), label=r"bound $2\lceil\log_2 n\rceil$", **bound)
        left.set(title="Work", xlabel="chunks $n$", ylabel="combines in all")
        right.set(title="Depth", xlabel="chunks $n$", ylabel="rounds, one after another")
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        for ax in (left, right):
            ax.legend(loc="upper left")
    return figure


def push_cost(trace: Sequence[Combine]) -> Figure:
    """Combines of each push of a binary counter, and their running mean.

    Args:
        trace: of an ``OnlineScan``.
    """
    _require(trace)
    pushes = max(node.step for node in trace) + 1
    made = np.bincount([node.step for node in trace], minlength=pushes)
    chunks = np.arange(1, pushes + 1)
    with style():
        figure = new_figure(10.4, 2.9)
        ax = figure.subplots()
        ax.bar(chunks, made, color="#B9D3E6", width=0.8, label="this push")
        ax.plot(chunks, np.cumsum(made) / chunks, color="#0072B2", label="mean so far")
        ax.axhline(2, color=MUTED, lw=1, ls=":", label="bound of the mean: 2")
        ax.set(xlabel="chunks seen", ylabel="combines", xlim=(0, pushes + 1))
        ax.set_title("Online: what one more chunk costs")
        ax.legend(loc="upper left", ncols=3)
        ax.set_ylim(0, made.max() * 1.3)
    return figure


def draw_dendrogram(ax: Axes, trace: Sequence[Combine], color: str) -> None:
    """One tree over consecutive leaves as a dendrogram; the height of a node is its level."""
    height = levels(trace)
    center: dict[Span, float] = {}
    for node in trace:
        a, b = (center.get(s, s[0]) for s in (node.left, node.right))
        center[node.out] = (a + b) / 2
        y = height[node.out]
        low = [height.get(s, 0) for s in (node.left, node.right)]
        ax.plot([a, a, b, b], [low[0], y, y, low[1]], color=color, lw=1.8)
    leaves = max(node.out[1] for node in trace)
    for j in range(leaves):
        ax.text(j, -0.25, _math(f"x{j}"), ha="center", va="top", fontsize=9.5)
    ax.set_xlim(-0.6, leaves - 0.4)
    ax.axis("off")


def bracketings(traces: Mapping[str, Sequence[Combine]]) -> Figure:
    """Different trees over the same leaves, side by side, each with its formula and depth.

    Args:
        traces: name of a tree -> trace whose last node is the root.
    """
    with style():
        figure = new_figure(3.4 * len(traces), 3.3)
        top = max(max(levels(trace).values()) for trace in traces.values())
        for ax, (name, trace) in zip(
            np.ravel(figure.subplots(1, len(traces), squeeze=False)), traces.items(), strict=True
        ):
            draw_dendrogram(ax, trace, TREE_COLORS.get(name, INK))
            ax.set_ylim(-1.9, top + 0.3)
            ax.set_title(f"{name}: depth {max(levels(trace).values())}", loc="center")
            middle = (trace[-1].out[1] - 1) / 2
            spelled = _math(formula(trace, trace[-1].out))
            ax.text(middle, -1.15, spelled, ha="center", va="top", fontsize=9, color=MUTED)
    return figure


TREE_COLORS = {
    "left fold": "#3F444C",
    "right fold": "#8A6D3B",
    "balanced": "#009E73",
    "scan's tree": "#0072B2",
}


def bracketing_gaps(gaps: pd.DataFrame) -> Figure:
    """How far the results of other trees lie from the scan's, one panel an operator.

    Args:
        gaps: columns ``n`` (chunks), ``operator``, ``tree`` and ``gap`` (relative distance), as
            ``scanlm.trees.bracketing_gaps`` measures them. Gaps of exactly zero are drawn hollow
            on a line of their own.
    """
    operators = list(gaps["operator"].unique())
    zero = 10 ** np.floor(np.log10(gaps.loc[gaps["gap"] > 0, "gap"].min()) - 1.2)
    with style():
        figure = new_figure(3.7 * len(operators), 3.9)
        axes = figure.subplots(1, len(operators), sharey=True, squeeze=False)[0]
        for ax, operator in zip(axes, operators, strict=True):
            ax.axhline(zero, color=FAINT, lw=1)
            trees_ = gaps[gaps["operator"] == operator].groupby("tree", sort=False)
            for k, (name, line) in enumerate(trees_):
                color, marker = TREE_COLORS.get(str(name), INK), "oDv^"[k % 4]
                shown = line[line["gap"] > 0]
                same = line[line["gap"] == 0]
                aside = 0.22 * (k - 1)  # so that equal gaps do not hide each other
                ax.plot(shown["n"] + aside, shown["gap"], marker, color=color, ms=4, label=name)
                on_line = np.full(len(same), zero)
                ax.plot(same["n"] + aside, on_line, marker, mfc="none", mec=color, ms=5)
            ax.set_yscale("log")
            ax.set(title=operator, xlabel="chunks in the prefix")
            ticks = [t for t in (1e-12, 1e-9, 1e-6, 1e-3, 1.0) if t > 3 * zero]
            ax.set_yticks(
                [zero, *ticks], ["equal", *(f"$10^{{{np.log10(t):.0f}}}$" for t in ticks)]
            )
            ax.minorticks_off()
        axes[0].set_ylabel("relative distance from the scan's result")
        handles, names = axes[-1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


# Influence


def influence_map(influence: np.ndarray | Mapping[str, np.ndarray], chunk_size: int) -> Figure:
    """Heat maps of which tokens a position's prediction depends on, chunk borders drawn.

    Args:
        influence: ``(T, T)`` gradient norms as ``scanlm.influence.influence`` returns them, or
            several by title. Rows are predictions, columns are tokens read; zeros stay white.
        chunk_size: distance of the borders, in tokens.
    """
    maps = dict(influence) if isinstance(influence, Mapping) else {"Influence": influence}
    positive = np.concatenate([m[m > 0].ravel() for m in maps.values()])
    low = float(np.quantile(positive, 0.01))
    norm = LogNorm(low, positive.max())
    with style():
        figure = new_figure(4.6 * len(maps) + 0.9, 4.7)
        axes = figure.subplots(1, len(maps), squeeze=False)[0]
        for ax, (title, matrix) in zip(axes, maps.items(), strict=True):
            shown = np.ma.masked_where(matrix == 0, np.maximum(matrix, low))
            image = ax.imshow(shown, norm=norm, cmap="viridis_r", interpolation="nearest")
            for border in range(chunk_size, len(matrix), chunk_size):
                ax.axhline(border - 0.5, color=INK, lw=0.6, alpha=0.45)
                ax.axvline(border - 0.5, color=INK, lw=0.6, alpha=0.45)
            every = -(-len(matrix) // (8 * chunk_size))  # at most 8 labels, at chunk borders
            ticks = range(0, len(matrix), every * chunk_size)
            ax.set_xticks(ticks)
            ax.set_yticks(ticks)
            ax.set(title=title, xlabel="token read", ylabel="position that predicts")
            ax.grid(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("gradient norm")
    return figure


def path_tables(tables: Mapping[str, np.ndarray]) -> Figure:
    """Tables of small whole numbers by pair of chunks, side by side.

    Args:
        tables: title -> ``(chunks, chunks)``, NaN on and above the diagonal
            (``scanlm.trees.path_lengths``).
    """
    with style():
        figure = new_figure(4.6 * len(tables), 4.5)
        axes = figure.subplots(1, len(tables), squeeze=False)[0]
        for ax, (title, table) in zip(axes, tables.items(), strict=True):
            _draw_counts(ax, title, table)
    return figure


def _draw_counts(ax: Axes, title: str, table: np.ndarray) -> None:
    """A lower triangle of small numbers; the diagonal is the chunk itself, which T2 reads."""
    n = len(table)
    top = int(np.nanmax(table)) if n > 1 else 0
    colors = sequence_colors(top + 1)
    for i in range(n):
        ax.text(i, i, "T2", ha="center", va="center", fontsize=9, color=MUTED)
        for j in range(i):
            color = colors[int(table[i, j])]
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=color, lw=0))
            count = f"{int(table[i, j])}"
            ax.text(j, i, count, ha="center", va="center", fontsize=9.5, color=text_on(color))
    ax.set_xlim(-0.5, n - 0.5)
    ax.set_ylim(n - 0.5, -0.5)
    ax.set_aspect("equal")
    ax.set_xticks(range(n))
    ax.set_yticks(range(n))
    ax.set(title=title, xlabel="chunk read", ylabel="chunk that predicts")
    ax.grid(False)
