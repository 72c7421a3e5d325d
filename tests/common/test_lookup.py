"""Names: each table knows what the configuration allows, and each of its consumers refuses anything else."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from bench.lib.steps import textbook
from engine import config, methods, models, objectives
from engine.attacks import adversary
from engine.attacks import pgd as attack
from engine.attacks.twin import Twin
from engine.common import lookup
from engine.config import RunConfig, semantics
from engine.config.optimizers import OPTIMIZERS
from engine.kernels import (
    Term,
    contract,
    dispatch,
    distill_loss,
    fab_step,
    native,
    pgd_update,
    random_start,
    reference,
)
from engine.kernels.contract import LossInputs, LossSpec, LossTerm
from engine.kernels.pgd_update import IS_L2
from engine.kernels.random_start import STARTS
from engine.pipelines import crops, sampling, selection, splits
from engine.pipelines.base import Batch
from engine.pipelines.ffcv import beton_writer
from engine.pipelines.images import augmentation
from engine.runs.trainer import Trainer
from engine.system import precision
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training import factors, plan, schedule, step_networks
from engine.training.learner import Learner
from engine.training.weights import averaging, optimizer

ROOT = Path(__file__).resolve().parents[2]
CPU = Precision(torch.device("cpu"), torch.float32)
UNKNOWN = "unifrom"
IMAGES = torch.rand(2, 3, 8, 8)
LABELS = torch.tensor([0, 1])


def literals(annotation: Any) -> Iterable[Any]:
    """The choices of a Literal, wherever it stands in an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
        return
    for inner in typing.get_args(annotation):
        yield from literals(inner)


def choices(key: str) -> set[Any]:
    section: type[BaseModel] = RunConfig
    *groups, name = key.split(".")
    for group in groups:
        section = typing.cast(type[BaseModel], section.model_fields[group].annotation)
    return set(literals(section.model_fields[name].annotation))


TABLES: dict[str, tuple[Iterable[Any], ...]] = {
    "semantics": (semantics.NAMES, methods._READINGS),
    "loss.kl_mean": (methods._KL_DIVISORS,),
    "attack.threat_model": (attack.NORMS, IS_L2, *STARTS.values()),
    "attack.random_start": (attack._STARTS, STARTS),
    "attack.bn": (attack.BN_MODES,),
    "forwards.clean": (plan.CLEAN,),
    "forwards.idle": (plan.IDLE,),
    "forwards.first": (plan._ORDERS,),
    "optim.schedule": (schedule.SCHEDULES,),
    "optim.implementation": (optimizer.IMPLEMENTATIONS, OPTIMIZERS),
    "averaging.kind": (averaging.AVERAGING_KINDS,),
    "lr_scale": (schedule._SCALES,),
    "on_bad_image": (splits.SKIPS,),
    "pipeline": ({*selection.PIPELINE_KINDS, "auto"},),
    "augmentation": ({*augmentation.AUGMENTATIONS, crops.RANDOM_RESIZED_CROP},),
    "order": (set(sampling.ORDERS) - {"sequential"},),
}


@pytest.mark.parametrize("key", TABLES)
def test_tables_know_what_the_configuration_allows(key: str) -> None:
    for table in TABLES[key]:
        assert set(table) == choices(key)


def test_tables_of_functions_are_those_of_objectives() -> None:
    assert set(attack._OBJECTIVES) == set(objectives.ATTACK_LOSSES)
    assert set(factors._MAKERS) == set(objectives.FACTORS)
    assert {term.kind for term in objectives.TERMS.values()} <= set(contract.KINDS)
    for term in objectives.TERMS.values():
        assert contract.KINDS[term.kind] == (term.target is not None)


def unknown(**keys: Any) -> RunConfig:
    """A configuration that no file and no flag can give: one name is of a later version, or misspelt."""
    complete = config.load({"method": "iad1", "model": "resnet8", "device": "cpu", "optim": {"lr_warmup": 2}})
    for key, value in keys.items():
        section, _, name = key.partition("__")
        if name:
            value = getattr(complete, section).model_copy(update={name: value})
        complete = complete.model_copy(update={section: value})
    return complete


def row(**loss: Any) -> methods.Method:
    return methods.get("iad1", loss=config.LossConfig().model_copy(update=loss))


def net() -> torch.nn.Module:
    return models.build("resnet8", 4)


def learner(complete: RunConfig) -> Learner:
    return Learner(net(), {"teacher": net().eval()}, row(), complete, CPU)


def learn(complete: RunConfig) -> None:
    one = learner(complete)
    one.learn(Batch(IMAGES, LABELS, torch.arange(2)), one.method, 0.1)


def guard(name: str) -> None:
    session = SimpleNamespace(config=unknown(masking_guard=name))
    Trainer._guard(typing.cast(Trainer, SimpleNamespace(session=session)), {"epoch": 1})


def guard_overfitting(name: str) -> None:
    session = SimpleNamespace(config=unknown(overfitting_guard=name))
    Trainer._guard_overfitting(typing.cast(Trainer, SimpleNamespace(session=session)), {"epoch": 1})


def keep_good(name: str) -> None:
    session = SimpleNamespace(config=unknown(overfitting_guard=name))
    vars(Trainer)["_keeps_good"].fget(SimpleNamespace(session=session))


def pgd(**keys: Any) -> Tensor:
    spec = unknown(**{f"attack__{key}": v for key, v in keys.items()}).attack
    return attack.pgd(net(), IMAGES, LABELS, spec, teacher=net().eval())


def passes(**keys: Any) -> plan.Passes:
    complete = unknown(**keys)
    return plan.passes(methods.get("ard"), complete.attack, complete.forwards)


def start(kind: str = "uniform", threat_model: str = "Linf") -> Tensor:
    return random_start(
        IMAGES, torch.arange(2), kind=kind, threat_model=threat_model, epsilon=0.1, seed=0, counter=0
    )


def build_pipeline(kind: str, *augmentation: str) -> object:
    split = splits.Split(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), LABELS, ("a", "b"))
    options = selection.LoaderOptions(True, False, CPU.device, CPU.dtype, augmentation=augmentation)
    return selection.build(kind, split, sampling.Sampling(2, 2), options, print)


def choose_pipeline(kind: str) -> object:
    split = splits.Split(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), LABELS, ("a", "b"))
    return selection.select(kind, split, CPU.device)


def request(**keys: str) -> splits.Request:
    return splits.Request(**keys)  # type: ignore[arg-type]


def step_of_textbook(**keys: str) -> None:
    student = net()
    setting = textbook.StepSetting(**{"method": "ard", **keys})  # type: ignore[arg-type]
    sgd = torch.optim.SGD(student.parameters())
    textbook.TextbookStep(setting, student, net(), net(), sgd)(IMAGES, LABELS, IMAGES)


CONSUMERS: dict[str, Callable[[], object]] = {
    "method": lambda: methods.get(UNKNOWN),
    "semantics of a method": lambda: methods.get("iad1", semantics=UNKNOWN),
    "semantics of defaults": lambda: semantics.defaults("iad1", UNKNOWN, 200),
    "semantics of a loss": lambda: config.check_reading(UNKNOWN, config.LossConfig()),
    "term of a method": lambda: methods.get("iad1", weights={UNKNOWN: 1}),
    "loss.kl_mean": lambda: row(kl_mean=UNKNOWN).terms(4),
    "loss.kl_mean in a step": lambda: Learner(
        net(), {"teacher": net().eval()}, row(kl_mean=UNKNOWN), unknown(), CPU
    ).learn(Batch(IMAGES, LABELS, torch.arange(2)), row(kl_mean=UNKNOWN), 0.1),
    "attack.loss of an attack": lambda: pgd(loss=UNKNOWN),
    "attack.loss of an attack of no step": lambda: pgd(loss=UNKNOWN, num_steps=0),
    "attack.loss in words": lambda: attack.describe(unknown(attack__loss=UNKNOWN).attack),
    "attack.loss in passes": lambda: passes(attack__loss=UNKNOWN),
    "attack.loss in a step": lambda: learn(unknown(attack__loss=UNKNOWN)),
    "attack.random_start": lambda: pgd(random_start=UNKNOWN),
    "attack.random_start in words": lambda: attack.describe(unknown(attack__random_start=UNKNOWN).attack),
    "kind of a start": lambda: start(kind=UNKNOWN),
    "threat model of a start": lambda: start(threat_model=UNKNOWN),
    "threat model of no start": lambda: start("none", UNKNOWN),
    "threat model of a gaussian start": lambda: start("gaussian", UNKNOWN),
    "attack.threat_model": lambda: pgd(threat_model=UNKNOWN),
    "attack.threat_model in words": lambda: attack.describe(unknown(attack__threat_model=UNKNOWN).attack),
    "threat model of a step": lambda: pgd_update(
        IMAGES.clone(), IMAGES, IMAGES, threat_model=UNKNOWN, epsilon=1, step_size=1
    ),
    "threat model of a step of FAB": lambda: fab_step(
        IMAGES.clone(), IMAGES, IMAGES, torch.zeros(2), threat_model=UNKNOWN
    ),
    "threat model of presets": lambda: attack.presets(threat_model=UNKNOWN),
    "preset": lambda: attack.preset(UNKNOWN, 0.1),
    "attack.bn": lambda: pgd(bn=UNKNOWN),
    "attack.bn of a twin": lambda: Twin(net(), UNKNOWN, CPU),
    "attack.bn of an adversary": lambda: adversary.Adversary(net(), unknown(attack__bn=UNKNOWN).attack, CPU),
    "attack.bn of networks": lambda: step_networks.build(
        net(), {}, methods.get("st"), unknown(attack__bn=UNKNOWN), CPU
    ),
    "forwards.clean in passes": lambda: passes(forwards__clean=UNKNOWN),
    "forwards.clean in a step": lambda: learn(unknown(forwards__clean=UNKNOWN)),
    "forwards.first in passes": lambda: passes(forwards__first=UNKNOWN),
    "factor of a method": lambda: methods._active({"ce_adv": methods.Weight(1, 0, UNKNOWN)}),
    "factor": lambda: factors.Factors(unknown(), World(), CPU.device)([UNKNOWN], {}, LABELS, 1.0),
    "kind of a term": lambda: distill_loss({"s_adv": IMAGES[:, 0, 0]}, LABELS, [Term(UNKNOWN, "s_adv")]),
    "addition of a method": lambda: methods.get(f"ard+{UNKNOWN}"),
    "forwards.idle in passes": lambda: passes(forwards__idle=UNKNOWN),
    "forwards.idle in a step": lambda: learn(unknown(forwards__idle=UNKNOWN)),
    "optim.schedule": lambda: schedule.factor(unknown(optim__schedule=UNKNOWN), 100, 1),
    "optim.schedule in its warm-up": lambda: schedule.factor(unknown(optim__schedule=UNKNOWN), 0, 1),
    "lr_scale": lambda: schedule.learning_rate(unknown(lr_scale=UNKNOWN), 0, 1),
    "optim.implementation": lambda: optimizer.build(net(), unknown(optim__implementation=UNKNOWN)),
    "averaging.kind": lambda: averaging.build(net(), unknown(averaging__kind=UNKNOWN)),
    "averaging.kind of a learner": lambda: learner(unknown(averaging__kind=UNKNOWN)),
    "micro_batch": lambda: learner(unknown(micro_batch=UNKNOWN)),
    "lanes": lambda: learner(unknown(lanes=UNKNOWN)),
    "graphs": lambda: learner(unknown(graphs=UNKNOWN)),
    "compile": lambda: learner(unknown(compile=UNKNOWN)),
    "a switch": lambda: lookup.is_on("sync_bn", UNKNOWN),
    "masking_guard": lambda: guard(UNKNOWN),
    "overfitting_guard": lambda: guard_overfitting(UNKNOWN),
    "overfitting_guard, what is kept": lambda: keep_good(UNKNOWN),
    "order": lambda: sampling.Sampling(4, 2, order=UNKNOWN),
    "last": lambda: sampling.Sampling(4, 2, last=UNKNOWN),
    "pipeline": lambda: choose_pipeline(UNKNOWN),
    "kind of a pipeline": lambda: build_pipeline(UNKNOWN),
    "augmentation": lambda: build_pipeline("image", UNKNOWN),
    "on_bad_image": lambda: request(on_bad_image=UNKNOWN),
    "resident": lambda: request(resident=UNKNOWN),
    "part": lambda: request().of(UNKNOWN, splits.Split(IMAGES, LABELS, ("a", "b"))),
    "format": lambda: beton_writer.BetonFormat(UNKNOWN),
    "op": lambda: dispatch.choose(UNKNOWN, CPU.device),
    "implementation": lambda: dispatch.fused(UNKNOWN, "pgd_update", "pgd_update"),
    "implementation that is missing": lambda: dispatch.missing(UNKNOWN, "cpu"),
    "dtype": lambda: precision.choose(unknown(dtype=UNKNOWN)),
    "winograd": lambda: precision.choose(unknown(winograd=UNKNOWN)),
    "amp_dtype": lambda: precision.choose(unknown(amp=True, amp_dtype=UNKNOWN)),
    "textbook's method": lambda: step_of_textbook(method=UNKNOWN),
    "textbook's semantics": lambda: step_of_textbook(semantics=UNKNOWN),
    "textbook's BatchNorm": lambda: step_of_textbook(bn=UNKNOWN),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_unknown_is_refused(consumer: str) -> None:
    with pytest.raises(ValueError, match=UNKNOWN) as refusal:
        CONSUMERS[consumer]()
    assert "\n" not in str(refusal.value)


def test_what_is_known_is_taken() -> None:
    """The consumers above refuse the name, and not whatever they are given."""
    learn(unknown())
    for key in ("loss", "random_start", "bn", "threat_model"):
        names = objectives.ATTACK_LOSSES if key == "loss" else choices(f"attack.{key}")
        for name in names:
            assert pgd(**{key: name, "num_steps": 1}).shape == IMAGES.shape
    for name in choices("forwards.idle"):
        learn(unknown(forwards__idle=name))
    for name in choices("forwards.clean"):
        learn(unknown(forwards__clean=name))


def test_automatic_is_no_answer_of_a_switch() -> None:
    with pytest.raises(ValueError, match="^sync_bn: 'auto' is not known; known: off, on$"):
        lookup.is_on("sync_bn", "auto")
    assert lookup.is_on("compile", "auto", auto=True)


# ---------------------------------------------------------------- terms of the loss

LOSSES: dict[str, Callable[[LossInputs, LossSpec], object]] = {
    "reference": reference.distill_loss,
    "native": lambda inputs, spec: native.loss_and_gradients(inputs, spec, (True,)),
    "triton": lambda inputs, spec: dispatch.fused("triton", "distill_loss", "loss_and_gradients")(
        inputs, spec, (True,)
    ),
}


@pytest.mark.parametrize("implementation", LOSSES)
def test_a_kind_that_an_implementation_does_not_compute_is_refused(implementation: str) -> None:
    if implementation != "reference" and (reason := dispatch.missing(implementation, "cpu")):
        pytest.skip(reason)
    spec = LossSpec((LossTerm("entropy", 0, -1, 1.0, 0.0, 1.0, False, -1),), -1, 0.1, 0.0)
    with pytest.raises(ValueError, match="^terms: the .* computes .*ce, kl.*, and not 'entropy'$"):
        LOSSES[implementation](LossInputs((torch.randn(2, 4),), LABELS), spec)


def test_the_native_library_numbers_formats_as_python_does() -> None:
    text = (ROOT / "kernels" / "csrc" / "cpu.h").read_text(encoding="utf-8")
    (body,) = re.findall(r"enum DType\b[^{]*{([^}]*)}", text)
    members = [member.partition("=")[0].strip().lower() for member in body.split(",")]
    formats = {str(dtype).removeprefix("torch."): number for dtype, number in native._DTYPES.items()}
    assert formats == {name: number for number, name in enumerate(members)}


@pytest.mark.skipif(bool(native.missing("cpu")), reason=native.missing("cpu") or "there")
def test_a_format_that_the_native_library_does_not_read_is_refused() -> None:
    logits = torch.randn(2, 4, dtype=torch.float64)
    spec = LossSpec((LossTerm("ce", 0, -1, 1.0, 0.0, 1.0, False, -1),), -1, 0.1, 0.0)
    with pytest.raises(ValueError, match="^dtype: torch.float64 is unknown"):
        native.loss_and_gradients(LossInputs((logits,), LABELS), spec, (True,))
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="^dtype: torch.float64 is unknown"):
        native.pgd_update(images, images.double(), images, False, 0.1, 0.1, None)
