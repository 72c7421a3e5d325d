"""One row per measurement, its arithmetic, and the CSV file it is written to."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_type_hints

from pydantic import TypeAdapter

from bench.lib.calls.op_cases import COMPILE, COPY, EAGER, OpCase, beyond
from bench.lib.machine import Facts
from bench.lib.timing import EPOCH_IMAGES
from engine.common.files import replacing

if TYPE_CHECKING:
    from bench.lib.calls.peak_cases import PeakCase
    from bench.lib.memory import Peaks
    from bench.lib.steps.peer_process import Peer
    from bench.lib.steps.variants import Workload


@dataclass(frozen=True)
class MeasuredRow:
    """The columns that every row begins with: `Facts`."""

    date: str
    commit: str
    device: str
    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    triton: str


@dataclass(frozen=True)
class OpRow(MeasuredRow):
    """One line of kernels.csv; README.md describes the columns. None: there is nothing to compare with."""

    op: str
    implementation: str
    mode: str
    shape: str
    setting: str
    dtype: str
    rounds: int
    median_s: float
    q10_s: float
    q90_s: float
    speedup_over_eager: float | None
    speedup_over_compile: float | None
    bytes_moved: int
    gb_per_s: float
    copy_gb_per_s: float
    share_of_copy: float
    beyond_cache: bool
    images_per_s: float | None

    @property
    def variant(self) -> str:
        """The setting, and the dtype where it is not the usual one."""
        return self.setting if self.dtype == "float32" else f"{self.setting}, {self.dtype}"


@dataclass(frozen=True)
class PipelineRow(MeasuredRow):
    """One line of pipelines.csv; README.md describes the columns."""

    ffcv: str
    dali: str
    data: str
    pipeline: str
    size: int
    batch_size: int
    images: int
    rounds: int
    images_per_s: float
    q10_images_per_s: float
    q90_images_per_s: float
    speedup: float
    cpu_s_per_10k_images: float


@dataclass(frozen=True)
class PeakRow(MeasuredRow):
    """One line of peaks.csv; README.md describes the columns. None: no such number, or the note says why."""

    op: str
    kind: str
    shape: str
    format: str
    layout: str
    plan: str
    times: int | None
    rounds: int
    median_s: float | None
    q10_s: float | None
    q90_s: float | None
    gflop: float | None
    tflop_per_s: float | None
    share_of_matmul: float | None
    bytes_moved: int | None
    gb_per_s: float | None
    share_of_copy: float | None
    note: str


@dataclass(frozen=True)
class StepRow(MeasuredRow):
    """One line of step.csv; README.md describes the columns."""

    method: str
    model: str
    batch_size: int
    variant: str
    rounds: int
    steps_per_round: int
    median_s: float
    q10_s: float
    q90_s: float
    images_per_s: float
    speedup: float
    expert: str
    speedup_over_expert: float | None
    of_expert_fp32: float | None
    q10_of_expert_fp32: float | None
    q90_of_expert_fp32: float | None
    gflop: float | None
    gflop_per_s: float | None
    convolutions_s: float
    share_of_convolutions: float
    peak_mib: float | None
    reserved_mib: float | None
    smi_mib: float | None
    share_of_textbook_memory: float | None


@dataclass(frozen=True)
class AblationRow(MeasuredRow):
    """One line of ablation.csv; README.md describes the columns."""

    method: str
    model: str
    batch_size: int
    off: str
    rounds: int
    steps_per_round: int
    median_s: float
    q10_s: float
    q90_s: float
    relative: float
    q10_relative: float
    q90_relative: float
    peak_mib: float | None
    relative_memory: float | None


@dataclass(frozen=True)
class EpochRow(MeasuredRow):
    """One line of epoch.csv; README.md describes the columns."""

    method: str
    model: str
    batch_size: int
    variant: str
    images: int
    steps: int
    epoch_s: float
    q10_epoch_s: float | None
    q90_epoch_s: float | None
    evaluation_s: float | None
    relative_to_ard: float | None
    peak_mib: float | None
    reserved_mib: float | None
    smi_mib: float | None
    table14_epoch_s: float
    table14_relative_to_ard: float
    table14_mib: int


@dataclass(frozen=True)
class PeerRow(MeasuredRow):
    """One line of peers.csv; README.md describes the columns."""

    method: str
    model: str
    batch_size: int
    candidate: str
    source: str
    rounds: int
    steps_per_round: int
    median_s: float
    q10_s: float
    q90_s: float
    epoch_s: float
    speedup_over_published: float | None
    speedup_over_plain: float | None
    forwards: float | None
    backwards: float | None
    peak_mib: float
    relative_memory: float | None


@dataclass(frozen=True)
class TrialRow(MeasuredRow):
    """One line of speedrun/TRACK/trials-NAME.csv; README.md describes the columns."""

    trials: str
    variant: str
    keys: str
    seed: int
    seconds: float
    flops: float
    data_sha256: str
    held_out: int
    natural: float
    pgd20: float


@dataclass(frozen=True)
class MethodRow(MeasuredRow):
    """One line of methods.csv; README.md describes the columns."""

    settings: str
    method: str
    semantics: str
    model: str
    images: int
    epochs: int
    batch_size: int
    seed: int
    epoch_s: float
    relative_to_at: float
    test_images: int
    attacked_images: int
    natural: float
    pgd20: float
    chance: float
    p_value: float
    above_chance: bool


@dataclass(frozen=True)
class PredictedRow:
    """One line of predicted.csv, of which nothing was measured; README.md describes the columns."""

    date: str
    commit: str
    torch: str
    gpu: str
    method: str
    model: str
    batch_size: int
    amp: bool
    eager_epoch_s: float
    device_epoch_s: float
    compiled_epoch_s: float
    lanes_epoch_s: float
    peak_mib: float
    launches: int
    share_of_convolutions: float


@dataclass(frozen=True)
class ScalingRow(MeasuredRow):
    """One line of scaling.csv; README.md describes the columns."""

    method: str
    model: str
    batch_size: int
    processes: int
    sync_bn: bool
    rounds: int
    median_s: float
    q10_s: float
    q90_s: float
    speedup: float
    sent_bytes: float | None
    ring_bytes: int
    save_stall_s: float
    save_write_s: float


@dataclass(frozen=True)
class EvaluationRow(MeasuredRow):
    """One line of evaluation.csv; README.md describes the columns."""

    network: str
    attack: str
    shorter: int
    variant: str
    images: int
    stood: int
    other_verdicts: int
    forward: int
    backward: int
    seconds: float
    speedup: float


@dataclass(frozen=True)
class EvaluationPredictedRow:
    """One line of evaluation-predicted.csv, of which no second was measured; README.md describes the columns."""

    date: str
    commit: str
    torch: str
    gpu: str
    network: str
    shorter: int
    images: int
    published_s: float
    published_tf32_s: float
    engine_s: float
    engine_tf32_s: float


@dataclass(frozen=True)
class ImagenetRow(MeasuredRow):
    """One line of imagenet.csv; README.md describes the columns."""

    model: str
    image_size: int
    batch_size: int
    processes: int
    attack_steps: int
    stage: str
    images: int
    seconds: float
    images_per_s: float
    peak_mib: float


@dataclass(frozen=True)
class ResumedRow(MeasuredRow):
    """One line of imagenet-resumed.csv; README.md describes the columns."""

    model: str
    processes: int
    steps: int
    killed_after: int
    same_bits: bool
    run_s: float


@dataclass(frozen=True)
class AccuracyRow(MeasuredRow):
    """One line of cells.csv; README.md describes the columns. seed: None of a teacher."""

    protocol: str
    row: str
    seed: int | None
    settings: str
    method: str
    model: str
    epochs: int
    attack: str
    n: int
    correct: int
    accuracy: float
    attack_seconds: float
    epoch_seconds: float
    seconds: float
    peak_memory: int | None
    weights: str


@dataclass(frozen=True)
class PredictedScalingRow:
    """One line of scaling-predicted.csv, of which nothing was measured; README.md describes the columns."""

    date: str
    commit: str
    torch: str
    gpu: str
    method: str
    model: str
    gpus: int
    batch_size: int
    sync_bn: bool
    step_s: float
    exposed_s: float
    efficiency: float


Rows = (
    Sequence[MeasuredRow]
    | Sequence[PredictedRow]
    | Sequence[PredictedScalingRow]
    | Sequence[EvaluationPredictedRow]
)


def cell(form: str, value: float | None) -> str:
    """Text of a row's number in a table, empty where there is none."""
    return "" if value is None else form.format(value)


def rows(
    facts: Facts, case: OpCase, mode: str, samples: Mapping[str, Sequence[float]], cache_bytes: int
) -> list[OpRow]:
    """Rows of one case: of every candidate but the copy, which all are compared with.

    samples: seconds per call in each round, by candidate; the candidates of a round were timed one after another.
    """
    copies = samples[COPY]
    copy_bytes_per_s = case.footprint / statistics.median(copies)
    result = []
    for name, seconds in samples.items():
        if name == COPY:
            continue
        median, (q10, q90) = statistics.median(seconds), quantiles(seconds)
        shares = [
            case.bytes_moved / mine / (case.footprint / copy) for mine, copy in zip(seconds, copies, strict=True)
        ]
        row = OpRow(
            **facts,
            op=case.op,
            implementation=name,
            mode=mode,
            shape=case.shape,
            setting=case.setting,
            dtype=str(case.dtype).removeprefix("torch."),
            rounds=len(seconds),
            median_s=median,
            q10_s=q10,
            q90_s=q90,
            speedup_over_eager=speedup(samples.get(EAGER), seconds),
            speedup_over_compile=speedup(samples.get(COMPILE), seconds),
            bytes_moved=case.bytes_moved,
            gb_per_s=case.bytes_moved / median / 1e9,
            copy_gb_per_s=copy_bytes_per_s / 1e9,
            share_of_copy=statistics.median(shares),
            beyond_cache=case.footprint >= beyond(cache_bytes),
            images_per_s=case.images / median if case.images else None,
        )
        result.append(row)
    return result


def pipeline_rows(
    facts: Facts,
    data: str,
    size: int,
    batch_size: int,
    images: int,
    samples: Mapping[str, Sequence[tuple[float, float]]],
) -> list[PipelineRow]:
    """Rows of one data set. samples: (wall, processor) seconds of each round, the baseline's first."""
    walls = {name: [wall for wall, _ in taken] for name, taken in samples.items()}
    baseline = next(iter(walls.values()))
    result = []
    for name, taken in samples.items():
        q10, q90 = quantiles([images / wall for wall in walls[name]])
        ratio = speedup(baseline, walls[name])
        assert ratio is not None
        row = PipelineRow(
            **facts,
            ffcv=version("ffcv"),
            dali=version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120"),
            data=data,
            pipeline=name,
            size=size,
            batch_size=batch_size,
            images=images,
            rounds=len(taken),
            images_per_s=statistics.median(images / wall for wall in walls[name]),
            q10_images_per_s=q10,
            q90_images_per_s=q90,
            speedup=ratio,
            cpu_s_per_10k_images=statistics.median(cpu for _, cpu in taken) / images * 1e4,
        )
        result.append(row)
    return result


def step_row(
    facts: Facts,
    workload: Workload,
    variant: str,
    samples: Mapping[str, Sequence[float]],
    steps_per_round: int,
    convolutions: Sequence[float],
    flops: int | None,
    peaks: Mapping[str, Peaks],
) -> StepRow:
    """One variant of a method. samples: seconds of a step, the mean of a round, in each round, by variant.

    convolutions: seconds of the step's convolutions alone in each round. flops: executed. peaks: by variant.
    """
    seconds = samples[variant]
    median, (q10, q90) = statistics.median(seconds), quantiles(seconds)
    ratio = speedup(samples["textbook"], seconds)
    assert ratio is not None
    expert = best_expert(samples)
    expert_fp32 = samples.get("expert-fp32")
    of_expert = (None, None, None) if expert_fp32 is None else relative(seconds, expert_fp32)
    peak = peaks.get(variant)
    return StepRow(
        **facts,
        method=workload.method,
        model=workload.model,
        batch_size=workload.batch_size,
        variant=variant,
        rounds=len(seconds),
        steps_per_round=steps_per_round,
        median_s=median,
        q10_s=q10,
        q90_s=q90,
        images_per_s=workload.batch_size / median,
        speedup=ratio,
        expert=expert,
        speedup_over_expert=speedup(samples.get(expert), seconds),
        of_expert_fp32=of_expert[0],
        q10_of_expert_fp32=of_expert[1],
        q90_of_expert_fp32=of_expert[2],
        gflop=None if flops is None else flops / 1e9,
        gflop_per_s=None if flops is None else flops / 1e9 / median,
        convolutions_s=statistics.median(convolutions),
        share_of_convolutions=statistics.median(
            alone / whole for alone, whole in zip(convolutions, seconds, strict=True)
        ),
        peak_mib=peak.allocated if peak else None,
        reserved_mib=peak.reserved if peak else None,
        smi_mib=peak.smi if peak else None,
        share_of_textbook_memory=peak.allocated / peaks["textbook"].allocated if peak else None,
    )


def ablation_row(
    facts: Facts,
    workload: Workload,
    off: str,
    baseline: str,
    samples: Mapping[str, Sequence[float]],
    steps_per_round: int,
    peaks: Mapping[str, float | None],
) -> AblationRow:
    """One step without a part. baseline: name of the step with everything on. samples: as of `step_row`.

    peaks: MiB, by name.
    """
    seconds = samples[off]
    q10, q90 = quantiles(seconds)
    ratio, q10_ratio, q90_ratio = relative(seconds, samples[baseline])
    peak, usual = peaks[off], peaks[baseline]
    return AblationRow(
        **facts,
        method=workload.method,
        model=workload.model,
        batch_size=workload.batch_size,
        off=off,
        rounds=len(seconds),
        steps_per_round=steps_per_round,
        median_s=statistics.median(seconds),
        q10_s=q10,
        q90_s=q90,
        relative=ratio,
        q10_relative=q10_ratio,
        q90_relative=q90_ratio,
        peak_mib=peak,
        relative_memory=peak / usual if peak is not None and usual else None,
    )


def peer_row(
    facts: Facts,
    peer: Peer,
    source: str,
    samples: Mapping[str, Sequence[float]],
    steps_per_round: int,
    passes: tuple[float, float] | None,
    peaks: Mapping[str, float],
) -> PeerRow:
    """One candidate of a method. samples: as of `step_row`, by candidate. peaks: MiB, by candidate.

    passes: forward passes of networks in a step, and those with a backward pass.
    """
    seconds = samples[peer.candidate]
    median, (q10, q90) = statistics.median(seconds), quantiles(seconds)
    return PeerRow(
        **facts,
        method=peer.method,
        model=peer.model,
        batch_size=peer.batch_size,
        candidate=peer.candidate,
        source=source,
        rounds=len(seconds),
        steps_per_round=steps_per_round,
        median_s=median,
        q10_s=q10,
        q90_s=q90,
        epoch_s=median * math.ceil(EPOCH_IMAGES / peer.batch_size),
        speedup_over_published=speedup(samples.get("published"), seconds),
        speedup_over_plain=speedup(samples.get("plain"), seconds),
        forwards=passes[0] if passes else None,
        backwards=passes[1] if passes else None,
        peak_mib=peaks[peer.candidate],
        relative_memory=peaks[peer.candidate] / peaks["published"] if "published" in peaks else None,
    )


def best_expert(samples: Mapping[str, Sequence[float]]) -> str:
    """The expert's variant with the least median, nothing where none was timed."""
    experts = [name for name in samples if name.startswith("expert")]
    return min(experts, key=lambda name: statistics.median(samples[name]), default="")


def peak_row(
    facts: Facts,
    case: PeakCase,
    seconds: Sequence[float],
    note: str,
    matmul: float | None,
    copy: float | None,
) -> PeakRow:
    """One case. seconds: of a call in each round, none where the note says why.

    matmul: operations a second of the matrix product in the case's format. copy: bytes a second.
    Raises ValueError for a time that is not finite or not positive.
    """
    if not all(0 < one < math.inf for one in seconds):
        raise ValueError(f"{case.op} {case.shape}: {seconds} are no times")
    median = statistics.median(seconds) if seconds else None
    q10, q90 = quantiles(seconds) if seconds else (None, None)
    flop_per_s = case.flops / median if case.flops and median else None
    bytes_per_s = case.bytes_moved / median if median else None
    return PeakRow(
        **facts,
        op=case.op,
        kind=case.kind,
        shape=case.shape,
        format=case.format.name,
        layout=case.layout,
        plan=case.plan,
        times=case.times,
        rounds=len(seconds),
        median_s=median,
        q10_s=q10,
        q90_s=q90,
        gflop=case.flops / 1e9 if case.flops else None,
        tflop_per_s=flop_per_s / 1e12 if flop_per_s else None,
        share_of_matmul=flop_per_s / matmul if flop_per_s and matmul else None,
        bytes_moved=case.bytes_moved,
        gb_per_s=bytes_per_s / 1e9 if bytes_per_s else None,
        share_of_copy=bytes_per_s / copy if bytes_per_s and copy else None,
        note=note,
    )


def version(package: str) -> str:
    """Version of a package, empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def speedup(baseline: Sequence[float] | None, seconds: Sequence[float]) -> float | None:
    """Median over the rounds of baseline / seconds: a round's disturbance is in both."""
    if baseline is None:
        return None
    return statistics.median(theirs / mine for theirs, mine in zip(baseline, seconds, strict=True))


def relative(seconds: Sequence[float], baseline: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10 % and 90 % quantile over the rounds of seconds / baseline."""
    ratios = [mine / theirs for mine, theirs in zip(seconds, baseline, strict=True)]
    return statistics.median(ratios), *quantiles(ratios)


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The 10 % and the 90 % quantile, interpolated between neighbours."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def write(path: Path, rows: Rows) -> None:
    """Write the rows as CSV, numbers with six digits, an absent one as an empty cell; all of them or none."""
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(rows[0]))
        for row in rows:
            writer.writerow(f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(row))


Row = TypeVar("Row", bound=MeasuredRow)


def read(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file that `write` wrote. Raises ValueError where its columns are not those of the kind."""
    types = get_type_hints(kind)
    with path.open(newline="", encoding="utf-8") as file:
        lines = [
            {name: None if text == "" and types.get(name) is not str else text for name, text in line.items()}
            for line in csv.DictReader(file)
        ]
    return TypeAdapter(list[kind]).validate_python(lines)  # type: ignore[valid-type]
