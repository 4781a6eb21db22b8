"""Sliders over figures."""

from matplotlib.figure import Figure

from scanlm.plotting.widgets import sliders


def test_the_picture_follows_the_sliders() -> None:
    drawn = []

    def draw(size: int, first_value: int) -> Figure:
        drawn.append((size, first_value))
        return Figure(figsize=(size, 1))

    *moved, image = sliders(draw, size=(1, 5, 2), first_value=(0, 9, 7)).children
    assert drawn == [(2, 7)]
    assert [s.description for s in moved] == ["size", "first value"]
    before = image.value
    assert bytes(before[:4]) == b"\x89PNG"
    moved[0].value = 4
    assert drawn[-1] == (4, 7)
    assert image.value != before
