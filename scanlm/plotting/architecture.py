"""The model in one picture: T0 embeds, T1 aggregates in a tree, T2 predicts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Curve

from scanlm.plotting.style import INK, MUTED, T0_COLOR, T1_COLOR, T2_COLOR, new_figure, style
from scanlm.trees import formula, levels, scan_trace

WORDS = (
    ("a", "scan", "joins"),
    ("all", "chunks", "two"),
    ("by", "two", "in"),
    ("a", "fixed", "tree"),
    ("so", "that", "training"),
)
COLUMN, SQUARE = 2.05, 0.25
TOKENS, EMBED, LEAVES, FIRST_T1 = 0.0, 0.72, 1.32, 2.2


def _box(
    ax: Axes, x: float, y: float, w: float, h: float, text: str, face: str, ink: str, size: float
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=face,
            edgecolor="none",
            zorder=3,
        )
    )
    ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=size, zorder=4)


def _state(ax: Axes, x: float, y: float, color: str, count: int) -> None:
    """A state: one square a token, centred at ``x``."""
    left = x - count * SQUARE / 2
    for k in range(count):
        ax.add_patch(
            Rectangle(
                (left + k * SQUARE, y - SQUARE / 2),
                SQUARE,
                SQUARE,
                facecolor=color,
                edgecolor="white",
                lw=1.5,
                zorder=3,
            )
        )


def _path(ax: Axes, points: Sequence[tuple[float, float]], color: str, lw: float = 1.6) -> None:
    """Vertical starts and ends joined by smooth curves."""
    vertices, codes = [points[0]], [Curve.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(points):
        bend = 0.5 * (y1 - y0)
        vertices += [(x0, y0 + bend), (x1, y1 - bend), (x1, y1)]
        codes += [Curve.CURVE4] * 3
    ax.add_patch(
        PathPatch(Curve(vertices, codes), facecolor="none", edgecolor=color, lw=lw, zorder=1.5)
    )


def _label(ax: Axes, y: float, name: str, text: str, color: str) -> None:
    ax.text(-1.5, y + 0.02, name, ha="right", va="bottom", color=color, fontsize=13, weight="bold")
    ax.text(-1.5, y - 0.06, text, ha="right", va="top", color=MUTED, fontsize=9, linespacing=1.4)


def architecture() -> Figure:
    """T0, T1 and T2 over five chunks of three tokens; T1's nodes come from a real trace."""
    trace = scan_trace(len(WORDS))
    rows, chunk = levels(trace), len(WORDS[0])
    top_t1 = FIRST_T1 + 0.95 * (max(rows.values()) - 1)
    strip, predict, output = top_t1 + 1.25, top_t1 + 1.85, top_t1 + 2.55

    def node_y(span: tuple[int, int]) -> float:
        return FIRST_T1 + 0.95 * (rows[span] - 1) if span in rows else LEAVES

    with style():
        figure = new_figure(12.4, 6.7)
        ax = figure.subplots()
        for i, words in enumerate(WORDS):
            x = i * COLUMN
            for k, word in enumerate(words):
                left = x + (k - 1) * 0.6
                _box(ax, left, TOKENS, 0.56, 0.3, word, "#F1F3F5", INK, 8.5)
            _box(ax, x, EMBED, 1.76, 0.34, "T0", T0_COLOR, "white", 10.5)
            _path(ax, [(x, TOKENS + 0.15), (x, EMBED - 0.17)], T0_COLOR)
            _path(ax, [(x, EMBED + 0.17), (x, LEAVES - SQUARE / 2)], T0_COLOR)
            _state(ax, x, LEAVES, T0_COLOR, chunk)
            ax.text(
                x - 0.47, LEAVES, f"$x_{i}$", ha="right", va="center", fontsize=11, color=T0_COLOR
            )
            # T2's input: the prefix's state, then the chunk's own embeddings
            half = (chunk * SQUARE) / 2 + 0.03
            own = x + half if i else x
            skip = x + 0.82
            _path(
                ax,
                [(x + 0.2, LEAVES + SQUARE / 2), (skip, LEAVES + 0.55)],
                "#C5CBD3",
                1.3,
            )
            ax.plot(
                [skip, skip], [LEAVES + 0.55, strip - 0.75], color="#C5CBD3", lw=1.3, zorder=1.2
            )
            _path(ax, [(skip, strip - 0.75), (own, strip - SQUARE / 2)], "#C5CBD3", 1.3)
            _state(ax, own, strip, T0_COLOR, chunk)
            if i:
                _state(ax, x - half, strip, T1_COLOR, chunk)
            _box(ax, x, predict, 1.76, 0.42, "T2", T2_COLOR, "white", 12)
            _path(ax, [(own, strip + SQUARE / 2), (own, predict - 0.21)], T0_COLOR)
            if i:
                _path(ax, [(x - half, strip + SQUARE / 2), (x - half, predict - 0.21)], T1_COLOR)
            following = [*words[1:], WORDS[i + 1][0] if i + 1 < len(WORDS) else "…"]
            for k, word in enumerate(following):
                left = x + (k - 1) * 0.6
                _path(ax, [(left, predict + 0.21), (left, output - 0.15)], T2_COLOR, 1.2)
                _box(ax, left, output, 0.56, 0.3, word, "#E3EEF6", INK, 8.5)

        for node in trace:
            x, y = (node.out[1] - 1) * COLUMN, node_y(node.out)
            spelled = formula(trace, node.out).replace("x", "x_")
            _box(ax, x, y, 1.3, 0.5, f"T1\n${spelled}$", T1_COLOR, "white", 9)
            for operand in (node.left, node.right):
                low = node_y(operand) + (0.25 if operand in rows else SQUARE / 2)
                _path(ax, [((operand[1] - 1) * COLUMN, low), (x, y - 0.25)], T1_COLOR)
        for i in range(1, len(WORDS)):
            x, low = (i - 1) * COLUMN, node_y((0, i)) + (0.25 if i > 1 else SQUARE / 2)
            target = i * COLUMN - (chunk * SQUARE) / 2 - 0.03
            ax.plot([x, x], [low, top_t1 + 0.28], color=T1_COLOR, lw=2.2, zorder=1.5)
            _path(ax, [(x, top_t1 + 0.28), (target, strip - SQUARE / 2)], T1_COLOR, 2.2)
            ax.text(
                target + 0.08,
                strip - 0.29,
                f"prefix({i})",
                ha="left",
                va="center",
                fontsize=8.5,
                color=T1_COLOR,
            )

        _label(ax, TOKENS, "tokens", "in chunks of $c$", INK)
        _label(ax, EMBED + 0.1, "T0", "embeds; a chunk's $c$ vectors\nare its leaf state", T0_COLOR)
        middle = (FIRST_T1 + top_t1) / 2 + 0.2
        _label(
            ax,
            middle,
            "T1",
            "aggregates two states of $c$\nvectors into one, no causal\nmask; a fixed tree, all\n"
            "pairs of a level in one call",
            T1_COLOR,
        )
        _label(ax, predict, "T2", "reads [prefix; own chunk]\ncausally", T2_COLOR)
        _label(ax, output + 0.02, "predictions", "the next token at\nevery position", INK)
        ax.set_xlim(-3.7, (len(WORDS) - 1) * COLUMN + 1.05)
        ax.set_ylim(TOKENS - 0.35, output + 0.35)
        ax.set_aspect("equal")
        ax.axis("off")
    return figure
