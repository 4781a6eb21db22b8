"""Sliders over a figure, for notebooks.

``ipywidgets.interact`` captures what a function shows in an Output widget, whose messages between
client and kernel now and then block a notebook that papermill or nbval runs (seen with ipykernel
7.4 and nbclient 0.11). An image widget needs no such messages.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure


def sliders(draw: Callable[..., Figure], **ranges: tuple[int, int, int]) -> Any:
    """A figure that is drawn anew when a slider moves.

    Args:
        draw: takes the sliders' values by name.
        ranges: least value, greatest value and start of each slider.

    Returns:
        An ``ipywidgets.VBox`` of the sliders and the picture; a cell's last value shows it.
    """
    from ipywidgets import Image, IntSlider, VBox

    moved = {
        name: IntSlider(value, low, high, description=name.replace("_", " "))
        for name, (low, high, value) in ranges.items()
    }
    image = Image(format="png")

    def renew(_: object = None) -> None:
        picture = io.BytesIO()
        figure = draw(**{name: slider.value for name, slider in moved.items()})
        figure.savefig(picture, format="png", dpi=90)
        image.value = picture.getvalue()

    for slider in moved.values():
        slider.observe(renew, "value")
    renew()
    return VBox([*moved.values(), image])
