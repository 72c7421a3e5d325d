"""Format of the passes with AMP: measured once, reported, and kept by a run whatever is measured later."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import config
from engine.common.console import Reporter
from engine.common.stopping import Interrupted
from engine.config.loading import as_begun
from engine.kernels import dispatch
from engine.models.layers import Conv3x3, conv
from engine.runs import assemble, lifecycle, provenance, teachers
from engine.runs.run_directory import RunDir
from engine.system import precision
from tests.processes import together
from tests.runs.test_resume import StopAt, assert_same_run

FAST, SLOW = 1.9, 0.51
AMP_ON_CPU = {"amp": True, "device": "cpu"}
bfloat16_gain = precision.bfloat16_gain  # which every test replaces


class Listening(StopAt):
    """Hears what a run says, and may stop it."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(step)
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)

    @property
    def of_amp(self) -> list[str]:
        return [line for line in self.lines if line.startswith("--amp")]


def set_gain(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: gain)


def forbid_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: pytest.fail("there is nothing to time"))


def format_of(run: Path) -> str:
    """Format in config.yaml, in the checkpoints and in provenance.json, which agree."""
    named: str = yaml.safe_load((run / "config.yaml").read_text())["amp_dtype"]
    for name in ("last.pt", "best.pt"):
        if (run / name).exists():
            assert torch.load(run / name, weights_only=True)["config"]["amp_dtype"] == named
    assert provenance.amp_dtype(RunDir(run)) == named
    return named


# ---------------------------------------------------------------- the decision


@pytest.mark.parametrize(
    ("gain", "dtype", "said"),
    [
        (FAST, torch.bfloat16, "at 1.90x of float32: passes in bfloat16"),
        (1.1, torch.bfloat16, "at 1.10x of float32: passes in bfloat16"),
        (1.09, None, "at 1.09x of float32: training stays in float32"),
        (SLOW, None, "at 0.51x of float32: training stays in float32"),
    ],
)
def test_the_faster_format_is_taken_on_a_cpu(
    gain: float, dtype: torch.dtype | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gain(monkeypatch, gain)
    lines: list[str] = []
    settled = precision.resolve_amp(config.load(AMP_ON_CPU), say=lines.append)
    assert precision.choose(settled).amp_dtype == precision.choose(config.load(AMP_ON_CPU)).amp_dtype == dtype
    assert lines == [f"--amp: on this processor convolutions in bfloat16 run {said}"]


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, None),
        ({"amp_dtype": "bfloat16"}, None),
        ({"amp": True, "amp_dtype": "bfloat16"}, torch.bfloat16),
        ({"amp": True, "amp_dtype": "float16"}, torch.float16),
        ({"amp": True, "amp_dtype": "float32"}, None),
    ],
)
def test_nothing_is_timed_where_nothing_is_to_be_decided(
    keys: dict[str, Any], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_timing(monkeypatch)
    complete = config.load({"device": "cpu", **keys})
    assert precision.resolve_amp(complete) == complete
    assert precision.choose(complete).amp_dtype == dtype


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_is_asked_and_not_timed(
    has_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_timing(monkeypatch)
    monkeypatch.setattr(precision, "count_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    settled = precision.resolve_amp(config.load({"amp": True}))
    assert settled.amp_dtype == str(dtype).removeprefix("torch.")
    assert precision.choose(settled) == precision.Precision(
        torch.device("cuda", 0), torch.float32, dtype, f"--amp: passes in {settled.amp_dtype}, as the run began"
    )


def pretend_winograd(monkeypatch: pytest.MonkeyPatch, gain: float | None, serves: str = "native") -> None:
    """The gain that a timing finds; None: there must be none."""
    found = (lambda: pytest.fail("there is nothing to time")) if gain is None else lambda: gain
    monkeypatch.setattr(precision, "winograd_gain", found)
    monkeypatch.setattr(dispatch, "choose", lambda op, place: serves)


@pytest.mark.parametrize(("gain", "chosen"), [(2.0, "on"), (1.1, "on"), (1.09, "off")])
def test_winograd_is_taken_where_it_is_faster(gain: float, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_winograd(monkeypatch, gain)
    lines: list[str] = []
    given = config.load({"device": "cpu", "winograd": "auto"})
    settled = precision.resolve_winograd(given, say=lines.append)
    assert settled.winograd == chosen
    assert precision.choose(settled).winograd == precision.choose(given).winograd == (chosen == "on")
    assert lines == [f"--winograd: on this processor 3x3 convolutions run at {gain:.2f}x of torch's: {chosen}"]


@pytest.mark.parametrize(
    ("keys", "serves", "winograd"),
    [
        ({}, "native", False),
        ({"winograd": "off"}, "native", False),
        ({"winograd": "on"}, "native", True),
        ({"winograd": "auto"}, "reference", False),
        ({"winograd": "auto", "dtype": "float64"}, "native", False),
        ({"winograd": "auto", "amp": True, "amp_dtype": "bfloat16"}, "native", False),
    ],
)
def test_winograd_is_not_timed_where_nothing_is_to_be_decided(
    keys: dict[str, Any], serves: str, winograd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_winograd(monkeypatch, None, serves)
    assert precision.choose(config.load({"device": "cpu", **keys})).winograd == winograd


def test_networks_are_placed_with_the_algorithm_that_was_chosen() -> None:
    for winograd in (True, False):
        at = precision.Precision(torch.device("cpu"), torch.float32, winograd=winograd)
        network = at.place(nn.Sequential(conv(16, 16, 3)))
        layer = network.get_submodule("0")
        assert isinstance(layer, Conv3x3)
        assert layer.winograd == winograd


@pytest.mark.parametrize(("wanted", "kept"), [("auto", "on"), ("off", "off")])
def test_a_run_keeps_its_algorithm(wanted: str, kept: str) -> None:
    begun = config.load({"winograd": "on"})
    assert as_begun(config.load({"winograd": wanted}), begun).winograd == kept


# ---------------------------------------------------------------- the timing


def test_the_least_of_rounds_in_turn_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: the first round warms up, and a disturbed round does not count."""
    now, order = 0.0, []
    seconds = {
        torch.float32: iter([9.0, 2.0, 3.0, 2.5] + [5.0] * 9),
        torch.bfloat16: iter([0.1, 7.0, 4.0, 8.0] + [5.0] * 9),
    }

    def convolution(dtype: torch.dtype, channels: int, side: int) -> Any:
        def call() -> None:
            nonlocal now
            if (channels, side) == (64, 32):
                order.append(dtype)
                now += next(seconds[dtype])

        return call

    monkeypatch.setattr(precision, "_convolution", convolution)
    monkeypatch.setattr(time, "thread_time", lambda: now)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    measured = precision._time_convolutions()
    assert measured == pytest.approx({torch.float32: 2.0, torch.bfloat16: 4.0})
    assert order == [torch.float32, torch.bfloat16] * 8

    once, given = functools.cache(bfloat16_gain.__wrapped__), iter([2.0])
    measure = lambda: {torch.float32: next(given), torch.bfloat16: 4.0}  # noqa: E731
    monkeypatch.setattr(precision, "_time_convolutions", measure)
    assert (once(), once()) == (0.5, 0.5), "it is timed once, and is the ratio of the rates"


def test_a_slow_processor_is_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round after the warming one at least, and none begins after half a second."""
    now, calls = 0.0, 0

    def convolution(dtype: torch.dtype, channels: int, side: int) -> Any:
        def call() -> None:
            nonlocal now, calls
            now, calls = now + 1.0, calls + 1

        return call

    monkeypatch.setattr(precision, "_convolution", convolution)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    measured = precision._time_convolutions()
    assert calls == 2 * 2 * 2  # rounds, formats, convolutions
    assert all(math.isfinite(value) for value in measured.values())


class Convolutions(TorchDispatchMode):
    """Notes name, dtype and layout of the convolutions that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, torch.dtype, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in func.name():
            of = args[0]
            self.seen.append((func.name(), of.dtype, of.is_contiguous(memory_format=torch.channels_last)))
        return func(*args, **(kwargs or {}))


def test_what_is_timed_is_a_convolution_in_that_format_and_leaves_no_trace() -> None:
    before = torch.get_num_threads()
    with Convolutions() as ran:
        precision._convolution(torch.bfloat16, 4, 8)()
    assert ran.seen == [
        ("aten::convolution", torch.bfloat16, True),
        ("aten::convolution_backward", torch.bfloat16, True),
    ]
    torch.set_num_threads(2)
    try:
        seconds = precision._time_convolutions()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seconds.keys() == {torch.float32, torch.bfloat16}
    assert all(0 < value < math.inf for value in seconds.values())


# ---------------------------------------------------------------- a run keeps it


@pytest.mark.parametrize(("began", "later", "kept"), [(SLOW, FAST, "float32"), (FAST, SLOW, "bfloat16")])
def test_a_resumed_run_keeps_its_format(
    began: float, later: float, kept: str, tiny: Any, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"method": "iad2", "amp": True, "checkpoint_every": 1}
    set_gain(monkeypatch, began)
    whole = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "whole")))
    first = Listening(7)
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys, out=str(tmp_path / "parts")), first)
    (said,) = first.of_amp
    assert f"{began:.2f}x" in said
    assert kept in said
    set_gain(monkeypatch, later)
    second = Listening()
    lifecycle.resume(tmp_path / "parts", second)
    (said,) = second.of_amp
    assert said.startswith("--amp: ")
    assert said.endswith(f"in {kept}, as the run began")
    assert format_of(tmp_path / "parts") == format_of(whole.path) == kept
    assert_same_run(whole.path, tmp_path / "parts")


@pytest.mark.parametrize(("began", "kept"), [(SLOW, "float32"), (FAST, "bfloat16")])
def test_a_run_that_began_before_there_was_a_key_keeps_the_format_of_its_provenance(
    began: float, kept: str, tiny: Any, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gain(monkeypatch, began)
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="at", amp=True, out=str(run)), StopAt(4))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"amp_dtype: {kept}\n", ""))
    assert "amp_dtype" not in (run / "config.yaml").read_text()
    forbid_timing(monkeypatch)
    lifecycle.resume(run)
    assert provenance.amp_dtype(RunDir(run)) == kept
    assert torch.load(run / "last.pt", weights_only=True)["config"]["amp_dtype"] == kept


def test_where_bfloat16_is_slow_amp_is_float32_to_the_bit(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gain(monkeypatch, SLOW)
    weights = []
    for amp in (False, True):
        run = lifecycle.train(tiny.config(method="iad1", amp=amp, epochs=1, out=str(tmp_path / str(amp))))
        weights.append(torch.load(run.path / "last.pt", weights_only=True)["student"])
        assert "probe_amp_sign_agreement" not in run.summary["last"], "no format is compared with itself"
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


@pytest.fixture
def stopped(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keys of a run that was stopped, where bfloat16 is slow."""
    keys = {"method": "at", "amp": True, "out": str(tmp_path / "run")}
    set_gain(monkeypatch, SLOW)
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(**keys), StopAt(4))
    return keys


def test_the_same_command_finds_its_run_whatever_is_measured_later(
    tiny: Any, stopped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_timing(monkeypatch)
    assert lifecycle.begin(config.load(tiny.config(**stopped)), again=True).run.path == tmp_path / "run"
    lifecycle.train(tiny.config(**stopped), again=True)
    assert format_of(tmp_path / "run") == "float32"


def test_another_format_that_is_asked_for_is_another_run(tiny: Any, stopped: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="amp_dtype"):
        lifecycle.begin(config.load(tiny.config(**stopped, amp_dtype="bfloat16")), again=True)


def test_a_finished_configuration_is_taken_as_it_is(
    tiny: Any, tmp_path: Path, bf16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lifecycle.train(tiny.config(method="at", amp=True, epochs=1, out=str(tmp_path / "first")))
    forbid_timing(monkeypatch)
    again = config.load(config.read_file(first.path / "config.yaml"), {"out": str(tmp_path / "again")})
    assert_same_run(first.path, lifecycle.train(again).path)


# ---------------------------------------------------------------- processes


def train_by(world: Any, keys: dict[str, Any], gains: list[float]) -> None:
    """Each process measures something else, as on different machines."""
    precision.bfloat16_gain = lambda: gains[world.rank]  # type: ignore[assignment]
    result = lifecycle.train(keys, Reporter(), world=world)
    complete = RunDir.existing(result.path)[1]
    world.check_same("the format", str(precision.choose(complete).amp_dtype))


def test_the_first_process_decides_for_all(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    together(2, train_by, tiny.config(method="at", amp=True, epochs=1, out=str(run)), [SLOW, FAST])
    assert format_of(run) == "float32"


# ---------------------------------------------------------------- teachers


def test_a_teacher_is_kept_under_the_format_that_it_was_trained_in(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gain(monkeypatch, SLOW)
    keys = {"method": "ard", "epochs": 1, "teacher": {"checkpoint": None}}
    lifecycle.train(tiny.config(**keys, amp=True, out=str(tmp_path / "slow")))
    assert format_of(tmp_path / "slow" / "teacher") == "float32"
    listening = Listening()
    lifecycle.train(tiny.config(**keys, out=str(tmp_path / "plain")), listening)
    assert any("teacher cache" in line for line in listening.lines), "without AMP it is the same teacher"
    set_gain(monkeypatch, FAST)
    lifecycle.train(tiny.config(**keys, amp=True, out=str(tmp_path / "fast")))
    assert format_of(tmp_path / "fast" / "teacher") == "bfloat16"


def test_teachers_of_before_are_found(tiny: Any) -> None:
    """Those with AMP are bfloat16's, under a key in which no format stood; float16's stand apart."""
    dataset = assemble.load_data(config.load(tiny.config()), Reporter())

    def path(**keys: Any) -> Path:
        return teachers.cache_path(config.load(tiny.config(method="at", **keys)), dataset)

    assert path(amp=True, amp_dtype="bfloat16") == path(amp=True)
    assert path(amp=True, amp_dtype="float32") == path(amp=False) == path(amp=False, amp_dtype="bfloat16")
    assert len({path(amp=True), path(amp=False), path(amp=True, amp_dtype="float16")}) == 3
