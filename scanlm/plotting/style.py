"""One look for every figure: fonts, spacing, and a fixed colour and marker per model family."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from scanlm.baselines import list_entries

INK = "#22262B"
MUTED = "#6B7280"
FAINT = "#D5D9DF"
PAPER = "#FFFFFF"


LineStyle = str | tuple[float, tuple[float, ...]]  # as matplotlib has them


@dataclass(frozen=True)
class FamilyStyle:
    """How the curves of one model family are drawn, in every figure."""

    label: str
    color: str
    marker: str
    linestyle: LineStyle = "-"

    def member(self, place: int, label: str) -> FamilyStyle:
        """A member's look: the family's own at place 0, else another marker and line."""
        marker = self.marker if place == 0 else MARKERS[(place - 1) % len(MARKERS)]
        line = DASHES[(DASHES.index(self.linestyle) + place) % len(DASHES)]
        return replace(self, label=label, marker=marker, linestyle=line)


# Okabe and Ito's colour-blind-safe palette; relatives share a hue and differ in line style
FAMILIES: dict[str, FamilyStyle] = {
    "scanlm": FamilyStyle("scan model", "#D55E00", "o"),
    "gpt2": FamilyStyle("GPT-2", "#3F444C", "s"),
    "window_gpt2": FamilyStyle("GPT-2, window", "#9AA1AB", "s", "--"),
    "gla": FamilyStyle("GLA", "#009E73", "^"),
    "gated_deltanet": FamilyStyle("Gated DeltaNet", "#0072B2", "D"),
    "mamba2": FamilyStyle("Mamba-2", "#CC79A7", "v"),
}
# for series that are no family of their own: chunk sizes, unknown models
EXTRA_COLORS = ("#56B4E9", "#E69F00", "#7A5195", "#8A6D3B", "#BC5090", "#2F9E9E")

# of the members of a family, in turn
DASHES: tuple[LineStyle, ...] = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)), (0, (9, 5)))
MARKERS = ("P", "X", "*", "p", "d")
CHUNK_SHADES = ("#F7B27E", "#EE8A3C", "#D55E00", "#9C4400", "#5E2900")

T0_COLOR, T1_COLOR, T2_COLOR = "#7C8794", "#D55E00", "#0072B2"

RC: dict[str, Any] = {
    # DejaVu comes with matplotlib, so a figure looks the same on every machine
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "mathtext.fontset": "dejavusans",
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelsize": 10,
    "axes.labelpad": 7,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9AA1AB",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E8EAEE",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.18,
}


def use_style() -> None:
    """Make this look the default of the whole session (notebooks call it once)."""
    mpl.rcParams.update(RC)  # type: ignore[arg-type]


@contextmanager
def style() -> Iterator[None]:
    """This look for the figures made inside the ``with`` block only."""
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        yield


def family_of(model: str) -> str | None:
    """Family of a model id: the longest family name it starts with (``window_gpt2_tiny``)."""
    model = model.partition(", ")[0]  # without what is special about a run of it
    matches = [f for f in FAMILIES if model == f or model.startswith((f + "_", f + "-"))]
    return max(matches, key=len, default=None)


def display_name(model: str) -> str:
    """What readers call a model: its family's label or its name in the registry, else its id.

    What stands behind a comma ("scanlm_tiny, compiled") is left as it is.
    """
    model, comma, rest = model.partition(", ")
    name = FAMILIES[model].label if model in FAMILIES else _registry_names().get(model)
    return (name or model) + comma + rest


@cache
def _registry_names() -> dict[str, str]:
    return {entry.id: entry.name for entry in list_entries()}


def model_styles(models: list[str]) -> dict[str, FamilyStyle]:
    """A style per model id: the family's colour, told apart within it by line style and marker.

    Chunk sizes of one model (``_c64``) are shades of the colour, the larger the darker. Ids of no
    known family get the extra colours in order of appearance.
    """
    found = {model: re.search(r"_c(\d+)(, |$)", model) for model in models}
    sizes = {model: int(size[1]) for model, size in found.items() if size}
    shades = _shades(sorted(set(sizes.values())))
    seen: dict[str, int] = {}
    styles = {}
    for model in models:
        family = family_of(model)
        if family is None:
            count = seen[""] = seen.get("", -1) + 1
            color = EXTRA_COLORS[count % len(EXTRA_COLORS)]
            styles[model] = FamilyStyle(model, color, "o")
            continue
        count = seen[family] = seen.get(family, -1) + 1
        look = FAMILIES[family].member(count, display_name(model))
        if model in sizes and shades:  # which tell it apart
            look = replace(look, color=shades[sizes[model]], linestyle="-")
        styles[model] = look
    return styles


def _shades(sizes: list[int]) -> dict[int, str]:
    """Light to dark; none for one or two sizes, which keep the family's own colour."""
    if len(sizes) < 3:
        return {}
    step = (len(CHUNK_SHADES) - 1) / (len(sizes) - 1)
    return {size: CHUNK_SHADES[round(i * step)] for i, size in enumerate(sizes)}


def sequence_colors(count: int) -> list[str]:
    """Colours of an ordered series, dark to light (viridis, its palest part left out)."""
    cmap = mpl.colormaps["viridis"]
    span = max(count - 1, 1)
    return [mpl.colors.to_hex(cmap(0.10 + 0.72 * i / span)) for i in range(count)]


def text_on(color: str) -> str:
    """White or ink, whichever is readable on a background colour (WCAG luminance)."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in mpl.colors.to_rgb(color)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.22 else PAPER


CAPTION_LETTERS = 17  # that fit on an inch


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It is not pyplot's: it shows once, as a cell's last value."""
    return Figure(figsize=(width, height), layout="constrained")


def caption(figure: Figure, text: str) -> None:
    """A small line or two under the figure: where its data come from."""
    letters = int(figure.get_figwidth() * CAPTION_LETTERS)
    figure.supxlabel(textwrap.fill(text, letters), x=0.01, ha="left", fontsize=7.5, color=MUTED)
