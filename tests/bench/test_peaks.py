"""bench.peaks: what is timed, for how long, and what its numbers mean."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bench import peaks
from bench.lib.calls import peak_cases
from bench.lib.calls.convolutions import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from bench.lib.calls.peak_cases import BFLOAT16, FLOAT16, FLOAT32, TF32, NumberFormat, PeakCase, PeakSetting
from bench.lib.machine import Facts
from bench.lib.output import csv_rows
from bench.lib.output.csv_rows import MeasuredRow, PeakRow
from bench.lib.timing import Call, HostClock, QueuedClock
from bench.peaks import Timed, Timer
from tests.bench.readme import documented
from tests.fake_cuda import FakeCuda

FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abc", device="cpu", processor="P", cores=2, threads=2, python="3",
    torch="2", triton="",
)  # fmt: skip
CPU = PeakSetting(torch.device("cpu"), 64, 2**16)
GPU = PeakSetting(torch.device("cuda"), 8192, 100 * 2**20)

# ---------------------------------------------------------------- the cases


def table(setting: PeakSetting, model: str = "resnet18", batch_size: int = 128) -> list[PeakCase]:
    """Nothing is made of its operands: the table for a GPU needs none."""
    return [case for group in peaks.table_of_cases(model, batch_size, setting) for case in group]


def ways(cases: list[PeakCase], op: str) -> set[tuple[str, str, str, str]]:
    return {(one.kind, one.format.name, one.layout, one.plan) for one in cases if one.op == op}


def test_the_table_for_a_gpu_is_complete() -> None:
    cases = table(GPU)
    kinds, plans = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT), ("deterministic", "heuristic", "benchmark")
    halves, formats = ("bfloat16", "float16"), ("bfloat16", "float16", "tf32", "float32")
    assert ways(cases, "matmul") == {("forward", form, "", "") for form in formats}
    assert ways(cases, "convolution") == {
        (kind, form, "channels-last", plan) for kind in kinds for form in halves for plan in plans
    }
    assert ways(cases, "stem") == {
        (kind, form, layout, plan)
        for kind in kinds
        for form in formats
        for layout, plan in [*(("channels-last", plan) for plan in plans), ("contiguous", "deterministic")]
    }
    assert ways(cases, "batch norm") == {
        (kind, form, layout, "")
        for kind in ("forward", "backward")
        for form in ("bfloat16", "float32")
        for layout in ("channels-last", "contiguous")
    }
    assert [one.shape for one in cases if one.op == "copy"] == ["6.25 MiB", "25 MiB", "100 MiB", "400 MiB"]
    assert [one.cached for one in cases if one.op == "copy"] == [True, True, False, False]
    assert Counter(one.op for one in cases) == {
        "copy": 4, "matmul": 4, "convolution": 10 * 3 * 2 * 3, "stem": 3 * 4 * 4, "batch norm": 4 * 2 * 2 * 2,
    }  # fmt: skip
    assert len({one.name for one in cases}) == len(cases)


def test_a_processor_has_neither_plans_nor_tf32() -> None:
    cases = table(CPU)
    assert {one.plan for one in cases} == {""}
    assert {one.format.name for one in cases} == {"float32", "bfloat16", "float16"}


def test_resnet18_has_eleven_convolutions_and_four_sizes_of_batch_norm() -> None:
    cases = table(GPU)
    shapes = {one.shape for one in cases if one.op in ("convolution", "stem")}
    assert shapes == {
        "128x3x32x32, 64x3x3x3, stride 1",
        "128x64x32x32, 64x64x3x3, stride 1",
        "128x64x32x32, 128x64x3x3, stride 2",
        "128x64x32x32, 128x64x1x1, stride 2",
        "128x128x16x16, 128x128x3x3, stride 1",
        "128x128x16x16, 256x128x3x3, stride 2",
        "128x128x16x16, 256x128x1x1, stride 2",
        "128x256x8x8, 256x256x3x3, stride 1",
        "128x256x8x8, 512x256x3x3, stride 2",
        "128x256x8x8, 512x256x1x1, stride 2",
        "128x512x4x4, 512x512x3x3, stride 1",
    }
    # the stem's and two in each of the two blocks; elsewhere four, and one in the shortcut
    assert {one.shape: one.times for one in cases if one.op == "batch norm"} == {
        "128x64x32x32": 5, "128x128x16x16": 5, "128x256x8x8": 5, "128x512x4x4": 5,
    }  # fmt: skip


def test_operations_bytes_and_numbers_of_a_case() -> None:
    cases = {one.name: one for one in table(GPU)}
    product = cases["matmul forward 8192x8192x8192 tf32"]
    assert (product.flops, product.bytes_moved) == (2 * 8192**3, 3 * 8192**2 * 4)
    down = "128x64x32x32, 128x64x3x3, stride 2"
    one = cases[f"convolution weight gradient {down} bfloat16 channels-last heuristic"]
    assert one.flops == 2 * 128 * 128 * 16 * 16 * 64 * 9
    assert one.bytes_moved == 2 * (128 * 64 * 32 * 32 + 128 * 64 * 3 * 3 + 128 * 128 * 16 * 16)
    # IAD-I: ten attacked passes, two trained, and two forwards of the teacher
    assert one.times == 2
    assert cases[f"convolution input gradient {down} float16 channels-last benchmark"].times == 10 + 2
    images = "128x3x32x32, 64x3x3x3, stride 1"
    assert cases[f"stem input gradient {images} tf32 contiguous deterministic"].times == 10
    norm = cases["batch norm backward 128x64x32x32 bfloat16 contiguous"]
    assert norm.bytes_moved == 3 * 128 * 64 * 32 * 32 * 2


@pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
def test_operands_have_the_format_and_the_layout_of_the_case(layout: str) -> None:
    (one,) = [
        case for case in table(CPU, "resnet8", 2)
        if (case.op, case.kind, case.format, case.layout) == ("stem", WEIGHT_GRADIENT, BFLOAT16, layout)
    ]  # fmt: skip
    call: Any = one.make()
    for operand in call.args[:3]:
        assert operand.dtype == torch.bfloat16
        assert operand.is_contiguous(memory_format=peak_cases.LAYOUTS[layout])
        assert operand.std() > 0.5  # random: not ones


def test_batch_norm_is_timed_in_train_mode_and_against_autograd() -> None:
    torch.manual_seed(0)
    made = {
        kind: peak_cases._norm(kind, (4, 3, 5, 5), torch.float32, CPU.device, torch.channels_last)
        for kind in (FORWARD, peak_cases.BACKWARD)
    }
    out: Any = made[FORWARD]()
    weights = out.grad_fn.next_functions[1][0].variable
    biases = out.grad_fn.next_functions[2][0].variable
    torch.testing.assert_close(out.mean((0, 2, 3)), biases)
    torch.testing.assert_close(out.std((0, 2, 3), unbiased=False), weights.abs(), rtol=1e-3, atol=1e-3)
    gradients: Any = made[peak_cases.BACKWARD]()
    dx, dw, db = gradients
    assert (dx.shape, dw.shape, db.shape) == ((4, 3, 5, 5), (3,), (3,))
    torch.testing.assert_close(dx.sum((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)  # the mean takes no gradient


# ---------------------------------------------------------------- flags


def flags() -> list[object]:
    backends: Any = torch.backends
    return [
        backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32,
        backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(),
        *(one.fp32_precision for one in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "tf32"), [(TF32, True), (FLOAT32, False), (BFLOAT16, False)], ids=["tf32", "float32", "bfloat16"]
)
@pytest.mark.parametrize(
    ("plan", "chosen"),
    [
        ("", (True, False)),
        ("deterministic", (True, False)),
        ("heuristic", (False, False)),
        ("benchmark", (False, True)),
    ],
)
def test_flags_are_the_case_s_and_then_what_they_were(
    form: NumberFormat, tf32: bool, plan: str, chosen: tuple[bool, bool]
) -> None:
    before = flags()
    inside: list[object] = []

    def broken() -> None:
        with peak_cases.settled(case(format=form, plan=plan)):
            inside.extend(flags())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert inside[:5] == [*chosen, tf32, tf32, "high" if tf32 else "highest"]
    assert [precision == "tf32" for precision in inside[5:]] == [tf32] * 3
    assert flags() == before


# ---------------------------------------------------------------- time


class Machine:
    """A clock and the time that it takes: each call lasts so many seconds."""

    def __init__(self, call_s: float) -> None:
        self.time = 100.0
        self.call_s = call_s
        self.threads: dict[object, set[int]] = {}

    def now(self) -> float:
        return self.time

    def seconds(self, call: Call, count: int) -> float:
        self.threads.setdefault(call(), set()).add(threading.get_ident())
        self.time += count * self.call_s
        return self.call_s


def case(name: str = "x", call: Callable[[], object] | None = None, **changes: Any) -> PeakCase:
    return PeakCase("op", name, "shape", lambda: call or (lambda: name), 2**20, **changes)


def timed(machine: Machine, seconds: float, *groups: list[PeakCase], sample_s: float = 1e-9) -> list[Timed]:
    timer = Timer(dataclasses.replace(CPU, sample_s=sample_s), machine, seconds, machine.now)
    return [one for group in timer.timed(groups) for one in group]


def test_the_time_is_divided_over_the_cases_that_are_left() -> None:
    machine = Machine(call_s=1.0)
    first, second, third = timed(machine, 30.0, [case("a")], [case("b"), case("c")])
    # One call to see how long it takes: 10 s are the first's, so nine rounds; 20 s are for the other two.
    assert [len(one.seconds) for one in (first, second, third)] == [9, 9, 9]
    assert machine.time == 130.0


def test_there_are_no_more_rounds_than_are_wanted() -> None:
    machine = Machine(call_s=1.0)
    assert [len(one.seconds) for one in timed(machine, 1000.0, [case("a"), case("b")])] == [15, 15]
    assert machine.time == 100.0 + 2 * 16


def test_what_there_was_no_time_for_is_said_and_the_budget_is_kept() -> None:
    machine = Machine(call_s=1.0)
    found = timed(machine, 6.0, [case("a")], [case("b")], [case("c")])
    assert [(len(one.seconds), one.note, one.failed) for one in found] == [
        (3, "", False), (0, peaks.NO_TIME, False), (0, peaks.NO_TIME, False),
    ]  # fmt: skip
    assert machine.time == 106.0
    assert all(one.call is None for one in found)  # and what they were called with is freed


def test_a_sample_is_as_long_as_it_is_asked_to_be() -> None:
    (one,) = timed(Machine(call_s=0.001), 100.0, [case()], sample_s=0.01)
    assert one.count == 10


def test_a_case_that_fails_is_told_and_the_others_run() -> None:
    def broken() -> None:
        raise RuntimeError("no algorithm\nand a trace")

    def unknown() -> None:
        raise NotImplementedError("not implemented for 'Half'")

    found = timed(Machine(1.0), 1000.0, [case("a", broken), case("b")], [case("c", unknown), case("d")])
    assert [(len(one.seconds), one.note, one.failed) for one in found] == [
        (0, "failed: RuntimeError: no algorithm", True), (15, "", False),
        (0, "not supported: not implemented for 'Half'", False), (15, "", False),
    ]  # fmt: skip


@pytest.mark.parametrize("told", [0.0, float("nan"), float("inf"), -1.0])
def test_a_time_that_is_none_is_a_failure_not_a_row(told: float, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1.0)
    monkeypatch.setattr(machine, "seconds", lambda call, count: told)
    (one,) = timed(machine, 1000.0, [case()])
    assert one.failed
    assert one.note == f"failed: RuntimeError: the clock told {told} s"
    with pytest.raises(ValueError, match="no times"):
        csv_rows.peak_row(FACTS, case(), [1.0, told], "", None, None)


def test_each_plan_has_a_thread_of_its_own() -> None:
    """torch keeps plans by thread, and by a key that does not say how they were chosen."""
    machine = Machine(1.0)
    plans = list(peak_cases.PLANS)
    timed(machine, 1000.0, [case(f"{plan}{number}", plan=plan) for number in range(2) for plan in plans])
    threads = [{*machine.threads[f"{plan}0"], *machine.threads[f"{plan}1"]} for plan in plans]
    assert [len(one) for one in threads] == [1, 1, 1]
    assert len(set.union(*threads)) == 3


class Events:
    """Stands in for the device: it is busy for so many overwrites, and tells how much was queued meanwhile."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.overwrites = 0
        self.calls = 0

    def zero_(self) -> None:
        self.overwrites += 1

    def call(self) -> None:
        self.calls += 1


def queued(needed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[QueuedClock, Events]:
    device = Events(needed)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.overwrites = device.overwrites
            self.calls = device.calls

        def query(self) -> bool:
            done, device.overwrites = device.overwrites < device.needed, 0
            return done

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, after: Event) -> float:
            return 2.0 * (after.calls - self.calls)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    clock = QueuedClock.__new__(QueuedClock)
    clock._other, clock._overwrites = device, 1  # type: ignore[assignment]
    device.device = None  # type: ignore[attr-defined]
    return clock, device


def test_the_device_is_kept_busy_until_all_calls_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, device = queued(3, monkeypatch)
    assert clock.seconds(device.call, 5) == pytest.approx(2e-3)
    assert device.calls == 3 * 5  # with one overwrite, with two and with four
    assert clock.seconds(device.call, 5) == pytest.approx(2e-3)
    assert device.calls == 4 * 5  # it is remembered


def test_a_host_that_is_too_slow_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, device = queued(QueuedClock.MAX_OVERWRITES + 1, monkeypatch)
    with pytest.raises(RuntimeError, match="the host's time would count"):
        clock.seconds(device.call, 5)


# ---------------------------------------------------------------- rows


def test_the_arithmetic_of_a_row() -> None:
    one = case("forward", flops=3 * 10**12, format=BFLOAT16, layout="channels-last", plan="heuristic", times=7)
    row = csv_rows.peak_row(FACTS, one, [2.0, 1.0, 4.0], "", 6e12, 2**20 * 5.0)
    assert dataclasses.asdict(row) == pytest.approx(
        FACTS
        | {
            "op": "op", "kind": "forward", "shape": "shape", "format": "bfloat16", "layout": "channels-last",
            "plan": "heuristic", "times": 7, "rounds": 3, "median_s": 2.0, "q10_s": 1.2, "q90_s": 3.6,
            "gflop": 3000.0, "tflop_per_s": 1.5, "share_of_matmul": 0.25,
            "bytes_moved": 2**20, "gb_per_s": 2**19 / 1e9, "share_of_copy": 0.1, "note": "",
        }
    )  # fmt: skip
    silent = csv_rows.peak_row(FACTS, one, [], "why", 6e12, 1.0)
    assert (silent.median_s, silent.q10_s, silent.tflop_per_s, silent.gb_per_s, silent.share_of_copy) == (
        None,
    ) * 5
    assert (silent.gflop, silent.rounds, silent.note) == (3000.0, 0, "why")


def test_shares_are_of_the_product_of_the_same_format_and_of_the_largest_copy() -> None:
    def of(op: str, form: NumberFormat, seconds: float, **changes: Any) -> Timed:
        return Timed(dataclasses.replace(case(format=form, **changes), op=op), [seconds] * 3)

    first = [of("copy", FLOAT32, 0.1), of("copy", FLOAT32, 0.2)]
    products = [of("matmul", form, 1.0, flops=flops) for form, flops in ((TF32, 400), (FLOAT32, 100))]
    group = [of("stem", form, 2.0, flops=40) for form in (FLOAT32, TF32, FLOAT16)]
    rows = peaks.rows_of(FACTS, group, first + products + group)
    assert [row.share_of_matmul for row in rows] == [0.2, 0.05, None]
    assert [row.share_of_copy for row in rows] == [0.1] * 3
    assert [row.share_of_matmul for row in peaks.rows_of(FACTS, products, first + products)] == [1.0, 1.0]


def rows(**missing: str) -> list[PeakRow]:
    """Rows of a made network: one convolution and a first one, in two formats and two plans."""
    seconds = {"deterministic": 4e-3, "benchmark": 2e-3}
    found = [Timed(dataclasses.replace(case(), op="copy"), [1.0] * 3)]
    found += [
        Timed(dataclasses.replace(case(flops=10**12, format=form), op="matmul"), [0.5] * 3)
        for form in (BFLOAT16, FLOAT16)
    ]
    for plan, one_s in seconds.items():
        for form, factor in ((BFLOAT16, 1.0), (FLOAT16, 0.5)):
            made = case(flops=10**9, format=form, layout="channels-last", plan=plan, times=10)
            found.append(Timed(dataclasses.replace(made, op="convolution"), [one_s * factor] * 3))
        for form, layout in ((FLOAT32, "channels-last"), (FLOAT32, "contiguous"), (BFLOAT16, "channels-last")):
            made = case(flops=5 * 10**8, format=form, layout=layout, plan=plan, times=2)
            found.append(Timed(dataclasses.replace(made, op="stem"), [1e-3] * 3))
    for layout, one_s in (("channels-last", 1e-3), ("contiguous", 2e-3)):
        made = case(format=BFLOAT16, layout=layout, times=5)
        found.append(Timed(dataclasses.replace(made, op="batch norm"), [one_s] * 3))
    if missing:
        index = next(index for index, one in enumerate(found) if one.case.op == "convolution")
        found[index].seconds, found[index].note = [], missing["note"]
    return peaks.rows_of(FACTS, found, found)


def test_a_step_is_the_sum_of_its_convolutions_the_first_in_float32() -> None:
    steps = {(row.format, row.plan): row for row in peaks.steps_of(rows())}
    assert {way: row.median_s for way, row in steps.items()} == pytest.approx(
        {
            ("bfloat16", "deterministic"): 10 * 4e-3 + 2 * 1e-3,
            ("float16", "deterministic"): 10 * 2e-3 + 2 * 1e-3,
            ("bfloat16", "benchmark"): 10 * 2e-3 + 2 * 1e-3,
            ("float16", "benchmark"): 10 * 1e-3 + 2 * 1e-3,
        }
    )
    one = steps["bfloat16", "benchmark"]
    assert one.gflop == 10 * 1.0 + 2 * 0.5
    assert one.tflop_per_s == pytest.approx(11e-3 / 22e-3)
    assert one.share_of_matmul == pytest.approx(0.5 / 2.0)
    assert (one.op, one.kind, one.note) == ("step", "iad1", "")


def test_a_step_that_lacks_a_convolution_has_no_time() -> None:
    steps = peaks.steps_of(rows(note="why"))
    assert [(row.median_s is None, row.note) for row in steps if row.plan == "deterministic"] == [
        (True, "not measured: 1 of 2 convolutions are missing"), (False, ""),
    ]  # fmt: skip


def test_the_lines_that_decide() -> None:
    measured, silent = rows(), rows(note="why")
    lines = peaks.summary(measured + peaks.steps_of(measured))
    fast = "benchmark 22 ms (25% of the matrix product); deterministic by benchmark"
    convolutions = "a step's convolutions in bfloat16: deterministic"
    assert lines == [
        f"{convolutions} 42 ms (13% of the matrix product), {fast} 1.91",
        "a step's convolutions in float16: deterministic 22 ms (25% of the matrix product), "
        "benchmark 12 ms (46% of the matrix product); deterministic by benchmark 1.83",
        "a step's convolutions in float16 by bfloat16: deterministic 0.524, benchmark 0.545",
        "BatchNorm in bfloat16: channels-last 1.049 GB/s, contiguous 0.5243 GB/s; the copy 0.001049 GB/s",
        "a step's first convolution, channels-last: float32 2 ms, bfloat16 2 ms",
        "a step's first convolution, contiguous: float32 2 ms, bfloat16 not measured",
    ]
    lines = peaks.summary(silent + peaks.steps_of(silent))
    assert lines[0] == f"{convolutions} not measured, {fast} not measured"
    assert lines[2].endswith("deterministic not measured, benchmark 0.545")


def test_the_columns_are_documented() -> None:
    common = {field.name for field in dataclasses.fields(MeasuredRow)}
    assert documented("peaks.csv") == [
        field.name for field in dataclasses.fields(PeakRow) if field.name not in common
    ]


# ---------------------------------------------------------------- the command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(peaks.main, [str(one) for one in arguments])


def test_a_small_run_writes_finite_rows(tmp_path: Path) -> None:
    done = invoke("--device", "cpu", "--model", "resnet8", "--batch-size", 1, "--quick", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    with (tmp_path / "peaks.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(table(CPU, "resnet8", 1)) + 3  # and a step in each format
    assert not [row["note"] for row in written if row["note"]]
    assert all(0 < float(row["median_s"]) < 60 for row in written)
    assert all(0 < float(row["gb_per_s"]) < 1e5 for row in written if row["op"] != "step")
    assert all(float(row["share_of_matmul"]) == 1 for row in written if row["op"] == "matmul")
    assert {row["shape"] for row in written if row["op"] == "matmul"} == {"64x64x64"}
    assert "a step's convolutions in bfloat16" in done.output


def test_a_failure_is_told_and_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Call:
        raise RuntimeError("out of memory")

    cases = [dataclasses.replace(case("bad"), make=broken), case("good")]
    monkeypatch.setattr(peaks, "table_of_cases", lambda *_: [cases])
    done = invoke("--device", "cpu", "--quick", "--out", tmp_path)
    assert done.exit_code == 1
    assert "op bad shape float32: failed: RuntimeError: out of memory" in done.output
    with (tmp_path / "peaks.csv").open() as file:
        assert [(row["kind"], row["note"], bool(row["median_s"])) for row in csv.DictReader(file)] == [
            ("bad", "failed: RuntimeError: out of memory", False), ("good", "", True),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--model", "resnet9"), "resnet8"),
        (("--device", "tpu"), "known: auto, cpu, cuda"),
        (("--seconds", "0"), "--seconds"),
        (("--batch-size", "0"), "--batch-size"),
    ],
)
def test_what_is_unknown_is_told(given: tuple[str, ...], words: str) -> None:
    done = invoke(*given)
    assert done.exit_code == 2
    assert words in done.output


# ---------------------------------------------------------------- on a pretended GPU


def on_a_gpu() -> list[str]:
    """Every case, small; the pretended device computes nothing and keeps no time."""
    setting = dataclasses.replace(GPU, rows=8, beyond_bytes=2**16, rounds=peaks.MIN_ROUNDS, sample_s=1e-9)
    timer = Timer(setting, HostClock(), 1000.0)
    found = [one for group in timer.timed(peaks.table_of_cases("resnet8", 1, setting)) for one in group]
    return [str(len(found)), *(f"{one.case.name}: {one.note}" for one in found if one.note)]


def test_every_case_runs_on_a_pretended_gpu(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.run(on_a_gpu) == [str(len(table(GPU, "resnet8", 1)))]
