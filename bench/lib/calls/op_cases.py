"""Ops to be timed, at each size: by the reference, by the compiled reference, and by their public function.

Shape suffixes: N data set, B batch, C classes or channels, H, W.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.lib.timing import Call
from engine import kernels, methods, objectives
from engine.common.numbers import ceil_div
from engine.kernels import dispatch, reference
from engine.kernels.contract import (
    ALPHA_BINS,
    MEASURED_LOGITS,
    BatchSums,
    LossInputs,
    LossSpec,
    LossTerm,
    MeasuredBatch,
    SgdNumbers,
    SgdTensors,
)
from engine.kernels.pgd_update import IS_L2

COPY, EAGER, COMPILE = "copy", "eager", "compile"
"""Candidates beside the implementations."""
OPS = tuple(dispatch.SERVED_BY)
LOSS_SIZES = ((128, 10), (128, 100), (1024, 100), (1024, 1000), (4096, 1000))  # B, C
TEMPERATURES = ((1.0, 1.0), (5.0, 2.0))  # tau, tau_self
PIXELS = (32, 64)  # H = W
MAPS = ((128, 16, 8), (128, 64, 32), (128, 512, 4))  # B, C, H = W
CONVOLUTIONS = ((128, 16, 32), (128, 32, 16), (128, 64, 8), (128, 64, 32), (128, 256, 8), (128, 512, 4))
STEMS = ((128, 16, 32), (128, 64, 32))  # B, C, H = W
WIDTHS = (16, 64)  # channels of the first convolutions that SGD updates
CHANNELS = 3
BATCH = 128
EVALUATED = 250  # images of a batch under AutoAttack
RESIDENT = 20_000  # images of the data set, at least


class Calls(NamedTuple):
    """One piece of work done in three ways."""

    eager: Call
    compiled: Call
    public: Call  # by whatever implementation ENGINE_KERNELS prefers


@dataclass(frozen=True)
class OpCase:
    """An op at one size.

    dtype: of logits, of the gradient, or of the images made. bytes_moved: what any implementation must read and
    write. footprint: bytes of all arrays together. calls: makes the tensors. images: made by a call, if any.
    """

    op: str
    shape: str
    setting: str
    dtype: torch.dtype
    bytes_moved: int
    footprint: int
    calls: Callable[[torch.device], Calls]
    images: int = 0


def table(cache_bytes: int, *, quick: bool) -> list[OpCase]:
    """All cases, op by op; cache_bytes: of the last level."""
    if quick:
        return [
            *(distill_loss(8, 10, 1.0, 1.0, name=name) for name in ("iad2", "saad")),
            random_start(4, 8),
            pgd_update(4, 8),
            *(fab_step(4, 8, norm) for norm in IS_L2),
            crop_flip(4, 8),
            batch_norm(4, 8, 4),
            batch_sums(4, 10),
            conv3x3(16, 16, 8),
            image_conv3x3(2, 8, 8, step=True),
            sgd_update(4),
        ]
    images = [(batch, pixels) for pixels in PIXELS for batch in (BATCH, batch_beyond(cache_bytes, pixels))]
    return [
        *(distill_loss(*logits, *taus) for logits in LOSS_SIZES for taus in TEMPERATURES),
        distill_loss(1024, 1000, 1.0, 1.0, torch.bfloat16),
        *(distill_loss(*logits, 1.0, 1.0, name="saad") for logits in LOSS_SIZES[1:4:2]),
        *(random_start(*size) for size in images),
        *(pgd_update(*size) for size in images),
        pgd_update(BATCH, 32, torch.bfloat16),
        *(fab_step(EVALUATED, 32, norm) for norm in IS_L2),  # one size: its steps take minutes to compile
        *(crop_flip(*size) for size in images),
        *(
            batch_norm(*size, dtype, residual=residual)
            for size in MAPS
            for dtype in (torch.float32, torch.bfloat16)
            for residual in (False, True)
        ),
        *(batch_sums(*logits) for logits in LOSS_SIZES[:3]),
        *(conv3x3(*size) for size in CONVOLUTIONS),
        *(
            image_conv3x3(*size, dtype, step=step)
            for size in STEMS
            for dtype in (torch.float32, torch.bfloat16)
            for step in (False, True)
        ),
        *(sgd_update(channels) for channels in WIDTHS),
    ]


def distill_loss(
    batch: int,
    classes: int,
    tau: float,
    tau_self: float,
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "iad2",
) -> OpCase:
    """Forward and backward with a method's terms, of random logits and factors.

    That of IAD-II reads four logits and has two gradients, that of SAAD six, with three gradients and two factors.
    Moved: logits and gradients of B C values; of each sample its label, factors, alpha and loss.
    """
    method = methods.get(name, tau=tau, tau_self=tau_self, lam=0.5)  # of which SAAD has no term of S(x) at 0
    terms = [kernels.Term(*term[1:]) for term in method.terms(classes)]
    read = list(dict.fromkeys(name for term in terms for name in (term.student, term.target) if name is not None))
    learning = [name for name in read if name.startswith("s_")]
    named = list(dict.fromkeys(term.factor for term in terms if term.factor is not None))
    trust = objectives.TRUST if objectives.TRUST in read else None

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        logits = {name: torch.randn(batch, classes, generator=generator).to(device, dtype) for name in read}
        labels = torch.randint(classes, (batch,), generator=generator).to(device)
        factors = {name: torch.rand(batch, generator=generator).to(device) for name in named}
        student = [logits[name].requires_grad_() for name in learning]

        def public() -> kernels.DistillLoss:
            return kernels.distill_loss(logits, labels, terms, trust=trust, beta=0.1, factors=factors)

        inputs = LossInputs(
            tuple(logits.values()), labels, factors=torch.stack(list(factors.values()), 1) if named else None
        )
        by_reference = (inputs, _spec(terms, read, named, trust))

        def both_ways(forward: Callable[[], kernels.DistillLoss]) -> Call:
            return lambda: torch.autograd.grad(forward().loss, student)

        return Calls(
            both_ways(functools.partial(reference.distill_loss, *by_reference)),
            both_ways(functools.partial(compiled(reference.distill_loss), *by_reference)),
            both_ways(public),
        )

    moved = (len(read) + len(learning)) * batch * classes * dtype.itemsize + batch * (8 + 4 * len(named) + 4 + 4)
    setting = f"tau {tau:g}, tau_self {tau_self:g}" if name == "iad2" else name
    return OpCase("distill_loss", f"{batch}x{classes}", setting, dtype, moved, moved, calls)


def _spec(
    terms: Sequence[kernels.Term], logits: Sequence[str], factors: Sequence[str], trust: str | None
) -> LossSpec:
    """The terms by numbers of logits and factors, as the public function has them."""

    def number(names: Sequence[str], name: str | None) -> int:
        return -1 if name is None else names.index(name)

    numbered = (
        LossTerm(
            term.kind,
            number(logits, term.student),
            number(logits, term.target),
            *term.weight,
            term.temperature,
            term.detach,
            number(factors, term.factor),
        )
        for term in terms
    )
    return LossSpec(tuple(numbered), number(logits, trust), 0.1, 0.0)


def pgd_update(batch: int, pixels: int, dtype: torch.dtype = torch.float32) -> OpCase:
    """One L-inf step in place, with the counts of zero and non-finite gradients, as in training.

    Moved: x_adv, x_nat and the gradient read, x_adv written. dtype: of the gradient.
    """

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        x_nat, x_adv, grad = (
            torch.rand(batch, CHANNELS, pixels, pixels, generator=generator).to(
                device, memory_format=torch.channels_last
            )
            for _ in range(3)
        )
        grad = (grad - 0.5).to(dtype)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        epsilon, step_size = 8 / 255, 2 / 255
        by_reference = (x_adv, grad, x_nat, False, epsilon, step_size, counts)
        return Calls(
            functools.partial(reference.pgd_update, *by_reference),
            functools.partial(compiled(reference.pgd_update), *by_reference),
            functools.partial(
                kernels.pgd_update, x_adv, grad, x_nat,
                threat_model="Linf", epsilon=epsilon, step_size=step_size, counts=counts,
            ),
        )  # fmt: skip

    footprint = values(batch, pixels) * (4 + 4 + dtype.itemsize)
    moved = footprint + values(batch, pixels) * 4
    return OpCase("pgd_update", shape(batch, pixels), "Linf", dtype, moved, footprint, calls)


def fab_step(batch: int, pixels: int, threat_model: str) -> OpCase:
    """One step of FAB, in place; every second image on either side of its boundary.

    Moved: x_adv, x_nat and the gradient read, x_adv written, and of each image its difference read.
    """

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        x_adv, x_nat, grad = (
            torch.rand(batch, CHANNELS, pixels, pixels, generator=generator).to(
                device, memory_format=torch.channels_last
            )
            for _ in range(3)
        )
        grad = grad - 0.5
        difference_B = (torch.arange(batch, device=device) % 2 - 0.5) * math.sqrt(values(1, pixels))
        alpha_max, eta = 0.1, 1.05
        by_reference = (x_adv, x_nat, grad, difference_B, IS_L2[threat_model], alpha_max, eta)
        return Calls(
            functools.partial(reference.fab_step, *by_reference),
            functools.partial(compiled(reference.fab_step), *by_reference),
            functools.partial(
                kernels.fab_step, x_adv, x_nat, grad, difference_B,
                threat_model=threat_model, alpha_max=alpha_max, eta=eta,
            ),
        )  # fmt: skip

    footprint = 3 * 4 * values(batch, pixels) + 4 * batch
    moved = footprint + 4 * values(batch, pixels)
    return OpCase("fab_step", shape(batch, pixels), threat_model, torch.float32, moved, footprint, calls)


def random_start(batch: int, pixels: int) -> OpCase:
    """The uniform start of an attack in L-inf. Moved: the noise written, and the index of each image read."""

    def calls(device: torch.device) -> Calls:
        x_nat = torch.empty(batch, CHANNELS, pixels, pixels, device=device)
        x_nat = x_nat.contiguous(memory_format=torch.channels_last)
        sample_B = torch.arange(batch, device=device)
        epsilon, seed, counter = 8 / 255, 0, 0
        fill = compiled(reference.random_start)
        return Calls(
            lambda: reference.random_start(torch.empty_like(x_nat), sample_B, epsilon, seed, counter),
            lambda: fill(torch.empty_like(x_nat), sample_B, epsilon, seed, counter),
            functools.partial(
                kernels.random_start, x_nat, sample_B,
                kind="uniform", threat_model="Linf", epsilon=epsilon, seed=seed, counter=counter,
            ),
        )  # fmt: skip

    moved = 4 * values(batch, pixels) + 8 * batch
    return OpCase("random_start", shape(batch, pixels), "Linf", torch.float32, moved, moved, calls)


def crop_flip(batch: int, pixels: int) -> OpCase:
    """Crop and flip of the next batch of a shuffled data set, into outputs that are used again.

    Moved: a byte read and a float written per value; of each image its index and label read, its label written.
    """

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        resident = max(RESIDENT, 2 * batch)
        sizes = (resident, pixels, pixels, CHANNELS)
        images_NHWC = torch.randint(256, sizes, dtype=torch.uint8, generator=generator).to(device)
        labels_N = torch.randint(10, (resident,), generator=generator).to(device)
        order_N = torch.randperm(resident, generator=generator).to(device)
        batches = order_N[: resident // batch * batch].split(batch)
        x_BCHW = torch.empty(batch, CHANNELS, pixels, pixels, device=device)
        out = (x_BCHW.contiguous(memory_format=torch.channels_last), labels_N.new_empty(batch))

        def public(sample_B: Tensor) -> object:
            return kernels.crop_flip(images_NHWC, labels_N, sample_B, seed=0, epoch=0, out=out)

        def by(crop: Callable[..., object]) -> Callable[[Tensor], object]:
            return lambda sample_B: crop(*out, images_NHWC, labels_N, sample_B, 0, 0, 4, True, True, None)

        def in_turn(crop: Callable[[Tensor], object]) -> Call:
            turns = itertools.cycle(batches)
            return lambda: crop(next(turns))

        return Calls(in_turn(by(reference.crop_flip)), in_turn(by(compiled(reference.crop_flip))), in_turn(public))

    moved = values(batch, pixels) * (1 + 4) + batch * 3 * 8
    return OpCase("crop_flip", shape(batch, pixels), "padding 4", torch.float32, moved, moved, calls, images=batch)


def batch_norm(
    batch: int, channels: int, pixels: int, dtype: torch.dtype = torch.float32, *, residual: bool = False
) -> OpCase:
    """Forward and backward of BatchNorm by the batch, [addition,] and ReLU, with the gradients of all inputs.

    Moved, in maps: x read twice and y written forward, grad and x read twice and grad_x written backward; with a
    residual it is read, and backward y is read in place of the second grad, grad_residual written and read.
    """

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        x, other, grad = (
            torch.randn(batch, channels, pixels, pixels, generator=generator).to(
                device, dtype, memory_format=torch.channels_last
            )
            for _ in range(3)
        )
        weight, bias, mean, var = (torch.ones(channels, device=device) for _ in range(4))
        asking = [x, weight, bias, *([other] if residual else [])]
        for given in asking:
            given.requires_grad_()
        added = other if residual else None
        by_reference = (x, weight, bias, mean, var, added, 0.1, 1e-5, True)

        def public() -> Tensor:
            return kernels.batch_norm(x, weight, bias, mean, var, residual=added, relu=True)

        def both_ways(forward: Callable[[], Tensor]) -> Call:
            return lambda: torch.autograd.grad(forward(), asking, grad)

        return Calls(
            both_ways(functools.partial(reference.batch_norm, *by_reference)),
            both_ways(functools.partial(compiled(reference.batch_norm), *by_reference)),
            both_ways(public),
        )

    size = batch * channels * pixels**2 * dtype.itemsize
    maps, arrays = (11, 6) if residual else (8, 4)
    setting = "residual, relu" if residual else "relu"
    name = f"{batch}x{channels}x{pixels}x{pixels}"
    return OpCase("batch_norm", name, setting, dtype, maps * size, arrays * size, calls)


def batch_sums(batch: int, classes: int) -> OpCase:
    """A batch of three terms, alpha and all four logits added to the sums.

    Moved: the logits; of each sample its label and alpha; the sums read and written.
    """
    terms = 3
    sizes = {"totals": 18 + terms, "histogram": ALPHA_BINS, "record": 1 + terms}

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        measured = MeasuredBatch(
            torch.ones((), device=device),
            torch.ones(terms, device=device),
            tuple(range(terms)),
            torch.rand(batch, generator=generator).to(device),
            tuple(torch.randn(batch, classes, generator=generator).to(device) for _ in MEASURED_LOGITS),
            torch.randint(classes, (batch,), generator=generator).to(device),
            torch.zeros((), dtype=torch.int64, device=device),
            entries=values(1, PIXELS[0]),
        )
        sums = BatchSums(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes.values()))
        return Calls(
            functools.partial(reference.batch_sums, sums, measured),
            functools.partial(compiled(reference.batch_sums), sums, measured),
            functools.partial(kernels.batch_sums, sums, measured),
        )

    read = batch * (4 * classes * len(MEASURED_LOGITS) + 8 + 4)
    held = 8 * sum(sizes.values())
    name = f"{batch}x{classes}"
    return OpCase("batch_sums", name, f"{terms} terms", torch.float32, read + 2 * held, read + held, calls)


def conv3x3(batch: int, channels: int, pixels: int) -> OpCase:
    """Forward and gradient of the images with a frozen weight, as in a step of the attack; as many channels out.

    Moved: forward images and weight read and the output written, backward grad and weight read and grad_x written.
    """

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        x, grad = (
            torch.randn(batch, channels, pixels, pixels, generator=generator).to(
                device, memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        weight = torch.randn(channels, channels, 3, 3, generator=generator) / (3 * channels**0.5)
        weight = weight.to(device, memory_format=torch.channels_last)
        x.requires_grad_()

        def both_ways(forward: Callable[..., Tensor]) -> Call:
            return lambda: torch.autograd.grad(forward(x, weight, None), x, grad)

        return Calls(
            both_ways(reference.conv3x3), both_ways(compiled(reference.conv3x3)), both_ways(kernels.conv3x3)
        )

    map_bytes, weight_bytes = 4 * batch * channels * pixels**2, 4 * 9 * channels**2
    moved, footprint = 4 * map_bytes + 2 * weight_bytes, 4 * map_bytes + weight_bytes
    name = f"{batch}x{channels}x{pixels}x{pixels}"
    return OpCase("conv3x3", name, "of the images", torch.float32, moved, footprint, calls)


def image_conv3x3(
    batch: int, channels: int, pixels: int, dtype: torch.dtype = torch.float32, *, step: bool = False
) -> OpCase:
    """The first convolution of normalised images; with `step` also a step of the attack in L-inf by its gradient.

    Moved: images and weight read, the output written; with the step its gradient, weight, x_adv and x_nat read,
    and x_adv written. dtype: of the output and its gradient.
    """

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        sizes = (batch, CHANNELS, pixels, pixels)
        x_adv, x_nat, grad, weight = (
            torch.rand(shape, generator=generator).to(device, memory_format=torch.channels_last)
            for shape in (sizes, sizes, (batch, channels, pixels, pixels), (channels, CHANNELS, 3, 3))
        )
        grad = (grad - 0.5).to(dtype)
        mean, std = torch.full((2, CHANNELS, 1, 1), 0.5, device=device)
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        epsilon, step_size = 8 / 255, 2 / 255

        def by_reference() -> Tensor:
            y = reference.image_conv3x3(x_adv, weight, None, mean, std, dtype)
            if step:
                of_images = reference.image_conv3x3_backward(grad, weight, std)
                reference.pgd_update(x_adv, of_images, x_nat, False, epsilon, step_size, counts)
            return y

        def public() -> Tensor:
            y = kernels.image_conv3x3(x_adv, weight, None, mean, std, dtype=dtype)
            if step:
                kernels.image_conv3x3_update(
                    x_adv, grad, x_nat, weight, std, epsilon=epsilon, step_size=step_size, counts=counts
                )
            return y

        return Calls(by_reference, compiled(by_reference), public)

    images, weights = 4 * values(batch, pixels), 4 * channels * CHANNELS * 9
    map_bytes = batch * channels * pixels**2 * dtype.itemsize
    moved = footprint = images + weights + map_bytes
    if step:
        moved, footprint = moved + 3 * images + weights + map_bytes, footprint + images + map_bytes
    name = f"{batch}x{channels}x{pixels}x{pixels}"
    return OpCase("image_conv3x3", name, "and a step" if step else "forward", dtype, moved, footprint, calls)


def sgd_update(channels: int) -> OpCase:
    """SGD with momentum of sixteen 3x3 convolutions, nearly those of a ResNet-18 with 64 channels.

    channels: of the first four; four each with 2, 4 and 8 times as many follow. Moved: weight and momentum read
    and written, the gradient read and the copy written, both in bfloat16.
    """
    sizes = [(factor * channels, factor * channels, 3, 3) for factor in (1, 2, 4, 8) for _ in range(4)]

    def calls(device: torch.device) -> Calls:
        generator = torch.Generator().manual_seed(0)
        layout = torch.channels_last
        weights, gradients, momenta = (
            [torch.randn(size, generator=generator).to(device, memory_format=layout) for size in sizes]
            for _ in range(3)
        )
        gradients, halves = ([tensor.bfloat16() for tensor in tensors] for tensors in (gradients, weights))
        given = SgdTensors(weights, gradients, momenta, [*halves])
        numbers = SgdNumbers(torch.tensor(1e-6, device=device), momentum=0.9, weight_decay=2e-4)
        return Calls(
            functools.partial(reference.sgd_update, given, numbers),
            functools.partial(compiled(reference.sgd_update), given, numbers),
            functools.partial(kernels.sgd_update, given, numbers),
        )

    count = sum(map(math.prod, sizes))
    moved, footprint = (2 * 4 + 2 * 4 + 2 + 2) * count, (4 + 4 + 2 + 2) * count
    name = f"{len(sizes)}x{channels}"
    return OpCase("sgd_update", name, "momentum", torch.bfloat16, moved, footprint, calls)


def copy(footprint: int, device: torch.device) -> Call:
    """Copy one array to another; both together have the footprint, and all of it is moved."""
    source = torch.ones(footprint // 8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function by torch.compile, for the sizes it meets."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def values(batch: int, pixels: int) -> int:
    """Numbers in a batch of images."""
    return batch * CHANNELS * pixels**2


def shape(batch: int, pixels: int) -> str:
    """B x C x H x W."""
    return f"{batch}x{CHANNELS}x{pixels}x{pixels}"


def beyond(cache_bytes: int) -> int:
    """Bytes from which on arrays lie beyond a cache: twice its size, and 64 MiB where it is small or unknown."""
    return max(2**26, 2 * cache_bytes)


def batch_beyond(cache_bytes: int, pixels: int) -> int:
    """The smallest power of two whose images, as floats, lie beyond the cache."""
    needed = ceil_div(beyond(cache_bytes), 4 * values(1, pixels))
    return 1 << (needed - 1).bit_length()
