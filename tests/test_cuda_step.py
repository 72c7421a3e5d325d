"""What a training step asks of a GPU, seen by a mock of its driver: lanes, waits, launches, graphs, memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine import config, methods, models, networks, optimizer, precision
from engine.pipelines.base import Batch
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split
from engine.pipelines.tensor import TensorPipeline
from engine.step import training_loss
from engine.streams import Lanes
from engine.telemetry import Telemetry
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import of, recorded

METHODS = tuple(methods.TABLE)
BATCH, CLASSES, SIZE, NUM_STEPS = 2, 4, 8, 3


class Training:
    """Steps of a method on the device, as the trainer does them."""

    def __init__(self, method: str, model: str = "resnet8", batch_size: int = BATCH, **keys: Any) -> None:
        torch.backends.cudnn.enabled = False  # the mock has no convolutions of its own
        given = {
            "method": method, "model": model, "device": "cuda", "amp": True, "compile": "off", "graphs": "off",
            "batch_size": batch_size, "attack": {"num_steps": NUM_STEPS},
        }  # fmt: skip
        self.run = config.load(given, keys)
        self.precision = precision.choose(self.run)
        self.method = methods.get(method, semantics=self.run.semantics, loss=self.run.loss)
        self.student, at, st = (self.precision.place(models.build(self.run.model, CLASSES)) for _ in range(3))
        needed = {"teacher": self.method.needs_teacher, "teacher_st": self.method.needs_teacher_st}
        given_teachers = {"teacher": at.eval(), "teacher_st": st.eval()}
        teachers = {name: given_teachers[name].requires_grad_(False) for name, wanted in needed.items() if wanted}
        device = self.precision.device
        self.telemetry = Telemetry(device)
        self.networks = networks.build(
            self.student, teachers, self.method, self.run, self.precision, self.telemetry.attack_counts
        )
        self.optimizer = optimizer.sgd(self.student.parameters(), self.run)
        self.scaler = self.precision.scaler()
        self.lanes = Lanes(device, wanted=self.run.lanes == "on")
        self.batches = self.lanes.ahead(self.epochs())

    def epochs(self) -> Iterator[Batch]:
        size = self.run.batch_size
        pixels = torch.zeros(64 * size, SIZE, SIZE, 3, dtype=torch.uint8)
        images = Split(pixels, torch.arange(64 * size) % CLASSES, tuple("abcd"))
        sampling = Sampling(len(images), size)
        pipeline = TensorPipeline(images, sampling, augment=True, flip=True, device=self.precision.device)
        yield from pipeline.epoch(0)

    def step(self) -> None:
        batch = next(self.batches)
        output = training_loss(
            self.networks, batch, self.method, self.run.forwards, self.precision, self.lanes, epoch=0
        )
        self.optimizer.zero_grad()
        self.scaler.scale(output.loss.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.telemetry.update(output, batch.labels, 1)


def hot_step(method: str, keys: dict[str, Any]) -> dict[str, Any]:
    """The calls of the fourth step; that the host waits for the device in it is an error."""
    training = Training(method, **keys)
    for _ in range(3):
        training.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    with recorded() as calls:
        training.step()
    torch.cuda.set_sync_debug_mode("default")
    lanes = training.lanes
    return {
        "calls": calls,
        "main": str(torch.cuda.current_stream().cuda_stream),
        "teachers": str(lanes._teachers.cuda_stream) if lanes._teachers else None,
        "data": str(lanes._data.cuda_stream) if lanes._data else None,
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_hot_step_never_waits_for_the_device(method: str, fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(hot_step, method, {})
    print(
        len(of("kernel", seen["calls"])),
        {k: len(of(k, seen["calls"])) for k in {c["call"] for c in seen["calls"]}},
    )
    assert not of("synchronize", seen["calls"])
