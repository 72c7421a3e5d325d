"""Pictures in one style: readable where they are shown 500 pixels wide, on a light page and on a dark one."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches of a picture: 500 pixels of a page, with text of a page's size."""
_DOTS_PER_INCH = 200
# The colours of Okabe and Ito (2008), which the colour-blind tell apart, but for yellow, which is pale on white.
_CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


@dataclass(frozen=True)
class Palette:
    """Colours of a picture beside those of its lines."""

    background: str
    text: str
    grid: str


LIGHT = Palette("#ffffff", "#1a1a1a", "#d0d0d0")
DARK = Palette("#16181c", "#e6e6e6", "#3c4046")


@contextmanager
def style(palette: Palette = LIGHT) -> Iterator[None]:
    """Matplotlib's settings for what is drawn inside; names of classes and runs are shown as they are."""
    from cycler import cycler
    from matplotlib import rc_context

    settings: Any = {
        "figure.dpi": _DOTS_PER_INCH,
        "figure.facecolor": palette.background,
        "savefig.facecolor": palette.background,
        "axes.facecolor": palette.background,
        "axes.edgecolor": palette.text,
        "axes.labelcolor": palette.text,
        "axes.titlecolor": palette.text,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=_CYCLE),
        "grid.color": palette.grid,
        "text.color": palette.text,
        "text.parse_math": False,
        "xtick.color": palette.text,
        "ytick.color": palette.text,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
        "legend.framealpha": 0.8,
        "legend.facecolor": palette.background,
        "legend.edgecolor": palette.grid,
        "font.size": 10,
    }
    with rc_context(settings):
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure of so many inches, inside `style`. Several panels stand below each other, so that none is small."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The picture as a file's content, inside `style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box in a name of a class
        FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def shortened(text: str, most: int) -> str:
    """A text in one line of at most so many characters, the middle left out where it is longer."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    ahead = most // 2
    return f"{line[:ahead]}…{line[len(line) - (most - 1 - ahead) :]}"


def fitted(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """A text in one line of at most so many inches in a size in points, shortened where it is longer."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font, measure = FontProperties(size=size, weight=weight), TextToPath()
    most = len(text)
    while most > 1:
        line = shortened(text, most)
        width, _, _ = measure.get_text_width_height_descent(line, font, ismath=False)
        if width <= inches * 72:
            return line
        most = min(most - 1, int(most * inches * 72 / width) + 1)
    return shortened(text, most)


def wrapped(text: str, most: int = 58) -> str:
    """A title in lines of at most so many characters, each of its own lines by itself."""
    lines = [textwrap.wrap(line, most, break_on_hyphens=False) for line in text.splitlines()]
    return "\n".join(line for of_one in lines for line in of_one)


def in_percent(axis: Axis) -> None:
    """Let an axis of shares in [0, 1] be labelled in percent."""
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
