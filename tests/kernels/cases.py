"""The table of inputs that every implementation of an op is held against.

Shape suffixes: B batch, C classes, N data set, H, W.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine import methods
from engine.kernels import DistillLoss, Term, crop_flip, distill_loss, pgd_update
from tests.kernels import exact
from tests.kernels.holding import Errors, assert_accurate, assert_same_bits, numpy, poisoned, serving, threads

SINGLE, HALF, BRAIN, DOUBLE = torch.float32, torch.float16, torch.bfloat16, torch.float64
Layout = Callable[[Tensor], Tensor]


def pairwise(**values: Sequence[object]) -> list[dict[str, Any]]:
    """A short list of combinations in which any two values of two names meet; the same at every call."""
    rng = random.Random(0)
    names = list(values)
    pairs = [
        (one, i, other, j)
        for one, other in itertools.combinations(names, 2)
        for i in range(len(values[one]))
        for j in range(len(values[other]))
    ]
    missing = set(pairs)

    def met(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(one, row[one], other, row[other]) for one, other in itertools.combinations(names, 2)} & missing

    rows = []
    for one, i, other, j in pairs:
        if (one, i, other, j) in missing:
            drawn = [{name: rng.randrange(len(values[name])) for name in names} for _ in range(30)]
            best = max((row | {one: i, other: j} for row in drawn), key=lambda row: len(met(row)))
            missing -= met(best)
            rows.append({name: values[name][index] for name, index in best.items()})
    return rows


# ---------------------------------------------------------------- layouts of a matrix


def contiguous(matrix: Tensor) -> Tensor:
    return matrix.contiguous()


def transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def sliced(matrix: Tensor) -> Tensor:
    """Every second row and third column of a larger matrix of NaN."""
    room = matrix.new_full((2 * matrix.shape[0] + 1, 3 * matrix.shape[1] + 1), torch.nan)
    room[1::2, 1::3] = matrix
    return room[1::2, 1::3]


def offset(matrix: Tensor) -> Tensor:
    """An odd number of entries into its memory, and from row to row: hardly a row is aligned to 16 bytes."""
    room = matrix.new_full((matrix.shape[0], matrix.shape[1] + 3 + matrix.shape[1] % 2), torch.nan)
    room[:, 1 : 1 + matrix.shape[1]] = matrix
    return room[:, 1 : 1 + matrix.shape[1]]


def one_row(matrix: Tensor) -> Tensor:
    """The first row for all, with a stride of 0."""
    return matrix[:1].expand_as(matrix)


def one_column(matrix: Tensor) -> Tensor:
    """The first column for all, with a stride of 0."""
    return matrix[:, :1].expand_as(matrix)


# ---------------------------------------------------------------- logits, (B, C) in float64


def normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return 3 * torch.randn(shape, generator=generator, dtype=DOUBLE)


def wide(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return 1e4 * (2 * torch.rand(shape, generator=generator, dtype=DOUBLE) - 1)


def equal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return normal(shape, generator)[:, :1].repeat(1, shape[1])


def one_hot(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """1e4 for one class and -1e4 for the others."""
    chosen_B1 = torch.randint(shape[1], (shape[0], 1), generator=generator)
    return torch.full(shape, -1e4, dtype=DOUBLE).scatter_(1, chosen_B1, 1e4)


def masked(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A third of the classes is as good as minus infinity; in float16, the lowest number."""
    shut = torch.rand(shape, generator=generator) < 1 / 3
    shut[:, 0] = False
    return normal(shape, generator).masked_fill_(shut, -1e30)


def near(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """All five logits almost alike: the divergences all but vanish."""
    common = torch.linspace(-2, 2, shape[1], dtype=DOUBLE).expand(shape)
    return common + 1e-3 * torch.randn(shape, generator=generator, dtype=DOUBLE)


# ---------------------------------------------------------------- distill_loss

STUDENT = ("s_adv", "s_nat")
LOGITS = (*STUDENT, "t_at_nat", "t_at_adv", "t_st_adv")
Weights = tuple[tuple[float, float], ...]

# Kind, student and target of the terms of the paper's Table 1, in its order.
TABLE_1 = (
    ("ce", "s_nat", None),
    ("ce", "s_adv", None),
    ("kl", "s_adv", "s_nat"),
    ("kl", "s_adv", "t_at_nat"),
    ("kl", "s_adv", "t_at_adv"),
    ("kl", "s_adv", "t_st_adv"),
)


def table_1(
    weights: Sequence[tuple[float, float]], tau: float = 1.0, tau_self: float = 1.0, detach_self: bool = False
) -> tuple[Term, ...]:
    """The terms of Table 1 by their weights (a, b), without those that have none."""
    terms = []
    for (kind, student, target), weight in zip(TABLE_1, weights, strict=True):
        of_student = target == "s_nat"
        temperature = 1.0 if target is None else tau_self if of_student else tau
        if any(weight):
            terms.append(Term(kind, student, target, weight, temperature, of_student and detach_self))
    return tuple(terms)


def method_terms(name: str, semantics: str, tau: float, tau_self: float, detach_self: bool) -> tuple[Term, ...]:
    """The terms of a method over its default weights; those that two temperatures of its own do not fit, at 1."""
    own: dict[str, Any] = {"tau": tau, "detach_self": detach_self}
    own |= {} if semantics == "official" else {"tau_self": tau_self}
    return tuple(Term(*term[1:]) for term in methods.get(name, semantics=semantics, **own).terms(1, 0.5))


# many parameters: five logits, and what the terms of Table 1 have in common
def table_arguments(
    s_adv: Tensor | None,
    labels: Tensor,
    *,
    s_nat: Tensor | None = None,
    t_at_nat: Tensor | None = None,
    t_at_adv: Tensor | None = None,
    t_st_adv: Tensor | None = None,
    weights: Sequence[tuple[float, float]],
    tau: float = 1.0,
    tau_self: float = 1.0,
    detach_self: bool = False,
    **rest: Any,
) -> dict[str, Any]:
    """Arguments of `distill_loss` over the terms of Table 1; alpha is that of t_at_adv, where it is given."""
    named = dict(zip(LOGITS, (s_adv, s_nat, t_at_nat, t_at_adv, t_st_adv), strict=True))
    logits = {name: value for name, value in named.items() if value is not None}
    trust = "t_at_adv" if t_at_adv is not None else None
    return {
        "logits": logits,
        "labels": labels,
        "terms": table_1(weights, tau, tau_self, detach_self),
        "trust": trust,
    } | rest


def table_loss(*arguments: Any, **keys: Any) -> DistillLoss:
    return distill_loss(**table_arguments(*arguments, **keys))


@dataclass(frozen=True)
class LossCase:
    """One call of `distill_loss`. Number i of its logits has dtypes[i % n] and layouts[i % n]."""

    batch: int
    classes: int
    logits: Callable[[tuple[int, int], torch.Generator], Tensor]
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[Layout, ...]
    terms: tuple[Term, ...]
    beta: float
    label_smoothing: float
    sample_weights: tuple[torch.dtype, Layout] | None
    spare: bool  # whether logits are given that no term reads, and labels with a stride
    trust: str | None = "t_at_adv"  # where logits of that name are read, or any weight depends on alpha
    learning: tuple[str, ...] = STUDENT  # the logits that ask for a gradient

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        terms = "+".join(f"{term.kind}({term.student},{term.target or 'y'})" for term in self.terms)
        return f"{self.batch}x{self.classes} {dtypes} {self.logits.__name__} {self.layouts[0].__name__} {terms}"

    @property
    def alpha_of(self) -> str | None:
        """The logits that alpha is made of."""
        used = any(term.weight[1] or term.target == self.trust for term in self.terms)
        return self.trust if used or self.spare else None

    @property
    def read(self) -> set[str]:
        """The logits that must be given."""
        names = {name for term in self.terms for name in (term.student, term.target, self.alpha_of)}
        return {name for name in names if name is not None}

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `distill_loss`; the student's logits ask for a gradient."""
        generator = torch.Generator().manual_seed(self.batch * self.classes)
        logits: dict[str, Tensor] = {}
        for i, name in enumerate(dict.fromkeys((*LOGITS, *sorted(self.read)))):
            logits_BC = self.logits((self.batch, self.classes), generator)
            dtype, layout = self.dtypes[i % len(self.dtypes)], self.layouts[i % len(self.layouts)]
            if self.spare or name in self.read:
                logits_BC = logits_BC.clamp_min(max(-1e30, torch.finfo(dtype).min))
                logits[name] = layout(logits_BC.to(device, dtype)).requires_grad_(name in self.learning)
        labels_B2 = torch.randint(self.classes, (self.batch, 2), generator=generator).to(device)
        sample_weights = None
        if self.sample_weights is not None:
            dtype, layout = self.sample_weights
            v_B1 = 2 * torch.rand(self.batch, 1, generator=generator)
            sample_weights = layout(v_B1.to(device, dtype))[:, 0]
        names = dict.fromkeys(term.factor for term in self.terms if term.factor is not None)
        factors = {name: 2 * torch.rand(self.batch, generator=generator).to(device) for name in names}
        return {
            "logits": logits,
            "labels": labels_B2[:, 1] if self.spare else labels_B2[:, 1].contiguous(),
            "terms": self.terms,
            "trust": self.alpha_of,
            "beta": self.beta,
            "factors": factors,
            "sample_weights": sample_weights,
            "label_smoothing": self.label_smoothing,
        }


RANDOM_ROWS: tuple[Weights, ...] = (
    ((0.7, -0.4), (-0.3, 0.9), (0.5, 0.8), (1.2, -0.6), (0.2, 0.3), (-0.8, 0.1)),
    ((0.0, 0.5), (0.0, 0.0), (0.0, -2.0), (0.0, 0.0), (3.0, 0.0), (0.0, 0.0)),
    ((0.0, 0.0), (0.4, 0.0), (0.0, 0.0), (-1.0, 1.0), (0.0, 0.0), (0.0, 0.7)),
)
MIXED_LAYOUTS = (sliced, offset, transposed, contiguous, one_row)


def table_case(
    row: str | Weights, tau: float = 1.0, tau_self: float = 1.0, detach_self: bool = False, **rest: Any
) -> LossCase:
    """The case of a method, "name semantics", or of weights of the six terms of Table 1."""
    temperatures = (tau, tau_self, detach_self)
    if isinstance(row, str):
        name, _, semantics = row.partition(" ")
        terms = method_terms(name, semantics, *temperatures)
    else:
        terms = table_1(row, *temperatures)
    return LossCase(terms=terms, **rest)


METHODS = [
    f"{name} {semantics}"
    for name, row in methods.METHODS.items()
    if row.function is None
    for semantics in ("paper", "official")
]
ROWS = (*METHODS, *RANDOM_ROWS)
OF_TABLE_1 = ("st", "at", "trades", "ard", "akd2", "iad1", "iad1-down", "iad2")
# Terms of every kind, with factors, over any of the logits, of which a teacher's may learn.
MIXED_TERMS = (
    Term("kl", "s_nat", "t_at_adv", (0.5, -0.3), 2.0, factor="f"),
    Term("kl_live", "s_adv", "s_nat", (0.7, 0.4), 0.8),
    Term("margin", "s_nat", None, (1.0, 0.2), factor="g"),
    Term("kl", "t_at_nat", "s_adv", (-0.4, 0.0), 4.0, detach=True),
    Term("ce", "t_at_nat", None, (0.3, 0.0)),
    Term("kl", "s_adv", "t_st_adv", (0.2, 0.6), 1.0, factor="f"),
    Term("kl", "s_nat", "t_at_adv", (0.1, 0.0), 2.0),
)

LOSS_CASES = [
    table_case(**values)
    for values in pairwise(
        row=(*(row for row in METHODS if row.split()[0] in OF_TABLE_1), *RANDOM_ROWS, None),
        batch=(1, 7, 128, 1000),
        classes=(2, 10, 100, 200, 1000, 4096),
        logits=(normal, wide, equal, one_hot, masked, near),
        dtypes=((SINGLE,), (HALF,), (BRAIN,), (SINGLE, BRAIN), (BRAIN, SINGLE, HALF), (DOUBLE,)),
        layouts=((contiguous,), (transposed,), MIXED_LAYOUTS, MIXED_LAYOUTS[::-1], (one_column, contiguous)),
        tau=(0.1, 1.0, 3.7, 100.0),
        tau_self=(0.1, 1.0, 6.5, 100.0),
        beta=(0.0, 0.01, 0.1, 0.5, 1.0),
        detach_self=(False, True),
        label_smoothing=(0.0, 0.1),
        sample_weights=(None, (SINGLE, contiguous), (HALF, sliced), (DOUBLE, offset), (SINGLE, one_row)),
        spare=(False, True),
    )
    if values["row"] is not None  # of no term
]
LOSS_CASES += [
    table_case(**values, beta=0.1, label_smoothing=0.0, sample_weights=None, spare=False)
    for values in pairwise(
        row=[row for row in METHODS if row.split()[0] not in OF_TABLE_1],
        batch=(7, 128),
        classes=(2, 10, 200),
        logits=(normal, wide, one_hot, masked, near),
        dtypes=((SINGLE,), (HALF,), (BRAIN, SINGLE, HALF), (DOUBLE,)),
        layouts=((contiguous,), MIXED_LAYOUTS),
        tau=(1.0, 3.7),
        tau_self=(1.0, 6.5),
        detach_self=(False, True),
    )
]
LOSS_CASES += [
    LossCase(terms=MIXED_TERMS, label_smoothing=0.1, spare=True, learning=LOGITS, **values)
    for values in pairwise(
        batch=(1, 7, 128),
        classes=(2, 10, 200),
        logits=(normal, wide, equal, one_hot, masked, near),
        dtypes=((SINGLE,), (HALF,), (BRAIN, SINGLE, HALF), (DOUBLE,)),
        layouts=((contiguous,), MIXED_LAYOUTS),
        beta=(0.0, 0.5),
        sample_weights=(None, (SINGLE, contiguous)),
        trust=("t_at_adv", "s_nat"),
    )
]
LOSS_CASES += [replace(case, batch=0) for case in LOSS_CASES[::10]]


def call_distill_loss(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The result of `distill_loss`, and grad_NAME of logits that ask for it, 0 where the loss does not reach."""
    result = distill_loss(**arguments)
    outputs: dict[str, Tensor] = {name: value.detach() for name, value in result._asdict().items()}
    for name, logits in arguments["logits"].items():
        if logits.requires_grad:
            grad = None
            if result.loss.requires_grad:
                (grad,) = torch.autograd.grad(result.loss, logits, retain_graph=True, allow_unused=True)
            outputs[f"grad_{name}"] = torch.zeros_like(logits) if grad is None else grad
    return outputs


def check_distill_loss(case: LossCase, implementation: str, device: str = "cpu") -> dict[str, Errors]:
    arguments = case.arguments(device)
    with serving("distill_loss", "reference", device):
        eager = call_distill_loss(arguments)
    with serving("distill_loss", implementation, device), poisoned():
        got = call_distill_loss(arguments)
        # Eager torch divides an elementwise op among threads, and rounds the end of a part otherwise.
        with threads(torch.get_num_threads() if implementation == "reference" else 2):
            assert_same_bits(got, call_distill_loss(arguments))
    right = exact.distill_loss(**in_numpy(case.arguments()))
    return {name: assert_accurate(name, value, eager[name], right[name]) for name, value in got.items()}


def in_numpy(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with arrays in place of tensors."""
    changed = {name: numpy(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    for name in ("logits", "factors"):
        changed[name] = {key: numpy(value) for key, value in (arguments.get(name) or {}).items()}
    return changed


# ---------------------------------------------------------------- pgd_update


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def shifted(images: Tensor) -> Tensor:
    """Dense, one entry into its memory: not aligned to 16 bytes."""
    room = images.new_full((images.numel() + 2,), torch.nan)
    room[1:-1] = images.flatten()
    return room[1:-1].view(images.shape)


def cropped(images: Tensor) -> Tensor:
    """A window of wider images of NaN."""
    room = images.new_full((*images.shape[:-1], images.shape[-1] + 3), torch.nan)
    room[..., 2:-1] = images
    return room[..., 2:-1]


def every_second(images: Tensor) -> Tensor:
    """The samples at odd places of a larger batch."""
    room = images.new_full((2 * images.shape[0] + 1, *images.shape[1:]), torch.nan)
    room[1::2] = images
    return room[1::2]


def plain(grad: Tensor) -> Tensor:
    return grad


def sparse(grad: Tensor) -> Tensor:
    """Most entries 0, of either sign, and the whole of the first sample."""
    grad = torch.where(grad.abs() < 0.7, grad.sign() * 0.0, grad)
    grad[:1] = 0
    return grad


def tiny(grad: Tensor) -> Tensor:
    return grad * 1e-38


def huge(grad: Tensor) -> Tensor:
    return grad * 3e38


def ragged(grad: Tensor) -> Tensor:
    """Magnitudes of all orders in one sample."""
    return grad * 10 ** (40 * grad.roll(1) - 20)


def broken(grad: Tensor) -> Tensor:
    """NaN, and infinity of either sign, in the first three samples."""
    for sample, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        grad[sample : sample + 1].flatten(1)[:, -1:] = value
    return grad


@dataclass(frozen=True)
class PgdCase:
    """One call of `pgd_update`. layouts: of x_adv, grad and x_nat."""

    shape: tuple[int, ...]
    threat_model: str
    gradient: Callable[[Tensor], Tensor]
    grad_dtype: torch.dtype
    layouts: tuple[Layout, Layout, Layout]
    epsilon: float
    step_size: float
    counting: bool
    dtype: torch.dtype = SINGLE

    def __str__(self) -> str:
        shape, grad_dtype = "x".join(map(str, self.shape)), str(self.grad_dtype).removeprefix("torch.")
        layouts = "-".join(layout.__name__ for layout in self.layouts)
        return f"{self.threat_model} {shape} {self.gradient.__name__} {grad_dtype} {layouts}"

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `pgd_update`: x_nat in [0, 1], x_adv in its ball, on its border, or beyond."""
        generator = torch.Generator().manual_seed(sum(self.shape))
        x_nat, away, grad = (
            torch.rand(self.shape, generator=generator, dtype=DOUBLE) * width - start
            for width, start in ((1, 0), (2, 1), (2, 1))
        )
        x_nat[..., ::5] = x_nat[..., ::5].round()  # white and black there are
        x_adv = (x_nat + 1.2 * self.epsilon * away).clamp(0, 1)
        x_adv[: len(x_adv) // 2] = x_nat[: len(x_adv) // 2]
        images = (x_adv.to(self.dtype), self.gradient(grad).to(self.grad_dtype), x_nat.to(self.dtype))
        x_adv, grad, x_nat = (layout(t.to(device)) for layout, t in zip(self.layouts, images, strict=True))
        return {
            "x_adv": x_adv,
            "grad": grad,
            "x_nat": x_nat,
            "threat_model": self.threat_model,
            "epsilon": self.epsilon,
            "step_size": self.step_size,
            "counts": torch.tensor([5, 2**40], device=device) if self.counting else None,
        }


PGD_CASES = [
    PgdCase(threat_model=threat_model, **values)
    for threat_model in ("Linf", "L2")
    for values in pairwise(
        shape=((1, 1, 1, 1), (4, 3, 5, 7), (3, 17), (8, 3, 32, 32), (5, 1, 64, 63), (2, 3, 96, 96), (0, 3, 8, 8)),
        gradient=(plain, sparse, tiny, huge, ragged, broken),
        grad_dtype=(SINGLE, HALF, BRAIN),
        layouts=(
            (contiguous, contiguous, contiguous),
            (channels_last, channels_last, channels_last),
            (contiguous, channels_last, shifted),
            (channels_last, cropped, contiguous),
            (shifted, shifted, channels_last),
            (cropped, contiguous, contiguous),
            (every_second, every_second, cropped),
        ),
        epsilon=(0.0, 8 / 255, 0.5, 3.0, math.inf),
        step_size=(0.0, 2 / 255, 1.0),
        counting=(False, True),
    )
]
PGD_CASES += [replace(case, dtype=DOUBLE, grad_dtype=DOUBLE) for case in PGD_CASES[::8]]


def call_pgd_update(case: PgdCase, device: str) -> dict[str, Tensor]:
    """The images after the step, and the counts."""
    arguments = case.arguments(device)
    x_adv, counts = arguments["x_adv"], arguments["counts"]
    around = torch.tensor(0) if x_adv._base is None else x_adv._base.isnan().sum() - x_adv.isnan().sum()
    assert pgd_update(**arguments) is x_adv
    if x_adv._base is not None:
        assert x_adv._base.isnan().sum() - x_adv.isnan().sum() == around, "written beside x_adv"
    return {"x_adv": x_adv} if counts is None else {"x_adv": x_adv, "counts": counts}


def check_pgd_update(case: PgdCase, implementation: str, device: str = "cpu") -> dict[str, Errors]:
    """L-inf and counts bit by bit; L2 as exact as can be, and NaN just where it must be."""
    with serving("pgd_update", "reference", device):
        eager = call_pgd_update(case, device)["x_adv"]
    with serving("pgd_update", implementation, device), poisoned():
        got = call_pgd_update(case, device)
        with threads(2):
            assert_same_bits(got, call_pgd_update(case, device))
    arguments = case.arguments()
    x_adv, x_nat = arguments["x_adv"].numpy(), arguments["x_nat"].numpy()
    grad = numpy(arguments["grad"])
    if case.counting:
        expected = [5 + int((grad == 0).sum()), 2**40 + int((~np.isfinite(grad)).sum())]
        assert got["counts"].tolist() == expected
    if case.threat_model == "Linf":
        right = exact.pgd_linf(x_adv, grad, x_nat, case.epsilon, case.step_size)
        np.testing.assert_array_equal(got["x_adv"].cpu().numpy(), right)
        return {}
    inexact = exact.pgd_l2(x_adv, grad, x_nat, case.epsilon, case.step_size)
    lost = np.isnan(inexact.value)
    np.testing.assert_array_equal(np.isnan(numpy(got["x_adv"])), lost)
    finite = exact.Number(np.where(lost, 0, inexact.value), inexact.size)
    return {"x_adv": assert_accurate("x_adv", got["x_adv"].nan_to_num(0), eager.nan_to_num(0), finite)}


# ---------------------------------------------------------------- crop_flip


@dataclass(frozen=True)
class CropCase:
    """One call of `crop_flip` on 40 images."""

    size: tuple[int, int]
    channels: int
    batch: int
    padding: int
    flip: bool
    augment: bool
    seed: int
    epoch: int
    reuse: bool  # whether out is given
    indexed: bool = False  # whether index_B is given; samples are then any numbers
    dtype: torch.dtype = SINGLE

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{self.batch}x{height}x{width}x{self.channels} by {self.padding} seed {self.seed} epoch {self.epoch}"
            f"{' indexed' if self.indexed else ''}"
        )

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Arguments of `crop_flip`; images repeat, and the first and the last one occur."""
        generator = torch.Generator().manual_seed(self.batch)
        shape = (40, *self.size, self.channels)
        index_B = torch.randint(40, (self.batch,), generator=generator)
        index_B[:1], index_B[1:2] = 39, 0
        result = {
            "images_NHWC": torch.randint(256, shape, dtype=torch.uint8, generator=generator),
            "labels_N": torch.randint(-(2**62), 2**62, (40,), generator=generator),
            "sample_B": index_B,
        }
        if self.indexed:
            sample_B = torch.randint(2**63 - 1, (self.batch,), generator=generator)
            result |= {"sample_B": sample_B, "index_B": index_B}
        numbers = ("seed", "epoch", "padding", "flip", "augment", "dtype")
        return {name: value.to(device) for name, value in result.items()} | {
            name: getattr(self, name) for name in numbers
        }


CROP_CASES = [
    CropCase(**values)
    for values in pairwise(
        size=((8, 8), (9, 13), (32, 32), (64, 64), (17, 63)),
        channels=(1, 3, 4),
        batch=(1, 7, 33),
        padding=(0, 1, 4, 8),
        flip=(True, False),
        augment=(True, True, True, False),
        seed=(0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
        epoch=(0, 7, 2**31, 2**32 - 1),
        reuse=(False, True),
        indexed=(False, True),
    )
]
CROP_CASES += [replace(CROP_CASES[0], batch=0), replace(CROP_CASES[0], dtype=DOUBLE)]


def call_crop_flip(case: CropCase, device: str) -> dict[str, Tensor]:
    arguments = case.arguments(device)
    if case.reuse:
        x_BCHW, labels_B = crop_flip(**arguments)
        arguments["out"] = (x_BCHW.fill_(torch.nan), labels_B.fill_(-1))
    x_BCHW, labels_B = crop_flip(**arguments)
    if case.reuse:
        assert x_BCHW is arguments["out"][0]
        assert labels_B is arguments["out"][1]
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return {"x_BCHW": x_BCHW.permute(0, 2, 3, 1), "labels_B": labels_B}


def check_crop_flip(case: CropCase, implementation: str, device: str = "cpu") -> None:
    """Bit by bit."""
    with serving("crop_flip", implementation, device), poisoned():
        got = call_crop_flip(case, device)
        with threads(2):
            assert_same_bits(got, call_crop_flip(case, device))
    arguments = case.arguments()
    images, index_B = arguments["images_NHWC"].numpy(), arguments.get("index_B", arguments["sample_B"])
    keys: dict[str, Any] = {name: getattr(case, name) for name in ("seed", "epoch", "padding", "flip")}
    views = [
        exact.crop_flip(images[index], sample, **keys) if case.augment else images[index]
        for sample, index in zip(arguments["sample_B"].tolist(), index_B.tolist(), strict=True)
    ]
    pixels: exact.Array = np.array(views, np.float64 if case.dtype == DOUBLE else np.float32)
    pixels = pixels.reshape(case.batch, *case.size, case.channels) / pixels.dtype.type(255)
    np.testing.assert_array_equal(got["x_BCHW"].cpu().numpy(), pixels)
    assert torch.equal(got["labels_B"].cpu(), arguments["labels_N"][index_B])
