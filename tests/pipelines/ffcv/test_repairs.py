"""Each fault of FFCV's that is mended: that FFCV still has it, and that it is mended.

Where one of the first kind fails with "FFCV has mended this", a part of `pipelines/ffcv/repairs.py` can go.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.pipelines import ffcv
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.reading import beton
from tests.pipelines.loaders import ARRAYS, COUNT, python_threads

MENDED = "FFCV has mended this: the repair can go"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def with_ffcv() -> None:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 43 raw images of 8x8 pixels."""
    path = tmp_path_factory.mktemp("betons") / "x.beton"
    beton_writer.write(path, [ARRAYS])
    return path


# ---------------------------------------------------------------- FFCV as it is


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Faults of FFCV without the repairs, in a process of its own."""
    command = [sys.executable, "-m", "tests.pipelines.ffcv.plain_ffcv", str(tmp_path_factory.mktemp("plain"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "fault",
    [
        "its import needs distutils",
        "its import sets torch's threads",
        "a loader sets torch's threads",
        "a loader alters numba's types",
        "a function that is compiled is not compiled again",
        "an exception leaves the consumer waiting",
        "an epoch that is left goes on",
        "a last put that blocks never ends",
        "a writer whose worker fails waits for ever",
        "a writer's order on the disk is that of its workers",
    ],
)
def test_ffcv_still_has_the_fault(fault: str, plain: Any) -> None:
    assert plain[fault], MENDED


LOOP = """
import os, threading
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numba, numpy as np

@numba.njit(parallel=True)
def ones(values):
    for i in numba.prange(len(values)):
        values[i] = 1

thread = threading.Thread(target=ones, args=(np.zeros(9),))
thread.start()
thread.join()
print(numba.threading_layer(), flush=True)
"""


def test_a_process_with_one_processor_still_hangs_at_its_end_in_tbb() -> None:
    """TBB is the layer that numba takes first, where it is installed. `test_pipeline.py` shows that ours ends."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_THREADING_LAYER"}
    with subprocess.Popen([sys.executable, "-c", LOOP], env=environment, stdout=-1, text=True) as process:
        assert process.stdout is not None
        layer = process.stdout.readline().strip()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            assert layer == "tbb"
        else:
            assert layer != "tbb", MENDED
            pytest.skip(f"numba finds no TBB here, and takes {layer or 'nothing'}")
        finally:
            process.kill()


# ---------------------------------------------------------------- mended: of the process

IMPORT = """
import sys, torch
from tests.pipelines.ffcv.plain_ffcv import DISTUTILS, distutils
torch.set_num_threads(3)
with distutils(dict.fromkeys(DISTUTILS)):
    from engine.pipelines.ffcv import repairs
    print(*(set(DISTUTILS) & set(sys.modules)), torch.get_num_threads())
"""


def test_it_is_imported_without_distutils_and_leaves_torch_s_threads() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["3"]), done.stderr


def test_a_loader_and_its_epochs_leave_torch_s_threads(path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        epoch = epoch_of(path, workers=2)
        next(epoch)
        epoch.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_was_compiled_before_a_loader_is_found_after_it(path: Path) -> None:
    import numba

    from engine.pipelines.ffcv.repairs import Compiler, Loader, OrderOption, SimpleRGBImageDecoder

    @numba.njit
    def first(values):  # type: ignore[no-untyped-def]
        return values[0]

    @numba.njit
    def second(values):  # type: ignore[no-untyped-def]
        return first(values) + 1

    values = np.full(4, 7, np.uint8)
    assert first(values) == 7
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None, "class_name": None}
    own = Loader(str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    assert second(values) == 8
    for number, (images,) in enumerate(own):  # FFCV's own decoder reads by what is compiled late
        np.testing.assert_array_equal(images, ARRAYS.images[4 * number : 4 * number + 4])
    assert Compiler.compile(first) is first


# ---------------------------------------------------------------- mended: epochs


@pytest.fixture
def others() -> list[threading.Thread]:
    """The threads that a test begins with."""
    return threading.enumerate()


def epoch_of(
    path: Path,
    *,
    paged: bool = False,
    count: int = COUNT,
    fail_at: int | None = None,
    workers: int = 1,
    made: list[int] | None = None,
) -> Any:
    """An epoch of four images a batch, two batches made ahead, which fails at one of them. made: their numbers."""
    from engine.pipelines.ffcv.loader import BetonLoader

    loader = BetonLoader(
        beton.read(path), (8, 8), any_size=False, paged=paged, batch_size=4, workers=workers, batches_ahead=2,
        device=torch.device("cpu"),
    )  # fmt: skip
    batches = list(np.split(np.arange(count) % COUNT, range(4, count, 4)))

    def crops(number: int) -> Any:
        if number == fail_at:
            raise RuntimeError("planted")
        if made is not None:
            made.append(number)
        return np.zeros((len(batches[number]), 5), np.int64)

    return loader.read(batches, crops, lambda number, i: pytest.fail("nothing is broken"))


def close(epoch: Any) -> None:
    """Close it, in seconds or never."""
    closing = threading.Thread(target=epoch.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


def wait_until_full(epoch: Any) -> None:
    patience = time.monotonic() + 20
    while not epoch.output_queue.full():
        assert time.monotonic() < patience
        time.sleep(0.01)


in_both_orders = pytest.mark.parametrize("paged", [False, True], ids=["mapped", "paged"])


@in_both_orders
def test_an_exception_is_raised_where_batches_are_awaited(
    paged: bool, path: Path, others: list[threading.Thread]
) -> None:
    epoch = epoch_of(path, paged=paged, fail_at=3)
    for number in range(3):
        np.testing.assert_array_equal(next(epoch)[0], ARRAYS.images[4 * number : 4 * number + 4])
    epoch.join(20)
    assert not epoch.output_queue.empty()
    with pytest.raises(RuntimeError, match="planted"):
        next(epoch)
    close(epoch)
    assert python_threads(others) == []


@in_both_orders
@pytest.mark.parametrize("taken", [0, 1, 9, 11])
def test_an_epoch_that_is_closed_ends_all_its_threads(
    taken: int, paged: bool, path: Path, others: list[threading.Thread]
) -> None:
    epoch = epoch_of(path, paged=paged)
    for _ in range(taken):
        next(epoch)
    if taken < 9:
        wait_until_full(epoch)  # and so the next one waits for room
        assert len(python_threads(others)) == (13 if paged else 1)
    close(epoch)
    assert python_threads(others) == []
    close(epoch)


@in_both_orders
def test_an_epoch_that_is_closed_makes_no_more_batches(paged: bool, path: Path) -> None:
    made: list[int] = []
    epoch = epoch_of(path, paged=paged, count=4000, made=made)
    next(epoch)
    close(epoch)
    assert len(made) <= 5  # one was taken, two were ahead, one was waiting for room, and one was begun


@in_both_orders
@pytest.mark.parametrize(("count", "fail_at"), [(8, None), (COUNT, 2)], ids=["the end", "an exception"])
def test_last_words_that_find_no_room_do_not_keep_an_epoch(
    count: int, fail_at: int | None, paged: bool, path: Path, others: list[threading.Thread]
) -> None:
    epoch = epoch_of(path, paged=paged, count=count, fail_at=fail_at)
    wait_until_full(epoch)
    time.sleep(0.05)  # until it says that it is over, which nobody hears
    close(epoch)
    assert python_threads(others) == []


class Stream:
    """A stream of a GPU, of which it is noted when a copy is recorded and when one waits for it."""

    def __init__(self, slot: int, told: list[tuple[str, int]]) -> None:
        self.slot, self.told = slot, told

    def record_event(self) -> Stream:
        self.told.append(("copied", self.slot))
        return self

    def synchronize(self) -> None:
        self.told.append(("awaited", self.slot))


def test_a_buffer_is_filled_again_when_its_copy_to_a_gpu_is_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.pipelines.ffcv.repairs import RepairedEpochIterator

    told: list[tuple[str, int]] = []

    def start(epoch: Any) -> None:
        epoch.cuda_streams = [Stream(slot, told) for slot in range(len(epoch.cuda_streams))]
        threading.Thread.start(epoch)

    monkeypatch.setattr(RepairedEpochIterator, "start", start)
    assert len(list(epoch_of(path, count=24))) == 6
    first_round = [("copied", slot) for slot in range(4)]  # two ahead, one in use, one in work
    assert told == [*first_round, ("awaited", 0), ("copied", 0), ("awaited", 1), ("copied", 1)]


# ---------------------------------------------------------------- mended: writing


def test_writing_raises_what_its_samples_raise(tmp_path: Path, others: list[threading.Thread]) -> None:
    from engine.pipelines.ffcv import repairs

    def samples() -> Any:
        yield (1,)
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        repairs.write(tmp_path / "y.beton", {"label": repairs.IntField()}, 9, samples())
    assert python_threads(others) == []
    assert multiprocessing.active_children() == []


def test_samples_are_written_in_their_order(path: Path) -> None:
    starts = beton.read(path).images["at"]
    assert (starts[1:] > starts[:-1]).all()
