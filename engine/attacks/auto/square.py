"""Square Attack (Andriushchenko et al., 2020): random squares, kept where they lower the margin; no gradient.

Shape suffixes: B images, C channels, H rows and W columns of an image, T tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attacks.auto import windows
from engine.attacks.auto.losses import margin
from engine.attacks.auto.search import (
    AttackState,
    Ball,
    Logits,
    PassCount,
    Search,
    Start,
    StepResult,
    norms,
    per_image,
)
from engine.attacks.auto.windows import MAX_CHANNELS, Window
from engine.common.lookup import look_up

_TINY = 1e-12


@dataclass
class SquareState(AttackState):
    """x_best: where the margin was smallest. windows: of all steps, see `windows.draw`."""

    x_best: Tensor
    margin_best_B: Tensor
    windows_BKN: Tensor


class Square(Search[SquareState]):
    """Square Attack on the margin, one start.

    network: images to logits, run without gradients. seed: of the starts and squares of each sample.
    num_queries: squares that are tried after the start.
    """

    def __init__(self, network: Logits, ball: Ball, *, seed: int, num_queries: int = 5000) -> None:
        self.steps = num_queries + 1
        self._network, self._ball, self._seed, self._num_queries = network, ball, seed, num_queries
        self._start = look_up("threat_model", ball.threat_model, _STARTS)
        self._size = look_up("threat_model", ball.threat_model, _SIZES)
        self._move = look_up("threat_model", ball.threat_model, _MOVES)

    def begin(self, start: Start) -> SquareState:
        """The state of images that have gone no step. Raises ValueError if they have too many channels."""
        x_nat = start.x_nat.contiguous(memory_format=torch.channels_last)
        if x_nat.shape[1] > MAX_CHANNELS:
            raise ValueError(f"x_nat: {x_nat.shape[1]} channels, at most {MAX_CHANNELS} are known")
        sizes = _sizes(self._size, self._num_queries, x_nat)
        return SquareState(
            x_nat,
            start.labels_B,
            torch.zeros_like(start.labels_B),
            x_best=self._start(self._seed, start.sample_B, x_nat, self._ball.epsilon),
            margin_best_B=x_nat.new_full((len(x_nat),), torch.inf),
            windows_BKN=windows.draw(self._seed, start.sample_B, sizes, x_nat.shape[1:], self._num_queries),
        )

    def advance(self, state: SquareState, *, last: bool) -> StepResult:
        with torch.no_grad():
            x_new = self._move(state, windows.at_step(state.windows_BKN, state.step_B), self._ball.epsilon)
            logits_BC = self._network(x_new)
            if not last:
                _keep(state, x_new, margin(logits_BC, state.labels_B))
        state.step_B += 1
        return StepResult(logits_BC.argmax(dim=1) != state.labels_B, x_new, logits_BC.isfinite().all(dim=1))

    def passes(self, steps: int) -> PassCount:
        return PassCount(steps, 0)


def _keep(state: SquareState, x_new: Tensor, margin_B: Tensor) -> None:
    """Take the images whose margin is smaller than the smallest, or not positive."""
    better_B = (margin_B < state.margin_best_B) | (margin_B <= 0)
    torch.where(better_B, margin_B, state.margin_best_B, out=state.margin_best_B)
    torch.where(per_image(better_B), x_new, state.x_best, out=state.x_best)


def _sizes(size: Callable[[int, int, int], int], num_queries: int, images: Tensor) -> list[int]:
    """Side of the windows of each level that so many queries reach."""
    height, width = images.shape[-2:]
    return [size(level, height, width) for level in range(windows.level(num_queries) + 1)]


def _stripes(seed: int, sample_B: Tensor, x_nat: Tensor, epsilon: float) -> Tensor:
    """Columns of +epsilon or -epsilon, drawn for each image, channel and column."""
    batch, channels, _, width = x_nat.shape
    signs = windows.start_signs(seed, sample_B, channels * width).view(batch, channels, 1, width)
    return (x_nat + epsilon * signs.to(x_nat.dtype)).clamp_(0, 1)


def _square(state: SquareState, window: Window, epsilon: float) -> Tensor:
    """+2 epsilon or -2 epsilon, for each channel, on the window of the best image; into the ball."""
    channels, height, width = state.x_best.shape[1:]
    dtype = state.x_best.dtype
    rows_BH = windows.inside(window.top_B, window.size_B, height).to(dtype)
    columns_BW = windows.inside(window.left_B, window.size_B, width).to(dtype)
    change_BC = 2 * epsilon * windows.channel_signs(window.signs_B, channels).to(dtype)
    rows = change_BC[:, :, None, None] * rows_BH[:, None, :, None]
    moved = torch.addcmul(state.x_best, rows, columns_BW[:, None, None, :])
    return torch.clamp(moved, state.x_nat - epsilon, state.x_nat + epsilon, out=moved).clamp_(0, 1)


def _tiles(seed: int, sample_B: Tensor, x_nat: Tensor, epsilon: float) -> Tensor:
    """A `pattern` on each of about 5 x 5 tiles, turned or not, its sign that of the channel; onto the sphere."""
    channels, height, width = x_nat.shape[1:]
    size = max(min(height // 5, width), 1)
    margin_size = max((height - 5 * size) // 2, 0)
    row_H, column_W = (torch.arange(length, device=x_nat.device) - margin_size for length in (height, width))
    down, across = height // size, width // size
    within_HW = _below(row_H, down * size)[:, None] & _below(column_W, across * size)
    tile_HW = (row_H // size).clamp(0, down - 1)[:, None] * across + (column_W // size).clamp(0, across - 1)
    both = windows.patterns((size,), x_nat.dtype, x_nat.device)[0]
    both_2HW = both[:, row_H % size][:, :, column_W % size] * within_HW

    signs_BCT = windows.start_signs(seed, sample_B, (1 + channels) * down * across).unflatten(
        1, (1 + channels, -1)
    )
    turned_BHW = signs_BCT[:, 0, tile_HW] > 0
    shape_BHW = torch.where(turned_BHW, both_2HW[1], both_2HW[0])
    delta = shape_BHW[:, None] * signs_BCT[:, 1:, tile_HW]
    delta = delta.contiguous(memory_format=torch.channels_last)
    return _moved(x_nat, delta, _to_length(delta, epsilon))


def _two_windows(state: SquareState, window: Window, epsilon: float) -> Tensor:
    """The perturbation of the second window goes into the first, with a new pattern; onto the sphere.

    Where both are empty, what goes there is as long as the root of a rounding error, as published.
    """
    channels, height, width = state.x_best.shape[1:]
    dtype = state.x_best.dtype
    first, second = (
        windows.inside(top_B, window.size_B, height)[:, None, :, None]
        & windows.inside(left_B, window.size_B, width)[:, None, None, :]
        for top_B, left_B in ((window.top_B, window.left_B), (window.second_top_B, window.second_left_B))
    )
    signs = windows.channel_signs(window.signs_B, channels)[:, :, None, None]

    delta = state.x_best - state.x_nat
    squared = delta.square()
    unused = (epsilon**2 - squared.sum(dim=(1, 2, 3), keepdim=True)).clamp_(min=0)
    length = (unused / channels + (squared * (first | second)).sum(dim=(2, 3), keepdim=True)).sqrt_()
    old = delta * first
    old *= 1 / (_plane_norms(old) + _TINY)
    fresh = old.addcmul_(signs.to(dtype), _placed(state, window) * first)
    fresh *= length / (_plane_norms(fresh) + _TINY)
    delta = delta.masked_fill_(first | second, 0).add_(fresh)
    factor = torch.where(per_image(window.size_B > 0), _to_length(delta, epsilon), 1.0)
    return _moved(state.x_nat, delta, factor)


def _placed(state: SquareState, window: Window) -> Tensor:
    """Pattern of each image's first window from its place on, (B, 1, H, W); no meaning outside of the window."""
    num_queries = state.windows_BKN.shape[1] - 1
    sizes = tuple(_sizes(windows.l2_size, num_queries, state.x_nat))
    table = windows.patterns(sizes, state.x_nat.dtype, state.x_nat.device)
    side = table.shape[-1]
    row_BH, column_BW = (
        (torch.arange(length, device=first_B.device) - first_B[:, None]).clamp_(0, side - 1)
        for first_B, length in zip((window.top_B, window.left_B), state.x_nat.shape[2:], strict=True)
    )
    table_B11 = (2 * window.level_B + window.turned_B)[:, None, None]
    return table.take((table_B11 * side + row_BH[:, :, None]) * side + column_BW[:, None, :])[:, None]


def _below(index: Tensor, end: int) -> Tensor:
    return (index >= 0) & (index < end)


def _plane_norms(images: Tensor) -> Tensor:
    """L2 norm of each channel of an image, (B, C, 1, 1)."""
    values: Tensor = torch.linalg.vector_norm(images, dim=(2, 3), keepdim=True)
    return values


def _to_length(delta: Tensor, epsilon: float) -> Tensor:
    """Factor of each image that makes the length of a perturbation epsilon, (B, 1, 1, 1)."""
    return epsilon / (norms(delta) + _TINY)


def _moved(x_nat: Tensor, delta: Tensor, factor: Tensor) -> Tensor:
    return torch.addcmul(x_nat, delta, factor).clamp_(0, 1)


# By threat model.
_STARTS: dict[str, Callable[[int, Tensor, Tensor, float], Tensor]] = {"Linf": _stripes, "L2": _tiles}
_SIZES: dict[str, Callable[[int, int, int], int]] = {"Linf": windows.linf_size, "L2": windows.l2_size}
_MOVES: dict[str, Callable[[SquareState, Window, float], Tensor]] = {"Linf": _square, "L2": _two_windows}
