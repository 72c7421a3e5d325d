"""Calls of the pipelines to a GPU, seen by a mock of its driver: copies, streams, and their waiting."""

from __future__ import annotations

import pytest
import torch

from engine.pipelines import ffcv
from engine.pipelines.base import Pipeline
from engine.pipelines.datasets import find
from engine.pipelines.ffcv import FFCVPipeline, beton_writer
from engine.pipelines.images import ImagePipeline
from engine.pipelines.reading.encoded import EncodedImages
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Request, Split
from engine.pipelines.tensor import TensorPipeline
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import Call, of, recorded

COUNT, BATCH, AHEAD = 96, 8, 2
SLOTS = AHEAD + 2  # buffers that FFCV uses in turn
IMAGE_BYTES = 8 * 8 * 3


def images() -> Split:
    pixels = torch.arange(COUNT * IMAGE_BYTES).view(COUNT, 8, 8, 3).to(torch.uint8)
    return Split(pixels, torch.arange(COUNT) % 5, tuple("abcde"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("betons") / "x.beton"
    beton_writer.write(path, [images(), images().take(torch.arange(5))])
    return str(path)


def make_ffcv(path: str) -> Pipeline:
    data = find("folder", path, Request(resident="never")).train
    assert isinstance(data, EncodedImages)
    return FFCVPipeline(
        data, Sampling(COUNT, BATCH, 3), augment=True, flip=True, device="cuda", batches_ahead=AHEAD
    )


def calls_of_an_epoch(pipeline: Pipeline) -> list[Call]:
    """Those of a second epoch, in which nothing is compiled; that training waits for the device is an error."""
    list(pipeline.epoch(0))
    with recorded() as calls:
        batches = pipeline.epoch(1)
        next(batches)  # copies the order of the epoch
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            assert batch.x_nat.device.type == batch.labels.device.type == batch.sample.device.type == "cuda"
            assert batch.x_nat.is_contiguous(memory_format=torch.channels_last)
        torch.cuda.set_sync_debug_mode("default")
    return calls


def calls_of_ffcv(path: str) -> list[Call]:
    return calls_of_an_epoch(make_ffcv(path))


def calls_of_image() -> list[Call]:
    pipeline = ImagePipeline(
        images(), Sampling(COUNT, BATCH, 3), augment=True, flip=True, device="cuda", batches_ahead=AHEAD
    )
    return calls_of_an_epoch(pipeline)


def calls_of_tensor() -> list[Call]:
    pipeline = TensorPipeline(images(), Sampling(COUNT, BATCH, 3), augment=True, flip=True, device="cuda")
    return calls_of_an_epoch(pipeline)


@pytest.fixture(scope="module")
def calls(fake_cuda: FakeCuda, path: str) -> list[Call]:
    found: list[Call] = fake_cuda.run(calls_of_ffcv, path)
    return found


def copies_of_images(calls: list[Call]) -> list[int]:
    return [
        number
        for number, call in enumerate(calls)
        if call["call"] == "copy" and call["bytes"] == str(BATCH * IMAGE_BYTES)
    ]


def test_images_are_copied_from_pinned_memory_on_streams_of_their_own(calls: list[Call]) -> None:
    copies = [calls[number] for number in copies_of_images(calls)]
    assert len(copies) == COUNT // BATCH
    assert {(copy["kind"], copy["host"]) for copy in copies} == {("H2D", "pinned")}
    streams = [copy["stream"] for copy in copies]
    assert "0" not in streams
    assert streams == [streams[number % SLOTS] for number in range(len(streams))]
    assert len(set(streams)) == SLOTS


def test_training_waits_for_the_copy_of_its_batch_on_the_device(calls: list[Call]) -> None:
    for start in copies_of_images(calls):
        stream = calls[start]["stream"]
        recorded_then = {call["event"] for call in of("record", calls[start:]) if call["stream"] == stream}
        assert any(call["event"] in recorded_then for call in of("wait", calls[start:]) if call["stream"] == "0")


def test_a_buffer_is_filled_again_only_when_its_last_copy_is_done(calls: list[Call]) -> None:
    """The processor fills it: so the loader's thread waits, and not a stream."""
    copies = copies_of_images(calls)
    for earlier, later in zip(copies, copies[SLOTS:], strict=False):
        stream = calls[earlier]["stream"]
        done = next(
            call["event"] for call in calls[earlier:] if call["call"] == "record" and call["stream"] == stream
        )
        assert done in [call.get("event") for call in of("synchronize", calls[earlier:later])]


def test_nothing_else_waits_for_the_device(calls: list[Call]) -> None:
    of_buffers = [call for call in of("synchronize", calls) if "event" in call]
    assert len(of_buffers) == COUNT // BATCH - SLOTS
    assert [call for call in of("synchronize", calls) if "event" not in call] == [
        {"call": "synchronize", "stream": "0"}  # for the order of the epoch
    ]


def test_resident_images_are_one_launch_a_batch(fake_cuda: FakeCuda) -> None:
    calls = fake_cuda.run(calls_of_tensor)
    assert [call["name"] for call in of("kernel", calls)] == ["_crop_flip"] * (COUNT // BATCH)
    assert [call["bytes"] for call in of("copy", calls)] == [str(8 * COUNT)]  # the order


def test_images_of_threads_are_copied_from_pinned_memory_and_nothing_waits(fake_cuda: FakeCuda) -> None:
    calls = fake_cuda.run(calls_of_image)
    copies = [calls[number] for number in copies_of_images(calls)]
    assert len(copies) == COUNT // BATCH
    assert {(copy["kind"], copy["host"]) for copy in copies} == {("H2D", "pinned")}
    assert [call["name"] for call in of("kernel", calls) if call["name"] == "_crop_flip"] == ["_crop_flip"] * 12
    assert list(of("synchronize", calls)) == [{"call": "synchronize", "stream": "0"}]  # for the order
