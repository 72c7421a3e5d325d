"""Training steps as their authors published them, transcribed: weights and BatchNorm's statistics, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import config, methods, models
from engine.attacks.pgd import started
from engine.common.console import Reporter
from engine.common.stopping import Stop
from engine.config import RunConfig
from engine.models.weights import load_model, weights_sha256
from engine.pipelines import datasets
from engine.pipelines.base import Batch
from engine.pipelines.datasets import AnyDataset
from engine.runs import teachers
from engine.runs.run_directory import RunDir
from engine.runs.session import Session
from engine.system import precision
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training import schedule
from engine.training.learner import Learner
from tests.conftest import write_checkpoint

F64 = Precision(torch.device("cpu"), torch.float64)
EPSILON, STEP, STEPS, LR = 8 / 255, 2 / 255, 3, 0.1
State = dict[str, Tensor]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return F64.place(models.build("resnet8", 4))


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    images[:2] = images[:2].round()  # black and white: an attack that is not clamped leaves them
    return Batch(images, torch.randint(4, (8,), generator=generator), torch.arange(8))


def climb(x: Tensor, start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Projected sign ascent, from a start that is used as it is."""
    x_adv = start.detach()
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x_adv), [x_adv])
        x_adv = x_adv.detach() + STEP * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON).clamp(0.0, 1.0)
    return x_adv


def trades(student: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """Zhang et al. (2019): attack in evaluation mode, then S(x), S(x~) and S(x) again in train mode."""
    divergence = nn.KLDivLoss(reduction="sum")
    student.eval()
    x_adv = climb(x, start, lambda a: divergence(F.log_softmax(student(a), dim=1), F.softmax(student(x), dim=1)))
    student.train()
    natural: Tensor = F.cross_entropy(student(x), labels)
    robust: Tensor = divergence(F.log_softmax(student(x_adv), dim=1), F.softmax(student(x), dim=1)) / len(x)
    return natural + 6.0 * robust


def iad1(
    student: nn.Module, teacher: nn.Module, x: Tensor, labels: Tensor, start: Tensor, *, in_warmup: bool
) -> Tensor:
    """The published IAD-I: all in train mode, an idle S(x~) always, an idle S(x) after the warm-up."""
    divergence = nn.KLDivLoss(reduction="none")
    x_adv = climb(x, start, lambda a: F.cross_entropy(student(a), labels, reduction="sum"))
    adversarial = student(x_adv)
    student(x_adv)
    if not in_warmup:
        student(x)
    clean = student(x)
    with torch.no_grad():
        taught, trusted = F.softmax(teacher(x), dim=1), F.softmax(teacher(x_adv), dim=1)
    loss: Tensor = divergence(F.log_softmax(adversarial, dim=1), taught).sum(dim=1).mean()
    if not in_warmup:
        trust = torch.stack([p[label] ** 0.1 for p, label in zip(trusted, labels, strict=True)])
        own = divergence(F.log_softmax(adversarial, dim=1), F.softmax(clean, dim=1)).sum(dim=1)
        loss = loss + ((1 - trust) * own).mean()
    return loss + 0.0 * F.cross_entropy(clean, labels)


def ours(complete: RunConfig, *, in_warmup: bool = False, count: int = 3) -> State:
    student, teacher = network(0).train(), network(1).eval()
    method = methods.get(complete.method, semantics=complete.semantics, loss=complete.loss)
    learner = Learner(student, {"teacher": teacher}, method, complete, F64)
    row = method.warmup if in_warmup else method
    assert row is not None
    for step in range(count):
        learner.learn(batch(step), row, LR, epoch=step)
    return student.state_dict()


def theirs(complete: RunConfig, published: Callable[..., Tensor], count: int = 3, **keys: Any) -> State:
    student, teacher = network(0).train(), network(1).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9, weight_decay=2e-4)
    for step in range(count):
        given = batch(step)
        spec = complete.attack.model_copy(update={"clamp_start": False})
        start = started(given.x_nat, spec, seed=complete.seed, counter=step)
        loss = published(student, teacher, given.x_nat, given.labels, start, **keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.state_dict()


def run(method: str, semantics: str, **keys: Any) -> RunConfig:
    base = {"method": method, "semantics": semantics, "model": "resnet8", "dtype": "float64", "device": "cpu"}
    return config.load(base, {"attack": {"num_steps": STEPS}}, keys)


def farthest(left: State, right: State) -> float:
    assert left.keys() == right.keys()
    return max(float((left[key].double() - right[key].double()).abs().max()) for key in left)


@pytest.mark.parametrize("semantics", ["paper", "official"])
def test_trades_is_its_authors(semantics: str) -> None:
    complete = run("trades", semantics)
    published = theirs(complete, trades)
    assert farthest(ours(complete), published) < 1e-10
    for other in ({"attack": {"clamp_start": True}}, {"forwards": {"idle": False}}):
        assert farthest(ours(run("trades", semantics, **other)), published) > 1e-3, other


@pytest.mark.parametrize("in_warmup", [True, False], ids=["warm-up", "after"])
def test_official_iad1_is_the_published_code(in_warmup: bool) -> None:
    complete = run("iad1", "official")
    published = theirs(complete, iad1, in_warmup=in_warmup)
    assert farthest(ours(complete, in_warmup=in_warmup), published) < 1e-10
    if in_warmup:  # what this project ran before it knew of the forward there
        earlier = ours(run("iad1", "official", forwards={"idle": True}), in_warmup=True)
        assert farthest(earlier, published) > 1e-3


@pytest.mark.parametrize(
    ("method", "semantics", "in_warmup", "forwards"),
    [
        ("trades", "paper", False, 3),
        ("trades", "official", False, 3),
        ("ard", "official", False, STEPS + 2),
        ("iad1", "official", True, STEPS + 3),
        ("iad1", "official", False, STEPS + 4),
        ("iad1-down", "official", True, STEPS + 3),
        ("iad1", "paper", True, STEPS + 2),
        ("akd2", "official", False, STEPS + 1),
    ],
)
def test_forwards_of_the_student_that_move_its_statistics(
    method: str, semantics: str, in_warmup: bool, forwards: int
) -> None:
    complete = run(method, semantics)
    student = network(0).train()
    row = methods.get(method, semantics=semantics, loss=complete.loss)
    learner = Learner(student, {"teacher": network(1), "teacher_st": network(2)}, row, complete, F64)
    trained = row.warmup if in_warmup else row
    assert trained is not None
    running_mean, count = student.get_buffer("bn1.running_mean"), 0

    def note(module: nn.Module, *_: object) -> None:
        nonlocal count
        moves = module.training and getattr(module, "track_running_stats", False)
        count += moves and module.get_buffer("running_mean") is running_mean

    with torch.nn.modules.module.register_module_forward_hook(note):
        learner.learn(batch(0), trained, LR)
    assert count == forwards


@pytest.mark.parametrize(
    ("epochs", "drops"),
    [(100, (29, 59)), (109, (32, 65)), (10, (2, 5)), (110, (54, 82)), (200, (99, 149)), (30, (8, 17))],
)
def test_published_teachers_drop_their_rate_an_epoch_early(epochs: int, drops: tuple[int, int]) -> None:
    """The script compares its epochs, counted from 1, with 30 % and 60 % of fewer than 110."""
    complete = config.load({"method": "at", "semantics": "official", "epochs": epochs})
    rates = [schedule.factor(complete, epoch, 1) for epoch in range(epochs)]
    assert rates == [1.0] * drops[0] + [0.1] * (drops[1] - drops[0]) + [0.01] * (epochs - drops[1])
    if epochs < 110:
        script = [0.01 if e + 1 >= 0.6 * epochs else 0.1 if e + 1 >= 0.3 * epochs else 1.0 for e in range(epochs)]
        assert rates == script


@pytest.mark.parametrize(
    ("method", "semantics", "earlier"),
    [
        ("trades", "paper", {"attack": {"clamp_start": True}, "forwards": {"idle": False}}),
        ("trades", "official", {"attack": {"clamp_start": True}, "forwards": {"idle": False}}),
        ("iad1", "official", {"forwards": {"idle": True}}),
        ("at", "official", {"epochs": 100, "optim": {"milestones": [0.3, 0.6]}}),
    ],
)
def test_a_config_yaml_of_an_earlier_version_keeps_its_meaning(
    method: str, semantics: str, earlier: dict[str, Any]
) -> None:
    tree = config.merge(config.load({"method": method, "semantics": semantics}).tree(), earlier)
    for key in ("init", "snapshot_every"):
        del tree[key]
    del tree["loss"]["kl_mean"]
    loaded = config.load(copy.deepcopy(tree)).tree()
    assert config.merge(loaded, tree) == loaded
    assert (loaded["init"], loaded["snapshot_every"], loaded["loss"]["kl_mean"]) == (None, 0, "batch")


@pytest.mark.parametrize("method", ["ard", "iad2"])
def test_the_mean_over_elements_is_that_of_kldivloss(method: str) -> None:
    """The first ARD's divergence is KLDivLoss() as torch has it by default: a mean over images and classes."""
    complete = run(method, "paper", loss={"kl_mean": "elements", "tau": 30.0, "warmup": 0})
    row = methods.get(method, loss=complete.loss)
    student, teacher = network(0).train(), network(1).eval()
    learner = Learner(student, {"teacher": teacher, "teacher_st": network(2).eval()}, row, complete, F64)
    seen: list[Any] = []
    learner.learn(batch(0), row, LR, on_output=lambda output, labels: seen.append(output))
    (output,) = seen

    def mean(target: Tensor, tau: float) -> Tensor:
        log_q, p = F.log_softmax(output.logits["s_adv"] / tau, dim=1), F.softmax(target / tau, dim=1)
        return F.kl_div(log_q, p, reduction="none").mean()

    if method == "ard":
        expected = 900 * mean(output.logits["t_at_nat"], 30.0)
        torch.testing.assert_close(output.loss.loss, expected, rtol=1e-10, atol=0)
    by_batch = methods.get(method, tau=30.0).terms(4)
    for whole, part in zip(by_batch, row.terms(4), strict=True):
        factor = 1 / 4 if whole.name.startswith("kl") else 1.0
        assert part.weight == pytest.approx([factor * number for number in whole.weight]), whole.name


# ---------------------------------------------------------------- runs begun with earlier defaults


_TRADES = {"attack": {"clamp_start": True}, "forwards": {"idle": False}}
_DROPS = {"optim": {"milestones": [0.3, 0.6]}}
EARLIER: dict[tuple[str, str], dict[str, Any]] = {
    ("paper", "trades"): _TRADES,
    ("official", "trades"): _TRADES | _DROPS,
    ("official", "at"): _DROPS,
}


@pytest.mark.parametrize(
    ("semantics", "method", "epochs"), [("paper", "trades", 2), ("official", "trades", 2), ("official", "at", 20)]
)
def test_a_student_keeps_a_teacher_with_earlier_defaults(
    semantics: str, method: str, epochs: int, tiny: Any, tmp_path: Path
) -> None:
    data = datasets.load("folder", str(tiny.folder))
    student = config.load(
        tiny.config(method="ard", semantics=semantics, epochs=epochs),
        {"teacher": {"checkpoint": None, "method": method}},
    )
    now = teachers.run_config(student, "teacher")
    before = config.load(config.merge(now.tree(), EARLIER[semantics, method]))
    asked: list[RunConfig] = []

    def train(wanted: RunConfig, path: Path, dataset: AnyDataset) -> Path:
        asked.append(wanted)
        return write_checkpoint(tmp_path / "trained.pt", 4)

    def obtain(known: str | None = None) -> teachers.Teacher:
        at = precision.choose(student)
        session = Session(student, at, World(), Reporter(), Stop(), RunDir(tmp_path))
        return teachers.obtain(session, "teacher", data, train, known)

    kept = teachers.cache_path(before, data)
    kept.parent.mkdir(parents=True)
    digest = weights_sha256(load_model(write_checkpoint(kept, 3)).module)
    assert obtain(digest).sha256 == digest  # the student has begun to learn from it
    assert asked == []
    assert obtain().sha256 != digest  # a new student has a new one
    assert asked == [now]

    teachers.cache_path(now, data).unlink()
    kept.unlink()
    RunDir.create(before.model_copy(update={"out": str(tmp_path / "teacher")}))
    obtain()  # it was in training
    assert asked == [now, before]
