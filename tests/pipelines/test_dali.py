"""The pipeline of DALI, on a CPU for real: its stream of batches, its pixels, and that nothing is left of it.

Of a GPU the definition is checked, by serialising it; the test marked gpu runs it.
"""

from __future__ import annotations

import io
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.pipelines.base import Batch, Pipeline
from engine.pipelines.dali import Arrays, DALIPipeline, Photographs, Source, define
from engine.pipelines.encoded import EncodedImages, encoded_splits
from engine.pipelines.folder import opened
from engine.pipelines.sampling import Sampling, Shard
from engine.pipelines.splits import Request, Split
from engine.pipelines.tensor import TensorPipeline
from engine.pipelines.windows import Windows, centre_windows, random_windows
from tests.pipelines.photographs import CLASSES, UNREADABLE, encode, image_folder, in_memory, smooth, write

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'iad-engine[dali]'")

COUNT = 43
LABELS = torch.arange(COUNT) % 5
SIZES = [(20 + 7 * number % 31, 20 + 11 * number % 37) for number in range(COUNT)]
FILES = [encode(smooth(number, *size)) for number, size in enumerate(SIZES)]
ARRAYS = Split(torch.from_numpy(np.stack([smooth(number, 8, 8) for number in range(COUNT)])), LABELS, CLASSES)
ENCODED = in_memory(*FILES)


def pipeline(
    data: Split | EncodedImages, batch_size: int = 8, *, augment: bool = True, **options: Any
) -> DALIPipeline:
    sampling = {key: options.pop(key) for key in ("seed", "order", "last", "shard") if key in options}
    if isinstance(data, EncodedImages):
        options.setdefault("image_size", 16)
    return DALIPipeline(
        data,
        Sampling(len(data), batch_size, **{"seed": 3, **sampling}),
        **{"augment": augment, "flip": True, "device": "cpu", "num_threads": 1, **options},
    )


def equal(got: Batch, expected: Batch) -> bool:
    pairs = ((got.x_nat, expected.x_nat), (got.labels, expected.labels), (got.sample, expected.sample))
    return all(torch.equal(*pair) for pair in pairs)


def threads_end(before: int) -> bool:
    """Whether no more threads are left than there were, those of C++ included."""
    patience = time.monotonic() + 5
    while (left := len(list(Path("/proc/self/task").iterdir()))) > before and time.monotonic() < patience:
        time.sleep(0.01)  # a joined thread vanishes from /proc a little later
    return left <= before


@pytest.fixture(autouse=True)
def threads_before() -> Iterator[int]:
    """How many threads a test begins with; it must end with no more."""
    before = len(list(Path("/proc/self/task").iterdir()))
    yield before
    assert threads_end(before), [thread.name for thread in threading.enumerate()]


both = pytest.mark.parametrize("data", [ARRAYS, ENCODED], ids=["arrays", "encoded"])

# ---------------------------------------------------------------- the stream of batches


@both
@pytest.mark.parametrize("last", ["keep", "drop", "pad"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_batches_of_all_ranks_are_those_of_one(data: Split | EncodedImages, last: str, world: int) -> None:
    size = 24
    whole = list(pipeline(data, size, last=last).epoch(1))
    ranks = [list(pipeline(data, size, last=last, shard=Shard(rank, world)).epoch(1)) for rank in range(world)]
    for number, expected in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert max(len(part.sample) for part in parts) - min(len(part.sample) for part in parts) <= 1
        together = Batch(
            torch.cat([part.x_nat for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.sample for part in parts]),
        )
        assert equal(together, expected)
    seen = torch.cat([batch.sample for batch in whole])
    assert len(seen) == {"keep": COUNT, "drop": size, "pad": 2 * size}[last]
    assert seen[:COUNT].unique().numel() == min(len(seen), COUNT)
    assert len(whole) == pipeline(data, size, last=last).steps_per_epoch == (1 if last == "drop" else 2)


@both
def test_more_ranks_than_samples_leave_empty_batches(data: Split | EncodedImages) -> None:
    few = data.take(torch.arange(9))
    for rank in range(8):
        first, last = pipeline(few, 8, shard=Shard(rank, 8)).epoch(0)
        assert len(first.sample) == len(first.x_nat) == 1
        assert len(last.sample) == len(last.x_nat) == len(last.labels) == (rank == 0)
        assert last.x_nat.shape[1:] == first.x_nat.shape[1:]


@both
@pytest.mark.parametrize("augment", [True, False])
def test_an_epoch_from_any_step_is_its_tail(data: Split | EncodedImages, augment: bool) -> None:
    """So nothing of DALI's own state has to be saved: a new pipeline resumes in the middle of an epoch."""
    whole = list(pipeline(data, augment=augment).epoch(2))
    for start_step in range(len(whole) + 1):
        tail = list(pipeline(data, augment=augment, prefetch=1 + start_step % 3).epoch(2, start_step))
        assert len(tail) == len(whole) - start_step
        assert all(map(equal, tail, whole[start_step:]))


@both
def test_views_do_not_depend_on_the_batch_size(data: Split | EncodedImages) -> None:
    (whole,) = pipeline(data, COUNT).epoch(1)
    parts = list(pipeline(data, 5, num_threads=2).epoch(1))
    assert torch.equal(torch.cat([part.sample for part in parts]), whole.sample)
    assert torch.equal(torch.cat([part.x_nat for part in parts]), whole.x_nat)


@both
def test_epochs_and_seeds_differ_and_come_back(data: Split | EncodedImages) -> None:
    one = pipeline(data, COUNT, order="sequential")
    views = [next(one.epoch(epoch)).x_nat for epoch in (0, 1, 0)]
    views.append(next(pipeline(data, COUNT, order="sequential", seed=4).epoch(0)).x_nat)
    assert torch.equal(views[0], views[2])
    for other in (views[1], views[3]):
        changed = (views[0] != other).flatten(1).any(1)
        assert changed.double().mean() > 0.9
    samples = [torch.cat([batch.sample for batch in pipeline(data).epoch(epoch)]) for epoch in (0, 1)]
    assert not torch.equal(*samples)


@both
def test_a_batch_that_is_held_keeps_its_values(data: Split | EncodedImages) -> None:
    for prefetch in (1, 3):
        held, copies = [], []
        for batch in pipeline(data, 4, prefetch=prefetch).epoch(0):
            held.append(batch)
            copies.append(Batch(batch.x_nat.clone(), batch.labels.clone(), batch.sample.clone()))
        assert len(held) == 11
        assert all(map(equal, held, copies))
        assert len({batch.x_nat.data_ptr() for batch in held}) == 11


@both
def test_two_epochs_of_one_pipeline_may_run_at_once(data: Split | EncodedImages) -> None:
    one = pipeline(data)
    expected = [list(one.epoch(epoch)) for epoch in (0, 1)]
    for first, second, *wanted in zip(one.epoch(0), one.epoch(1), *expected, strict=True):
        assert equal(first, wanted[0])
        assert equal(second, wanted[1])


@both
def test_values_layout_and_labels(data: Split | EncodedImages) -> None:
    one: Pipeline = pipeline(data)
    assert one.num_samples == COUNT
    size = 8 if data is ARRAYS else 16
    for batch in one.epoch(0):
        assert batch.x_nat.dtype == torch.float32
        assert batch.x_nat.shape == (len(batch.sample), 3, size, size)
        assert batch.x_nat.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.sample.dtype == torch.int64
        assert torch.equal(batch.labels, data.labels[batch.sample])
        levels = batch.x_nat * 255
        assert torch.equal(levels, levels.round())
        assert levels.min() >= 0
        assert levels.max() <= 255
        assert levels.max() > 100


# ---------------------------------------------------------------- the pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("augment", "flip"), [(True, True), (True, False), (False, True)])
def test_views_of_arrays_equal_the_resident_pipeline_s(augment: bool, flip: bool, dtype: torch.dtype) -> None:
    resident = TensorPipeline(
        ARRAYS.images, LABELS, batch_size=8, seed=3, augment=augment, flip=flip, device="cpu", dtype=dtype
    )
    got = list(pipeline(ARRAYS, augment=augment, flip=flip, dtype=dtype).epoch(5))
    expected = list(resident.epoch(5))
    assert len(got) == len(expected)
    assert all(map(equal, got, expected))
    assert all(batch.x_nat.dtype == dtype for batch in got)


TOLERANCE = 3.5 / 255  # Pillow rounds between its two passes, and JPEG decoders differ by a level


def cut_and_resized(files: list[bytes], windows: Windows, size: int) -> Tensor:
    """What Pillow and torchvision make of the windows."""
    from torchvision.transforms import functional as TF

    images = []
    for data, (top, left, height, width, flip) in zip(files, torch.stack(windows, dim=1).tolist(), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            view = TF.resized_crop(image.convert("RGB"), top, left, height, width, [size, size], antialias=True)
        images.append(TF.to_tensor(TF.hflip(view) if flip else view))
    return torch.stack(images)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [12, 40, 224])
def test_random_windows_look_as_pillow_cuts_and_resizes_them(size: int, kind: str) -> None:
    shapes = [(40 + 13 * number % 300, 40 + 29 * number % 350) for number in range(12)]
    files = [encode(smooth(number, *shape), kind) for number, shape in enumerate(shapes)]
    sample_B, heights_B, widths_B = torch.arange(12), *torch.tensor(shapes).T
    windows = random_windows(3, 6, sample_B, heights_B, widths_B)
    assert set(windows.flip.tolist()) == {0, 1}
    (batch,) = pipeline(in_memory(*files), 12, order="sequential", image_size=size).epoch(6)
    assert (batch.x_nat - cut_and_resized(files, windows, size)).abs().max() < TOLERANCE
    (batch,) = pipeline(in_memory(*files), 12, order="sequential", image_size=size, flip=False).epoch(6)
    unflipped = windows._replace(flip=torch.zeros_like(windows.flip))
    assert (batch.x_nat - cut_and_resized(files, unflipped, size)).abs().max() < TOLERANCE


def test_evaluation_shows_the_centre() -> None:
    from torchvision.transforms import functional as TF

    shapes = [(256, 256), (300, 420), (512, 400), (333, 250)]
    files = [encode(smooth(number, *shape)) for number, shape in enumerate(shapes)]
    evaluation = pipeline(in_memory(*files), 4, order="sequential", image_size=224, augment=False)
    (batch,) = evaluation.epoch(0)
    windows = centre_windows(*torch.tensor(shapes).T)
    assert (batch.x_nat - cut_and_resized(files, windows, 224)).abs().max() < TOLERANCE
    resized = [TF.resize(Image.open(io.BytesIO(data)), 256, antialias=True) for data in files]
    customary = torch.stack([TF.to_tensor(TF.center_crop(image, [224, 224])) for image in resized])
    assert (batch.x_nat - customary).abs().max() < 5 / 255  # windows are of whole pixels


def test_images_are_read_as_pillow_reads_them() -> None:
    """Of 32x32 pixels evaluation shows the central 28x28, here without resizing them."""
    image = Image.fromarray(smooth(1, 32, 32))
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera's orientation, by which neither Pillow nor the other pipelines turn the pixels
    exactly = {
        "grey jpeg": encode(image.convert("L")),
        "rgb jpeg": encode(image, subsampling=0),
        "cmyk": encode(image.convert("CMYK")),
        "turned": encode(image, subsampling=0, exif=turned),
        "progressive": encode(image, subsampling=0, progressive=True),
        "rgb png": encode(image, "PNG"),
        "grey png": encode(image.convert("L"), "PNG"),
        "palette": encode(image.quantize(32), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "black and white": encode(image.convert("1"), "PNG"),
        "gif": encode(image, "GIF"),
        "webp": encode(image, "WEBP"),
    }
    files = list(exactly.values())
    (batch,) = pipeline(in_memory(*files), len(files), order="sequential", image_size=28, augment=False).epoch(0)
    for name, data, x in zip(exactly, files, batch.x_nat, strict=True):
        with Image.open(io.BytesIO(data)) as opened_image:
            expected = np.asarray(opened_image.convert("RGB"))[2:30, 2:30]
        np.testing.assert_array_equal((x.permute(1, 2, 0) * 255).numpy(), expected, name)


def test_images_of_any_size_are_enlarged() -> None:
    shapes = [(1, 1), (1, 90), (90, 1), (3, 2), (2, 700)]
    files = [encode(smooth(number, *shape), "PNG") for number, shape in enumerate(shapes)]
    windows = random_windows(3, 1, torch.arange(5), *torch.tensor(shapes).T)
    (batch,) = pipeline(in_memory(*files), 5, order="sequential", image_size=20).epoch(1)
    assert (batch.x_nat - cut_and_resized(files, windows, 20)).abs().max() < TOLERANCE


def test_real_photographs_look_as_pillow_resizes_them(real_images: Path) -> None:
    with opened(real_images) as (train, test):
        images = encoded_splits(train, test, Request(limit_test=200))[1]
        files = [images.read(sample)[0] for sample in range(len(images))]
        (batch,) = pipeline(images, len(images), order="sequential", image_size=32).epoch(0)
        sizes = torch.tensor([images.read(sample)[1:] for sample in range(len(images))]).T
    difference = (
        batch.x_nat - cut_and_resized(files, random_windows(3, 0, torch.arange(len(images)), *sizes), 32)
    ).abs()
    assert difference.mean() < 1 / 255
    assert torch.equal(batch.labels, images.labels)


# ---------------------------------------------------------------- folders and archives


def test_folder_and_archive_give_the_same_batches(tmp_path: Path) -> None:
    root = write(tmp_path / "folder", image_folder(FILES))
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as file:
        for name, data in image_folder(FILES).items():
            file.writestr(name, data)
    with opened(root) as parts, opened(tmp_path / "whole.zip") as zipped_parts:
        train, _ = encoded_splits(*parts, Request())
        zipped, _ = encoded_splits(*zipped_parts, Request())
        batches = list(pipeline(train).epoch(0))
        assert all(map(equal, pipeline(zipped).epoch(0), batches))
        assert sum(len(batch.sample) for batch in batches) == COUNT
        by_number = {int(Path(name).stem): sample for sample, name in enumerate(train.names)}
        (expected,) = pipeline(ENCODED, COUNT, order="sequential", augment=False).epoch(0)
        (got,) = pipeline(train, COUNT, order="sequential", augment=False).epoch(0)
        assert torch.equal(got.x_nat[[by_number[number] for number in range(COUNT)]], expected.x_nat)


# ---------------------------------------------------------------- bad data


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_image_ends_the_epoch_with_its_name(data: bytes) -> None:
    one = pipeline(in_memory(*FILES[:9], data, *FILES[10:]), 4)
    with pytest.raises(ValueError, match=r"^data: X/9 is not a readable image \([^\n]*\)$"):
        list(one.epoch(0))


TABLES = FILES[9].index(b"\xff\xc4") + 4
UNDECODABLE = FILES[9][:TABLES] + bytes(30) + FILES[9][TABLES + 30 :]  # no Huffman table, which no header shows


def test_an_image_that_only_dali_finds_bad_ends_the_epoch_with_its_name() -> None:
    images = in_memory(*FILES[:9], UNDECODABLE, *FILES[10:])
    assert images.read(9)[0] == UNDECODABLE
    one = pipeline(images, 4)
    for _ in range(2):  # the pipeline is none the worse for it
        with pytest.raises(ValueError, match=r"^data: X/9 cannot be decoded by DALI \([^\n]+\)$"):
            list(one.epoch(0))


def test_batches_before_a_bad_image_are_given() -> None:
    order = Sampling(COUNT, 4, 3).samples(0)
    files = list(FILES)
    files[int(order[-1])] = b"nothing"
    batches = pipeline(in_memory(*files), 4, prefetch=1).epoch(0)
    expected = pipeline(ENCODED, 4).epoch(0)
    assert all(equal(next(batches), next(expected)) for _ in range(8))
    with pytest.raises(ValueError, match="is not a readable image"):
        list(batches)


def test_a_file_that_vanishes_ends_the_epoch_with_its_name(tmp_path: Path) -> None:
    root = write(tmp_path, image_folder(FILES))
    missing = root / "train/b/01.jpg"
    with opened(root) as parts:
        train, _ = encoded_splits(*parts, Request(), on_bad_image="skip")
        assert train.skipped == ()
        missing.unlink()
        with pytest.raises(
            ValueError, match=rf"^data: {re.escape(str(missing))} is not a readable image \(.*No such"
        ):
            list(pipeline(train).epoch(0))


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("data", [b"nothing", UNDECODABLE], ids=["reading fails", "decoding fails"])
def test_a_failed_epoch_leaves_nothing_although_its_error_is_kept(data: bytes, threads_before: int) -> None:
    with pytest.raises(ValueError, match="X/9") as error:
        list(pipeline(in_memory(*FILES[:9], data)).epoch(0))
    assert threads_end(threads_before)
    assert "X/9" in str(error.value)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]


@both
def test_close_ends_what_was_left_unfinished(data: Split | EncodedImages) -> None:
    one = pipeline(data)
    unfinished = [one.epoch(epoch) for epoch in range(3)]
    for batches in unfinished[:2]:
        next(batches)
    assert readers()
    one.close()
    assert readers() == []
    assert [list(batches) for batches in unfinished] == [[], [], []]
    one.close()


@both
def test_an_epoch_that_is_dropped_ends_by_itself(data: Split | EncodedImages) -> None:
    for batch in pipeline(data).epoch(0):
        assert len(batch.sample) == 8
        break
    assert readers() == []


def test_an_exception_of_the_consumer_leaves_nothing() -> None:
    def consume() -> None:
        with closing(pipeline(ENCODED)) as one:
            for _ in one.epoch(0):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert readers() == []


# ---------------------------------------------------------------- what does not fit


def test_too_old_a_dali_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvidia.dali.__version__", "2.1.1")
    with pytest.raises(
        ValueError, match=r"^pipeline: dali needs `pip install [^\n]*` \(version 2.1.1 is too old\)$"
    ):
        pipeline(ARRAYS)


@pytest.mark.parametrize("name", ["image_size", "num_threads", "prefetch"])
def test_numbers_below_one_are_refused(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=rf"^{name} must be 1 or more, got 0$"):
        pipeline(ENCODED, **options)


def test_encoded_images_need_a_size() -> None:
    with pytest.raises(ValueError, match=r"^image_size: images in files are resized to a size that must be given"):
        pipeline(ENCODED, image_size=None)


# ---------------------------------------------------------------- on a GPU


def fields(message: bytes) -> list[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: int, or bytes."""
    found: list[tuple[int, Any]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        size = {0: 0, 1: 8, 5: 4}.get(kind)
        if kind == 0:
            found.append((number, varint()))
            continue
        size = varint() if size is None else size
        found.append((number, message[at : at + size]))
        at += size
    return found


def operators(source: Source, on_gpu: bool) -> list[tuple[str, str]]:
    """Operators and output, each with its device, of the definition as DALI checks and serialises it."""
    definition = define(source, [], batch_size=8, num_threads=1, prefetch=2, on_gpu=on_gpu, device_id=None)
    found = []
    for number, value in fields(definition.serialize()):
        if number == 5:
            parts = fields(value)
            arguments = {part[0][1]: part[2][1] for part in (fields(value) for key, value in parts if key == 4)}
            found.append((parts[0][1].decode(), arguments[b"device"].decode()))
        elif number == 7:
            found.append(("output", fields(value)[1][1].decode()))
    return found


def on_a_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


@pytest.mark.parametrize(("on_gpu", "decoding", "device"), [(True, "mixed", "gpu"), (False, "cpu", "cpu")])
def test_a_gpu_decodes_and_resizes_by_the_same_definition(on_gpu: bool, decoding: str, device: str) -> None:
    found = operators(Photographs(ENCODED, 0, 16, True, True), on_gpu)
    assert [each for each in found if each[0] != "ExternalSource"] == [
        ("decoders__ImageSlice", decoding),
        ("Resize", device),
        ("Flip", device),
        ("output", device),
    ]
    assert found.count(("ExternalSource", "cpu")) == 4
    assert operators(Arrays(ARRAYS.images), on_gpu) == [("ExternalSource", "cpu"), ("output", device)]


@on_a_gpu
@both
def test_a_gpu_gives_what_the_cpu_gives(data: Split | EncodedImages) -> None:
    for got, expected in zip(pipeline(data, device="cuda").epoch(0), pipeline(data).epoch(0), strict=True):
        assert got.x_nat.device.type == got.labels.device.type == got.sample.device.type == "cuda"
        assert got.x_nat.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got.labels.cpu(), expected.labels)
        assert torch.equal(got.sample.cpu(), expected.sample)
        difference = (got.x_nat.cpu() - expected.x_nat).abs()
        assert difference.max() <= (0 if isinstance(data, Split) else 8 / 255)


@on_a_gpu
@both
def test_a_batch_that_is_held_on_a_gpu_keeps_its_values(data: Split | EncodedImages) -> None:
    held = list(pipeline(data, 4, device="cuda").epoch(0))
    for batch, again in zip(held, pipeline(data, 4, device="cuda").epoch(0), strict=True):
        assert torch.equal(batch.x_nat, again.x_nat)
