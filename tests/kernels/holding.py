"""Requirements of an implementation: it serves itself, writes all of its output, is exact, repeats its bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels import dispatch
from tests.kernels.exact import Array, Number


@contextmanager
def serving(op: str, implementation: str, device: str) -> Iterator[None]:
    """ENGINE_KERNELS says which implementation serves, and that one does, not another in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KERNELS", implementation)
        assert dispatch.choose(op, torch.device(device)) == implementation
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that torch allocates with NaN, or with the largest integer, on every device."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numpy(tensor: Tensor) -> Array:
    """Its values on the host; numpy has no bfloat16, and float64 holds all."""
    tensor = tensor.detach().cpu()
    array: Array = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


class Errors(NamedTuple):
    """Error of the worst element of a tensor, in rounding units of what that element was computed from."""

    got: float
    eager: float


def assert_accurate(name: str, got: Tensor, eager: Tensor, right: Number) -> Errors:
    """Each element within one rounding unit of its condition.

    That bound is of the worst case, where all roundings add up, and eager torch stays well inside it. How much
    better it is than another implementation shows only over many cases: in one it may be exact by luck.
    """
    assert got.shape == eager.shape == right.value.shape, (name, got.shape, eager.shape, right.value.shape)
    assert got.dtype == eager.dtype, (name, got.dtype, eager.dtype)
    info = torch.finfo(got.dtype)
    # Half the distance of neighbours; for float64 twice that, as the exact result is rounded too.
    unit = info.eps if info.bits == 64 else torch.finfo(torch.float32).eps / 2
    # A half precision number is computed in float32 and then rounded to nearest; it may overflow or underflow.
    stored = info.eps / 2 * (abs(right.value) if info.bits == 16 else 0) + info.smallest_normal * info.eps
    bound = unit * right.size + stored
    exactly, *computed = (array.clip(info.min, info.max) for array in (right.value, numpy(got), numpy(eager)))
    ratio, eager_ratio = (abs(array - exactly) / bound for array in computed)
    if not (ratio <= 1).all():
        worst = np.unravel_index(np.argmax(np.nan_to_num(ratio, nan=np.inf)), ratio.shape)
        raise AssertionError(
            f"{name}{list(map(int, worst))}: got {computed[0][worst]:.9g}, exactly {exactly[worst]:.9g}, "
            f"eager {computed[1][worst]:.9g}; {ratio[worst]:.3g} times what its condition allows"
        )
    return Errors(ratio.max(initial=0), eager_ratio.max(initial=0))


def assert_no_worse_than_twice_eager(errors: Iterable[tuple[str, Errors]]) -> None:
    """Over many tensors of a name: by the worst of them, and by their root mean square."""
    by_name: dict[str, list[Errors]] = {}
    for name, measured in errors:
        by_name.setdefault(name, []).append(measured)
    for name, measured_N in by_name.items():
        got_N, eager_N = np.array(measured_N).T
        for norm in (np.inf, 2):
            got, eager = np.linalg.norm(got_N, norm), np.linalg.norm(eager_N, norm)
            assert got <= 2 * eager, f"{name}: {got:.3g}, eager {eager:.3g} over {len(got_N)} (norm {norm})"


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in first.items():
        assert numpy(tensor).tobytes() == numpy(second[name]).tobytes(), (
            f"{name} has other bits at the second call"
        )
