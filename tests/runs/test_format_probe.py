"""The timing that chooses the format of the passes, and the cache of its results."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import config, models
from engine.config import RunConfig
from engine.models.architecture import Architecture
from engine.runs import format_probe
from engine.training import plan

bfloat16_gain = format_probe.bfloat16_gain  # which every other test replaces


def run_of(**keys: Any) -> RunConfig:
    return config.load(
        {"model": "resnet8", "method": "iad1", "batch_size": 4, "device": "cpu", "amp": True, **keys}
    )


def passes(order: list[str], seconds: dict[str, list[float]], clock: list[float]) -> Any:
    """Steps of one pass for each format that take the seconds given, one after the other."""
    left = {name: iter(values) for name, values in seconds.items()}

    def call(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock[0] += next(left[name])

        return run

    return {name: [format_probe._Pass(call(name), 3)] for name in seconds}


# ---------------------------------------------------------------- the timing


def test_the_least_of_rounds_in_turn_counts_as_often_as_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: the first round warms up, and a disturbed round does not count."""
    order: list[str] = []
    clock = [0.0]
    steps = passes(order, {"float32": [0.1, 2.0, 9.0], "bfloat16": [0.1, 7.0, 4.0]}, clock)
    ends = iter([0.0, 1.0, 1.9, 2.0])
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: next(ends))
    assert format_probe._least(steps) == pytest.approx({"float32": 6.0, "bfloat16": 12.0})
    assert order == ["float32", "bfloat16"] * 3


def test_a_slow_processor_is_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round counts where it takes all the time there is."""
    order: list[str] = []
    clock = [0.0]
    steps = passes(order, {"float32": [3.0, 1.0], "bfloat16": [5.0, 1.0]}, clock)
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert format_probe._least(steps) == pytest.approx({"float32": 9.0, "bfloat16": 15.0})
    assert order == ["float32", "bfloat16"]


class Convolutions(TorchDispatchMode):
    """Notes the convolutions that run inside: name, dtype, and which gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, torch.dtype, tuple[bool, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in func.name():
            assert args[0].is_contiguous(memory_format=torch.channels_last)
            mask = tuple(args[-1][:2]) if "backward" in func.name() else ()
            self.seen.append((func.name(), args[0].dtype, mask))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_timed_are_the_passes_of_the_step(dtype: torch.dtype) -> None:
    """All but the first of nine convolutions are in the format; in the attack no weight has a gradient."""
    run = run_of()
    amp_dtype = None if dtype == torch.float32 else dtype
    step = format_probe._step(models.build("resnet8", 10), torch.rand(2, 3, 32, 32), run, amp_dtype)
    assert [one.number for one in step] == list(format_probe._passes(run)) == list(plan.Passes(10, 2, 2))
    wanted = [{(True, False)}, {(True, True), (False, True)}, set()]
    for one, masks in zip(step, wanted, strict=True):
        with Convolutions() as ran:
            one.call()
        assert sum(name == "aten::convolution" for name, _, _ in ran.seen) == 9
        assert [seen for name, seen, _ in ran.seen if name == "aten::convolution"] == [torch.float32, *[dtype] * 8]
        assert {mask for _, _, mask in ran.seen if mask} == masks


def test_a_method_without_an_attack_times_none() -> None:
    run = run_of(method="st")
    assert [
        one.number for one in format_probe._step(models.build("resnet8", 10), torch.rand(2, 3, 32, 32), run, None)
    ] == [1]


def test_a_timing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_probe, "_SECONDS", 0.0)
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    seconds = format_probe.measure(run_of())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert seconds.keys() == {"float32", "bfloat16"}
    assert all(0 < value < math.inf for value in seconds.values())


@pytest.mark.parametrize(("batch_size", "threads", "images"), [(128, 1, 32), (128, 16, 8), (8, 16, 1), (6, 2, 3)])
def test_the_images_of_one_thread(
    batch_size: int, threads: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 32, where a forward of ResNet-8 over all of them has fewer operations than the limit."""
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(format_probe, "_step", lambda network, images, run, amp: seen.append(len(images)))
    monkeypatch.setattr(format_probe, "_least", lambda steps: {})
    format_probe.measure(run_of(batch_size=batch_size))
    assert seen == [images] * 2


# ---------------------------------------------------------------- the cache


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that were timed; bfloat16 takes half as long in each."""
    asked: list[RunConfig] = []

    def measure(run: RunConfig) -> dict[str, float]:
        asked.append(run)
        return {"float32": 1.0, "bfloat16": 0.5}

    monkeypatch.setattr(format_probe, "measure", measure)
    return asked


def cached() -> list[Path]:
    return sorted((Path(os.environ["ENGINE_CACHE"]) / "formats").iterdir())


def test_a_machine_is_timed_once(timings: list[RunConfig]) -> None:
    assert [bfloat16_gain(run_of(seed=seed)) for seed in range(3)] == [2.0, 2.0, 2.0]
    assert len(timings) == len(cached()) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"model": "resnet18"}, {"dataset": "tiny-imagenet"}, {"batch_size": 8}, {"method": "at"},
        {"attack": {"num_steps": 3}}, {"attack": {"bn": "eval"}}, {"micro_batch": 2},
    ],
)  # fmt: skip
def test_another_step_is_timed_anew(keys: dict[str, Any], timings: list[RunConfig]) -> None:
    bfloat16_gain(run_of())
    bfloat16_gain(run_of(**keys))
    assert len(timings) == len(cached()) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2"),
        lambda patch: patch.setenv("ENGINE_KERNELS", "reference"),
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        lambda patch: patch.setattr(format_probe, "_processor", lambda: ["flags: none"]),
        lambda patch: patch.setattr(format_probe, "code_hash", lambda: "another"),
    ],
)
def test_another_machine_is_timed_anew(
    change: Callable[[pytest.MonkeyPatch], None], timings: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    bfloat16_gain(run_of())
    change(monkeypatch)
    bfloat16_gain(run_of())
    assert len(timings) == 2


def test_the_processor_is_told_apart_by_its_flags() -> None:
    assert {line.partition(":")[0] for line in format_probe._processor()} & {"flags", "Features"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"3", b'{"gain": 2}', b'{"key": {}, "gain": 3}', b"\xff\xfe", b"x" * 2**17,
        b'{"key": KEY, "gain": "fast"}', b'{"key": KEY, "gain": -1}', b'{"key": KEY, "gain": NaN}',
        b'{"key": KEY, "gain": Infinity}', b'{"key": KEY, "gain": null}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_anew_and_replaced(content: bytes, timings: list[RunConfig]) -> None:
    bfloat16_gain(run_of())
    (path,) = cached()
    whole = path.read_bytes()
    path.write_bytes(content.replace(b"KEY", json.dumps(json.loads(whole)["key"]).encode()))
    assert bfloat16_gain(run_of()) == 2.0
    assert len(timings) == 2
    assert path.read_bytes() == whole
    assert bfloat16_gain(run_of()) == 2.0
    assert len(timings) == 2


def test_without_a_cache_folder_it_is_measured_each_time(
    timings: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    assert [bfloat16_gain(run_of()) for _ in range(2)] == [2.0, 2.0]
    assert len(timings) == 2


def test_a_network_that_cannot_be_run_is_float32_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(num_classes: int) -> Any:
        raise RuntimeError("no such layer")

    monkeypatch.setitem(models.TABLE, "broken", Architecture("fails", fails, version="1"))
    assert bfloat16_gain(run_of(model="broken")) == 0.0
    assert not (Path(os.environ["ENGINE_CACHE"]) / "formats").exists()
    monkeypatch.setattr(format_probe, "bfloat16_gain", bfloat16_gain)
    assert format_probe.resolve_amp(run_of(model="broken")).amp_dtype == "float32"
