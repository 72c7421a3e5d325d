"""Makes Triton's interpreter compute as the compiled kernels do, where it does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = NDArray[Any]


def imitate(patch: pytest.MonkeyPatch, *, asserting: bool = True) -> None:
    """Until the patch is undone.

    - A conversion to bfloat16 rounds to nearest (the interpreter truncates), and one from it keeps small numbers.
    - Arithmetic in bfloat16, which would be done on its bits as integers, is refused.
    - `tl.fma` rounds once.
    - `tl.dot` in "bf16x6" multiplies three numbers in bfloat16 for each factor, by six products.
    - `tl.exp` is exp2 of a rounded product, as on CUDA.
    - Assertions on the device are made, if asked for.
    - A number of one element bounds a loop (Triton 3.6 with a numpy that no longer takes it for an integer).
    """
    casts, operations, patch_tensor = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.binary_op,
        interpreter._patch_lang_tensor,
    )

    def cast(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded_to_bfloat16(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return casts(self, source, target)

    def operation(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise TypeError("arithmetic in bfloat16: convert to float32 first")
        return operations(self, left, right, op)

    def fma(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        assert x.data.dtype == y.data.dtype == z.data.dtype == np.float32
        exact = x.data.astype(np.float64) * y.data + z.data  # but for the last bit of a float64
        return TensorHandle(exact.astype(np.float32), tl.float32)

    def exp(_: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
        power = x.data * np.float32(math.log2(math.e))
        return TensorHandle(np.exp2(power.astype(np.float64)).astype(np.float32), tl.float32)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    for name in ("create_fp_trunc", "create_fp_ext", "cast_impl"):
        patch.setattr(InterpreterBuilder, name, cast)
    patch.setattr(InterpreterBuilder, "binary_op", operation)
    patch.setattr(InterpreterBuilder, "create_fma", fma)
    patch.setattr(InterpreterBuilder, "create_exp", exp)
    patch.setattr(InterpreterBuilder, "create_dot", _dot)
    patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    options = interpreter.InterpreterOptions(
        debug=asserting, sanitize_overflow=False, allowed_dot_input_precisions=("bf16x6",)
    )
    patch.setattr(interpreter.interpreter_builder, "options", options)


def rounded_to_bfloat16(numbers: Array) -> Array:
    """The bits of float32 numbers rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def in_bfloat16(numbers: Array) -> list[Array]:
    """Three numbers in bfloat16, as float32, whose sum is a number in float32; 0 after an infinite one."""
    parts = []
    for _ in range(3):
        parts.append((rounded_to_bfloat16(numbers).astype(np.uint32) << 16).view(np.float32))
        with np.errstate(invalid="ignore"):
            numbers = np.where(np.isfinite(parts[-1]), numbers - parts[-1], np.float32(0))
    return parts


def _dot(_: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle, *how: Any) -> TensorHandle:
    """x y + z, of float32, in "bf16x6"."""
    assert how[0] == ir.INPUT_PRECISION.BF16x6, "another precision than the kernels have asked for so far"
    (x1, x2, x3), (y1, y2, y3) = in_bfloat16(x.data), in_bfloat16(y.data)
    with np.errstate(invalid="ignore"):
        rest = sum(left @ right for left, right in ((x2, y2), (x1, y3), (x3, y1), (x1, y2), (x2, y1)))
        return TensorHandle(z.data + np.nan_to_num(rest, nan=0) + x1 @ y1, tl.float32)
