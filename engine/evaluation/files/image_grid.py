"""The grid of attacked images: x, x~ and their difference, with the classes that the network gives.

Shape suffix: K images of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from engine.common.numbers import ceil_div
from engine.common.pictures import WIDTH, fitted, new_figure, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGE = 96  # pixels of a side, from which on an image has a row of its own
_DOTS = 200  # of an inch of the picture: more pixels are averaged
_MARGIN, _BETWEEN, _GAP = 0.1, 0.24, 0.05  # inches: around all, between blocks and between the three of a block
_LINE = 0.15  # inches of a line of text
_SIZE = 8
"""Points of the texts of a block."""
_LETTERS, _SHARE = 0.25, 0.6  # inches before and after the name of a class
_FELL = "#c04a00"


class Guess(NamedTuple):
    """A class, by its name, and the probability that the network gives it."""

    name: str
    probability: float

    def text(self, inches: float) -> str:
        """The two in a line of at most so many inches."""
        return f"{fitted(self.name, inches - _SHARE, _SIZE)}, {self.probability:.1%}"


class AttackedImage(NamedTuple):
    """An image before and after an attack, CHW in [0, 1], its class, and the network's classes.

    after: None where the attack has found no image that breaks it, and so shows none.
    """

    x_nat: Tensor
    x_adv: Tensor
    true_name: str
    before: Guess
    after: Guess | None
    fell: bool


def scale_of(images: Sequence[AttackedImage]) -> int:
    """Largest power of 2, from 1 on, by which no difference of the images leaves [-1/2, 1/2]; 1 for none."""
    largest = max(float((image.x_adv - image.x_nat).abs().max()) for image in images)
    return 2 ** max(0, math.floor(math.log2(0.5 / largest) + 1e-4)) if largest > 0 else 1


def grid(title: str, images: Sequence[AttackedImage]) -> Figure:
    """Figure of the images, inside `pictures.style`: small ones two in a row, each pixel a square.

    The third of each is 1/2 + factor (x~ - x), so that grey is no change. Photographs are shown smaller.
    """
    height, width = images[0].x_nat.shape[1:]
    columns = 1 if max(height, width) >= _LARGE else 2
    block = (WIDTH - 2 * _MARGIN - (columns - 1) * _BETWEEN) / columns
    side = (block - 2 * _GAP) / 3
    tall = side * height / width
    lines = wrapped(title).splitlines()
    top = _MARGIN + _LINE * (1.25 * len(lines) + 1.8)
    row_height = tall + 3 * _LINE + 0.12
    rows = ceil_div(len(images), columns)
    figure = new_figure(top + rows * row_height)
    figure.set_layout_engine("none")
    page = _Page(figure, top + rows * row_height)
    page.write("\n".join(lines), WIDTH / 2, _MARGIN, size=10, centred=True)
    factor = scale_of(images)
    for place, image in enumerate(images):
        left = _MARGIN + (place % columns) * (block + _BETWEEN)
        above = top + (place // columns) * row_height
        shown = (image.x_nat, image.x_adv, 0.5 + factor * (image.x_adv - image.x_nat))
        heads = ("x", "x~", f"(x~ - x) x {factor}")
        for number, (pixels, head) in enumerate(zip(shown, heads, strict=True)):
            x = left + number * (side + _GAP)
            axes = page.axes(x, above + _LINE, side, tall)
            _show(axes, pixels, round(side * _DOTS), averaged=number < 2)
            if place < columns:
                page.write(head, x + side / 2, above - _LINE, size=_SIZE, centred=True)
        _write_classes(page, image, left, above, tall, block)
    return figure


def _write_classes(
    page: _Page, image: AttackedImage, left: float, above: float, tall: float, inches: float
) -> None:
    """Texts of a block: the true class above, the network's classes below."""
    page.write(fitted(image.true_name, inches, _SIZE, "bold"), left, above, size=_SIZE, weight="bold")
    below = above + _LINE + tall + 0.03
    page.write(f"x: {image.before.text(inches - _LETTERS)}", left, below, size=_SIZE)
    after = "x~: none found" if image.after is None else f"x~: {image.after.text(inches - _LETTERS)}"
    page.write(after, left, below + _LINE, size=_SIZE, color=_FELL if image.fell else None)


class _Page:
    """A figure whose parts are placed in inches from its upper left corner."""

    def __init__(self, figure: Figure, height: float) -> None:
        self._figure, self._height = figure, height

    def axes(self, left: float, above: float, width: float, height: float) -> Axes:
        """Axes at a place."""
        below = 1 - (above + height) / self._height
        axes = self._figure.add_axes((left / WIDTH, below, width / WIDTH, height / self._height))
        axes.set_axis_off()
        return axes

    def write(
        self,
        text: str,
        left: float,
        above: float,
        *,
        size: float,
        centred: bool = False,
        weight: str = "normal",
        color: str | None = None,
    ) -> None:
        """Write a text below a place."""
        style: dict[str, Any] = {} if color is None else {"color": color}
        self._figure.text(
            left / WIDTH,
            1 - above / self._height,
            text,
            fontsize=size,
            weight=weight,
            ha="center" if centred else "left",
            va="top",
            **style,
        )


def _show(axes: Axes, pixels: Tensor, dots: int, *, averaged: bool) -> None:
    """Draw an image CHW, in grey where it has one channel. averaged: many pixels become one by their mean."""
    pixels = pixels.detach().float().cpu()
    height, width = pixels.shape[1:]
    if width > dots:
        size = (max(1, round(height * dots / width)), dots)
        pixels = F.interpolate(pixels[None], size, mode="area" if averaged else "nearest")[0]
    values = pixels.clamp(0, 1).permute(1, 2, 0)
    if values.shape[2] == 1:
        values = values.expand(-1, -1, 3)
    axes.imshow(values.numpy(), interpolation="nearest", aspect="auto")


def fallen(images: Sequence[AttackedImage]) -> str:
    """Number of the images that the attack broke, in words."""
    count = sum(image.fell for image in images)
    return f"chosen among the correctly classified images; {count} of {len(images)} fell"
