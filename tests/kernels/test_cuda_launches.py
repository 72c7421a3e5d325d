"""Calls of the ops to a CUDA device, seen by a mock of its driver: launches, streams, waits, memory, graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import methods
from engine.kernels import (
    BatchSums,
    MeasuredBatch,
    SgdNumbers,
    SgdTensors,
    Term,
    batch_norm,
    batch_sums,
    crop_flip,
    dispatch,
    distill_loss,
    fab_step,
    native,
    pgd_update,
    random_start,
    sgd_update,
)
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import Call, of, recorded

# The kernels of one call, by implementation. What the native library leaves to Triton:
SHARED = {
    "loss": ["_loss", "_means"],
    "loss backward": ["_scale"],
    "loss both": ["_loss", "_means", "_scale"],
    "start": ["_random_start"],
    "fab linf": ["_fab_step"],
    "fab l2": ["_fab_step"],
    "norm both": ["_statistics", "_apply", "_sums", "_gradient"],
    "norm of a sum both": ["_statistics", "_apply", "_sums", "_gradient"],
    "sums": ["_batch_sums"],
    "sums of one": ["_batch_sums"],
}
KERNELS: dict[str, dict[str, list[str]]] = {
    "triton": {
        "linf": ["_linf"],
        "l2": ["_l2"],
        "crop": ["_crop_flip"],
        "crop into": ["_crop_flip"],
        "crop by index": ["_crop_flip"],
        **SHARED,
    },
    "native": {
        "linf": ["pgd_update_linf<float, true, true>"],
        "l2": ["pgd_update_l2<__nv_bfloat16, true, false>"],
        "crop": ["crop_flip<true>"],
        "crop into": ["crop_flip<true>"],
        "crop by index": ["crop_flip<true>"],
        **SHARED,
    },
}
OPS = tuple(KERNELS["triton"])
CAPTURED = tuple(op for op in OPS if op != "loss backward")  # which needs its forward in the same graph


def adding(loss: Tensor, logits: tuple[Tensor | None, ...], labels: Tensor) -> Callable[[float], None]:
    """`batch_sums` of a batch, with a number of entries that changes."""
    device = labels.device
    sums = BatchSums(*(torch.zeros(size, dtype=torch.float64, device=device) for size in (18 + 3, 20, 1 + 3)))
    terms, alpha = torch.zeros(2, device=device), torch.zeros(len(labels), device=device)
    step = torch.zeros((), dtype=torch.int64, device=device)

    def add(number: float) -> None:
        entries = int(number * 16)
        batch_sums(sums, MeasuredBatch(loss, terms, (0, -1, 1), alpha, logits, labels, step, entries))

    return add


# long: every op once
def make_ops(device: str) -> dict[str, Callable[[float], Any]]:
    """The ops on tensors of a device, as functions of a number that changes from step to step."""
    shape = (8, 3, 32, 32)
    x_adv, x_nat = (torch.rand(shape, device=device).to(memory_format=torch.channels_last) for _ in range(2))
    grad = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    half_grad, difference = grad.bfloat16(), torch.randn(8, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    images = torch.zeros(50, 32, 32, 3, dtype=torch.uint8, device=device)
    labels, sample = torch.zeros(50, dtype=torch.int64, device=device), torch.arange(8, device=device)
    far_sample = sample + 2**40
    out = crop_flip(images, labels, sample, seed=0, epoch=0)
    logits = [torch.randn(8, 10, device=device, dtype=torch.bfloat16) for _ in range(4)]
    scale = torch.tensor(1024.0, device=device)  # as of a gradient scaler

    def forward(number: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s_adv, s_nat = (given.detach().requires_grad_() for given in logits[:2])
        given = {"s_adv": s_adv, "s_nat": s_nat, "t_at_adv": logits[2], "t_st_adv": logits[3]}
        method = methods.get("iad2", lam1=number, tau=1 + number, tau_self=2 + number)
        terms = [Term(*term[1:]) for term in method.terms(10)]
        result = distill_loss(given, labels[:8], terms, trust="t_at_adv", beta=number)
        return result.loss, (s_adv, s_nat)

    maps = [
        torch.randn(8, 64, 8, 8, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for _ in range(3)
    ]
    maps[0].requires_grad_()
    numbers = [torch.ones(64, device=device) for _ in range(4)]

    def norm(number: float, residual: Tensor | None = None) -> object:
        y = batch_norm(maps[0], *numbers, residual=residual, relu=True, momentum=number, eps=number)
        return torch.autograd.grad(y, maps[0], maps[1])

    loss, student = forward(0.5)

    def start(number: float) -> Tensor:
        return random_start(
            x_nat,
            sample,
            kind="uniform",
            threat_model="Linf",
            epsilon=number,
            seed=int(number * 32),
            counter=int(number * 16),
        )

    return {
        "linf": lambda number: pgd_update(
            x_adv, grad, x_nat, threat_model="Linf", epsilon=number, step_size=number / 4, counts=counts
        ),
        "l2": lambda number: pgd_update(
            x_adv, half_grad, x_nat, threat_model="L2", epsilon=number, step_size=number / 4
        ),
        "fab linf": lambda number: fab_step(
            x_adv, x_nat, grad, difference, threat_model="Linf", alpha_max=number, eta=number
        ),
        "fab l2": lambda number: fab_step(
            x_adv, x_nat, grad, difference, threat_model="L2", alpha_max=number, eta=number
        ),
        "crop": lambda number: crop_flip(
            images, labels, sample, seed=int(number * 2**60), epoch=int(number * 100)
        ),
        "crop into": lambda number: crop_flip(images, labels, sample, seed=int(number), epoch=1, out=out),
        "crop by index": lambda number: crop_flip(
            images, labels, far_sample, seed=int(number), epoch=1, index_B=sample
        ),
        "start": start,
        "sums": adding(loss.detach(), (*logits[:3], None), labels[:8]),
        "sums of one": adding(loss.detach(), (None, logits[0], None, None), labels[:8]),
        "loss": forward,
        "loss backward": lambda _: torch.autograd.grad(loss, student, scale, retain_graph=True),
        "loss both": lambda number: torch.autograd.grad(*forward(number), scale),
        "norm both": norm,
        "norm of a sum both": functools.partial(norm, residual=maps[2]),
    }


def observe(library: str) -> dict[str, Any]:
    """Every op in every situation; two devices."""
    native._FILE = Path(library)
    seen: dict[str, Any] = {"describe": dispatch.describe(torch.device("cuda"))}
    first, second = make_ops("cuda:0"), make_ops("cuda:1")
    for name in OPS:
        first[name](0.5)
        second[name](0.5)
    side, pool, graphs = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []
    seen["side stream"] = str(side.cuda_stream)

    def capture(op: Callable[[float], Any]) -> None:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool):
            op(0.5)
        graphs[-1].replay()

    def on_side(op: Callable[[float], Any]) -> None:
        with torch.cuda.stream(side):
            op(0.5)

    for name in CAPTURED:
        with recorded() as seen[f"{name}: captured"]:
            capture(first[name])
        with recorded() as seen[f"{name}: captured again"]:
            capture(first[name])
    torch.cuda.set_sync_debug_mode("error")
    for name in OPS:
        with recorded() as seen[f"{name}: plain"]:
            first[name](0.5)
        with recorded() as seen[f"{name}: other numbers"]:
            for number in (1 / 16, 1.0):  # of which Triton would make kernels for 1 and for multiples of 16
                first[name](number)
        with recorded() as seen[f"{name}: side stream"]:
            on_side(first[name])
        with recorded() as seen[f"{name}: second device"]:
            second[name](0.5)
    seen["current device"] = torch.cuda.current_device()
    return seen


@pytest.fixture(scope="module", params=list(KERNELS))
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def seen(fake_cuda: FakeCuda, cuda_library: Path, implementation: str) -> dict[str, Any]:
    if reason := dispatch.missing("triton", "cuda"):
        pytest.skip(reason)
    result: dict[str, Any] = fake_cuda.run(observe, str(cuda_library), devices=2, ENGINE_KERNELS=implementation)
    return result


def names(calls: list[Call]) -> list[str]:
    """Names of calls; those of kernels in C++ without namespace and arguments."""
    plain = (call["name"].replace("(anonymous namespace)::", "") if "name" in call else "" for call in calls)
    short = [name.removeprefix("void engine::").partition("(")[0] for name in plain]
    return [name or call["call"] for name, call in zip(short, calls, strict=True)]


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_its_launches_and_nothing_else(seen: dict[str, Any], implementation: str, op: str) -> None:
    """No wait, no copy, no filling of memory, no kernel of torch."""
    calls = seen[f"{op}: plain"]
    assert names(calls) == KERNELS[implementation][op]
    assert {call["stream"] for call in calls} == {"0"}


@pytest.mark.parametrize("op", OPS)
def test_numbers_that_change_from_step_to_step_need_no_compilation(
    seen: dict[str, Any], implementation: str, op: str
) -> None:
    assert names(seen[f"{op}: other numbers"]) == 2 * KERNELS[implementation][op]


@pytest.mark.parametrize("op", OPS)
def test_the_current_stream_is_used(seen: dict[str, Any], implementation: str, op: str) -> None:
    calls = of("kernel", seen[f"{op}: side stream"])
    # The backward runs where its forward ran.
    expected = "0" if op == "loss backward" else seen["side stream"]
    assert names(calls) == KERNELS[implementation][op]
    assert {call["stream"] for call in calls} == {expected}


@pytest.mark.parametrize("op", OPS)
def test_the_device_of_the_tensors_is_used(seen: dict[str, Any], implementation: str, op: str) -> None:
    assert names(seen[f"{op}: second device"]) == KERNELS[implementation][op]
    assert {call["device"] for call in seen[f"{op}: second device"]} == {"1"}
    assert seen["current device"] == 0


def within_capture(calls: list[Call]) -> list[Call]:
    begin, end = ([call["call"] for call in calls].index(kind) for kind in ("capture_begin", "capture_end"))
    return calls[begin + 1 : end]


@pytest.mark.parametrize("op", CAPTURED)
def test_a_graph_captures_it_whole(seen: dict[str, Any], implementation: str, op: str) -> None:
    expected = KERNELS[implementation][op]
    for name in (f"{op}: captured", f"{op}: captured again"):
        assert names(of("kernel", within_capture(seen[name]))) == expected
        (launch,) = of("graph_launch", seen[name])
        assert int(launch["nodes"]) == len(expected)
    # The pool of the graphs may be filled once; all else a capture takes comes from it.
    mallocs = of("malloc", within_capture(seen[f"{op}: captured"]))
    assert len(mallocs) <= 1
    assert names(within_capture(seen[f"{op}: captured again"])) == expected


# ---------------------------------------------------------------- the update of weights, by tables of addresses


def updates() -> dict[str, Any]:
    """Updates of many weights op by op, with other numbers, on a side stream, by another device, and captured."""
    first, second = (make_update(device) for device in ("cuda:0", "cuda:1"))
    for update in (first, second):
        update(0.5, None)
    seen: dict[str, Any] = {}
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    seen["side stream"] = str(side.cuda_stream)
    table = first(0.5, None)
    with recorded() as seen["captured"], torch.cuda.graph(graph):
        kept = first(0.5, table)
    graph.replay()
    seen["the table is kept"] = kept is table
    torch.cuda.set_sync_debug_mode("error")
    with recorded() as seen["plain"]:
        first(0.5, None)
    with recorded() as seen["other numbers"]:
        for number in (1 / 16, 1.0):
            first(number, None)
    with recorded() as seen["on side stream"], torch.cuda.stream(side):
        first(0.5, None)
    with recorded() as seen["second device"]:
        second(0.5, None)
    return seen


def make_update(device: str) -> Callable[[float, Tensor | None], Tensor | None]:
    """`sgd_update` of weights of which each second one has gradient and copy in half precision."""
    weights = [torch.zeros(64, 3 + number, 3, 3, device=device) for number in range(70)]
    momenta = [torch.zeros_like(weight) for weight in weights]
    halves = [weight.bfloat16() if number % 2 else None for number, weight in enumerate(weights)]
    lr = torch.ones((), device=device)

    def update(number: float, table: Tensor | None) -> Tensor | None:
        gradients = [weight if half is None else half for weight, half in zip(weights, halves, strict=True)]
        numbers = SgdNumbers(lr, momentum=number, weight_decay=number)
        return sgd_update(SgdTensors(weights, gradients, momenta, halves), numbers, table)

    return update


def test_an_update_of_all_weights_is_one_copy_and_one_launch(fake_cuda: FakeCuda) -> None:
    """The copy is of addresses, from memory of the host that is pinned: nobody waits for it."""
    if reason := dispatch.missing("triton", "cuda"):
        pytest.skip(reason)
    seen = fake_cuda.run(updates, devices=2)
    inside = within_capture(seen["captured"])
    for calls, times in (
        (inside, 1),
        (seen["plain"], 1),
        (seen["other numbers"], 2),
        (seen["on side stream"], 1),
        (seen["second device"], 1),
    ):
        work = [call for call in calls if call["call"] in ("copy", "kernel", "fill", "synchronize", "module_load")]
        assert names(work) == times * ["copy", "_sgd_update"]
        assert {call["host"] for call in of("copy", calls)} == {"pinned"}
    assert not of("host_malloc", inside)
    assert seen["the table is kept"]
    assert {call["stream"] for call in of("kernel", seen["on side stream"])} == {seen["side stream"]}
    assert {call["device"] for call in of("kernel", seen["second device"])} == {"1"}


def test_the_user_is_told_what_serves(seen: dict[str, Any], implementation: str) -> None:
    expected = {
        "triton": "Kernels: triton",
        "native": "Kernels: native (CUDA C++) for pgd_update, crop_flip; "
        "triton for distill_loss, random_start, fab_step, image_conv3x3, batch_norm, batch_sums, sgd_update",
    }
    assert seen["describe"] == expected[implementation]
