"""The whole step as one CUDA graph, on a pretended GPU: what is captured when, and what is launched beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from engine import methods, register
from engine.pipelines.base import Batch, Mixture
from engine.system.distributed import World
from engine.training import learner
from engine.training.capture import captured_step
from engine.training.capture.captured_step import CapturedStep
from engine.training.step import OnDevice, StepOutput
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import Call, of, recorded
from tests.training.test_cuda_step import BATCH, CLASSES, Training

METHODS = tuple(methods.METHODS)
MOST_OUTSIDE = 8
LAUNCHES = ("kernel", "copy", "fill", "graph_launch")


def work(calls: list[Call], lane: str) -> list[tuple[str, ...]]:
    """Kernels, copies and fills in order: what they are, and whether they are on the teachers' lane."""
    kinds = ("kernel", "copy", "fill")  # the journal cuts long names, by what stands before them
    return [
        (call["call"], call.get("name", "")[:600], call.get("bytes", ""), str(call["stream"] == lane))
        for call in calls
        if call["call"] in kinds
    ]


def three_and_more(method: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The second step, op by op; the third, which is captured and replayed; and the fourth, replayed."""
    training = Training(method, graphs="step", **keys)
    lane = training.learner.lanes._teachers
    assert lane is not None
    seen: dict[str, Any] = {}
    training.step()
    for name in ("op by op", "captured", "replayed"):
        with recorded() as calls:
            training.step()
        seen[name] = calls
    return {**seen, "lane": str(lane.cuda_stream)}


@pytest.mark.parametrize("method", METHODS)
def test_a_replayed_step_is_one_graph_and_few_launches(method: str, fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(three_and_more, method, {})
    replayed = seen["replayed"]
    (graph,) = of("graph_launch", replayed)
    assert sum(len(of(kind, replayed)) for kind in LAUNCHES) <= MOST_OUTSIDE
    assert not [call for call in replayed if call["call"] in ("synchronize", "copy_and_wait", "malloc")]
    begin, end = (
        next(number for number, call in enumerate(seen["captured"]) if call["call"] == kind)
        for kind in ("capture_begin", "capture_end")
    )
    inside = work(seen["captured"][begin:end], seen["lane"])
    assert len(inside) == int(graph["nodes"])
    eager = work(seen["op by op"], seen["lane"])
    assert inside == eager[-len(inside) :]  # the same work, in the same order
    before = [call[0] if call[0] == "copy" else call[1] for call in eager[: -len(inside)]]
    assert before == ["_crop_flip", "copy"]  # the next batch, and the numbers of this step


OPTIONS: dict[str, dict[str, Any]] = {
    "float16": {"amp_dtype": "float16"},
    "clipped": {"optim": {"clip_norm": 1.0}},
    "clipped in float16": {"amp_dtype": "float16", "optim": {"clip_norm": 1.0}},
    "adamw": {"optim": {"implementation": "adamw"}},
    "layer decay": {"optim": {"layer_decay": 0.5}},
    "float32": {"amp": False},
    "compiled": {"compile": "on"},
    "idle forwards": {"semantics": "official"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "compiled" else ()) for name in OPTIONS]
)
def test_options_are_in_the_graph(name: str, fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(three_and_more, "iad1", OPTIONS[name])
    assert len(of("graph_launch", seen["replayed"])) == 1
    assert sum(len(of(kind, seen["replayed"])) for kind in LAUNCHES) <= MOST_OUTSIDE


def graphs_of(batches: Iterator[Batch], training: Training, method: methods.Method | None = None) -> list[int]:
    """Graphs that are captured and launched, as 10 * captured + launched, at each of the batches."""
    found = []
    for batch in batches:
        with recorded() as calls:
            training.learner.learn(batch, method or training.method, 0.1, on_output=training.on_device)
        found.append(10 * len(of("capture_end", calls)) + len(of("graph_launch", calls)))
    return found


def whole(training: Training, count: int) -> Iterator[Batch]:
    return (next(training.batches) for _ in range(count))


def odd_batch() -> list[int]:
    training = Training("iad1", graphs="step")
    first = graphs_of(whole(training, 4), training)
    part = Batch(*(tensor[:1] for tensor in vars(next(training.batches)).values() if tensor is not None))
    return first + graphs_of(iter([part]), training) + graphs_of(whole(training, 2), training)


def test_an_odd_batch_is_trained_on_op_by_op(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.run(odd_batch) == [0, 0, 11, 1, 0, 1, 1]


def phases() -> dict[str, Any]:
    """A warm-up, the method, a shorter attack, and a state that was loaded."""
    training = Training("iad1", graphs="step")
    assert training.method.warmup is not None
    found: dict[str, Any] = {"warm-up": graphs_of(whole(training, 4), training, training.method.warmup)}
    held = torch.cuda.memory_allocated()
    found["method"] = graphs_of(whole(training, 1), training)
    found["memory is given back"] = torch.cuda.memory_allocated() < held
    found["method"] += graphs_of(whole(training, 3), training)
    training.learner.attack_with(training.run.attack.model_copy(update={"num_steps": 1}))
    found["attack"] = graphs_of(whole(training, 4), training)
    training.learner.load_state_dict(training.learner.state_dict())
    found["state"] = graphs_of(whole(training, 4), training)
    training.learner.release()
    found["released"] = graphs_of(whole(training, 1), training)
    return found


def test_each_phase_has_its_graph(fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(phases)
    assert seen.pop("memory is given back")
    assert seen.pop("released") == [0]
    assert seen == {name: [0, 0, 11, 1] for name in ("warm-up", "method", "attack", "state")}


def growing_weights() -> list[int]:
    """Steps of two epochs of a method with a weight that grows by epochs."""
    training = Training("ard+igdm", graphs="step")
    found = []
    for epoch in (0, 1):
        for batch in whole(training, 4):
            with recorded() as calls:
                training.learner.learn(
                    batch, training.method, 0.1, epoch=epoch, on_output=training.on_device, global_batch_size=2
                )
            found.append(10 * len(of("capture_end", calls)) + len(of("graph_launch", calls)))
    return found


def test_a_weight_that_grows_is_captured_in_each_epoch(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.run(growing_weights) == 2 * [0, 0, 11, 1]


def mixed_images() -> list[int]:
    training = Training("iad1", graphs="step")
    batches = [
        Batch(
            batch.x_nat, batch.labels, batch.sample, Mixture(batch.labels, torch.rand(2, device="cuda"), CLASSES)
        )
        for batch in whole(training, 4)
    ]
    return graphs_of(iter(batches), training)


def test_mixed_images_are_captured(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.run(mixed_images) == [0, 0, 11, 1]


def watched() -> dict[str, Any]:
    """Steps whose output somebody looks at."""
    training = Training("iad1", graphs="step")
    seen: list[StepOutput] = []
    found = []
    for batch in whole(training, 4):
        with recorded() as calls:
            training.learner.learn(batch, training.method, 0.1, on_output=lambda output, _: seen.append(output))
        found.append([int(call["nodes"]) for call in of("graph_launch", calls)])
    return {"outputs": len(seen), "graphs": found}


def test_a_step_whose_output_is_looked_at_is_not_captured(fake_cuda: FakeCuda) -> None:
    """But its attack is, from the second batch on."""
    seen = fake_cuda.run(watched)
    assert seen["outputs"] == 4
    assert [len(nodes) for nodes in seen["graphs"]] == [0, 1, 1, 1]


def loss_that_waits() -> dict[str, Any]:
    def loss(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        log_p = logits["s_adv"].log_softmax(dim=1)
        return -log_p.gather(1, labels[:, None])[:, 0] * (2.0 if float(log_p.sum()) > 0 else 1.0)

    register.method("looks", loss=loss, reads=[("student", "x_adv")])
    training = Training("looks", graphs="step")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        found = graphs_of(whole(training, 5), training)
    return {"graphs": found, "warnings": [str(warning.message) for warning in given]}


def test_a_loss_that_looks_at_its_values_is_not_captured(fake_cuda: FakeCuda) -> None:
    """The host would wait in the capture: the attack alone is captured, and a warning says so and where."""
    seen = fake_cuda.run(loss_that_waits)
    assert seen["graphs"] == [0, 0, 0, 11, 1]
    (told,) = [text for text in seen["warnings"] if text.startswith("graphs:")]
    assert "the attack alone is captured" in told
    assert "test_captured_step.py" in told


def refused(error: str) -> dict[str, Any]:
    """Steps where a capture raises an error: of memory where it is not told."""
    training = Training("iad1", graphs="step")
    refused = mock.Mock(side_effect=RuntimeError(error) if error else torch.OutOfMemoryError)
    with mock.patch.object(captured_step, "CapturedCall", refused), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        found = graphs_of(whole(training, 5), training)
    return {"graphs": found, "warnings": [str(warning.message) for warning in given]}


def test_without_memory_for_a_graph_nothing_is_captured(fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(refused, "")
    assert seen["graphs"] == [0, 0, 0, 0, 0]
    (told,) = [text for text in seen["warnings"] if text.startswith("graphs:")]
    assert "the memory is too small" in told


def test_where_a_capture_fails_the_attack_is_captured(fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(refused, "operation not permitted when stream is capturing\nCUDA kernel errors ...")
    assert seen["graphs"] == [0, 0, 0, 0, 11]
    (told,) = [text for text in seen["warnings"] if text.startswith("graphs:")]
    assert "not permitted when stream is capturing), so that the attack alone" in told


NOT_CAPTURED: dict[str, dict[str, Any]] = {
    "graphs": {"graphs": "attack"},
    "awp": {"awp": {"gamma": 0.01}},
    "micro_batch": {"micro_batch": 1},
}


def is_captured(keys: dict[str, Any]) -> dict[str, Any]:
    training = Training("iad1", **{"graphs": "step", **keys})
    nodes = []
    for _ in range(4):
        with recorded() as calls:
            training.step()
        nodes.append(len(of("graph_launch", calls)))
    adversary = training.learner.networks.adversary
    return {"step": isinstance(training.learner._run, CapturedStep), "launched": nodes, "attack": bool(adversary)}


@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_where_the_step_is_not_captured_the_attack_is(name: str, fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(is_captured, NOT_CAPTURED[name])
    assert not seen["step"]
    parts = 2 if name == "micro_batch" else 1
    assert seen["launched"][1:] == 3 * [parts]


def averaged() -> dict[str, int]:
    training = Training("iad1", graphs="step", averaging={"kind": "ema"})
    for _ in range(3):
        training.step()
    with recorded() as calls:
        training.step()
    return {kind: len(of(kind, calls)) for kind in LAUNCHES}


def test_an_average_is_taken_beside_the_graph(fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(averaged)
    assert seen["graph_launch"] == 1
    assert MOST_OUTSIDE - 2 < sum(seen.values()) <= 40


def first_of_two() -> World:
    """A process that takes itself for one of two."""
    world = World()
    world.size = 2
    return world


def one_of_two(method: str) -> dict[str, Any]:
    """Calls of the fourth step of a process that pretends to be one of two, and the tensors that it sends."""
    sent: list[torch.Tensor] = []
    with (
        mock.patch.object(torch.distributed, "broadcast"),
        mock.patch.object(torch.distributed, "all_reduce", lambda tensor, **keys: sent.append(tensor)),
    ):
        training = Training(method, graphs="step", world=first_of_two(), batch_size=2 * BATCH)
        for _ in range(3):
            training.step()
        sent.clear()
        with recorded() as calls:
            training.step()
    student = training.student
    running = [value for name, value in student.named_buffers() if "running" in name]
    numbers = sum(value.numel() for value in [*student.parameters(), *running])
    return {"calls": calls, "sent": [tensor.numel() for tensor in sent], "numbers": numbers}


@pytest.mark.parametrize("method", ["at", "iad1"])
def test_several_processes_have_two_graphs_and_a_message_between_them(method: str, fake_cuda: FakeCuda) -> None:
    """Its all-reduce is a launch beside them."""
    seen = fake_cuda.run(one_of_two, method)
    assert seen["sent"] == [seen["numbers"]]
    assert len(of("graph_launch", seen["calls"])) == 2
    assert sum(len(of(kind, seen["calls"])) for kind in LAUNCHES) + 1 <= MOST_OUTSIDE
    assert not [call for call in seen["calls"] if call["call"] in ("synchronize", "copy_and_wait", "malloc")]


def talking(method: str, keys: dict[str, Any]) -> bool:
    with mock.patch.object(torch.distributed, "broadcast"), mock.patch.object(learner, "replicate"):
        training = Training(method, graphs="step", world=first_of_two(), **keys)
    return isinstance(training.learner._run, CapturedStep)


@pytest.mark.parametrize(("method", "captured"), [("saad", False), ("mtard", False), ("iad2", True)])
def test_processes_that_talk_in_the_midst_of_a_step_do_not_capture_it(
    method: str, captured: bool, fake_cuda: FakeCuda
) -> None:
    assert fake_cuda.run(talking, method, {}) == captured


def state() -> dict[str, Any]:
    """Types of the rates in a checkpoint, and whether the optimizer reads the device's rates after loading it."""
    training = Training("iad1", graphs="step")
    training.step()
    one = training.learner
    saved = one.state_dict()["optimizer"]["param_groups"]
    one.load_state_dict(one.state_dict())
    pointers = [group["lr"].data_ptr() for group in one.optimizer.param_groups]
    return {
        "rates": [group["lr"] for group in saved],
        "on the device": pointers == [one.numbers._values[3:].data_ptr()],
    }


def test_a_checkpoint_has_rates_as_numbers(fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(state)
    assert seen == {"rates": [0.1], "on the device": True}


def test_on_device_calls_what_it_holds() -> None:
    given = mock.Mock()
    one = OnDevice(given)
    one("output", "labels")  # type: ignore[arg-type]
    given.assert_called_once_with("output", "labels")
    assert OnDevice(given) == one
