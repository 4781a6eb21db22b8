"""The families side by side: how each reads the past, and curves against what training costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, ScalarFormatter

from scanlm.errors import ScanLMError, check_name
from scanlm.plotting.style import (
    FAINT,
    FAMILIES,
    INK,
    MUTED,
    T1_COLOR,
    caption,
    model_styles,
    new_figure,
    style,
    text_on,
)
from scanlm.plotting.training import (
    NAME_LABELS,
    X_LABELS,
    final_rows,
    last_rows,
    loss_rows,
    seed_spread,
)

if TYPE_CHECKING:
    import pandas as pd

TOKENS, CHUNK, WINDOW = 12, 3, 6  # of the drawings: tokens, chunk size, T2's window
READER = 3.5  # height of the token that reads


def _token(ax: Axes, x: float, color: str, reads: bool = False) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - 0.32, -0.3),
            0.64,
            0.6,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=color,
            edgecolor=INK if reads else "none",
            lw=1.3,
            zorder=3,
        )
    )


def _arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str,
    bend: float = 0.0,
    lw: float = 1.2,
    alpha: float = 1.0,
) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>,head_length=3.2,head_width=1.8",
            connectionstyle=f"arc3,rad={bend}",
            color=color,
            lw=lw,
            alpha=alpha,
            shrinkA=1,
            shrinkB=2,
            zorder=2,
        )
    )


def _box(ax: Axes, x: float, y: float, w: float, text: str, color: str, size: float = 8.5) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - 0.3),
            w,
            0.6,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=color,
            edgecolor="none",
            zorder=3,
        )
    )
    ax.text(x, y, text, ha="center", va="center", color=text_on(color), fontsize=size, zorder=4)


def _reader(ax: Axes, color: str) -> tuple[float, float]:
    """The last position, which reads: its place in the drawing."""
    x = TOKENS - 1.0
    _box(ax, x, READER, 1.1, "reads", color)
    return x, READER - 0.3


def _attention(first: int) -> Callable[[Axes, str], None]:
    """Arrows from every token that is kept to the one that reads."""

    def draw(ax: Axes, color: str) -> None:
        end = _reader(ax, color)
        for i in range(TOKENS):
            kept = i >= first
            _token(ax, i, color if kept else FAINT, reads=i == TOKENS - 1)
            if kept:
                _arrow(ax, (i, 0.3), end, color, bend=-0.12 if i < TOKENS - 1 else 0, alpha=0.8)

    return draw


def _scan(ax: Axes, color: str) -> None:
    """Chunks joined by T1 in their tree; the own chunk is read token by token."""
    end = _reader(ax, color)
    own = TOKENS - CHUNK
    for i in range(TOKENS):
        _token(ax, i, color if i >= own else "#F2B98F", reads=i == TOKENS - 1)
        if i % CHUNK == 0 and i:
            ax.plot([i - 0.5] * 2, [-0.45, 0.45], color=MUTED, lw=0.9, ls=":")
    pairs, fold = (4.0, 1.3), (7.0, 2.3)
    for i in range(own):
        target = pairs if i < 2 * CHUNK else fold
        _arrow(ax, (i, 0.3), (target[0], target[1] - 0.3), T1_COLOR, lw=0.8, alpha=0.7)
    _arrow(ax, (pairs[0] + 0.3, pairs[1] + 0.25), (fold[0] - 0.45, fold[1] - 0.1), T1_COLOR, lw=1.8)
    _box(ax, *pairs, 1.0, "T1", T1_COLOR)
    _box(ax, *fold, 1.0, "T1", T1_COLOR)
    _arrow(ax, (fold[0] + 0.5, fold[1]), (end[0] - 0.55, READER - 0.1), T1_COLOR, lw=2.2)
    ax.text(fold[0] + 1.0, fold[1] + 0.75, "prefix", ha="center", color=T1_COLOR, fontsize=8.5)
    for i in range(own, TOKENS):
        _arrow(ax, (i, 0.3), end, color, bend=-0.1 if i < TOKENS - 1 else 0)


def _shades(kind: str, token: int) -> list[float]:
    """How dark the three rows of the drawn state are after a token."""
    if kind == "rows fade":
        return [0.35 + 0.65 * ((token + 1) * (3 + 2 * k) % 7) / 6 for k in range(3)]
    if kind == "one row written":
        return [1.0 if k == token * token % 3 + token % 2 else 0.38 for k in range(3)]
    return [0.4 + 0.6 * ((token + 1) * 3 % 7) / 6] * 3


def _recurrence(steps: str, kind: str) -> Callable[[Axes, str], None]:
    """One state that every token changes and the last one reads."""

    def draw(ax: Axes, color: str) -> None:
        end = _reader(ax, color)
        for i in range(TOKENS):
            _token(ax, i, color, reads=i == TOKENS - 1)
            _arrow(ax, (i, 0.3), (i, 1.35), color, lw=0.9)
            for k, shade in enumerate(_shades(kind, i)):
                corner = (i - 0.25, 1.4 + 0.2 * k)
                ax.add_patch(Rectangle(corner, 0.5, 0.17, color=color, alpha=shade, lw=0))
            if i:
                _arrow(ax, (i - 0.75, 1.7), (i - 0.27, 1.7), INK, lw=1.0)
        ax.text(-0.25, 2.4, steps, ha="left", va="center", fontsize=9, color=INK)
        _arrow(ax, (TOKENS - 1, 2.05), end, color, lw=2.2)

    return draw


def reading_the_past() -> Figure:
    """How the last of twelve tokens reads the eleven before it, in each family."""
    panels: Sequence[tuple[str, str, str, Callable[[Axes, str], None]]] = (
        (
            "gpt2",
            r"$o_t=\sum_{i\leq t}\mathrm{softmax}(q_t^\top k_i)\,v_i$",
            "keeps a key and a value for every token: grows with $t$",
            _attention(0),
        ),
        (
            "scanlm",
            r"$\mathrm{T2}([\mathrm{prefix}(j)\,;\,x_j])$",
            r"keeps at most $\log_2(t/c)+1$ trees of $c$ vectors, as many folds, a window",
            _scan,
        ),
        (
            "gla",
            r"$S_t=\mathrm{diag}(\alpha_t)\,S_{t-1}+k_tv_t^\top,\quad o_t=S_t^\top q_t$",
            r"keeps one matrix a head; $\alpha_t$ lets each row fade by itself",
            _recurrence("every row of $S$ fades by itself, then $kv^\\top$ is added", "rows fade"),
        ),
        (
            "gated_deltanet",
            r"$S_t=\alpha_t(I-\beta_tk_tk_t^\top)\,S_{t-1}+\beta_tk_tv_t^\top,"
            r"\quad o_t=S_t^\top q_t$",
            "keeps one matrix a head; a key's old value is erased first",
            _recurrence("what $k$ held is erased, then $kv^\\top$ is written", "one row written"),
        ),
        (
            "window_gpt2",
            r"$o_t=\sum_{t-w<i\leq t}\mathrm{softmax}(q_t^\top k_i)\,v_i$",
            "keeps $w=2c$ keys and values and nothing else (beyond the paper)",
            _attention(TOKENS - WINDOW),
        ),
        (
            "mamba2",
            r"$S_t=a_t\,S_{t-1}+k_tv_t^\top,\quad o_t=S_t^\top q_t$",
            "keeps one matrix a head; all of it fades alike (beyond the paper)",
            _recurrence("all of $S$ fades alike, then $kv^\\top$ is added", "all fades"),
        ),
    )
    with style():
        figure = new_figure(12.4, 9.6)
        axes = figure.subplots(3, 2).ravel()
        for ax, (family, formula, text, draw) in zip(axes, panels, strict=True):
            look = FAMILIES[family]
            name = "TransformerScanModel" if family == "scanlm" else look.label
            ax.set_title(name, color=look.color if family != "window_gpt2" else MUTED)
            draw(ax, look.color)
            ax.text(-0.4, -0.95, formula, ha="left", va="center", fontsize=10)
            ax.text(-0.4, -1.6, text, ha="left", va="center", fontsize=9, color=MUTED)
            ax.set_xlim(-0.6, TOKENS)
            ax.set_ylim(-2.2, READER + 0.4)
            ax.axis("off")
    return figure


def cost_curves(
    metrics: pd.DataFrame,
    name: str = "perplexity",
    xs: Sequence[str] = ("tokens", "flops"),
    split: str = "validation",
    source: str | None = None,
) -> Figure:
    """A metric against several measures of what training cost; seeds are a mean in a band.

    Args:
        metrics: frame of ``records.read_metrics``.
        name: "loss" or "perplexity".
        xs: "tokens", "flops", "seconds" or "step", a panel each.
        split: which split.
        source: caption.

    Raises:
        ScanLMError: the records have no such metric, split or axis.
    """
    panels = [(x, loss_rows(metrics, name, x, split)) for x in xs]
    looks = model_styles(list(panels[0][1]["model"].unique()))
    with style():
        figure = new_figure(5.2 * len(panels) + 1.6, 4.2)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (x, rows) in zip(axes, panels, strict=True):
            for model, part in rows.groupby("model", sort=False):
                look = looks[str(model)]
                table = seed_spread(part, x)
                few = look.marker if len(table) <= 25 else None
                line = {"color": look.color, "ls": look.linestyle, "marker": few, "ms": 4}
                ax.plot(table["x"], table["mean"], label=look.label, **line)
                if part["run_id"].nunique() > 1:
                    band = {"color": look.color, "alpha": 0.15, "lw": 0}
                    ax.fill_between(table["x"], table["min"], table["max"], **band)
            ax.set_xlabel(X_LABELS.get(x, x))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.set_title(f"against {X_LABELS.get(x, x).partition(' (')[0]}")
        axes[0].set_ylabel(NAME_LABELS.get(name, name))
        if name == "perplexity":  # which falls by whole factors
            axes[0].set_yscale("log")
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes[0].yaxis.set_major_formatter(ScalarFormatter())
            axes[0].minorticks_off()
        axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        if source:
            caption(figure, source)
    return figure


def final_values(
    metrics: pd.DataFrame,
    name: str = "loss",
    split: str = "validation",
    source: str | None = None,
) -> Figure:
    """Each model's last value: a point a seed, a bar at the mean; the best model on top.

    Args:
        metrics: frame of ``records.read_metrics``.
        name: "loss" or "perplexity".
        split: which split.
        source: caption.

    Raises:
        ScanLMError: the records have no such metric or split.
    """
    last = final_rows(metrics, name, split)
    means = last.groupby("model")["value"].mean().sort_values(ascending=False)
    looks = model_styles(list(last["model"].unique()))
    with style():
        figure = new_figure(7.4, 0.48 * len(means) + 1.4)
        ax = figure.subplots()
        for row, (model, mean) in enumerate(means.items()):
            look = looks[str(model)]
            values = last.loc[last["model"] == model, "value"]
            ax.plot(values, np.full(len(values), row), "o", color=look.color, ms=6, alpha=0.55)
            ax.plot([mean] * 2, [row - 0.26, row + 0.26], color=look.color, lw=2.6)
            ax.annotate(
                f"{mean:.3f}",
                (values.max(), row),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=MUTED,
            )
        ax.set_yticks(range(len(means)), [looks[str(model)].label for model in means.index])
        ax.tick_params(axis="y", length=0)
        ax.set_ylim(-0.6, len(means) - 0.4)
        ax.grid(axis="x")
        ax.margins(x=0.12)
        ax.set_xlabel(NAME_LABELS.get(name, name))
        ax.set_title(f"Final {split} {name}: a point a seed, a bar at the mean")
        if source:
            caption(figure, source)
    return figure


def scored_texts(runs: pd.DataFrame, source: str | None = None) -> Figure:
    """Bits per byte of each text, a panel a text and a row a model; seeds are a mean.

    A byte is the same in every text, which a token and, with other conventions about spaces, a
    word are not. Panels span the same range, so that distances can be compared.

    Args:
        runs: evaluations, as ``records.read_runs`` has them.
        source: caption.

    Raises:
        ScanLMError: none of them has the value.
    """
    value = "summary.bits_per_byte"
    texts = runs["parameters"].map(lambda p: f"{p['corpus']}\n{p['split']}")
    rows = runs.assign(text=texts).reindex(columns=["text", "model", value]).dropna()
    if rows.empty:
        raise ScanLMError("no evaluation with bits per byte: scanlm evaluate RUN --split test")
    table = rows.pivot_table(index="model", columns="text", values=value)
    table = table[table.mean().sort_values().index]  # the easiest text first
    table = table.sort_values(table.columns[0], ascending=False)
    looks = model_styles(list(table.index))
    span = 1.25 * (table.max() - table.min()).max() or 1.0
    with style():
        figure = new_figure(3.0 * table.shape[1] + 2.2, 0.36 * len(table) + 1.5)
        axes = figure.subplots(1, table.shape[1], sharey=True, squeeze=False)[0]
        for ax, (text, values) in zip(axes, table.items(), strict=True):
            colors = [looks[str(model)].color for model in table.index]
            ax.scatter(values, range(len(table)), s=42, color=colors, zorder=3)
            for row, found in enumerate(values):
                if found == found:  # not every model was scored on every text
                    note = {"textcoords": "offset points", "va": "center", "color": MUTED}
                    ax.annotate(f"{found:.3f}", (found, row), (8, 0), fontsize=8.5, **note)
            middle = (values.max() + values.min()) / 2
            ax.set_xlim(middle - 0.5 * span, middle + 0.7 * span)
            ax.set_title(text, fontsize=10)
            ax.grid(axis="both")
            ax.tick_params(axis="y", length=0)
            ax.set_xlabel(NAME_LABELS["bits_per_byte"])
        axes[0].set_yticks(range(len(table)), [looks[str(model)].label for model in table.index])
        if source:
            caption(figure, source)
    return figure


def position_differences(
    metrics: pd.DataFrame,
    reference: str,
    chunk_size: int | None = None,
    split: str = "validation",
    window: int = 1,
    source: str | None = None,
) -> Figure:
    """Loss by position less that of one model: what the text does to all of them cancels.

    Args:
        metrics: frame of ``records.read_metrics``, all models scored on the same text.
        reference: model id that the others are compared with.
        chunk_size: draw chunk borders at its multiples.
        split: which split.
        window: positions in the running mean.
        source: caption.

    Raises:
        ScanLMError: the records have no values by position, or not of ``reference``.
    """
    rows = last_rows(loss_rows(metrics, "loss", "position", split))
    table = rows.pivot_table(index="position", columns="model", values="value", sort=False)
    check_name("model", reference, table.columns)
    looks = model_styles(list(table.columns))
    differences = table.sub(table[reference], axis=0).drop(columns=reference)
    smooth = differences.rolling(window, center=True, min_periods=1).mean()
    with style():
        figure = new_figure(9.6, 3.9)
        ax = figure.subplots()
        for border in np.arange(chunk_size or len(table), len(table), chunk_size or 1):
            ax.axvline(border - 0.5, color=FAINT, lw=0.9, zorder=0)
        zero = looks[reference]
        ax.axhline(0, color=zero.color, ls=zero.linestyle, lw=1.5, label=zero.label)
        for model, values in smooth.items():
            look = looks[str(model)]
            ax.plot(
                smooth.index, values, color=look.color, ls=look.linestyle, lw=1.5, label=look.label
            )
        ax.set_xlim(-0.5, table.index.max() + 0.5)
        ax.set(xlabel="position in the sequence", ylabel="nats per token, lower is better")
        ax.set_title(f"Loss by position, less that of {looks[reference].label}")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        if source:
            caption(figure, source)
    return figure


def influence_by_distance(
    maps: Mapping[str, np.ndarray], marks: Mapping[str, float] | None = None
) -> Figure:
    """How much a token matters to a prediction by how far back it lies.

    Args:
        maps: model id -> ``(T, T)`` gradient norms of ``scanlm.influence.influence``.
        marks: distances to mark with a vertical line, by name.

    Raises:
        ScanLMError: no maps.
    """
    if not maps:
        raise ScanLMError("no influence maps to draw")
    looks = model_styles(list(maps))
    with style():
        figure = new_figure(7.4, 4.2)
        ax = figure.subplots()
        for model, matrix in maps.items():
            # distances that few predictions can look back on would be mostly noise
            reach = range(1, 3 * len(matrix) // 4)
            mean = np.array([np.sqrt(np.mean(np.diagonal(matrix, -d) ** 2)) for d in reach])
            own = np.sqrt(np.mean(np.diagonal(matrix) ** 2))
            shown = np.where(mean > 0, mean / own, np.nan)
            ax.plot(
                reach,
                shown,
                color=looks[model].color,
                ls=looks[model].linestyle,
                label=looks[model].label,
            )
        for name, distance in (marks or {}).items():
            ax.axvline(distance, color=FAINT, lw=1.2, zorder=0)
            ax.annotate(
                name,
                (distance, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -3),
                textcoords="offset points",
                va="top",
                fontsize=8.5,
                color=MUTED,
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set(xlabel="tokens back", ylabel="influence, relative to the last token's")
        ax.set_title("How far back a prediction reaches")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
