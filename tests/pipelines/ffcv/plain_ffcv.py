"""FFCV as it is, without `pipelines/ffcv/repairs.py`: print its faults as JSON. Run as a process of its own."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

DISTUTILS = ("distutils", "distutils.log")
THREADS = 3  # of torch's, set before FFCV is imported
PATIENCE = 1.2  # seconds: more than twice as long as FFCV waits until it looks again whether it is to end


@contextmanager
def distutils(stand_ins: dict[str, ModuleType | None]) -> Iterator[None]:
    """Put other modules, or none, in the place of distutils."""
    before = {name: sys.modules.pop(name) for name in DISTUTILS if name in sys.modules}
    sys.modules.update(stand_ins)  # type: ignore[arg-type]  # None: not to be imported
    try:
        yield
    finally:
        for name in DISTUTILS:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def import_plainly() -> None:
    """Import FFCV where there is no distutils either."""
    log = ModuleType("distutils.log")
    vars(log)["warn"] = print
    with distutils({"distutils": ModuleType("distutils"), "distutils.log": log}):
        importlib.import_module("ffcv")


def faults(folder: Path) -> dict[str, bool]:
    torch.set_num_threads(THREADS)
    found = {}
    with distutils(dict.fromkeys(DISTUTILS)):
        try:
            importlib.import_module("ffcv")
        except ImportError:
            found["its import needs distutils"] = True
        else:
            found["its import needs distutils"] = False
    import_plainly()
    found["its import sets torch's threads"] = torch.get_num_threads() != THREADS

    # The writer first: it forks, which a process must not do after it has run compiled loops in threads.
    found["a writer whose worker fails waits for ever"] = waits_for_ever(folder / "failed.beton")
    path = folder / "slow.beton"
    write(path, Samples(first_chunk=lambda: time.sleep(0.5)), workers=2)
    found["a writer's order on the disk is that of its workers"] = not is_in_order(path)

    found["a loader alters numba's types"] = alters_types(path)
    found["a loader sets torch's threads"] = torch.get_num_threads() != THREADS
    found["a function that is compiled is not compiled again"] = not compiles_again()
    found["an exception leaves the consumer waiting"] = leaves_consumer_waiting(path)
    found["an epoch that is left goes on"] = goes_on_when_left(path)
    found["a last put that blocks never ends"] = never_ends(path)
    return found


class Samples:
    """40 small images and their numbers, for FFCV's writer."""

    def __init__(self, first_chunk: Callable[[], object] = lambda: None) -> None:
        self.first_chunk = first_chunk

    def __len__(self) -> int:
        return 40

    def __getitem__(self, number: int) -> tuple[npt.NDArray[np.uint8], int]:
        if number == 0:
            self.first_chunk()
        return np.full((4, 4, 3), number, np.uint8), int(number)


def write(path: Path, samples: Samples, workers: int) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    writer = DatasetWriter(str(path), {"image": RGBImageField("raw"), "label": IntField()}, num_workers=workers)
    writer.from_indexed_dataset(samples, chunksize=20)


def waits_for_ever(path: Path) -> bool:
    """True if the writer goes on waiting after its only process has died of an exception."""

    def fail() -> None:
        raise OSError("no space left on device")

    writing = threading.Thread(target=write, args=(path, Samples(fail), 1), daemon=True)
    writing.start()
    while not (workers := multiprocessing.active_children()) and writing.is_alive():
        time.sleep(0.01)
    for worker in workers:
        worker.join()
    writing.join(PATIENCE)
    return writing.is_alive()


def is_in_order(path: Path) -> bool:
    """True if images stand in the file in the order of their numbers."""
    from ffcv.reader import Reader

    starts = Reader(str(path)).metadata["f0"]["data_ptr"]
    return bool((starts[1:] > starts[:-1]).all())


def loader(path: Path, *operations: Any, paged: bool = False, count: int = 40) -> Any:
    """Batches of four images, two of them made in advance."""
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    return Loader(
        str(path), batch_size=4, num_workers=1, os_cache=not paged, order=OrderOption.SEQUENTIAL,
        indices=range(count), batches_ahead=2,
        pipelines={"image": [SimpleRGBImageDecoder(), *operations], "label": None},
    )  # fmt: skip


def alters_types(path: Path) -> bool:
    """True if a function that was compiled before a loader was made cannot be called by one compiled after it."""

    @numba.njit
    def first(values):  # type: ignore[no-untyped-def]
        return values[0]

    @numba.njit
    def second(values):  # type: ignore[no-untyped-def]
        return first(values)

    values = np.zeros(4, np.uint8)
    first(values)
    torch.set_num_threads(THREADS)
    loader(path)
    try:
        second(values)
    except KeyError:
        return True
    return False


def compiles_again() -> bool:
    from ffcv.pipeline.compiler import Compiler

    def one() -> int:
        return 1

    try:
        return bool(Compiler.compile(Compiler.compile(one))() == 1)
    except TypeError:
        return False


def leaves_consumer_waiting(path: Path) -> bool:
    """True if an exception of an operation ends the thread and leaves its consumer waiting for batches."""
    from ffcv.pipeline.operation import Operation

    class Fail(Operation):  # type: ignore[misc]
        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            return type(previous_state)(**{**vars(previous_state), "jit_mode": False}), None

        def generate_code(self) -> Any:
            def fail(*_: Any) -> None:
                raise ValueError("this image is bad")

            return fail

    with suppress(ValueError):
        epoch = iter(loader(path, Fail()))
        epoch.join(20)
        return not epoch.is_alive() and epoch.output_queue.empty()
    return False


def goes_on_when_left(path: Path) -> bool:
    """True if threads go on for an epoch that nobody holds any more."""
    before = threading.active_count()
    for _ in loader(path, paged=True):
        break
    gc.collect()
    time.sleep(PATIENCE)
    return threading.active_count() > before


def never_ends(path: Path) -> bool:
    """True if a closed epoch does not end when all its batches are made and nobody takes them."""
    epoch = iter(loader(path, count=8))
    while not epoch.output_queue.full():
        time.sleep(0.01)
    epoch.close()
    epoch.join(PATIENCE)
    return bool(epoch.is_alive())


if __name__ == "__main__":
    json.dump(faults(Path(sys.argv[1])), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the threads that FFCV left would not let it end
