"""Format of the passes with AMP: measured once, reported, and kept by a run whatever is measured later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from engine import config
from engine.common.console import Reporter
from engine.common.stopping import Interrupted
from engine.config.loading import as_begun
from engine.models.layers import Conv3x3, conv
from engine.runs import assemble, format_probe, lifecycle, provenance, teachers
from engine.runs.run_directory import RunDir
from engine.system import precision
from tests.processes import together
from tests.runs.test_resume import StopAt, assert_same_run

FAST, SLOW = 1.9, 0.51
ON_CPU = {"device": "cpu", "winograd": "off"}
AMP_ON_CPU = {**ON_CPU, "amp": True}


def gains(bfloat16: float, winograd: float = 1.0) -> dict[str, float]:
    return {"float32": 1.0, "winograd": winograd, "bfloat16": bfloat16}


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
    monkeypatch.setattr(format_probe, "gains_of", lambda config: gains(gain))


def forbid_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_probe, "gains_of", lambda config: pytest.fail("there is nothing to time"))


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
        (FAST, torch.bfloat16, "1.90x of float32 on this processor: bfloat16 is used"),
        (1.1, torch.bfloat16, "1.10x of float32 on this processor: bfloat16 is used"),
        (1.09, None, "1.09x of float32 on this processor: float32 is used"),
        (SLOW, None, "0.51x of float32 on this processor: float32 is used"),
    ],
)
def test_the_faster_format_is_taken_on_a_cpu(
    gain: float, dtype: torch.dtype | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_gain(monkeypatch, gain)
    lines: list[str] = []
    settled = format_probe.resolve(config.load(AMP_ON_CPU), say=lines.append)
    assert precision.choose(settled).amp_dtype == dtype
    assert precision.choose(config.load(AMP_ON_CPU)).amp_dtype is None, "nothing is timed there"
    assert lines == [f"--amp: bfloat16 is {said}"]


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
    complete = config.load({**ON_CPU, **keys})
    assert format_probe.resolve(complete) == complete
    assert precision.choose(complete).amp_dtype == dtype


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_is_asked_and_not_timed(
    has_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_timing(monkeypatch)
    monkeypatch.setattr(precision, "count_gpus", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    settled = format_probe.resolve(config.load({"amp": True}))
    assert settled.amp_dtype == str(dtype).removeprefix("torch.")
    assert precision.choose(settled) == precision.Precision(
        torch.device("cuda", 0), torch.float32, dtype, f"--amp: passes in {settled.amp_dtype}, as the run began"
    )


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


def train_by(world: Any, keys: dict[str, Any], of_processes: list[float]) -> None:
    """Each process measures something else, as on different machines."""
    format_probe.gains_of = lambda config: gains(of_processes[world.rank])
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


# ---------------------------------------------------------------- fast


def settings() -> tuple[object, ...]:
    cudnn, forms = torch.backends.cudnn, [backend.fp32_precision for backend in precision._FLOAT32]
    return cudnn.deterministic, cudnn.benchmark, torch.get_float32_matmul_precision(), cudnn.allow_tf32, forms


def test_fast_lets_cudnn_time_its_plans_and_round_to_tf32() -> None:
    before = settings()
    with precision.deterministic(fast=True):
        assert settings()[:4] == (False, True, "high", True)
        assert settings()[4] == ["tf32", "tf32", "tf32", *before[4][3:]]  # type: ignore[index]
        inside = settings()
        with precision.full_precision():  # of a final evaluation
            assert settings() == (False, True, "highest", False, ["ieee"] * 5)
        assert settings() == inside
    assert settings() == before


def test_fast_with_amp_keeps_the_first_and_the_last_layer_in_full_precision() -> None:
    with precision.deterministic(amp=True, fast=True):
        assert settings() == (False, True, "highest", False, ["ieee"] * 5)


def test_without_fast_the_plans_are_deterministic() -> None:
    with precision.deterministic():
        assert settings()[:2] == (True, False)


@pytest.mark.parametrize(("place", "expected"), [("cpu", False), ("cuda", True)])
def test_fast_is_of_gpus_alone(place: str, expected: bool) -> None:
    for fast in (False, True):
        found = precision.is_fast(config.load({"fast": fast}), torch.device(place))
        assert found == (expected and fast)
    assert ("nothing on a CPU" in precision.describe_fast(torch.device(place))) != expected


def test_on_a_cpu_fast_says_so_and_changes_no_bit(tiny: Any, tmp_path: Path) -> None:
    listening = Listening()
    keys = {"method": "at", "epochs": 1, "device": "cpu"}
    plain = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "plain")))
    fast = lifecycle.train(tiny.config(**keys, fast=True, out=str(tmp_path / "fast")), listening)
    assert [line for line in listening.lines if line.startswith("--fast")] == [
        "--fast: nothing on a CPU; the same seed gives the same bits"
    ]
    states = [torch.load(run.path / "last.pt", weights_only=True)["student"] for run in (plain, fast)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    for run in (plain, fast):
        record = json.loads((run.path / "provenance.json").read_text())
        assert record["cudnn"] == {"deterministic": True, "benchmark": False}


# ---------------------------------------------------------------- formats of passes


@pytest.mark.parametrize(
    ("place", "amp_dtype", "inside", "named"),
    [
        ("cuda", None, "tf32", "tf32"),
        ("cuda", torch.bfloat16, "ieee", "bfloat16"),
        ("cuda", torch.float16, "ieee", "float16"),
        ("cpu", None, "ieee", "float32"),
    ],
)
def test_epochs_are_compared_in_the_precision_of_the_passes(
    place: str, amp_dtype: torch.dtype | None, inside: str, named: str
) -> None:
    at = precision.Precision(torch.device(place), torch.float32, amp_dtype)
    assert at.passes == named
    with at.float32():
        assert torch.backends.cudnn.conv.fp32_precision == inside  # type: ignore[attr-defined]
    with precision.full_precision():
        assert precision.Precision(torch.device("cuda"), torch.float32).passes == "float32"
    assert precision.Precision(torch.device("cuda"), torch.float64).passes == "float64"


def test_float16_on_a_cpu_is_taken_and_told_of() -> None:
    lines: list[str] = []
    given = config.load({**AMP_ON_CPU, "amp_dtype": "float16"})
    assert format_probe.resolve(given, say=lines.append) == given
    assert [line.partition(":")[0] for line in lines] == ["--amp-dtype float16"]
    format_probe.resolve(config.load({**ON_CPU, "amp_dtype": "float16"}), say=lines.append)
    assert len(lines) == 1, "without --amp nothing runs in it"
