"""Budgets of the Triton kernels, read from the binaries that a launch would make on each device.

The launchers run as they are, on tensors of the CPU, under a driver that names another device: what they would
launch is compiled, with their block sizes and specialised to their arguments, and is not launched.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.kernels.contract import LossInputs, LossSpec, LossTerm
from engine.kernels.triton_ops import (
    batch_norm,
    batch_sums,
    crop_flip,
    distill_loss,
    fab_step,
    image_conv3x3,
    pgd_update,
    sgd_update,
)
from tests.kernels.sgd_cases import SgdCase
from tests.kernels.sgd_cases import make as make_sgd
from tests.kernels.sums_cases import SumsCase, make, zero_sums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SINGLE, BRAIN = torch.float32, torch.bfloat16
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


# ---------------------------------------------------------------- what is launched
# With 64 registers half as many threads as can be fit on a multiprocessor, with 128 a quarter.


@dataclass(frozen=True)
class Objective:
    """Terms over numbered logits, the first ones the student's, which have gradients. trust: see `LossSpec`."""

    name: str
    terms: tuple[LossTerm, ...]
    students: int
    trust: int

    @property
    def logits(self) -> int:
        return 1 + max(number for term in self.terms for number in (term.student, term.target, self.trust))


def ce(student: int, a: float, b: float = 0.0) -> LossTerm:
    return LossTerm("ce", student, -1, a, b, 1.0, False, -1)


def kl(student: int, target: int, a: float, b: float, temperature: float = 4.0, factor: int = -1) -> LossTerm:
    return LossTerm("kl", student, target, a, b, temperature, False, factor)


# S(x~), S(x), T_at(x~), T_st(x~), T_at(x)
IAD2 = Objective("IAD-II", (ce(0, 0.25), kl(0, 1, 1, -1, 1.0), kl(0, 2, 0, 0.5), kl(0, 3, 0.5, 0)), 2, 2)
ALL = Objective(
    "all",
    (
        ce(1, 0.5, 0.5),
        ce(0, 0.5, 0.5),
        kl(0, 1, 0.5, 0.5, 1.0),
        *(kl(0, teacher, 0.5, 0.5) for teacher in (4, 2, 3)),
    ),
    2,
    2,
)
# S(x~), S(x), S(x~) - S(x-), T_at(x~), T_at(x), T_at(x~) - T_at(x-)
SAAD = Objective("SAAD", (kl(0, 3, 16, 0, factor=0), kl(1, 4, 16, 0, factor=1), kl(2, 5, 1, 0, 1.0, 0)), 3, -1)
# S(x~), S(x)
MART = Objective(
    "MART",
    (
        ce(0, 1),
        LossTerm("margin", 0, -1, 1.0, 0.0, 1.0, False, -1),
        LossTerm("kl_live", 0, 1, 5.0, 0.0, 1.0, False, -1),
    ),
    2,
    -1,
)


@dataclass(frozen=True)
class Loss:
    """The loss and its backward; with all terms also sample weights and label smoothing."""

    objective: Objective
    dtype: torch.dtype
    classes: int
    layout: str = "contiguous"
    batch: int = 32
    tau: float = 4.0
    beta: float = 0.1
    scale: float = 1.0  # of some weights

    kernels = ("_loss", "_means", "_scale")

    def __str__(self) -> str:
        return f"{self.objective.name} {short(self.dtype)} {self.classes} {self.layout}"

    @property
    def registers(self) -> int:
        few = 64 + 8 * (OLD_TRITON and self.classes == 200)
        # Tensors with strides have addresses of their own.
        return (few if self.classes <= 200 else 128) + 16 * (self.layout != "contiguous")

    @property
    def values(self) -> int:
        """Number of values of each tensor in a thread."""
        rows, columns, num_warps = distill_loss.tile(self.classes)
        return rows * columns // (32 * num_warps)

    def logits(self) -> Tensor:
        shape = {"sliced": (self.batch, 2 * self.classes), "transposed": (self.classes, self.batch)}
        logits = torch.zeros(shape.get(self.layout, (self.batch, self.classes)), dtype=self.dtype)
        return logits.t() if self.layout == "transposed" else logits[:, : self.classes]

    def launch(self) -> None:
        objective, everything = self.objective, self.objective.name == "all"
        terms = tuple(
            term._replace(a=self.scale * term.a, b=self.scale * term.b, temperature=self.tau)
            if term.temperature == 4
            else term
            for term in objective.terms
        )
        factors = 1 + max(term.factor for term in terms)
        inputs = LossInputs(
            tuple(self.logits() for _ in range(objective.logits)),
            labels=torch.zeros(self.batch, dtype=torch.int64),
            sample_weights=torch.ones(self.batch) if everything else None,
            factors=torch.ones(self.batch, factors) if factors else None,
        )
        spec = LossSpec(terms, objective.trust, self.beta, 0.1 if everything else 0.0)
        wants = tuple(number < objective.students for number in range(objective.logits))
        result = distill_loss.loss_and_gradients(inputs, spec, wants)
        assert result.gradients is not None
        distill_loss.scale(result.loss, result.gradients, self.dtype)


@dataclass(frozen=True)
class Pgd:
    """A step on samples of a size."""

    l2: bool
    dtype: torch.dtype
    size: int
    counting: bool = True
    batch: int = 4
    epsilon: float = 0.1

    def __str__(self) -> str:
        counting = " counting" if self.counting else ""
        return f"{'L2' if self.l2 else 'Linf'} {short(self.dtype)} {self.size}{counting}"

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("_l2" if self.l2 else "_linf",)

    @property
    def registers(self) -> int:
        return 128 if self.l2 and self.size > 4096 else 64

    def launch(self) -> None:
        x_adv, x_nat = torch.zeros(self.batch, self.size), torch.zeros(self.batch, self.size)
        counts = torch.zeros(2, dtype=torch.int64) if self.counting else None
        pgd_update.pgd_update(x_adv, x_nat.to(self.dtype), x_nat, self.l2, self.epsilon, 0.1, counts)


@dataclass(frozen=True)
class Fab:
    """A step of FAB on samples of a size."""

    l2: bool
    size: int
    batch: int = 4
    alpha_max: float = 0.1
    eta: float = 1.05

    kernels = ("_fab_step",)
    registers = 80

    def __str__(self) -> str:
        return f"fab {'L2' if self.l2 else 'Linf'} {self.size}"

    def launch(self) -> None:
        x_adv, x_nat, grad = (torch.zeros(self.batch, self.size) for _ in range(3))
        fab_step.fab_step(x_adv, x_nat, grad, torch.zeros(self.batch), self.l2, self.alpha_max, self.eta)


@dataclass(frozen=True)
class Crop:
    """Views of square images of three channels."""

    size: int
    seed: int = 0
    epoch: int = 0
    batch: int = 4
    count: int = 5
    indexed: bool = False

    kernels = ("_crop_flip",)
    registers = 64

    def __str__(self) -> str:
        return f"crop {self.size}{' indexed' if self.indexed else ''}"

    def launch(self) -> None:
        x_BCHW = torch.zeros(self.batch, 3, self.size, self.size).contiguous(memory_format=torch.channels_last)
        images = torch.zeros(self.count, self.size, self.size, 3, dtype=torch.uint8)
        labels_N, labels_B = (torch.zeros(n, dtype=torch.int64) for n in (self.count, self.batch))
        sample_B = torch.zeros_like(labels_B)
        index_B = sample_B.clone() if self.indexed else None
        numbers = (self.seed, self.epoch, 4, True, True)
        crop_flip.crop_flip(x_BCHW, labels_B, images, labels_N, sample_B, *numbers, index_B)


@dataclass(frozen=True)
class Norm:
    """BatchNorm with ReLU, and with a residual, forward and backward."""

    dtype: torch.dtype
    channels: int
    residual: bool = False
    batch: int = 64
    momentum: float = 0.1

    kernels = ("_statistics", "_apply", "_sums", "_gradient")
    registers = 128

    def __str__(self) -> str:
        return f"norm {short(self.dtype)} {self.channels}{' residual' if self.residual else ''}"

    def launch(self) -> None:
        map_ = torch.zeros(self.batch, self.channels, 8, 8, dtype=self.dtype).to(memory_format=torch.channels_last)
        weight, bias, mean, var = (torch.zeros(self.channels) for _ in range(4))
        added = map_.clone() if self.residual else None
        y, statistics_2C = batch_norm.batch_norm(map_, weight, bias, mean, var, added, self.momentum, 1e-5, True)
        batch_norm.batch_norm_backward(
            map_, map_.clone(), y if self.residual else None, weight, bias, statistics_2C, True
        )


@dataclass(frozen=True)
class Stem:
    """Normalisation and first convolution, its backward, and the step of an attack by it."""

    dtype: torch.dtype
    channels: int
    batch: int = 4
    epsilon: float = 0.1

    kernels = ("_image_conv", "_image_gradient", "_image_update")

    @property
    def registers(self) -> int:
        return 128 if self.dtype == BRAIN else 152

    def __str__(self) -> str:
        return f"stem {short(self.dtype)} {self.channels}"

    def launch(self) -> None:
        def last(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
            map_ = torch.zeros(self.batch, channels, 32, 32, dtype=dtype)
            return map_.to(memory_format=torch.channels_last)

        images, weight, mean = last(3), torch.zeros(self.channels, 3, 3, 3), torch.zeros(3, 1, 1)
        counts, y = torch.zeros(2, dtype=torch.int64), last(self.channels, self.dtype)
        image_conv3x3.image_conv3x3(images, weight, weight[:, 0, 0, 0].contiguous(), mean, mean, self.dtype)
        image_conv3x3.image_conv3x3_backward(y, weight, mean)
        image_conv3x3.image_conv3x3_update(images, y, last(3), weight, mean, self.epsilon, 0.1, counts)


@dataclass(frozen=True)
class Sums:
    """Sums of what is measured of a batch."""

    classes: int
    dtype: torch.dtype
    batch: int = 33

    kernels = ("_batch_sums",)

    def __str__(self) -> str:
        return f"sums {short(self.dtype)} {self.classes}"

    @property
    def registers(self) -> int:
        return 64 + 8 * OLD_TRITON if self.classes <= 1000 else 128

    def launch(self) -> None:
        batch = make(SumsCase(self.batch, self.classes, self.dtype))
        batch_sums.batch_sums(zero_sums(len(batch.sources)), batch)


@dataclass(frozen=True)
class Sgd:
    """An update of weights. half: of some gradients and copies; None: there are none."""

    half: torch.dtype | None
    momentum: float = 0.9
    nesterov: bool = False
    scaled: bool = False
    decay: float = 0.1
    shapes: tuple[tuple[int, ...], ...] = ((64, 64, 3, 3), (64,), (10, 64))

    kernels = ("_sgd_update",)
    registers = 72  # of sm_120; 64 of the others

    def __str__(self) -> str:
        words = {"nesterov": self.nesterov, "scaled": self.scaled, "no momentum": not self.momentum}
        return " ".join(["sgd", short(self.half or SINGLE), *(word for word, is_so in words.items() if is_so)])

    def launch(self) -> None:
        case = SgdCase(self.shapes, self.half, self.momentum, self.decay, self.nesterov, scaled=self.scaled)
        tensors, numbers = make_sgd(case)
        sgd_update.sgd_update(tensors, numbers, None)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Launch = Loss | Pgd | Fab | Crop | Norm | Stem | Sums | Sgd
SIZES = (10, 100, 200, 1000, 4096)
LOSSES = [Loss(row, dtype, classes) for row in (ALL, IAD2) for dtype in (SINGLE, BRAIN) for classes in SIZES]
NEWER = [Loss(row, dtype, classes) for row in (SAAD, MART) for dtype in (SINGLE, BRAIN) for classes in SIZES]
STRIDED = [
    Loss(ALL, dtype, classes, layout)
    for dtype, layout in ((SINGLE, "transposed"), (BRAIN, "sliced"))
    for classes in SIZES
]
STEPS = [
    *(Pgd(False, dtype, 3072, counting) for dtype in (SINGLE, BRAIN) for counting in (False, True)),
    *(Pgd(True, dtype, size) for dtype in (SINGLE, BRAIN) for size in (3072, 12288, 150528)),
]
FABS = [Fab(l2, size) for l2 in (False, True) for size in (784, 3072, 150528)]
CROPS = [Crop(32), Crop(64), Crop(32, indexed=True)]
NORMS = [
    Norm(dtype, channels, residual)
    for dtype in (SINGLE, BRAIN)
    for channels in (16, 64)
    for residual in (False, True)
]
STEMS = [Stem(dtype, channels) for dtype in (SINGLE, BRAIN) for channels in (16, 64)]
SUMS = [Sums(classes, dtype) for classes in SIZES for dtype in (SINGLE, BRAIN)]
UPDATES = [Sgd(BRAIN), Sgd(None), Sgd(torch.float16, nesterov=True, scaled=True), Sgd(BRAIN, momentum=0.0)]
LAUNCHES: list[Launch] = [*LOSSES, *NEWER, *STRIDED, *STEPS, *FABS, *CROPS, *NORMS, *STEMS, *SUMS, *UPDATES]
# The rest is slow. On one device nearly all, on the others what comes nearest to the budgets.
NEAREST: list[Launch] = [
    *LOSSES[:2],
    LOSSES[3],
    LOSSES[7],
    LOSSES[9],
    LOSSES[17],
    *STEPS[3:5],
    *FABS[1::3],
    *CROPS[::2],
    NORMS[-1],
    STEMS[-1],
    SUMS[0],
    UPDATES[2],
]
QUICK = {target: set(NEAREST) for target in TARGETS}
QUICK["sm_90"] = {*LAUNCHES} - {*STRIDED[1::2], *NEWER[1::2]}
PLAN = [
    pytest.param(case, id=f"{case[0]} {case[1]}", marks=() if case[1] in QUICK[case[0]] else pytest.mark.slow)
    for case in itertools.product(TARGETS, LAUNCHES)
]


# ---------------------------------------------------------------- what it is compiled to


@dataclass(frozen=True)
class Driver:
    """A device as far as a compilation asks for it. Its number is its name, and so its kernels are its own."""

    name: str

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, _: str) -> int:
        return 0


@contextmanager
def compiling(target: str, cache: Path) -> Iterator[list[Any]]:
    """Compile the kernels of launches inside for a device, and list them."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernels.append(run(self, *args, warmup=True, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setattr(driver, "_active", Driver(target))
        patch.setattr(JITFunction, "run", compile_only)
        yield kernels


@dataclass(frozen=True)
class Binary:
    """spilled: what went from registers to memory, in bytes or instructions or registers; 0 is what matters."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    text: str
    instructions: Counter[str]
    intermediate: str

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


def tool(name: str) -> Path:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        pytest.skip(f"this triton comes without {name}")
    return path


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(kernel: Any, folder: Path) -> Binary:
    if "cubin" in kernel.asm:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        text = output(tool("nvdisasm"), "-c", cubin)
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
        facts = dict(re.findall(r"(\w+):(\d+)", output(tool("cuobjdump"), "--dump-resource-usage", cubin)))
        local = sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
        registers, spilled = int(facts["REG"]), int(facts["STACK"]) + int(facts["LOCAL"]) + local
    else:
        text = kernel.asm["amdgcn"]
        instructions = re.findall(r"^\t([a-z]\w+)", text, re.M)
        facts = dict(re.findall(r"\.(\w+): +(\d+)$", text, re.M))
        registers = int(facts["vgpr_count"])
        spilled = sum(int(facts[f"{name}_spill_count"]) for name in ("vgpr", "sgpr"))
        spilled += int(facts["private_segment_fixed_size"])
    return Binary(
        kernel.metadata.name,
        registers,
        spilled,
        kernel.metadata.shared,
        text,
        Counter(instructions),
        kernel.asm["ttir"],
    )


@dataclass(frozen=True)
class Compiled:
    target: str
    launch: Launch
    binaries: tuple[Binary, ...]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module", params=PLAN)
def compiled(request: pytest.FixtureRequest, cache: Path) -> Compiled:
    target, launch = request.param
    with compiling(target, cache) as kernels:
        launch.launch()
    return Compiled(target, launch, tuple(read(kernel, cache) for kernel in kernels))


def test_an_op_makes_no_more_launches_than_it_must(compiled: Compiled) -> None:
    """The loss: values and gradients, means, and the backward."""
    assert [binary.kernel for binary in compiled.binaries] == list(compiled.launch.kernels)


def test_nothing_spills_and_registers_and_shared_memory_are_few(compiled: Compiled) -> None:
    most = compiled.launch.registers
    if TARGETS[compiled.target].backend == "hip":
        most = max(most, 200 if OLD_TRITON else 168)  # it has twice as many for each thread
    spilled = 10 if OLD_TRITON and isinstance(compiled.launch, Sums) else 0  # of a kernel that runs once a step
    if isinstance(compiled.launch, Fab):
        spilled = 24  # bytes, around the calls of a division in float64, of which a projection has one a step
    for binary in compiled.binaries:
        assert binary.spilled <= spilled, binary.kernel
        assert binary.registers <= most, (binary.kernel, binary.registers)
        assert binary.shared <= 32768, (binary.kernel, binary.shared)


def test_memory_is_moved_16_bytes_at_a_time(compiled: Compiled) -> None:
    """For aligned rows and threads that have so much. Nothing that fits into registers is read twice."""
    launch, lanes = compiled.launch, TARGETS[compiled.target].warp_size
    cuda = (r"LDG\.E(\.\w+)*\.128(\.\w+)*", r"STG\.E(\.\w+)*\.128(\.\w+)*")
    load, store = cuda if lanes == 32 else ("buffer_load_dwordx4", "buffer_store_dwordx4")

    def wide(values: int, itemsize: int, row: int = 16) -> int:
        """Accesses of 16 bytes to so many values for each of 32 lanes, in rows of a length."""
        size = values * itemsize * 32 // lanes
        return size // 16 if min(size, math.gcd(row * itemsize, 16)) == 16 else 0

    counts = {binary.kernel: (binary.count(load), binary.count(store)) for binary in compiled.binaries}
    if isinstance(launch, Loss):
        itemsize = launch.dtype.itemsize
        loads = launch.objective.logits * wide(launch.values, itemsize, launch.classes)
        if launch.layout == "contiguous":
            assert counts["_loss"][0] == loads
        assert counts["_loss"][1] == launch.objective.students * wide(launch.values, 4, launch.classes)
        assert counts["_scale"] == (wide(8, 4), wide(8, itemsize))
    elif isinstance(launch, Fab):
        loads, stores = counts["_fab_step"]
        if lanes == 32:  # with 64 a thread has two values
            (binary,) = compiled.binaries
            assert stores > 0
            assert binary.count(r"LDG\..*") == loads + 1  # the difference
            assert binary.count(r"STG\..*") == stores
    elif isinstance(launch, Crop):
        assert counts["_crop_flip"][1] == wide(8, 4)
    elif isinstance(launch, Norm):
        once = wide(4096 // 256, launch.dtype.itemsize)  # of a tile, for each of 256 threads
        assert counts["_apply"][1] == counts["_gradient"][1] == once
        assert counts["_sums"][1] == launch.residual * once
        reads = {"_statistics": 2, "_apply": 1 + launch.residual, "_sums": 2 + launch.residual, "_gradient": 2}
        for kernel, maps in reads.items():
            assert counts[kernel][0] >= maps * once, kernel
    elif isinstance(launch, Stem):
        if lanes == 32:
            assert counts["_image_conv"][1] == wide(32 * launch.channels // 128, launch.dtype.itemsize)
            once = wide(64 * min(launch.channels, 32) // 128, launch.dtype.itemsize)  # of a block of a gradient
            for binary in compiled.binaries[1:]:  # through shared memory, which some devices fill by themselves
                assert binary.count(rf"LDGSTS\.E(\.\w+)*\.128(\.\w+)*|{load}") >= once
    elif isinstance(launch, Sums):
        assert counts["_batch_sums"][1] == 0  # it stores numbers one by one
    elif isinstance(launch, Sgd):
        single, half = wide(2048 // 256, 4), wide(2048 // 256, 2) if launch.half is not None else 0
        written = (1 + bool(launch.momentum)) * single
        assert counts["_sgd_update"] == (written + single + half, written + half)  # of gradients of either format
    else:
        block, num_warps = pgd_update.blocks(launch.size) if launch.l2 else (1024, 4)
        values = block // (32 * num_warps)
        loads, stores = 2 * wide(values, 4) + wide(values, launch.dtype.itemsize), wide(values, 4)
        ((found_loads, found_stores),) = counts.values()
        if launch.l2:  # what lies beyond the end of all samples is left out
            assert 0 < found_loads <= loads or launch.size > block
            assert 0 < found_stores <= stores
        else:
            assert (found_loads, found_stores) == (loads, stores)
        if lanes == 32:
            assert compiled.binaries[0].count(r"(LDG|STG)\..*") == found_loads + found_stores


def test_addresses_do_not_overflow(compiled: Compiled) -> None:
    """Products with a stride or a block have 64 bits; rows, parts and pixels are counted in 32."""
    for binary in compiled.binaries:
        products = re.findall(r"muli .*: (tensor<\w+xi32>|i32)", binary.intermediate)
        counted = {"i32", "tensor<16xi32>", "tensor<16x1xi32>"}  # parts, their rows, and the places of their sums
        allowed = {"_loss": {"i32"}, "_batch_sums": {"i32"}, "_crop_flip": {"i32", "tensor<1024xi32>"}}
        allowed |= dict.fromkeys(Norm.kernels, counted)
        # Numbers of images and of a weight, of which there are fewer than 2^31.
        of_images = {"32x32", "1x32", "1x16", "1x64", "64x1", "16x1", "32x1"}
        counted = {"i32", *(f"tensor<{shape}xi32>" for shape in of_images)}
        allowed |= dict.fromkeys(Stem.kernels, counted)
        assert set(products) <= allowed.get(binary.kernel, set()), binary.kernel


def test_arithmetic_stays_in_single_precision(compiled: Compiled) -> None:
    if isinstance(compiled.launch, (Sums, Fab)):  # which add in float64
        return
    for binary in compiled.binaries:
        assert binary.count(r"D(ADD|MUL|FMA|SETP)\b.*|F2F\.F64.*|v_\w+_f64\w*") == 0, binary.kernel


def test_the_device_refuses_unknown_labels_and_samples(compiled: Compiled) -> None:
    for binary in compiled.binaries:
        refuses = "__assertfail" in binary.text or "s_trap" in binary.text
        assert refuses == (binary.kernel in ("_loss", "_crop_flip")), binary.kernel


def test_what_is_not_asked_for_costs_nothing(compiled: Compiled) -> None:
    if isinstance(compiled.launch, Crop):  # which reads a sample, a pixel and a label
        (binary,) = compiled.binaries
        assert binary.intermediate.count("tt.load") == 3 + compiled.launch.indexed
    if isinstance(compiled.launch, Pgd):
        (binary,) = compiled.binaries
        assert (binary.count(r"(RED|REDG|ATOM|ATOMG)\b.*|global_atomic_\w+") > 0) == compiled.launch.counting
        if not compiled.launch.l2 and compiled.launch.dtype == SINGLE:  # another one is brought to its layout
            assert (binary.count(r"BAR\b.*|s_barrier") > 0) == compiled.launch.counting


@pytest.mark.parametrize(
    ("launch", "changes"),
    [
        (
            Loss(IAD2, SINGLE, 10),
            [
                {"batch": 1},
                {"batch": 33},
                {"tau": 7.0, "beta": 0.0},
                {"scale": 7.0},
            ],
        ),
        (Stem(BRAIN, 64), [{"batch": 16}, {"batch": 3}, {"epsilon": 1.0}]),
        (Norm(BRAIN, 64), [{"batch": 16}, {"batch": 48}, {"momentum": 1.0}]),
        (Pgd(False, SINGLE, 3072), [{"batch": 1}, {"batch": 33}, {"epsilon": 1.0}]),
        (
            Fab(False, 3072),
            [{"batch": 1}, {"batch": 33}, {"alpha_max": 1.0}, {"alpha_max": 0.0}, {"eta": 1.0}],
        ),
        (Sums(10, SINGLE), [{"batch": 1}, {"batch": 16}, {"batch": 1000}]),
        (Pgd(True, SINGLE, 3072), [{"batch": 1}, {"batch": 33}, {"epsilon": 1.0}]),
        (
            Sgd(BRAIN),
            [{"momentum": 1.0}, {"decay": 0.0}, {"decay": 1.0}, {"shapes": ((3,), (5, 7), (1,), (16, 16))}],
        ),
        (
            Crop(8),
            [
                {"seed": 1},
                {"seed": 2**31},
                {"seed": 2**64 - 1},
                {"epoch": 16},
                {"epoch": 2**32 - 1},
                {"batch": 1},
                {"count": 16},
            ],
        ),
    ],
    ids=str,
)
def test_other_numbers_need_no_other_kernel(launch: Launch, changes: list[dict[str, Any]], cache: Path) -> None:
    with compiling("sm_90", cache) as kernels:
        for change in ({}, *changes):
            replace(launch, **change).launch()
    # ... but that a size divisible by 16 is moved in wider accesses.
    distinct: dict[str, set[str]] = {name: set() for name in launch.kernels}
    for kernel in kernels:
        distinct[kernel.metadata.name].add(kernel.hash)
    assert {name: len(hashes) for name, hashes in distinct.items() if name != "_scale"} == {
        name: 1 for name in launch.kernels if name != "_scale"
    }
    assert len(distinct.get("_scale", ())) <= 2
