"""Choice of the implementation that serves, whichever are installed here: the tests pretend what is there."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels import (
    Term,
    crop_flip,
    dispatch,
    distill_loss,
    fab_step,
    native,
    pgd_update,
    random_start,
    reference,
)
from engine.kernels.contract import KINDS, LossInputs, LossSpec, LossTerm

NOT_BUILT = "it is not built"
OPS = ("distill_loss", "random_start", "batch_norm", "pgd_update", "crop_flip")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets ENGINE_KERNELS, and what is there: "native cpu", "native cuda", "triton"."""

    def pretend(*there: str, wanted: str | None = None) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.delenv("ENGINE_KERNELS", raising=False)
        if wanted is not None:
            monkeypatch.setenv("ENGINE_KERNELS", wanted)
        monkeypatch.setattr(native, "missing", lambda device: "" if f"native {device}" in there else NOT_BUILT)
        monkeypatch.setattr(native, "description", lambda device: f"on {device}")
        monkeypatch.setattr(dispatch, "_has_triton", lambda: "triton" in there)

    return pretend


ALL = ("native cpu", "native cuda", "triton")
NONE: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("wanted", "there", "device", "chosen"),
    [
        (None, ALL, "cpu", ("native", "native", "native", "native", "native")),
        ("auto", ALL, "cpu", ("native", "native", "native", "native", "native")),
        ("auto", ALL, "cuda", ("triton", "triton", "triton", "triton", "triton")),
        ("auto", NONE, "cpu", ("reference", "reference", "reference", "reference", "reference")),
        ("auto", NONE, "cuda", ("reference", "reference", "reference", "reference", "reference")),
        (
            "auto",
            ("native cpu", "native cuda"),
            "cuda",
            ("reference", "reference", "reference", "native", "native"),
        ),
        ("auto", ("native cpu",), "cuda", ("reference", "reference", "reference", "reference", "reference")),
        ("native", ALL, "cpu", ("native", "native", "native", "native", "native")),
        ("native", ALL, "cuda", ("triton", "triton", "triton", "native", "native")),
        ("triton", ALL, "cpu", ("native", "native", "native", "native", "native")),
        ("triton", ("triton",), "cpu", ("reference", "reference", "reference", "reference", "reference")),
        ("triton", ALL, "cuda", ("triton", "triton", "triton", "triton", "triton")),
        ("reference", ALL, "cpu", ("reference", "reference", "reference", "reference", "reference")),
        ("reference", ALL, "cuda", ("reference", "reference", "reference", "reference", "reference")),
        ("auto", ALL, "mps", ("reference", "reference", "reference", "reference", "reference")),
        ("native", ALL, "meta", ("reference", "reference", "reference", "reference", "reference")),
    ],
)
def test_the_table_of_choices(
    installed: Callable[..., None],
    wanted: str | None,
    there: tuple[str, ...],
    device: str,
    chosen: tuple[str, ...],
) -> None:
    installed(*there, wanted=wanted)
    assert tuple(dispatch.choose(op, torch.device(device)) for op in OPS) == chosen
    assert {dispatch.choose(op, torch.device(device), fused=False) for op in OPS} == {"reference"}


@pytest.mark.parametrize(
    ("wanted", "device", "reason"),
    [("native", "cpu", NOT_BUILT), ("triton", "cuda", "triton is not installed (pip install triton)")],
)
def test_what_is_asked_for_by_name_and_not_there_is_refused(
    installed: Callable[..., None], wanted: str, device: str, reason: str
) -> None:
    installed(wanted=wanted)
    for op in OPS:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
            dispatch.choose(op, torch.device(device))
        assert str(error.value) == f"ENGINE_KERNELS={wanted}: {reason}"


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("auto,batch_norm=reference", {"batch_norm": "reference"}),
        ("reference,pgd_update=native,crop_flip=auto", {"pgd_update": "native", "crop_flip": "native"}),
        ("native,pgd_update=native,pgd_update=reference", {"pgd_update": "reference"}),
    ],
)
def test_one_op_is_chosen_alone(installed: Callable[..., None], wanted: str, chosen: dict[str, str]) -> None:
    installed(*ALL, wanted=wanted)
    rest = "reference" if wanted.startswith("reference") else "native"
    assert {op: dispatch.choose(op, torch.device("cpu")) for op in OPS} == dict.fromkeys(OPS, rest) | chosen


@pytest.mark.parametrize(
    ("wanted", "unknown", "known"),
    [
        ("auto,batchnorm=reference", "batchnorm", OPS),
        ("auto,batch_norm=cudnn", "cudnn", dispatch.CHOICES),
        ("auto,batch_norm", "", dispatch.CHOICES),
        ("batch_norm=reference", "batch_norm=reference", dispatch.CHOICES),
    ],
)
def test_an_unknown_choice_of_one_op_is_refused(
    installed: Callable[..., None], wanted: str, unknown: str, known: tuple[str, ...]
) -> None:
    installed(*ALL, wanted=wanted)
    with pytest.raises(ValueError, match=rf"\AENGINE_KERNELS: {unknown!r} is unknown; known are ") as error:
        dispatch.choose("pgd_update", torch.device("cpu"))
    assert all(name in str(error.value) for name in known)


@pytest.mark.parametrize("wanted", ["cuda", "Native", ""])
def test_an_unknown_choice_is_refused_with_the_known_ones(installed: Callable[..., None], wanted: str) -> None:
    installed(*ALL, wanted=wanted)
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    calls: tuple[Callable[[], object], ...] = (
        lambda: distill_loss({"s": logits}, labels, [Term("ce", "s")]),
        lambda: distill_loss({"s": logits.double()}, labels, [Term("ce", "s")]),
        lambda: pgd_update(logits, logits, logits, threat_model="Linf", epsilon=0, step_size=0),
        lambda: crop_flip(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), labels[:1], labels, seed=0, epoch=0),
        lambda: dispatch.describe(torch.device("cpu")),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as error:
            call()
        assert f"ENGINE_KERNELS: {wanted!r} is unknown" in str(error.value)
        assert all(choice in str(error.value) for choice in ("auto", "native", "triton", "reference"))


@pytest.mark.parametrize(("device", "chosen"), [("cpu", "native"), ("cuda", "reference"), ("mps", "reference")])
def test_an_op_that_a_cpu_alone_has(installed: Callable[..., None], device: str, chosen: str) -> None:
    installed(*ALL)
    assert dispatch.choose("conv3x3", torch.device(device)) == chosen


def test_the_interpreter_runs_triton_on_any_device(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(*ALL, wanted="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert {dispatch.choose(op, torch.device("cpu")) for op in OPS} == {"triton"}
    monkeypatch.setenv("ENGINE_KERNELS", "auto")
    assert {dispatch.choose(op, torch.device("cpu")) for op in OPS} == {"native"}


@pytest.mark.parametrize(
    ("wanted", "there", "device", "line"),
    [
        ("auto", ALL, "cpu", "Kernels: native (on cpu)"),
        ("auto", ALL, "cuda", "Kernels: triton"),
        ("reference", ALL, "cpu", "Kernels: reference"),
        ("auto", NONE, "cpu", f"Kernels: reference; faster with native: {NOT_BUILT}"),
        (
            "native",
            ALL,
            "cuda",
            "Kernels: native (on cuda) for pgd_update, crop_flip; "
            "triton for distill_loss, random_start, fab_step, image_conv3x3, batch_norm, batch_sums, sgd_update",
        ),
        (
            "auto",
            ("native cuda",),
            "cuda",
            "Kernels: native (on cuda) for pgd_update, crop_flip; "
            "reference for distill_loss, random_start, fab_step, image_conv3x3, batch_norm, "
            "batch_sums, sgd_update; "
            "faster with triton: triton is not installed (pip install triton)",
        ),
        ("auto", ALL, "mps", "Kernels: reference"),
    ],
)
def test_one_line_tells_the_user_what_serves_and_what_would_be_faster(
    installed: Callable[..., None], wanted: str, there: tuple[str, ...], device: str, line: str
) -> None:
    installed(*there, wanted=wanted)
    assert dispatch.describe(torch.device(device)) == line
    assert dispatch.describe(torch.device(device), fused=False) == "Kernels: reference"


# ---------------------------------------------------------------- which calls a fused implementation gets


@pytest.fixture
def served(installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the native functions that were called; the reference does their work."""
    calls: list[str] = []
    installed("native cpu")

    def record(name: str) -> None:
        work = getattr(reference, name)

        def recorded(*arguments: Any) -> None:
            calls.append(name)
            work(*arguments)

        monkeypatch.setattr(native, name, recorded)

    for name in ("pgd_update", "crop_flip", "random_start", "fab_step"):
        record(name)
    return calls


def channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (lambda x, grad: (x, grad), True),
        (lambda x, grad: (x, grad.half()), True),
        (lambda x, grad: (x, grad.bfloat16()), True),
        (lambda x, grad: (channels_last(x), grad[:, :, ::2].repeat_interleave(2, 2)), True),
        (lambda x, grad: (x[1:], grad[1:]), True),
        (lambda x, grad: (x[:, 0], grad[:, 0]), False),  # with gaps
        (lambda x, grad: (x[:, :, :, 1:], grad[:, :, :, 1:]), False),
        (lambda x, grad: (x.double(), grad), False),
        (lambda x, grad: (x, grad.double()), False),
        (lambda x, grad: (x.half(), grad), False),
    ],
)
def test_pgd_update_is_fused_for_dense_images_in_float32(
    served: list[str], change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], fused: bool
) -> None:
    x_adv, grad = change(torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    pgd_update(x_adv, grad, x_adv.clone(), threat_model="Linf", epsilon=0.1, step_size=0.1)
    assert served == ["pgd_update"] * fused


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (lambda x, grad: (x, grad), True),
        (lambda x, grad: (channels_last(x), grad[:, :, ::2].repeat_interleave(2, 2)), True),
        (lambda x, grad: (x[:, 0], grad[:, 0]), False),  # with gaps
        (lambda x, grad: (x.double(), grad), False),
        (lambda x, grad: (x, grad.half()), False),
    ],
)
def test_fab_step_is_fused_for_dense_tensors_in_float32(
    served: list[str], change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], fused: bool
) -> None:
    x_adv, grad = change(torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    fab_step(x_adv, x_adv.clone(), grad, torch.ones(6)[::2], threat_model="Linf")
    fab_step(x_adv, x_adv.clone(), grad, torch.ones(3).double(), threat_model="Linf")
    assert served == ["fab_step"] * fused


def test_a_fused_pgd_update_gets_all_tensors_in_one_layout(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed("native cpu")
    strides: list[tuple[int, ...]] = []
    monkeypatch.setattr(native, "pgd_update", lambda *tensors: strides.extend(t.stride() for t in tensors[:3]))
    x_adv, grad, x_nat = (
        channels_last(torch.rand(3, 2, 4, 4)),
        torch.rand(3, 2, 4, 8)[..., ::2],
        torch.rand(2, 4, 4),
    )
    pgd_update(x_adv, grad, x_nat.expand(3, 2, 4, 4), threat_model="Linf", epsilon=0.1, step_size=0.1)
    assert strides == [x_adv.stride()] * 3


@pytest.mark.parametrize(
    ("x_nat", "fused"),
    [
        (torch.zeros(3, 2, 4, 4), True),
        (channels_last(torch.zeros(3, 2, 4, 4)), True),
        (torch.zeros(3, 2, 4, 8)[..., ::2], True),  # what is made is dense
        (torch.zeros(3, 2, 4, 4).permute(0, 2, 1, 3), False),
        (torch.zeros(3, 2, 4, 4, dtype=torch.float64), False),
        (torch.zeros(3, 5), False),
    ],
)
def test_random_start_is_fused_for_dense_images_in_float32(served: list[str], x_nat: Tensor, fused: bool) -> None:
    keys: dict[str, Any] = {"threat_model": "Linf", "epsilon": 0.5, "seed": 1, "counter": 2}
    random_start(x_nat, torch.arange(6)[::2], kind="uniform", **keys)
    assert served == ["random_start"] * fused
    random_start(x_nat, torch.arange(3), kind="gaussian", **keys)
    assert served == ["random_start"] * fused


@pytest.mark.parametrize(
    ("images", "labels", "dtype", "fused"),
    [
        (torch.zeros(4, 6, 6, 3, dtype=torch.uint8), torch.arange(4), torch.float32, True),
        (torch.zeros(4, 6, 6, 3, dtype=torch.uint8), torch.arange(4), torch.float64, False),
        (torch.zeros(4, 6, 6, 3, dtype=torch.uint8), torch.arange(4), torch.bfloat16, False),
        (torch.zeros(4, 6, 7, 3, dtype=torch.uint8)[:, :, 1:], torch.arange(4), torch.float32, False),
        (torch.zeros(4, 6, 6, 3, dtype=torch.uint8), torch.arange(8)[::2], torch.float32, False),
    ],
)
@pytest.mark.parametrize("index_B", [None, torch.tensor([1, 0, 2])[::2]])
def test_crop_flip_is_fused_for_dense_images_into_float32(
    served: list[str],
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    fused: bool,
    index_B: Tensor | None,
) -> None:
    crop_flip(images, labels, torch.tensor([3, 1, 0])[::2], seed=0, epoch=0, dtype=dtype, index_B=index_B)
    assert served == ["crop_flip"] * fused


@pytest.mark.parametrize(
    ("student", "teacher", "fused"),
    [
        (torch.float32, torch.float32, True),
        (torch.float16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float64, torch.float64, False),
        (torch.float32, torch.float64, False),
    ],
)
@pytest.mark.parametrize("classes", [3, 10_000])
def test_distill_loss_is_fused_for_logits_of_at_most_32_bits(
    installed: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    student: torch.dtype,
    teacher: torch.dtype,
    fused: bool,
    classes: int,
) -> None:
    def serve(*_: object) -> None:
        raise NotImplementedError

    installed("native cpu")
    monkeypatch.setattr(native, "loss_and_gradients", serve)
    logits = {name: torch.zeros(2, classes, dtype=dtype) for name, dtype in (("s", student), ("t", teacher))}
    terms, labels = [Term("ce", "s", weight=(0, 1))], torch.zeros(2, dtype=torch.int64)
    with pytest.raises(NotImplementedError) if fused else nullcontext():
        distill_loss(logits, labels, terms, trust="t")


def lacking_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict.fromkeys(("native", "triton"), frozenset(("ce", "kl")))
    monkeypatch.setitem(dispatch.COMPUTES, "distill_loss", few)
    monkeypatch.setattr(dispatch, "_told", set())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_kind_that_an_implementation_lacks_is_the_references_and_that_is_told_once(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    installed(*ALL)
    lacking_margin(monkeypatch)
    place = torch.device(device)
    assert dispatch.choose("distill_loss", place, kinds=("kl", "ce")) != "reference"
    with pytest.warns(
        UserWarning, match=r"\Adistill_loss: the \w+ implementation does not compute margin: the ref"
    ):
        assert dispatch.choose("distill_loss", place, kinds=("ce", "margin")) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("distill_loss", place, kinds=("margin", "ce")) == "reference"


def test_the_line_for_the_user_names_the_kinds_that_the_reference_computes(
    installed: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(*ALL)
    lacking_margin(monkeypatch)
    device, kinds = torch.device("cpu"), ("ce", "margin")
    assert dispatch.describe(device, kinds=("ce",)) == "Kernels: native (on cpu)"
    assert dispatch.describe(device, kinds=kinds) == (
        "Kernels: native (on cpu) for random_start, pgd_update, fab_step, crop_flip, conv3x3, image_conv3x3, "
        "batch_norm; "
        "reference for distill_loss (the native implementation does not compute margin)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was told
        assert dispatch.choose("distill_loss", device, kinds=kinds) == "reference"


def test_a_call_of_terms_that_an_implementation_lacks_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := native.missing("cpu"):
        pytest.skip(reason)
    lacking_margin(monkeypatch)
    logits, labels = {"s": torch.randn(3, 4)}, torch.tensor([0, 1, 3])
    with pytest.warns(UserWarning, match="native implementation does not compute margin"):
        found = distill_loss(logits, labels, [Term("margin", "s"), Term("ce", "s")])
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    assert torch.equal(found.loss, distill_loss(logits, labels, [Term("margin", "s"), Term("ce", "s")]).loss)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_the_kinds_are_those_of_the_contract(implementation: str) -> None:
    kinds = list(native._KINDS if implementation == "native" else reference._TERMS)
    assert kinds == list(KINDS)
    if implementation != "reference":
        assert dispatch.COMPUTES["distill_loss"][implementation] == frozenset(kinds)
    spec = LossSpec((LossTerm("hinge", 0, -1, 1.0, 0.0, 1.0, False, -1),), -1, 0.1, 0.0)
    inputs = LossInputs((torch.zeros(1, 2),), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="and not 'hinge'"):
        native._terms(spec) if implementation == "native" else reference.distill_loss(inputs, spec)


def test_importing_the_ops_does_not_import_torch_s_compiler() -> None:
    """The compiler costs a second and 150 MiB. Tests of compiled ops show that `choose` is a constant to it."""
    code = "import engine.kernels, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
