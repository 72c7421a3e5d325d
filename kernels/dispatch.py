"""Choice of the implementation that serves an op: made here and nowhere else.

`ENGINE_KERNELS` says which to prefer: auto (the default), native, triton or reference, and after it, where asked
for, another for single ops, as in "auto,batch_norm=reference". Where an op has no such implementation for a device
or a dtype, the next one of its row in `SERVED_BY` serves; where it has one that is not installed, the call is
refused.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from engine.kernels import native
from engine.kernels.contract import look_up

# By op and type of device, the fastest first. For CUDA the native library has but pgd_update and crop_flip.
SERVED_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "distill_loss": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "random_start": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "pgd_update": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "fab_step": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "crop_flip": {"cpu": ("native", "reference"), "cuda": ("triton", "native", "reference")},
    "conv3x3": {"cpu": ("native", "reference")},  # for CUDA cuDNN has its own
    "image_conv3x3": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "batch_norm": {"cpu": ("native", "reference"), "cuda": ("triton", "reference")},
    "batch_sums": {"cpu": ("reference",), "cuda": ("triton", "reference")},
    "sgd_update": {"cpu": ("reference",), "cuda": ("triton", "reference")},
}
_ELSEWHERE = ("reference",)  # on devices that have no row
# By op whose calls consist of terms, and implementation: the kinds that it computes; the reference computes all.
COMPUTES: dict[str, dict[str, frozenset[str]]] = {
    "distill_loss": {
        "native": frozenset(("ce", "kl", "margin", "kl_live")),
        "triton": frozenset(("ce", "kl", "margin", "kl_live")),
    },
}


class _Implementation(NamedTuple):
    """module: of an op's functions. missing: why it cannot serve on a type of device, empty where it can."""

    module: str
    missing: Callable[[str], str]


@functools.cache
def _has_triton() -> bool:
    """Presence of triton: looked for, and not imported, which takes a second."""
    return importlib.util.find_spec("triton") is not None


_IMPLEMENTATIONS = {
    "native": _Implementation("engine.kernels.native", lambda device_type: native.missing(device_type)),
    "triton": _Implementation(
        "engine.kernels.triton_ops.{op}",
        lambda _: "" if _has_triton() else "triton is not installed (pip install triton)",
    ),
    "reference": _Implementation("engine.kernels.reference", lambda _: ""),
}
CHOICES = ("auto", *_IMPLEMENTATIONS)


def choose(op: str, device: torch.device, *, fused: bool = True, kinds: tuple[str, ...] = ()) -> str:
    """The implementation that serves an op on a device: "native", "triton" or "reference".

    fused: False where the call has dtypes or sizes that the fused implementations do not know.
    kinds: see `COMPUTES`; where the implementation lacks one, the reference serves, and a warning says so once.
    Raises ValueError for an unknown ENGINE_KERNELS, and for one that is not installed.
    """
    wanted = preference(op)
    if not fused:
        return "reference"
    by_device = look_up("op", op, SERVED_BY)
    known = ("triton",) if _interpreting(wanted) else by_device.get(device.type, _ELSEWHERE)
    if wanted in known:
        if reason := missing(wanted, device.type):
            raise ValueError(f"ENGINE_KERNELS={wanted}: {reason}")
        chosen = wanted
    else:
        chosen = next(name for name in known if not missing(name, device.type))
    if kinds and (lacking := _lacking(op, chosen, kinds)):
        if lacking not in _told:
            _told.add(lacking)
            warnings.warn(f"{op}: {lacking}: the reference serves", stacklevel=3)
        return "reference"
    return chosen


def _lacking(op: str, implementation: str, kinds: tuple[str, ...]) -> str:
    """The kinds of terms that an implementation does not compute, in words; empty where it computes all."""
    if implementation == "reference" or COMPUTES[op][implementation].issuperset(kinds):
        return ""
    unknown = sorted(set(kinds) - COMPUTES[op][implementation])
    return f"the {implementation} implementation does not compute {', '.join(unknown)}"


_told: set[str] = set()  # once is enough


# What torch.compiler.assume_constant_result does. Calling that imports torch's compiler: a second, and 150 MiB.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def preference(op: str | None = None) -> str:
    """Implementation that ENGINE_KERNELS prefers for an op, or in general. Raises ValueError for unknown names."""
    general, by_op = _preferences(os.environ.get("ENGINE_KERNELS", "auto"))
    return general if op is None else by_op.get(op, general)


@functools.cache
def _preferences(text: str) -> tuple[str, dict[str, str]]:
    """The value of ENGINE_KERNELS in parts: the general implementation, and those of single ops."""
    general, *named = text.split(",")
    by_op = {}
    for one in named:
        op, _, wanted = one.partition("=")
        look_up("ENGINE_KERNELS", op, SERVED_BY)
        by_op[op] = wanted
    for wanted in (general, *by_op.values()):
        look_up("ENGINE_KERNELS", wanted, dict.fromkeys(CHOICES))
    return general, by_op


def fused(implementation: str, op: str, function: str) -> Callable[..., Any]:
    """The function of an op in an implementation. Raises ValueError for an unknown one.

    Imported only here: triton takes a second.
    """
    module = look_up("implementation", implementation, _IMPLEMENTATIONS).module.format(op=op)
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def missing(implementation: str, device_type: str) -> str:
    """Reason why an implementation cannot serve on a type of device; empty where it can.

    Raises ValueError for an unknown one.
    """
    return look_up("implementation", implementation, _IMPLEMENTATIONS).missing(device_type)


def describe(device: torch.device, *, fused: bool = True, kinds: tuple[str, ...] = ()) -> str:
    """One line for the user: the implementation that serves each op on a device, and how to get a faster one.

    kinds: of the terms of distill_loss; those that send it to the reference are named, and no warning follows.
    An op of which there is one implementation for the device is left out.
    """
    rows = {op: by_device.get(device.type, _ELSEWHERE) for op, by_device in SERVED_BY.items()}
    chosen = {op: choose(op, device, fused=fused) for op, row in rows.items() if len(row) > 1}
    chosen = chosen or {op: choose(op, device, fused=fused) for op in rows}
    if lacking := _lacking("distill_loss", chosen["distill_loss"], kinds):
        _told.add(lacking)
        chosen["distill_loss"] = "reference"
    names = {name: [op for op in chosen if chosen[op] == name] for name in _IMPLEMENTATIONS}
    parts = [
        (f"{name} ({native.description(device.type)})" if name == "native" else name)
        + ("" if len(ops) == len(chosen) else f" for {', '.join(ops)}")
        + (f" ({lacking})" if lacking and "distill_loss" in ops else "")
        for name, ops in names.items()
        if ops
    ]
    line = f"Kernels: {'; '.join(parts)}"
    if preference() == "auto" and fused:
        fastest = {op: rows[op][0] for op in chosen}
        faster = {name: missing(name, device.type) for op, name in fastest.items() if name != chosen[op]}
        line += "".join(f"; faster with {name}: {reason}" for name, reason in faster.items() if reason)
    return line


def _interpreting(wanted: str) -> bool:
    """True where Triton's interpreter runs kernels, on any device."""
    return wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
