"""Speeds that the engine is built for, and verdicts of measurements on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bench.lib.output.csv_rows import OpRow, PipelineRow, StepRow

THREADS = 2


AnyRow = TypeVar("AnyRow")


@dataclass(frozen=True)
class Target(Generic[AnyRow]):
    """Target: value >= `wanted` in each row that `applies`, so in the least one."""

    text: str
    unit: str
    wanted: float
    applies: Callable[[AnyRow], bool]
    value: Callable[[AnyRow], float | None]


def _distill(row: OpRow) -> bool:
    return row.op == "distill_loss"


def _pgd(row: OpRow) -> bool:
    return row.op == "pgd_update"


OP_TARGETS: tuple[Target[OpRow], ...] = (
    Target(
        "distill_loss over eager at 128x10", "x", 2.0,
        lambda row: _distill(row) and row.shape == "128x10",
        lambda row: row.speedup_over_eager,
    ),
    Target(
        "distill_loss over eager at larger sizes", "x", 3.0,
        lambda row: _distill(row) and row.shape != "128x10",
        lambda row: row.speedup_over_eager,
    ),
    Target("distill_loss over torch.compile", "x", 1.0, _distill, lambda row: row.speedup_over_compile),
    Target(
        "pgd_update over eager at 128x3x32x32", "x", 5.0,
        lambda row: _pgd(row) and row.shape == "128x3x32x32",
        lambda row: row.speedup_over_eager,
    ),
    Target(
        "pgd_update of the copy's bandwidth beyond the cache", "", 0.8,
        lambda row: _pgd(row) and row.beyond_cache,
        lambda row: row.share_of_copy,
    ),
    Target(
        "crop_flip of 128x3x32x32", " images/s", 800_000.0,
        lambda row: row.op == "crop_flip" and row.shape == "128x3x32x32",
        lambda row: row.images_per_s,
    ),
)  # fmt: skip


def verdicts(rows: Iterable[OpRow]) -> list[str]:
    """A line per target: reached, not reached or not measured. They are for float32 on two CPU threads."""
    judged = [
        row
        for row in rows
        if (row.implementation, row.device, row.dtype, row.threads) == ("native", "cpu", "float32", THREADS)
    ]
    return [verdict(target, judged) for target in OP_TARGETS]


PIPELINE_TARGETS = {  # times the baseline
    ("cifar10", "tensor"): 30.0,
    ("cifar10", "ffcv"): 7.0,
    ("cifar10", "dali"): 3.0,
    ("jpeg224", "ffcv"): 1.3,
    ("jpeg224", "dali"): 1.3,
}
MOST_MEMORY = 400.0  # MiB


def pipeline_verdicts(rows: Iterable[PipelineRow], growth: float | None) -> list[str]:
    """A line per target. growth: MiB of `bench.lib.memory`, None where that was not measured."""
    judged = [row for row in rows if (row.device, row.threads) == ("cpu", THREADS)]

    def target(data: str, pipeline: str, wanted: float) -> Target[PipelineRow]:
        text = f"{pipeline} over the DataLoader on {data}"
        return Target(text, "x", wanted, lambda row: (row.data, row.pipeline) == (data, pipeline), _speedup)

    lines = [verdict(target(*which, wanted), judged) for which, wanted in PIPELINE_TARGETS.items()]
    wanted_memory = f"peak memory of the resident pipeline over CIFAR-10: at most {MOST_MEMORY:g} MiB above torch"
    if growth is None:
        return [*lines, f"not measured: {wanted_memory}"]
    word = "reached" if growth <= MOST_MEMORY else "not reached"
    return [*lines, f"{word}: {wanted_memory}; measured {growth:,.4g} MiB"]


def _of(method: str, variant: str) -> Callable[[StepRow], bool]:
    return lambda row: (row.method, row.variant) == (method, variant)


STEP_TARGETS: tuple[Target[StepRow], ...] = (
    Target("iad1 with AMP over the textbook", "x", 2.5, _of("iad1", "amp"), lambda row: row.speedup),
    Target("iad2 with AMP over the textbook", "x", 2.3, _of("iad2", "amp"), lambda row: row.speedup),
    Target("iad1 in float32 over the textbook", "x", 1.3, _of("iad1", "fp32"), lambda row: row.speedup),
    Target("iad2 in float32 over the textbook", "x", 1.3, _of("iad2", "fp32"), lambda row: row.speedup),
    Target(
        "AMP of the speed of the convolutions alone", "", 0.8,
        lambda row: row.variant == "amp", lambda row: row.share_of_convolutions,
    ),
)  # fmt: skip
OVER_EXPERT: Target[StepRow] = Target(
    "the engine over the best expert", "x", 1.0, lambda row: True, lambda row: row.speedup_over_expert
)
BASELINES, OTHER_ATTACKS = ("textbook", "expert"), ("amp-eval",)
MOST_OF_TEXTBOOK_MEMORY = 0.6
EVAL_SPEEDUP = 1.1


def step_verdicts(rows: Sequence[StepRow]) -> list[str]:
    """A line per target. All but the first are for ResNet-18, batch 128, on two CPU threads with bfloat16."""
    judged = [
        row
        for row in rows
        if (row.device, row.threads, row.model, row.batch_size) == ("cpu", THREADS, "resnet18", 128)
    ]
    lines = [expert_verdict(rows), *(verdict(target, judged) for target in STEP_TARGETS)]
    seconds = {(row.method, row.variant): row.median_s for row in judged}
    for method in dict.fromkeys(row.method for row in judged):
        if (method, "amp-eval") in seconds:
            gained = seconds[method, "amp"] / seconds[method, "amp-eval"]
            word = "reached" if gained >= EVAL_SPEEDUP else "not reached"
            lines.append(
                f"{word}: {method} with --attack-bn eval: a further {EVAL_SPEEDUP:g}x; measured {gained:.3g}x"
            )
    for row in judged:
        if row.variant == "amp" and row.share_of_textbook_memory is not None:
            word = "reached" if row.share_of_textbook_memory <= MOST_OF_TEXTBOOK_MEMORY else "not reached"
            wanted = (
                f"peak memory of {row.method} with AMP: at most {MOST_OF_TEXTBOOK_MEMORY:.0%} of the textbook's"
            )
            lines.append(f"{word}: {wanted}; measured {row.share_of_textbook_memory:.0%}")
    return lines


def expert_verdict(rows: Sequence[StepRow]) -> str:
    """Verdict on the engine's fastest variant with the same attack beside the expert's fastest."""
    fastest: dict[str, StepRow] = {}
    for row in rows:
        other = row.variant.startswith(BASELINES) or row.variant in OTHER_ATTACKS
        if not other and (row.method not in fastest or row.median_s < fastest[row.method].median_s):
            fastest[row.method] = row
    line = verdict(OVER_EXPERT, fastest.values())
    named = [f"{row.method}: {row.variant} / {row.expert}" for row in fastest.values() if row.expert]
    return f"{line} ({', '.join(named)})" if named else line


def _speedup(row: PipelineRow) -> float:
    return row.speedup


def verdict(target: Target[AnyRow], rows: Iterable[AnyRow]) -> str:
    """Line about a target: reached, not reached or not measured. The least value decides."""
    values = [value for row in rows if target.applies(row) and (value := target.value(row)) is not None]
    wanted = f"{target.text}: at least {target.wanted:,g}{target.unit}"
    if not values:
        return f"not measured: {wanted}"
    worst = min(values)
    word = "reached" if worst >= target.wanted else "not reached"
    return f"{word}: {wanted}; measured {worst:,.4g}{target.unit}"
