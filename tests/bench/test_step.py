"""bench.step and bench.epoch: what is timed, what the numbers mean, and what is written."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from bench import convolutions, epoch, gate, memory, results, step, steps, targets
from bench.convolutions import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Layer, Work
from bench.machine import Facts
from bench.results import EpochRow, Measured, StepRow
from engine import config, hostmemory, methods, models, plan
from engine.speed import forward_flops
from tests.bench.readme import documented

FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abc", device="cpu", processor="P", cores=2, threads=2, python="3",
    torch="2", triton="",
)  # fmt: skip
CPU = torch.device("cpu")


def workload(method: str = "iad1", model: str = "resnet8", batch_size: int = 2) -> steps.Workload:
    return steps.Workload(method, model, batch_size, steps.images_of(steps.RANDOM, batch_size), CPU)


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


@pytest.mark.parametrize("method", list(methods.TABLE))
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
    called = {kind: convolutions.call(Work(layer, kind), torch.float32, CPU) for kind in convolutions.KINDS}
    x, weight = (called[INPUT_GRADIENT].args[index] for index in (1, 2))  # type: ignore[attr-defined]
    out = nn.functional.conv2d(x.requires_grad_(), weight.requires_grad_(), None, stride, 1, 1, groups)
    dx, dw = torch.autograd.grad(out.sum(), (x, weight))
    assert called[FORWARD]().shape == out.shape  # type: ignore[attr-defined]
    gradients: Any = called[INPUT_GRADIENT]()
    torch.testing.assert_close(gradients[0], dx)
    assert gradients[1:] == (None, None)
    x, weight = (called[WEIGHT_GRADIENT].args[index] for index in (1, 2))  # type: ignore[attr-defined]
    out = nn.functional.conv2d(x, weight.requires_grad_(), None, stride, 1, 1, groups)
    gradients = called[WEIGHT_GRADIENT]()
    torch.testing.assert_close(gradients[1], torch.autograd.grad(out.sum(), weight)[0])
    assert (gradients[0], gradients[2]) == (None, None)
    size = out.shape[-1]
    assert convolutions.flops(Work(layer, FORWARD)) == 2 * 2 * 12 * size**2 * (8 // groups) * 9
    assert dw.shape == weight.shape


def test_the_first_layer_is_in_float32_and_channels_last() -> None:
    for images, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        call: Any = convolutions.call(
            Work(Layer((2, 3, 8, 8), (4, 3, 3, 3), 1, 1, 1, images), FORWARD), torch.bfloat16, CPU
        )
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
    run = work.config(steps.VARIANTS[variant])
    row = methods.get("iad1", semantics=run.semantics, loss=run.loss)
    forward, first = forward_flops(models.build("resnet8", 10), (3, 32, 32))
    passes = plan.passes(row, run.attack, run.forwards)
    expected = 2 * passes.flops(forward, first)
    blocks = forward - first - 2 * 64 * 10
    if variant == "amp-recompute":
        expected += 2 * passes.trained * blocks
    assert step.executed(work.step(steps.VARIANTS[variant])) == pytest.approx(expected, rel=1e-12)


def test_every_variant_trains(bf16: None) -> None:
    for name in (*steps.ON_CPU, "amp-recompute"):
        run = workload().step(steps.VARIANTS[name])
        for _ in range(steps.BATCHES + 1):  # beyond an epoch
            run()


def test_the_peak_of_a_process(bf16: None) -> None:
    small, large = (step.peak_of_a_process(workload("at", batch_size=size), "fp32") for size in (2, 128))
    # The activations of 126 images: 184,320 values of each are kept twice.
    assert 100 < large - small < 1000


def test_a_peak_can_be_forgotten() -> None:
    hostmemory.give_back_freed()
    torch.ones(2**26)
    assert memory.mebibytes("VmHWM") - memory.mebibytes("VmRSS") > 200
    memory.forget_peak()
    assert memory.mebibytes("VmHWM") - memory.mebibytes("VmRSS") < 50


def test_variants_settle_how_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hostmemory, "keep_freed", lambda: said.append("keep"))
    monkeypatch.setattr(hostmemory, "give_back_freed", lambda: said.append("give back"))
    for name in ("textbook", "textbook-paper", "fp32", "amp-malloc", "amp"):
        steps.VARIANTS[name].settle()
    assert said == ["give back", "give back", "keep", "give back", "keep"]


# ---------------------------------------------------------------- rows and verdicts


def rows(**speeds: tuple[float, float, float]) -> list[StepRow]:
    """Of a method on ResNet-18: seconds by variant."""
    samples = {name.replace("_", "-"): list(seconds) for name, seconds in speeds.items()}
    work = workload("iad1", "resnet18", 128)
    return [
        results.step_row(FACTS, work, name, samples, [1.0, 2.0, 1.5], 3 * 10**9, 300.0, 1000.0) for name in samples
    ]


def test_the_arithmetic_of_a_row() -> None:
    textbook, amp = rows(textbook=(10.0, 20.0, 12.0), amp=(4.0, 5.0, 3.0))
    assert (textbook.speedup, amp.speedup) == (1.0, 4.0)  # the median of 2.5, 4 and 4
    assert (amp.median_s, amp.images_per_s, amp.rounds) == (4.0, 32.0, 3)
    assert [amp.q10_s, amp.q90_s] == pytest.approx([3.2, 4.8])
    assert (amp.gflop, amp.gflop_per_s) == (3.0, 0.75)
    assert (amp.convolutions_s, amp.share_of_convolutions) == (1.5, 0.4)  # the median of 0.25, 0.4 and 0.5
    assert (amp.peak_mib, amp.share_of_textbook_memory) == (300.0, 0.3)


def test_verdicts() -> None:
    found = rows(textbook=(10, 10, 10), fp32=(8, 8, 8), amp=(3, 3, 3), amp_eval=(2.5, 2.5, 2.5))
    lines = targets.step_verdicts(found)
    assert [line.partition(":")[0] for line in lines] == [
        "reached", "not measured", "not reached", "not measured", "not reached", "reached", "reached",
    ]  # fmt: skip
    assert "measured 3.333x" in lines[0]
    assert "measured 1.25x" in lines[2]
    assert "a further 1.1x; measured 1.2x" in lines[5]
    assert "at most 60% of the textbook's; measured 30%" in lines[6]
    small = [dataclasses.replace(row, batch_size=64) for row in found]
    assert all(line.startswith("not measured") for line in targets.step_verdicts(small))


@pytest.mark.parametrize(("heading", "kind"), [("step.csv", StepRow)])
def test_the_columns_are_documented(heading: str, kind: type[Measured]) -> None:
    common = {field.name for field in dataclasses.fields(Measured)}
    own = {field.name for field in dataclasses.fields(kind)} - common
    assert set(documented(heading)) >= own


# ---------------------------------------------------------------- the commands


def invoke(command: Any, *arguments: object) -> Any:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_a_run_of_bench_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: None) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *_: True)
    small = ("--dataset", "random", "--model", "resnet8", "--batch-size", 2, "--rounds", 2, "--no-memory")
    done = invoke(step.main, *small, "--method", "at", "--variant", "amp", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    with (tmp_path / "step.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["variant"] for row in written] == ["textbook", "amp"]
    assert float(written[0]["speedup"]) == 1.0
    assert all(float(row["gflop"]) > 0 and row["peak_mib"] == "" for row in written)
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert "not measured: iad1 with AMP" in done.output


def test_nothing_is_timed_while_the_step_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(gate, "tests_pass", lambda *given: asked.append(given))
    done = invoke(step.main, "--dataset", "random", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "nothing is timed" in done.output
    assert asked[0][0] == [step.TESTS]
    assert step.TESTS.exists()
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
    monkeypatch.setattr(epoch, "peak_of_a_process", lambda *_: 7.0)
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
