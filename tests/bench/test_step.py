"""bench.step and bench.epoch: what is timed, what the numbers mean, and what is written."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bench import epoch, gate, step
from bench.lib import memory
from bench.lib.calls import convolutions
from bench.lib.calls.convolutions import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Layer, Work
from bench.lib.machine import Facts
from bench.lib.memory import Peaks
from bench.lib.output import chart, csv_rows, targets
from bench.lib.output.csv_rows import EpochRow, MeasuredRow, StepRow
from bench.lib.steps import real_epoch, variants
from engine import config, methods, models
from engine.common import host_memory
from engine.training import plan
from engine.training.performance.speed import forward_flops
from tests.bench.readme import documented

FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abc", device="cpu", processor="P", cores=2, threads=2, python="3",
    torch="2", triton="",
)  # fmt: skip
CPU = torch.device("cpu")


def workload(method: str = "iad1", model: str = "resnet8", batch_size: int = 2) -> variants.Workload:
    return variants.Workload(method, model, batch_size, variants.images_of(variants.RANDOM, batch_size), CPU)


# ---------------------------------------------------------------- a network's convolutions


def test_the_layers_of_a_network() -> None:
    found = convolutions.layers(models.build("resnet8", 10), (4, 3, 32, 32))
    assert found == {
        Layer((4, 3, 32, 32), (16, 3, 3, 3), 1, 1, 1, True): 1,
        Layer((4, 16, 32, 32), (16, 16, 3, 3), 1, 1, 1, False): 2,
        Layer((4, 16, 32, 32), (32, 16, 3, 3), 2, 1, 1, False): 1,
        Layer((4, 32, 16, 16), (32, 32, 3, 3), 1, 1, 1, False): 1,
        Layer((4, 16, 32, 32), (32, 16, 1, 1), 2, 0, 1, False): 1,
        Layer((4, 32, 16, 16), (64, 32, 3, 3), 2, 1, 1, False): 1,
        Layer((4, 64, 8, 8), (64, 64, 3, 3), 1, 1, 1, False): 1,
        Layer((4, 32, 16, 16), (64, 32, 1, 1), 2, 0, 1, False): 1,
    }


@pytest.mark.parametrize("method", list(methods.METHODS))
@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_the_operations_of_a_step_s_convolutions_are_the_plan_s(method: str, semantics: str) -> None:
    run = config.load({"method": method, "semantics": semantics})
    row = methods.get(method, semantics=semantics, loss=run.loss)
    net = models.build("resnet18", 10)
    work = convolutions.of_step(convolutions.layers(net, (2, 3, 32, 32)), row, run)
    counted = sum(count * convolutions.flops(one) for one, count in work.items())
    forward, first = forward_flops(net, (3, 32, 32))
    assert counted == 2 * plan.passes(row, run.attack, run.forwards).flops(forward - 2 * 512 * 10, first)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_three_computations_of_a_convolution(stride: int, groups: int) -> None:
    layer = Layer((2, 8, 9, 9), (12, 8 // groups, 3, 3), stride, 1, groups, False)
    torch.manual_seed(0)
    called = {kind: convolutions.call(Work(layer, kind), torch.float32, CPU) for kind in convolutions.COMPUTATIONS}
    incoming, x, weight = called[INPUT_GRADIENT].args[:3]  # type: ignore[attr-defined]
    out = nn.functional.conv2d(x.requires_grad_(), weight.requires_grad_(), None, stride, 1, 1, groups)
    dx, dw = torch.autograd.grad(out, (x, weight), incoming)
    assert called[FORWARD]().shape == out.shape  # type: ignore[attr-defined]
    gradients: Any = called[INPUT_GRADIENT]()
    torch.testing.assert_close(gradients[0], dx)
    assert gradients[1:] == (None, None)
    incoming, x, weight = called[WEIGHT_GRADIENT].args[:3]  # type: ignore[attr-defined]
    out = nn.functional.conv2d(x, weight.requires_grad_(), None, stride, 1, 1, groups)
    gradients = called[WEIGHT_GRADIENT]()
    torch.testing.assert_close(gradients[1], torch.autograd.grad(out, weight, incoming)[0])
    assert (gradients[0], gradients[2]) == (None, None)
    size = out.shape[-1]
    assert convolutions.flops(Work(layer, FORWARD)) == 2 * 2 * 12 * size**2 * (8 // groups) * 9
    assert dw.shape == weight.shape


def test_the_first_layer_is_in_float32_and_channels_last() -> None:
    for images, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        layer = Layer((2, 3, 8, 8), (4, 3, 3, 3), 1, 1, 1, images)
        call: Any = convolutions.calls([layer], torch.bfloat16, CPU)[Work(layer, FORWARD)]
        assert call.args[0].dtype == dtype
        assert call.args[0].is_contiguous(memory_format=torch.channels_last)


def test_seconds_are_weighted_by_their_number() -> None:
    layer = Layer((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, False)
    one = {Work(layer, FORWARD): 2.0, Work(layer, INPUT_GRADIENT): 3.0, Work(layer, WEIGHT_GRADIENT): 100.0}
    assert convolutions.seconds({Work(layer, FORWARD): 3, Work(layer, INPUT_GRADIENT): 2}, one) == 12.0


# ---------------------------------------------------------------- what is timed


@pytest.mark.parametrize("variant", ["textbook", "fp32", "amp", "amp-recompute", "amp-eval"])
def test_a_variant_runs_the_operations_of_its_plan(variant: str, bf16: None) -> None:
    work = workload("iad1")
    run = work.config(variants.VARIANTS[variant])
    row = methods.get("iad1", semantics=run.semantics, loss=run.loss)
    forward, first = forward_flops(models.build("resnet8", 10), (3, 32, 32))
    passes = plan.passes(row, run.attack, run.forwards)
    expected = 2 * passes.flops(forward, first)
    blocks = forward - first - 2 * 64 * 10
    if variant == "amp-recompute":
        expected += 2 * passes.trained * blocks
    assert step.executed(work.step(variants.VARIANTS[variant])) == pytest.approx(expected, rel=1e-12)


def test_every_variant_trains(bf16: None) -> None:
    for name in ("textbook", "textbook-paper", "fp32", "amp-malloc", "amp", "amp-eval", "amp-recompute"):
        run = workload().step(variants.VARIANTS[name])
        for _ in range(variants.BATCHES + 1):  # beyond an epoch
            run()


def test_the_peak_of_a_process(bf16: None) -> None:
    small, large = (step.peaks_of_a_process(workload("at", batch_size=size), "fp32") for size in (2, 128))
    # The activations of 126 images: 184,320 values of each are kept twice.
    assert 100 < large.allocated - small.allocated < 1000
    assert (small.reserved, small.smi) == (None, None)  # there is no GPU


def test_a_peak_can_be_forgotten() -> None:
    host_memory.return_freed_memory()
    torch.ones(2**26)
    assert memory.mebibytes("VmHWM") - memory.mebibytes("VmRSS") > 200
    memory.forget_peak()
    assert memory.mebibytes("VmHWM") - memory.mebibytes("VmRSS") < 50


def test_variants_settle_how_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: said.append("keep"))
    monkeypatch.setattr(host_memory, "return_freed_memory", lambda: said.append("give back"))
    for name in ("textbook", "textbook-paper", "fp32", "amp-malloc", "amp"):
        variants.VARIANTS[name].settle()
    assert said == ["give back", "give back", "keep", "give back", "keep"]


# ---------------------------------------------------------------- rows and verdicts


def rows(**speeds: Sequence[float]) -> list[StepRow]:
    """Rows of a method on ResNet-18. speeds: seconds by variant."""
    samples = {name.replace("_", "-"): list(seconds) for name, seconds in speeds.items()}
    work = workload("iad1", "resnet18", 128)
    peaks = {name: Peaks(1000.0 if name == "textbook" else 300.0, 400.0, 500.0) for name in samples}
    return [
        csv_rows.step_row(FACTS, work, name, samples, 2, [1.0, 2.0, 1.5], 3 * 10**9, peaks) for name in samples
    ]


def test_the_arithmetic_of_a_row() -> None:
    textbook, _, fast, amp = rows(
        textbook=(10.0, 20.0, 12.0), expert=(9.0, 9.0, 9.0), expert_fp32=(6.0, 6.0, 6.0), amp=(4.0, 5.0, 3.0)
    )
    assert (textbook.speedup, amp.speedup) == (1.0, 4.0)  # the median of 2.5, 4 and 4
    assert {row.expert for row in (textbook, fast, amp)} == {"expert-fp32"}
    assert (textbook.speedup_over_expert, fast.speedup_over_expert) == (0.5, 1.0)  # the median of 0.6, 0.3 and 0.5
    assert amp.speedup_over_expert == 1.5  # the median of 1.5, 1.2 and 2
    assert amp.of_expert_fp32 == pytest.approx(2 / 3)  # of 2/3, 5/6 and 1/2
    assert [amp.q10_of_expert_fp32, amp.q90_of_expert_fp32] == pytest.approx([8 / 15, 0.8])
    assert (fast.of_expert_fp32, fast.q10_of_expert_fp32, fast.q90_of_expert_fp32) == (1.0, 1.0, 1.0)
    assert (amp.median_s, amp.images_per_s, amp.rounds, amp.steps_per_round) == (4.0, 32.0, 3, 2)
    assert [amp.q10_s, amp.q90_s] == pytest.approx([3.2, 4.8])
    assert (amp.gflop, amp.gflop_per_s) == (3.0, 0.75)
    assert (amp.convolutions_s, amp.share_of_convolutions) == (1.5, 0.4)  # the median of 0.25, 0.4 and 0.5
    assert (amp.peak_mib, amp.share_of_textbook_memory) == (300.0, 0.3)
    assert (amp.reserved_mib, amp.smi_mib) == (400.0, 500.0)


def test_without_an_expert_nothing_is_said_of_one() -> None:
    textbook, amp = rows(textbook=(2.0, 2.0, 2.0), amp=(1.0, 1.0, 1.0))
    assert (amp.expert, amp.speedup_over_expert, amp.of_expert_fp32, amp.q90_of_expert_fp32) == (
        "",
        None,
        None,
        None,
    )
    assert targets.expert_verdict([textbook, amp]).startswith("not measured: the engine over the best expert")


@pytest.mark.parametrize("is_measured", [True, False])
def test_memory_that_was_not_measured_is_not_shown(
    is_measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(chart, "_bars", lambda axes, labels, values, *_: shown.append(values))
    gone: dict[str, Any] = {} if is_measured else {"peak_mib": None, "reserved_mib": None, "smi_mib": None}
    found = [dataclasses.replace(row, **gone) for row in rows(textbook=(2.0, 2.0, 2.0), amp=(1.0, 1.0, 1.0))]
    chart.draw_steps(tmp_path / "step.png", found)
    assert shown == [[1.0, 2.0], [1000.0, 300.0]][: 1 + is_measured]
    headings = [column.header for column in step.table("iad1", found).columns]
    assert ("MiB" in headings, "nvidia-smi" in headings) == (is_measured, is_measured)
    assert "x expert" not in headings


@pytest.mark.parametrize(("amp", "word"), [(4.0, "reached"), (4.1, "not reached")])
def test_the_verdict_over_the_expert_is_of_the_engine_s_fastest_with_the_same_attack(
    amp: float, word: str
) -> None:
    found = rows(
        textbook=[9] * 3, expert=[4] * 3, expert_fp32=[5] * 3, fp32=[8] * 3, amp=[amp] * 3, amp_eval=[1] * 3
    )
    line = targets.expert_verdict(found)
    assert line.startswith(f"{word}: the engine over the best expert: at least 1x; measured {4 / amp:,.4g}x")
    assert line.endswith("(iad1: amp / expert)")


def test_verdicts() -> None:
    found = rows(textbook=(10, 10, 10), fp32=(8, 8, 8), amp=(3, 3, 3), amp_eval=(2.5, 2.5, 2.5))
    lines = targets.step_verdicts(found)
    assert [line.partition(":")[0] for line in lines] == [
        "not measured",
        "reached", "not measured", "not reached", "not measured", "not reached", "reached", "reached",
    ]  # fmt: skip
    assert "measured 3.333x" in lines[1]
    assert "measured 1.25x" in lines[3]
    assert "a further 1.1x; measured 1.2x" in lines[6]
    assert "at most 60% of the textbook's; measured 30%" in lines[7]
    small = [dataclasses.replace(row, batch_size=64) for row in found]
    assert all(line.startswith("not measured") for line in targets.step_verdicts(small))


@pytest.mark.parametrize(("heading", "kind"), [("step.csv", StepRow), ("epoch.csv", EpochRow)])
def test_the_columns_are_documented(heading: str, kind: type[MeasuredRow]) -> None:
    common = {field.name for field in dataclasses.fields(MeasuredRow)}
    own = {field.name for field in dataclasses.fields(kind)} - common
    assert set(documented(heading)) == own


# ---------------------------------------------------------------- the commands


def invoke(command: Any, *arguments: object) -> Any:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_a_run_of_bench_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: None) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *_: True)
    small = (
        "--dataset",
        "random",
        "--model",
        "resnet8",
        "--batch-size",
        2,
        "--rounds",
        2,
        "--no-memory",
        "--steps-per-round",
        3,
    )
    done = invoke(step.main, *small, "--method", "at", "--variant", "amp", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    with (tmp_path / "step.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["variant"] for row in written] == ["textbook", "amp"]
    assert float(written[0]["speedup"]) == 1.0
    assert all(float(row["gflop"]) > 0 and row["peak_mib"] == "" for row in written)
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert {row["steps_per_round"] for row in written} == {"3"}
    assert "not measured: iad1 with AMP" in done.output


def test_nothing_is_timed_while_the_step_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gate, "tests_pass", lambda *given: asked.append(given))
    done = invoke(step.main, "--dataset", "random", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "nothing is timed" in done.output
    assert asked[0][0] == [step.STEP_TESTS]
    assert step.STEP_TESTS.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--method", "iad3"), "did you mean"), (("--model", "resnet9"), "resnet8"), (("--variant", "fast"), "fast")],
)
def test_what_is_unknown_is_told(flags: tuple[str, ...], words: str) -> None:
    done = invoke(step.main, "--dataset", "random", *flags)
    assert done.exit_code == 2
    assert words in done.output


def test_a_run_of_bench_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: None) -> None:
    monkeypatch.setattr(epoch, "peaks_of_a_process", lambda *_: Peaks(7.0))
    seconds = {"ard": 1.0, "iad1": 2.0, "akd2": 0.5, "iad2": 4.0}
    monkeypatch.setattr(
        epoch, "measure", lambda works, variants, count: {
            (variant, name): [value] * count for variant in variants for name, value in seconds.items()
        },
    )  # fmt: skip
    small = ("--table14", "--dataset", "random", "--model", "resnet8", "--steps", 2, "--variant", "amp")
    done = invoke(epoch.main, *small, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    with (tmp_path / "epoch.csv").open() as file:
        written = {row["method"]: row for row in csv.DictReader(file)}
    assert {name: float(row["epoch_s"]) for name, row in written.items()} == {
        name: 391 * value for name, value in seconds.items()
    }
    assert float(written["iad2"]["relative_to_ard"]) == 4.0
    assert float(written["iad1"]["table14_relative_to_ard"]) == pytest.approx(182.01 / 156.12, rel=1e-5)
    assert written["akd2"]["table14_mib"] == "2397"
    assert set(written["ard"]) == {field.name for field in dataclasses.fields(EpochRow)}


def test_epochs_take_turns(bf16: None) -> None:
    works = {name: workload(name) for name in ("at", "iad1")}
    samples = epoch.measure(works, ["textbook", "amp"], 2)
    assert list(samples) == [("textbook", "at"), ("textbook", "iad1"), ("amp", "at"), ("amp", "iad1")]
    assert all(len(taken) == 2 and min(taken) > 0 for taken in samples.values())


# ---------------------------------------------------------------- whole epochs


def test_the_numbers_of_a_real_epoch_are_the_trainer_s(tmp_path: Path, bf16: None) -> None:
    keys = {
        "method": "ard", "model": "resnet8", "batch_size": 16, "dataset": "digits", "device": "cpu",
        "limit_train": 40, "limit_test": 10, "attack": {"num_steps": 1}, "eval": {"probe_size": 10},
    }  # fmt: skip
    found = real_epoch.run(keys, tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    of_epochs = [row for row in map(json.loads, lines) if row["event"] == "epoch"]
    assert [row["phase"] for row in of_epochs] == ["ard", "ard"]
    assert (found.images, found.steps, found.seconds) == (40, 3, of_epochs[1]["seconds"])
    assert found.evaluation_s > 0
    assert found.peaks.allocated > 0
    assert (found.peaks.reserved, found.peaks.smi) == (None, None)


def real(tmp_path: Path, *arguments: object) -> tuple[Any, list[dict[str, str]]]:
    """bench.epoch --real, and the rows that it has written."""
    small = ("--real", "--dataset", "digits", "--model", "resnet8", "--device", "cpu", "--out", tmp_path)
    done = invoke(epoch.main, *small, *arguments)
    path = tmp_path / "epoch-real.csv"
    return done, list(csv.DictReader(path.open())) if path.exists() else []


def test_a_method_that_fails_is_named_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(keys: dict[str, Any], timeout: float | None) -> real_epoch.RealEpoch:
        if keys["method"] == "iad1":
            raise ChildProcessError("its process ended with exit code 9")
        assert (keys["amp"], keys["limit_train"], timeout) == (True, 200, None)
        return real_epoch.RealEpoch(
            200, 2, {"ard": 4.0, "akd2": 3.0, "iad2": 5.0}[keys["method"]], 1.5, Peaks(7.0)
        )

    monkeypatch.setattr(real_epoch, "timed", timed)
    done, written = real(tmp_path, "--limit-train", 200)
    assert done.exit_code == 1
    assert "iad1: its process ended with exit code 9" in done.output
    assert [(row["method"], row["variant"], row["images"]) for row in written] == [
        ("ard", "real", "200"), ("akd2", "real", "200"), ("iad2", "real", "200"),
    ]  # fmt: skip
    assert [float(row["relative_to_ard"]) for row in written] == [1, 0.75, 1.25]
    assert {(row["evaluation_s"], row["q10_epoch_s"], row["smi_mib"]) for row in written} == {("1.5", "", "")}


def test_what_no_longer_fits_into_the_budget_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 0.0, 60.0, 60.0, 60.0, 110.0, 110.0, 110.0])
    monkeypatch.setattr("bench.epoch.time.monotonic", lambda: next(now))
    monkeypatch.setattr(real_epoch, "timed", lambda keys, left: real_epoch.RealEpoch(1, 1, 1.0, 1.0, Peaks(1.0)))
    done, written = real(tmp_path, "--budget", 130)
    assert done.exit_code == 1
    assert [row["method"] for row in written] == ["ard", "iad1"]
    assert "akd2: left out, 20 s of the budget are left, and one took 60 s; iad2: left out" in done.output


@pytest.mark.parametrize(
    "flags", [(), ("--table14", "--real"), ("--real", "--variant", "amp"), ("--table14", "--budget", 9)]
)
def test_options_that_do_not_go_together_are_refused(flags: tuple[object, ...]) -> None:
    assert invoke(epoch.main, *flags).exit_code == 2


def test_a_process_that_fails_is_told_of() -> None:
    keys = {"method": "ard", "dataset": "digits", "model": "no network"}
    with pytest.raises(ChildProcessError, match="exit code 1"):
        real_epoch.timed(keys, None)


# ---------------------------------------------------------------- what nvidia-smi tells


@pytest.mark.parametrize(
    ("processes", "used", "told"),
    [
        ([(str(os.getpid()), "GPU-a", "700"), ("1", "GPU-a", "9")], ("100", "900"), 700),
        ([(str(os.getpid()), "GPU-b", "700")], ("100", "900"), 800),  # on another GPU
        ([("1", "GPU-a", "9")], ("100", "900"), 800),
        ([(str(os.getpid()), "GPU-a", "[N/A]")], ("100", "900"), 800),
        ([], ("100", "100"), None),
        ([], ("[N/A]", "[N/A]"), None),
    ],
)
def test_the_memory_that_nvidia_smi_tells(
    processes: list[tuple[str, str, str]],
    used: tuple[str, str],
    told: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(used)

    def query(what: str) -> list[Sequence[str]]:
        return list(processes) if what.startswith("compute-apps") else [("GPU-a", next(now)), ("GPU-b", "5")]

    monkeypatch.setattr(memory, "_query", query)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="a"))
    assert memory.Smi().mebibytes(torch.device("cuda:0")) == told
