"""The timing that chooses the format of the passes, and the cache of its results."""

from __future__ import annotations

import copy
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
from engine.kernels import dispatch
from engine.models.architecture import Architecture
from engine.models.layers import Conv3x3
from engine.runs import format_probe
from engine.training import plan

gains_of = format_probe.gains_of  # which every other test replaces


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
def test_what_is_timed_are_the_passes_of_the_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first of nine convolutions are in the format; in the attack no weight has a gradient."""
    monkeypatch.setenv("ENGINE_KERNELS", "auto,image_conv3x3=reference")  # torch's, which is seen
    run = run_of()
    way = format_probe.WAYS[str(dtype).removeprefix("torch.")]
    step = format_probe._step(models.build("resnet8", 10), torch.rand(2, 3, 32, 32), run, way)
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
        one.number
        for one in format_probe._step(
            models.build("resnet8", 10), torch.rand(2, 3, 32, 32), run, format_probe.WAYS["float32"]
        )
    ] == [1]


def test_a_timing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_probe, "_SECONDS", 0.0)
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    seconds = format_probe.measure(run_of())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert seconds.keys() == format_probe.WAYS.keys()
    assert all(0 < value < math.inf for value in seconds.values())


@pytest.mark.parametrize(("batch_size", "threads", "images"), [(128, 1, 32), (128, 16, 8), (8, 16, 1), (6, 2, 3)])
def test_the_images_of_one_thread(
    batch_size: int, threads: int, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 32, where a forward of ResNet-8 over all of them has fewer operations than the limit."""
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(format_probe, "_step", lambda network, images, run, way: seen.append(len(images)))
    monkeypatch.setattr(format_probe, "_least", lambda steps: {})
    format_probe.measure(run_of(batch_size=batch_size))
    assert seen == [images] * len(format_probe.WAYS)


# ---------------------------------------------------------------- the cache

GAINS = {"float32": 1.0, "winograd": 1.25, "bfloat16": 2.0}


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that were timed; bfloat16 takes half as long in each, Winograd's algorithm 4/5."""
    asked: list[RunConfig] = []

    def measure(run: RunConfig) -> dict[str, float]:
        asked.append(run)
        return {"float32": 1.0, "winograd": 0.8, "bfloat16": 0.5}

    monkeypatch.setattr(format_probe, "measure", measure)
    return asked


def cached() -> list[Path]:
    return sorted((Path(os.environ["ENGINE_CACHE"]) / "formats").iterdir())


def test_a_machine_is_timed_once(timings: list[RunConfig]) -> None:
    assert [gains_of(run_of(seed=seed)) for seed in range(3)] == [GAINS] * 3
    assert len(timings) == len(cached()) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"model": "resnet18"}, {"dataset": "tiny-imagenet"}, {"batch_size": 8}, {"method": "at"},
        {"attack": {"num_steps": 3}}, {"attack": {"bn": "eval"}}, {"micro_batch": 2},
    ],
)  # fmt: skip
def test_another_step_is_timed_anew(keys: dict[str, Any], timings: list[RunConfig]) -> None:
    gains_of(run_of())
    gains_of(run_of(**keys))
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
    gains_of(run_of())
    change(monkeypatch)
    gains_of(run_of())
    assert len(timings) == 2


def test_the_processor_is_told_apart_by_its_flags() -> None:
    assert {line.partition(":")[0] for line in format_probe._processor()} & {"flags", "Features"}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"3", b'{"gains": 2}', b'{"key": {}, "gains": GAINS}', b"\xff\xfe", b"x" * 2**17,
        *(b'{"key": KEY, "gains": {"float32": 1, "winograd": 1, "bfloat16": %s}}' % gain
          for gain in (b'"fast"', b"-1", b"NaN", b"Infinity", b"null")),
        b'{"key": KEY, "gains": {"float32": 1, "bfloat16": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_measured_anew_and_replaced(content: bytes, timings: list[RunConfig]) -> None:
    gains_of(run_of())
    (path,) = cached()
    whole = path.read_bytes()
    path.write_bytes(
        content.replace(b"KEY", json.dumps(json.loads(whole)["key"]).encode()).replace(
            b"GAINS", json.dumps(GAINS).encode()
        )
    )
    assert gains_of(run_of()) == GAINS
    assert len(timings) == 2
    assert path.read_bytes() == whole
    assert gains_of(run_of()) == GAINS
    assert len(timings) == 2


def test_without_a_cache_folder_it_is_measured_each_time(
    timings: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    assert [gains_of(run_of()) for _ in range(2)] == [GAINS] * 2
    assert len(timings) == 2


def test_a_network_that_cannot_be_run_is_float32_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(num_classes: int) -> Any:
        raise RuntimeError("no such layer")

    monkeypatch.setitem(models.TABLE, "broken", Architecture("fails", fails, version="1"))
    assert gains_of(run_of(model="broken")) == dict.fromkeys(format_probe.WAYS, 0.0)
    assert not (Path(os.environ["ENGINE_CACHE"]) / "formats").exists()
    monkeypatch.setattr(format_probe, "gains_of", gains_of)
    assert format_probe.resolve(run_of(model="broken")).amp_dtype == "float32"


# ---------------------------------------------------------------- the decision

BIG = {"model": "resnet18", "dtype": "float32"}


@pytest.mark.parametrize(
    ("keys", "winograd", "bfloat16", "decided"),
    [
        ({"amp": False}, 1.3, 9.0, ("auto", "on")),
        ({"amp": False}, 1.06, 9.0, ("auto", "on")),
        ({"amp": False}, 1.04, 9.0, ("auto", "off")),
        ({"amp": False, "winograd": "on"}, 0.5, 9.0, ("auto", "on")),
        ({"amp": False, "winograd": "off"}, 2.0, 9.0, ("auto", "off")),
        ({"amp": False, "dtype": "float64"}, 2.0, 9.0, ("auto", "off")),
        ({"amp": False, "model": "resnet8"}, 2.0, 9.0, ("auto", "on")),
        ({"amp": False, "model": "resnet8", "image_size": 16}, 2.0, 9.0, ("auto", "off")),  # too small to time
        ({"amp": True}, 1.3, 2.0, ("bfloat16", "off")),
        ({"amp": True}, 1.3, 1.4, ("float32", "on")),  # bfloat16 gains less than 1.1 over the best of float32
        ({"amp": True}, 0.9, 1.15, ("bfloat16", "off")),
        ({"amp": True, "amp_dtype": "float32"}, 1.3, 2.0, ("float32", "on")),
        ({"amp": True, "amp_dtype": "bfloat16"}, 1.3, 0.1, ("bfloat16", "off")),
    ],
)
def test_the_fastest_way_is_taken(
    keys: dict[str, Any],
    winograd: float,
    bfloat16: float,
    decided: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reason := dispatch.missing("native", "cpu"):
        pytest.skip(reason)
    monkeypatch.delenv("ENGINE_KERNELS", raising=False)
    gains = {"float32": 1.0, "winograd": winograd, "bfloat16": bfloat16}
    monkeypatch.setattr(format_probe, "gains_of", lambda run: gains)
    found = format_probe.resolve(run_of(**BIG | keys))
    assert (found.amp_dtype, found.winograd) == decided


def test_without_the_native_library_nothing_is_asked_of_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KERNELS", "reference")
    monkeypatch.setattr(format_probe, "gains_of", lambda run: pytest.fail("there is nothing to time"))
    assert format_probe.resolve(run_of(**BIG, amp=False)).winograd == "off"


def test_the_lines_say_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := dispatch.missing("native", "cpu"):
        pytest.skip(reason)
    monkeypatch.delenv("ENGINE_KERNELS", raising=False)
    gains = {"float32": 1.0, "winograd": 1.5, "bfloat16": 0.75}
    monkeypatch.setattr(format_probe, "gains_of", lambda run: gains)
    lines: list[str] = []
    format_probe.resolve(run_of(**BIG), say=lines.append)
    assert lines == [
        "--amp: bfloat16 is 0.50x of float32 on this processor: float32 is used",
        "--winograd: a step with Winograd's algorithm is 1.50x as fast on this processor: it is used",
    ]


def test_the_timed_step_computes_by_winograd_where_it_says_so() -> None:
    network = models.build("resnet8", 10)
    for way in format_probe.WAYS:
        copied = copy.deepcopy(network)
        format_probe._step(copied, torch.rand(2, 3, 32, 32), run_of(), format_probe.WAYS[way])
        found = {module.winograd for module in copied.modules() if isinstance(module, Conv3x3)}
        assert found == {way == "winograd"}
