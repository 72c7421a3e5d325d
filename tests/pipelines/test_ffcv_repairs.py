"""Each fault of FFCV's that is mended: that FFCV still has it, and that it is mended.

Where one of the first kind fails with "FFCV has mended this", a part of `pipelines/ffcv_repairs.py` can go.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.pipelines import beton, beton_writer, ffcv
from tests.pipelines.loaders import ARRAYS, python_threads

MENDED = "FFCV has mended this: the repair can go"

# FFCV as it comes, in a process of its own: what each fault does, as JSON.
PLAIN = r"""
import json, sys, threading, time
import numba, torch
torch.set_num_threads(2)
found = {}

class NoDistutils:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "distutils":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoDistutils())
for name in [name for name in sys.modules if name.partition(".")[0] == "distutils"]:
    del sys.modules[name]
try:
    import ffcv.loader
    found["needs distutils"] = False
except ImportError as error:
    found["needs distutils"] = "distutils" in str(error)
del sys.meta_path[0]
for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
    del sys.modules[name]

import types
for name in ("distutils", "distutils.log"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["distutils.log"].warn = None
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import SimpleRGBImageDecoder
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
shared = numba.types.uint8[::1]  # one object for all as long as somebody holds it
found["sets torch's threads"] = torch.get_num_threads() != 2

try:
    Compiler.compile(numba.njit(lambda x: x))
    found["refuses what is compiled"] = False
except TypeError:
    found["refuses what is compiled"] = True

class Faulty(Operation):
    def declare_state_and_memory(self, state):
        from dataclasses import replace
        return replace(state, jit_mode=False), None
    def generate_code(self):
        def fail(images, _):
            raise RuntimeError("planted")
        return fail

def loader(*operations):
    return Loader(sys.argv[1], batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, batches_ahead=1,
                  pipelines={"image": [SimpleRGBImageDecoder(), *operations], "label": None, "class_name": None})

threading.excepthook = lambda *_: None
epoch = iter(loader(Faulty()))
epoch.join(60)
found["says nothing of an exception"] = not epoch.is_alive() and epoch.output_queue.empty()

epoch = iter(loader())
next(epoch)
epoch.close()
time.sleep(0.2)
found["goes on when it is closed"] = epoch.is_alive()

found["alters numba's types"] = not shared.mutable
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        ffcv.check_installed()
    except ValueError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("betons") / "x.beton"
    beton_writer.write(path, [ARRAYS])
    return path


@pytest.fixture(scope="module")
def plain(path: Path) -> Any:
    """What FFCV does unmended."""
    done = subprocess.run([sys.executable, "-c", PLAIN, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "fault",
    [
        "needs distutils",
        "sets torch's threads",
        "refuses what is compiled",
        "says nothing of an exception",
        "goes on when it is closed",
        "alters numba's types",
    ],
)
def test_ffcv_still_has_the_fault(fault: str, plain: Any) -> None:
    assert plain[fault], MENDED


WRITER = """
import sys
import numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import IntField
class Samples:
    def __len__(self): return 4
    def __getitem__(self, i): raise RuntimeError("planted")
DatasetWriter(sys.argv[1], {"label": IntField()}, num_workers=1).from_indexed_dataset(Samples())
"""


def test_ffcv_s_writer_still_waits_for_ever_after_an_exception(path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path.with_name("y.beton")], stderr=subprocess.PIPE, text=True
    )
    assert writer.stderr is not None
    for line in writer.stderr:
        if "planted" in line:
            break
    try:
        writer.wait(3)
    except subprocess.TimeoutExpired:
        return
    finally:
        writer.kill()
        writer.stderr.close()
        writer.wait()
    pytest.fail(MENDED)


WITHOUT_DISTUTILS = """
import sys, torch
torch.set_num_threads(2)
class NoDistutils:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "distutils":
            raise ModuleNotFoundError(name)
for name in [name for name in sys.modules if name.partition(".")[0] == "distutils"]:
    del sys.modules[name]
sys.meta_path.insert(0, NoDistutils())
from engine.pipelines import ffcv_repairs
assert "distutils" not in sys.modules
assert torch.get_num_threads() == 2, torch.get_num_threads()
ffcv_repairs.Compiler.set_num_threads(1)
assert torch.get_num_threads() == 2
"""


def test_it_is_imported_without_distutils_and_leaves_torch_s_threads(path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_DISTUTILS], check=True, timeout=120)


def epoch_of(path: Path, order: str, *, fail_at: int | None = None, count: int = 43) -> Any:
    """An epoch of four images a batch, which fails at one of its batches."""
    from engine.pipelines.ffcv_loader import BetonLoader

    loader = BetonLoader(
        beton.read(path), (8, 8), windows=False, paged=order == "quasi-random", batch_size=4, workers=1,
        batches_ahead=1, device=torch.device("cpu"),
    )  # fmt: skip
    batches = list(np.split(np.arange(count), range(4, count, 4)))

    def windows(number: int) -> Any:
        if number == fail_at:
            raise RuntimeError("planted")
        return np.zeros((len(batches[number]), 5), np.int64)

    return loader.read(batches, windows, lambda number, i: pytest.fail("nothing is broken"))


@pytest.mark.parametrize("order", ["random", "quasi-random"])
def test_an_exception_is_raised_where_batches_are_awaited(order: str, path: Path) -> None:
    others = threading.enumerate()
    epoch = epoch_of(path, order, fail_at=3)
    for _ in range(3):
        next(epoch)
    with pytest.raises(RuntimeError, match="planted"):
        next(epoch)
    epoch.close()
    assert python_threads(others) == []


@pytest.mark.parametrize("order", ["random", "quasi-random"])
@pytest.mark.parametrize("taken", [0, 1, 11])
def test_an_epoch_that_is_closed_ends_all_its_threads(order: str, taken: int, path: Path) -> None:
    others = threading.enumerate()
    epoch = epoch_of(path, order)
    for _ in range(taken):
        next(epoch)
    epoch.close()
    assert python_threads(others) == []
    epoch.close()


def test_the_last_word_of_an_epoch_does_not_wait_for_a_reader(path: Path) -> None:
    """All batches are made and nobody has taken one: what says that it is over finds no room."""
    epoch = epoch_of(path, "random", count=4)
    while not epoch.output_queue.full():
        pass
    epoch.close()
    assert not epoch.is_alive()


def test_code_that_is_compiled_stays_so_when_a_loader_is_made(path: Path) -> None:
    """FFCV alters types that numba shares, and what was compiled for them would be lost."""
    for _ in range(3):
        (images,) = next(epoch := epoch_of(path, "random"))
        assert torch.equal(images, ARRAYS.images[:4])
        epoch.close()
    from ffcv.fields.decoders import SimpleRGBImageDecoder

    from engine.pipelines.ffcv_repairs import Loader, OrderOption

    pipelines = {"image": [SimpleRGBImageDecoder()], "label": None, "class_name": None}
    own = Loader(str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
    (images,) = next(batches := iter(own))  # its own decoder reads as before
    np.testing.assert_array_equal(images, ARRAYS.images[:4])
    del batches
