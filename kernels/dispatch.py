"""Which implementation of an op serves: the one place where it is chosen.

`ENGINE_KERNELS` says which to prefer: auto (the default), native, triton or reference. Where an op has no such
implementation for a device or a dtype, its table below goes on to the next one; where it has one that is not
installed, the call is refused.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from engine.kernels import native
from engine.kernels.contract import look_up

# From the fastest on. For CUDA the native library has no distill_loss and no random_start.
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "distill_loss": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "random_start": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "pgd_update": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "crop_flip": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
}
_MODULES = {"native": "engine.kernels.native", "triton": "engine.kernels.triton_ops.{op}"}
CHOICES = ("auto", *_MODULES, "reference")


def choose(op: str, device: torch.device, *, fused: bool = True) -> str:
    """The implementation that serves an op on a device: "native", "triton" or "reference".

    fused: whether the call's dtypes and sizes are those that the fused implementations know.
    Raises ValueError for an unknown ENGINE_KERNELS, and for one that is not installed.
    """
    wanted = preference()
    if not fused:
        return "reference"
    by_device = look_up("op", op, TABLE)
    known = ("triton",) if _interpreting(wanted) else by_device.get(device.type, ("reference",))
    if wanted in known:
        if reason := missing(wanted, device.type):
            raise ValueError(f"ENGINE_KERNELS={wanted}: {reason}")
        return wanted
    return next(name for name in known if not missing(name, device.type))


# What torch.compiler.assume_constant_result does. Calling that imports torch's compiler: a second, and 150 MiB.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preference() -> str:
    """The value of ENGINE_KERNELS. Raises ValueError for an unknown one."""
    wanted = os.environ.get("ENGINE_KERNELS", "auto")
    if wanted not in CHOICES:
        raise ValueError(f"ENGINE_KERNELS: {wanted!r} is unknown; known are {', '.join(CHOICES)}")
    return wanted


def fused(implementation: str, op: str, function: str) -> Callable[..., Any]:
    """The function of an op in a fused implementation. Raises ValueError for an unknown one.

    Imported only here: triton takes a second.
    """
    module = look_up("implementation", implementation, _MODULES).format(op=op)
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def missing(implementation: str, device_type: str) -> str:
    """Why an implementation cannot serve on a device; empty where it can. Raises ValueError for an unknown one."""
    reasons: dict[str, Callable[[], str]] = {
        "native": lambda: native.missing(device_type),
        "triton": lambda: "" if _has_triton() else "triton is not installed (pip install triton)",
        "reference": lambda: "",
    }
    return look_up("implementation", implementation, reasons)()


def describe(device: torch.device, *, fused: bool = True) -> str:
    """One line for the user: which implementation serves each op on a device, and how to get a faster one."""
    chosen = {op: choose(op, device, fused=fused) for op in TABLE}
    names = {name: [op for op in TABLE if chosen[op] == name] for name in CHOICES[1:]}
    parts = [
        (f"{name} ({native.description(device.type)})" if name == "native" else name)
        + ("" if len(ops) == len(TABLE) else f" for {', '.join(ops)}")
        for name, ops in names.items()
        if ops
    ]
    line = f"Kernels: {'; '.join(parts)}"
    first = TABLE["crop_flip"].get(device.type, ("reference",))[0]
    if preference() == "auto" and fused and chosen["crop_flip"] != first:
        line += f"; faster with {first}: {missing(first, device.type)}"
    return line


def _interpreting(wanted: str) -> bool:
    """Triton's interpreter runs kernels on any device."""
    return wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
