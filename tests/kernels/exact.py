"""The ops a second time, in float64 numpy: what is right, and how far rounding may carry a number from it.

Shares nothing with the code under test. Shape suffixes: B batch, C classes, N data set, H, W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROUNDING = 2.0**-24  # relative, of a float32 operation
UNDERFLOW = 2.0**-126 / ROUNDING  # what may become 0, in units of it


@dataclass(frozen=True)
class Number:
    """An array and its condition: float32 arithmetic errs by about ROUNDING * size, element by element.

    First-order error analysis: an operation passes on the errors of what it reads, each times its derivative, and
    then rounds once, or underflows.
    """

    value: Array
    size: Array

    def __add__(self, other: Number) -> Number:
        return _rounded(self.value + other.value, self.size + other.size)

    def __sub__(self, other: Number) -> Number:
        return _rounded(self.value - other.value, self.size + other.size)

    def __mul__(self, other: Number) -> Number:
        size = abs(self.value) * other.size + self.size * abs(other.value)
        return _rounded(self.value * other.value, size)

    def exp(self) -> Number:
        value = np.exp(self.value)
        return _rounded(value, value * self.size)

    def log(self) -> Number:
        return _rounded(np.log(self.value), self.size / self.value)

    def sum(self, axis: int, *, keepdims: bool = False) -> Number:
        """The roundings of a sum of n are n and of either sign: sqrt(n) of them are expected to be left."""
        size = self.size + math.sqrt(self.value.shape[axis]) * abs(self.value)
        return Number(self.value.sum(axis, keepdims=keepdims), size.sum(axis, keepdims=keepdims))

    def inverse_norm(self) -> Number:
        """1 / the L2 norm of each row, as a column; 0 for a row of zeros."""
        squares = (self * self).sum(1, keepdims=True)
        safe = np.where(squares.value > 0, squares.value, 1)
        inverse = np.where(squares.value > 0, safe**-0.5, 0)
        return _rounded(inverse, inverse * squares.size / (2 * safe))

    def pick(self, index_B: Array) -> Number:
        """One entry of each row, as a column."""
        return self.each(lambda part_BC: np.take_along_axis(part_BC, index_B[:, None], axis=1))

    def each(self, change: Callable[[Array], Array]) -> Number:
        """The same change of shape or choice for value and size."""
        return Number(change(self.value), change(self.size))


def _rounded(value: Array, size: Array) -> Number:
    return Number(value, size + abs(value) + UNDERFLOW)


def given(value: Any) -> Number:
    """The input as float64, without error."""
    value = np.asarray(value, np.float64)
    return Number(value, np.zeros_like(value))


# ---------------------------------------------------------------- distill_loss


def log_softmax(logits_BC: Array, tau: float) -> Number:
    z_BC = given(logits_BC) * _rounded(np.array(1 / tau), np.array(0.0))
    shifted_BC = z_BC - z_BC.pick(z_BC.value.argmax(axis=1))
    return shifted_BC - shifted_BC.exp().sum(1, keepdims=True).log()


# long: the whole loss by hand, to be read beside docs/loss.md
# many parameters: those of engine.kernels.distill_loss
def distill_loss(
    s_adv: Array | None,
    labels: Array,
    *,
    s_nat: Array | None,
    t_at_nat: Array | None,
    t_at_adv: Array | None,
    t_st_adv: Array | None,
    weights: Sequence[tuple[float, float]],
    tau: float,
    tau_self: float,
    beta: float,
    detach_self: bool,
    sample_weights: Array | None,
    label_smoothing: float,
) -> dict[str, Number]:
    """loss, alpha, terms, per_sample, and in closed form (docs/loss.md) the gradients grad_adv and grad_nat."""
    batch, classes = next(logits.shape for logits in (s_adv, s_nat) if logits is not None)
    divisor = given(1 / max(batch, 1))
    y_BC = np.full((batch, classes), label_smoothing / classes)
    y_BC[range(batch), labels] += 1 - label_smoothing
    v_B1 = given(np.ones((batch, 1)) if sample_weights is None else sample_weights[:, None])
    alpha_B1 = given(np.ones((batch, 1)))
    if t_at_adv is not None:
        alpha_B1 = (given(beta) * log_softmax(t_at_adv, 1.0).pick(labels)).exp()

    term_means, per_sample_B1 = [], given(np.zeros((batch, 1)))
    gradients = {"adv": given(np.zeros((batch, classes))), "nat": given(np.zeros((batch, classes)))}
    reads = (
        ("nat", s_nat, None, 1.0),
        ("adv", s_adv, None, 1.0),
        ("adv", s_adv, s_nat, tau_self),
        ("adv", s_adv, t_at_nat, tau),
        ("adv", s_adv, t_at_adv, tau),
        ("adv", s_adv, t_st_adv, tau),
    )
    for k, ((a, b), (student, logits, target, temperature)) in enumerate(zip(weights, reads, strict=True)):
        if a == b == 0:
            term_means.append(given(0))
            continue
        assert logits is not None
        w_B1 = v_B1 * (given(a) + given(b) * alpha_B1 if b else given(a))
        upstream_B1 = w_B1 * divisor * given(1 / temperature)
        log_p_BC = log_softmax(logits, temperature)
        if target is None:
            q_BC = given(y_BC)
            term_B1 = (given(-y_BC) * log_p_BC).sum(1, keepdims=True)
        else:
            log_q_BC = log_softmax(target, temperature)
            q_BC, d_BC = log_q_BC.exp(), log_q_BC - log_p_BC
            term_B1 = (q_BC * d_BC).sum(1, keepdims=True)
            if k == 2 and not detach_self:
                gradients["nat"] += upstream_B1 * q_BC * (d_BC - term_B1)
        gradients[student] += upstream_B1 * (log_p_BC.exp() - q_BC)
        term_means.append(term_B1.each(np.ravel).sum(0) * divisor)
        per_sample_B1 += w_B1 * term_B1
    return {
        "loss": per_sample_B1.each(np.ravel).sum(0) * divisor,
        "alpha": alpha_B1.each(np.ravel),
        "terms": Number(
            np.stack([mean.value for mean in term_means]), np.stack([mean.size for mean in term_means])
        ),
        "per_sample": per_sample_B1.each(np.ravel),
        "grad_adv": gradients["adv"],
        "grad_nat": gradients["nat"],
    }


# ---------------------------------------------------------------- pgd_update


def pgd_linf(x_adv: Array, grad: Array, x_nat: Array, epsilon: float, step_size: float) -> Array:
    """The L-inf step in the dtype of the images, each operation rounded once: there is one right answer."""
    radius, step = (x_adv.dtype.type(length) for length in (epsilon, step_size))
    sign = np.nan_to_num(np.sign(grad)).astype(x_adv.dtype)
    moved: Array = np.minimum(np.maximum(x_adv + step * sign, x_nat - radius), x_nat + radius).clip(0, 1)
    return moved


def pgd_l2(x_adv: Array, grad: Array, x_nat: Array, epsilon: float, step_size: float) -> Number:
    """The L2 step; a sample whose gradient is not finite becomes NaN. A rounding unit of white, 1, is granted."""
    rows = (len(grad), math.prod(grad.shape[1:]))
    grad_BN = grad.reshape(rows)
    lost_B1 = ~np.isfinite(grad_BN).all(axis=1, keepdims=True)
    grad_BN = np.where(lost_B1, 0, grad_BN)
    largest_B1 = abs(grad_BN).max(axis=1, keepdims=True)
    # By its largest entry, which changes no direction, so that no square underflows.
    direction_BN = given(grad_BN / np.where(largest_B1 > 0, largest_B1, 1))
    x_nat_BN = given(x_nat.reshape(rows))
    step_BN = given(step_size) * (direction_BN * direction_BN.inverse_norm())
    delta_BN = given(x_adv.reshape(rows)) + step_BN - x_nat_BN
    factor_B1 = given(epsilon) * delta_BN.inverse_norm()
    outside_B1 = factor_B1.value < 1
    projected_BN = delta_BN * Number(np.where(outside_B1, factor_B1.value, 1), outside_B1 * factor_B1.size)
    moved_BN = x_nat_BN + projected_BN
    value_BN = np.where(lost_B1, np.nan, moved_BN.value.clip(0, 1))
    return Number(value_BN, moved_BN.size + 1).each(lambda part_BN: part_BN.reshape(grad.shape))


# ---------------------------------------------------------------- crop_flip


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds on Python's integers, which do not wrap."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def crop_flip(image_HWC: Array, sample: int, *, seed: int, epoch: int, padding: int, flip: bool) -> Array:
    """The view of one image: padded with zeros, cut out, and mirrored. Of a sample 32 bits count."""
    height, width, _ = image_HWC.shape
    row_word, column_word, flip_word, _ = philox4x32((0, sample % 2**32, epoch, 0), (seed % 2**32, seed >> 32))
    row, column = (word * (2 * padding + 1) // 2**32 for word in (row_word, column_word))
    padded = np.pad(image_HWC, ((padding, padding), (padding, padding), (0, 0)))
    view = padded[row : row + height, column : column + width]
    return view[:, ::-1] if flip and flip_word >= 2**31 else view
