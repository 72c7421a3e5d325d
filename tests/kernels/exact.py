"""The ops a second time, in float64 numpy: what is right, and how far rounding may carry a number from it.

Shares nothing with the code under test. Shape suffixes: B batch, C classes, N data set, H, W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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


def distill_loss(
    logits: Mapping[str, Array],
    labels: Array,
    terms: Sequence[Any],
    *,
    trust: str | None = None,
    beta: float = 0.1,
    factors: Mapping[str, Array] | None = None,
    sample_weights: Array | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, Number]:
    """loss, alpha, terms, per_sample, and in closed form (docs/loss.md) grad_NAME to each of the logits."""
    batch, classes = next(iter(logits.values())).shape
    divisor = given(1 / max(batch, 1))
    y_BC = np.zeros((batch, classes))
    y_BC[range(batch), labels] = 1
    v_B1 = given(np.ones((batch, 1)) if sample_weights is None else sample_weights[:, None])
    alpha_B1 = given(np.ones((batch, 1)))
    if trust is not None:
        alpha_B1 = (given(beta) * log_softmax(logits[trust], 1.0).pick(labels)).exp()

    term_means, per_sample_B1 = [], given(np.zeros((batch, 1)))
    gradients = {name: given(np.zeros((batch, classes))) for name in logits}
    for term in terms:
        a, b = term.weight
        w_B1 = v_B1 * (given(a) + given(b) * alpha_B1 if b else given(a))
        if term.factor is not None:
            assert factors is not None
            w_B1 *= given(factors[term.factor][:, None])
        target_BC = None if term.target is None else logits[term.target]
        slopes = _TERMS[term.kind](logits[term.student], target_BC, y_BC, term.temperature, label_smoothing)
        gradients[term.student] += w_B1 * divisor * slopes.student_BC
        if slopes.target_BC is not None and not term.detach:
            gradients[term.target] += w_B1 * divisor * slopes.target_BC
        term_means.append(slopes.value_B1.each(np.ravel).sum(0) * divisor)
        per_sample_B1 += w_B1 * slopes.value_B1
    return {
        "loss": per_sample_B1.each(np.ravel).sum(0) * divisor,
        "alpha": alpha_B1.each(np.ravel),
        "terms": Number(
            np.stack([mean.value for mean in term_means]), np.stack([mean.size for mean in term_means])
        ),
        "per_sample": per_sample_B1.each(np.ravel),
        **{f"grad_{name}": gradient_BC for name, gradient_BC in gradients.items()},
    }


class Slopes(NamedTuple):
    """A term of each sample, and its gradient to the student's logits and to the target's."""

    value_B1: Number
    student_BC: Number
    target_BC: Number | None = None


def _cross_entropy(student_BC: Array, _: None, y_BC: Array, temperature: float, smoothing: float) -> Slopes:
    y_BC = (1 - smoothing) * y_BC + smoothing / y_BC.shape[1]
    log_p_BC = log_softmax(student_BC, 1.0)
    return Slopes((given(-y_BC) * log_p_BC).sum(1, keepdims=True), log_p_BC.exp() - given(y_BC))


def _divergence(student_BC: Array, target_BC: Array, _: Array, temperature: float, smoothing: float) -> Slopes:
    log_q_BC, log_p_BC = log_softmax(target_BC, temperature), log_softmax(student_BC, temperature)
    q_BC, d_BC = log_q_BC.exp(), log_q_BC - log_p_BC
    value_B1 = (q_BC * d_BC).sum(1, keepdims=True)
    slope = given(1 / temperature)
    return Slopes(value_B1, slope * (log_p_BC.exp() - q_BC), slope * q_BC * (d_BC - value_B1))


def _margin(student_BC: Array, _: None, y_BC: Array, temperature: float, smoothing: float) -> Slopes:
    p_BC = log_softmax(student_BC, 1.0).exp()
    others_BC = np.where(y_BC > 0, -np.inf, student_BC)
    highest_BC = (others_BC == others_BC.max(axis=1, keepdims=True)) * 1.0
    highest_BC /= highest_BC.sum(axis=1, keepdims=True)  # equal ones share the gradient
    p_B1 = p_BC.pick(others_BC.argmax(axis=1))
    room_B1 = given(1.0001 + 1e-12) - p_B1
    inverse_B1 = (given(-1) * room_B1.log()).exp()
    return Slopes(given(-1) * room_B1.log(), inverse_B1 * p_B1 * (given(highest_BC) - p_BC))


def _live_divergence(
    student_BC: Array, target_BC: Array, y_BC: Array, temperature: float, smoothing: float
) -> Slopes:
    log_q_BC, p_BC = log_softmax(target_BC, temperature), log_softmax(student_BC, temperature).exp()
    floor, slope = given(1e-12), given(1 / temperature)
    q_BC, d_BC = log_q_BC.exp(), log_q_BC - (p_BC + floor).log()
    value_B1 = (q_BC * d_BC).sum(1, keepdims=True)
    label_BC = log_softmax(target_BC, 1.0).exp()
    label_B1 = label_BC.pick(y_BC.argmax(axis=1))
    live_B1 = given(1.0000001) - label_B1
    part_BC = q_BC * p_BC * (given(-1) * (p_BC + floor).log()).exp()
    of_student_BC = live_B1 * slope * (p_BC * part_BC.sum(1, keepdims=True) - part_BC)
    of_target_BC = live_B1 * slope * q_BC * (d_BC - value_B1)
    return Slopes(live_B1 * value_B1, of_student_BC, of_target_BC + value_B1 * label_B1 * (label_BC - given(y_BC)))


_TERMS: dict[str, Callable[..., Slopes]] = {
    "ce": _cross_entropy,
    "kl": _divergence,
    "margin": _margin,
    "kl_live": _live_divergence,
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
    factor_B1 = given(min(epsilon, 1e30)) * delta_BN.inverse_norm()  # infinity times 0 is no number
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
