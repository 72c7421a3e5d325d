"""Types of the values of a configuration, with what each admits."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

LARGEST_IMAGE = 8192
"""Side of the largest views that are cut from images of any size."""


def _fraction(value: object) -> object:
    """Accept "8/255" where a number is expected: the paper writes epsilon and warm-up periods that way."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ArithmeticError):
            raise ValueError(f"not a fraction: {value!r}") from None
    return value


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


def _part_of_run(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("give a fraction of the epochs below 1, or a whole number of epochs")
    return value


def _path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("a path is expected")
    return value


def _utf8(value: str) -> str:
    """TensorBoard writes to no other path."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a path of UTF-8 text is expected") from None
    return value


def _switch(value: object) -> object:
    """YAML reads a bare on or off as a truth value."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _graphs(value: object) -> object:
    """Accept the "on" of earlier versions."""
    return "step" if value == "on" else value


def _words(value: object) -> object:
    """Accept "a,b" where words are expected, as options give them."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _length(value: float, info: ValidationInfo) -> float:
    """In L-inf no two images in [0,1] are more than 1 apart: a larger number was meant in steps of 255."""
    if value > 1 and info.data.get("threat_model") == "Linf":
        hint = f"; {value:g}/255 may be meant" if value <= 255 else ""
        raise ValueError(f"an L-inf length is at most 1, since images are in [0, 1]{hint}")
    return value


# Bounded, since what is no float32 fails deep inside torch.
Number = Annotated[float, BeforeValidator(_fraction), BeforeValidator(_no_truth_value), Field(ge=-1e30, le=1e30)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
PartOfOne = Annotated[Number, Field(ge=0, lt=1)]
Length = Annotated[NotNegative, AfterValidator(_length)]
Triple = tuple[Number, Number, Number]
"""Red, green, blue."""
# A point in training: below 1 a fraction of the epochs (so that it scales with them), else a number of epochs.
PartOfRun = Annotated[NotNegative, AfterValidator(_part_of_run)]
# Bounded, since torch overflows at what is no int64, and a thread each is started for what is a number of threads.
Integer = Annotated[int, BeforeValidator(_no_truth_value), Field(lt=2**31)]
Count = Annotated[Integer, Field(ge=1)]
CountOrZero = Annotated[Integer, Field(ge=0)]
Few = Annotated[Integer, Field(ge=1, le=1024)]
Seed = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=2**63 - 1)]
PathText = Annotated[str, AfterValidator(_path)]
Utf8PathText = Annotated[PathText, AfterValidator(_utf8)]
Augmentations = Annotated[
    tuple[Literal["random-resized-crop", "trivial-augment", "colour-jitter"], ...], BeforeValidator(_words)
]
Names = Annotated[tuple[str, ...], BeforeValidator(_words)]
Auto = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
Graphs = Annotated[Literal["step", "attack", "off"], BeforeValidator(_graphs), BeforeValidator(_switch)]
Guard = Annotated[Literal["warn", "stop", "off"], BeforeValidator(_switch)]
OverfittingGuard = Annotated[Literal["warn", "stop", "rollback", "off"], BeforeValidator(_switch)]
