"""The default of each method under each semantics, against the table of docs/semantics.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.attacks.pgd import presets
from engine.config import RunConfig, epochs_of, load, semantics
from engine.methods import METHODS

TEACHER_METHODS = ("st", "at", "trades")
STUDENT_METHODS = ("ard", "akd2", "iad1", "iad1-down", "iad2")
OF_THE_PAPER = (*TEACHER_METHODS, *STUDENT_METHODS)
BOTH = ("paper", "official")

# The newer methods' own numbers: epochs, rate, weight decay, and the epochs from which the rate is another.
TRAINING: dict[str, tuple[int, float, float, dict[int, float]]] = {
    "mart": (120, 0.01, 3.5e-3, {74: 0.001, 89: 0.0001, 99: 0.00001}),
    "fgsm-rs": (15, 0.2, 5e-4, {}),
    "n-fgsm": (30, 0.2, 5e-4, {}),
    "rslad": (300, 0.1, 2e-4, {215: 0.01, 260: 0.001, 285: 0.0001}),
    "adaad": (200, 0.1, 5e-4, {100: 0.01, 150: 0.001}),
    "adaiad": (200, 0.1, 5e-4, {100: 0.01, 150: 0.001}),
    "mtard": (300, 0.1, 2e-4, {215: 0.01, 260: 0.001, 285: 0.0001}),
    "saad": (200, 0.1, 2e-4, {100: 0.01, 150: 0.001}),
}
ASCENDED = {
    "rslad": "kl-teacher",
    "adaad": "kl-teacher-moving",
    "adaiad": "kl-teacher-moving",
    "saad": "kl-teacher-linear",
    "mart": "ce",
    "mtard": "ce",
}


def config(method: str, reading: str, **keys: Any) -> RunConfig:
    return load({"method": method, "semantics": reading, **keys})


def learning_rates(run: RunConfig) -> dict[int, float]:
    """Learning rate from each epoch on, counted from 0, in 12 digits."""
    rates = {0: run.lr}
    for part, factor in zip(run.optim.milestones, run.optim.lr_factors, strict=True):
        rates[epochs_of(part, run.epochs)] = round(run.lr * factor, 12)
    return rates


def test_every_method_is_a_teachers_or_a_students() -> None:
    assert semantics.TEACHER_METHODS == TEACHER_METHODS
    assert {*OF_THE_PAPER, *TRAINING} == set(METHODS)
    assert semantics.NAMES == BOTH


@pytest.mark.parametrize("reading", BOTH)
@pytest.mark.parametrize("method", TRAINING)
def test_the_newer_methods_train_as_their_authors_do(method: str, reading: str) -> None:
    run = config(method, reading)
    epochs, lr, weight_decay, falls = TRAINING[method]
    assert (run.epochs, run.lr, run.optim.weight_decay) == (epochs, lr, weight_decay)
    if run.optim.schedule == "milestones":
        assert learning_rates(run) == pytest.approx({0: lr, **falls})
    else:
        assert (run.optim.schedule, run.normalize, falls) == ("cyclic", True, {})
    assert (run.averaging.kind, run.averaging.start) == (("swa", 95 / 200) if method == "saad" else ("none", None))
    assert run.teacher.method == ("trades" if method in ("rslad", "mtard") else "at")
    assert run.validation == (0.02 if reading == "paper" else 0)


@pytest.mark.parametrize("reading", BOTH)
@pytest.mark.parametrize("method", ASCENDED)
def test_attacks_of_the_newer_methods(method: str, reading: str) -> None:
    attack = config(method, reading).attack
    assert (attack.loss, attack.bn, attack.num_steps) == (ASCENDED[method], "eval", 10)
    assert (attack.random_start, attack.gaussian_std, attack.clamp_start) == ("gaussian", 0.001, False)
    lengths = (0.031, 0.007) if (method, reading) == ("mart", "official") else (8 / 255, 2 / 255)
    assert (attack.epsilon, attack.step_size) == lengths


def test_attacks_of_one_step() -> None:
    for reading in BOTH:
        fgsm_rs, n_fgsm = config("fgsm-rs", reading).attack, config("n-fgsm", reading).attack
        for attack in (fgsm_rs, n_fgsm):
            assert (attack.loss, attack.bn, attack.num_steps, attack.epsilon) == ("ce", "train", 1, 8 / 255)
            assert (attack.random_start, attack.clamp_start) == ("uniform", True)
        assert (fgsm_rs.step_size, fgsm_rs.start_epsilon, fgsm_rs.project) == (1.25 * 8 / 255, None, True)
        assert (n_fgsm.step_size, n_fgsm.start_epsilon, n_fgsm.project) == (8 / 255, 16 / 255, False)


@pytest.mark.parametrize("reading", BOTH)
def test_hyper_parameters_of_the_newer_methods(reading: str) -> None:
    loss = {method: config(method, reading).loss for method in TRAINING}
    assert loss["rslad"].lam == 1 / 6
    assert loss["mart"].trades_lambda == 5
    assert (loss["adaiad"].tau, loss["adaiad"].beta, loss["adaiad"].warmup) == (30, 0.1, 0.3)
    assert (loss["saad"].igdm, loss["saad"].lam, loss["saad"].entropy_order) == (1, 0, 1)
    assert loss["mtard"].balance_rate == 0.025
    assert loss["mtard"].balance_floor == (1e-5 if reading == "official" else 0)
    by_elements = {"rslad", "adaad", "mtard"} if reading == "official" else set()
    assert {method for method in TRAINING if loss[method].kl_mean == "elements"} == by_elements
    growth = config("ard+igdm", reading).loss.growth_epochs
    assert growth == (200 if reading == "official" else None)
    assert config("ard+igdm", reading).forwards == config("ard", reading).forwards
    assert config("rslad+igdm", reading).loss.kl_mean == config("adaad+igdm", reading).loss.kl_mean == "batch"


@pytest.mark.parametrize("method", OF_THE_PAPER)
def test_paper_learning_rates(method: str) -> None:
    assert learning_rates(config(method, "paper")) == {0: 0.1, 100: 0.01, 150: 0.001}
    assert learning_rates(config(method, "paper", epochs=20)) == {0: 0.1, 10: 0.01, 15: 0.001}


@pytest.mark.parametrize("method", STUDENT_METHODS)
def test_official_students_reach_a_hundredth_only(method: str) -> None:
    assert learning_rates(config(method, "official")) == {0: 0.1, 100: 0.01, 150: 0.01}


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_official_teachers_drop_an_epoch_earlier_and_short_ones_at_30_and_60_percent(method: str) -> None:
    assert learning_rates(config(method, "official")) == {0: 0.1, 99: 0.01, 149: 0.001}
    assert learning_rates(config(method, "official", epochs=109)) == {0: 0.1, 32: 0.01, 65: 0.001}
    assert learning_rates(config(method, "official", epochs=100)) == {0: 0.1, 29: 0.01, 59: 0.001}
    assert learning_rates(config(method, "official", epochs=110)) == {0: 0.1, 54: 0.01, 82: 0.001}


@pytest.mark.parametrize("reading", BOTH)
@pytest.mark.parametrize("method", STUDENT_METHODS)
def test_the_students_attack(method: str, reading: str) -> None:
    attack = config(method, reading).attack
    assert (attack.threat_model, attack.epsilon, attack.step_size, attack.num_steps) == (
        "Linf",
        8 / 255,
        2 / 255,
        10,
    )
    assert (attack.loss, attack.random_start, attack.bn) == ("ce", "uniform", "train")
    assert attack.clamp_start is (reading == "paper")


@pytest.mark.parametrize("reading", BOTH)
def test_the_attack_of_adversarial_training(reading: str) -> None:
    attack = config("at", reading).attack
    assert (attack.threat_model, attack.epsilon, attack.step_size, attack.num_steps) == (
        "Linf",
        8 / 255,
        2 / 255,
        10,
    )
    assert (attack.loss, attack.random_start, attack.bn, attack.clamp_start) == ("ce", "uniform", "eval", True)


@pytest.mark.parametrize("reading", BOTH)
def test_the_attack_of_trades(reading: str) -> None:
    attack = config("trades", reading).attack
    assert (attack.threat_model, attack.epsilon, attack.step_size, attack.num_steps) == (
        "Linf",
        8 / 255,
        2 / 255,
        10,
    )
    assert (attack.loss, attack.random_start, attack.gaussian_std, attack.bn) == ("kl", "gaussian", 0.001, "eval")
    assert attack.clamp_start is False


@pytest.mark.parametrize(
    ("method", "paper", "official"),
    [
        ("st", "skip", "skip"),
        ("at", "skip", "skip"),
        ("trades", "skip", "skip"),
        ("ard", "no_grad", "grad"),
        ("iad1", "no_grad", "grad"),
        ("iad1-down", "no_grad", "grad"),
        ("akd2", "skip", "skip"),
        ("iad2", "skip", "skip"),
    ],
)
def test_the_clean_forward_that_no_term_reads(method: str, paper: str, official: str) -> None:
    assert config(method, "paper").forwards.clean == paper
    assert config(method, "official").forwards.clean == official


@pytest.mark.parametrize("method", OF_THE_PAPER)
def test_idle_forwards_are_those_of_the_published_code(method: str) -> None:
    trades = "trades" if method == "trades" else False
    assert config(method, "paper").forwards.idle == trades
    assert config(method, "official").forwards.idle == ("iad1" if method in ("iad1", "iad1-down") else trades)


@pytest.mark.parametrize(
    ("batches", "share"),
    [
        ("aaaaaaaaaa a a c c", 0.246),
        ("aaaaaaaaaa a a c", 0.134),
        ("aaaaaaaaaa a c", 0.139),
        ("aaaaaaaaaa a", 0.0),
        ("c a c", 0.668),
        ("a c", 0.526),
    ],
    ids=["iad1", "warm-up of iad1", "ard", "akd2", "trades", "trades without its idle forward"],
)
def test_the_share_of_clean_batches_in_the_running_mean_that_the_page_states(batches: str, share: float) -> None:
    """Forwards of a step in order, a adversarial and c clean, and BatchNorm's momentum 0.1, after many steps."""
    running = 0.0
    for batch in batches.replace(" ", "") * 50:
        running = 0.9 * running + 0.1 * (batch == "c")
    assert round(running, 3) == share


@pytest.mark.parametrize("reading", BOTH)
@pytest.mark.parametrize(
    ("method", "epochs"), [("iad1", 60), ("iad1-down", 60), ("iad2", 40), ("ard", 0), ("at", 0)]
)
def test_the_warm_up(method: str, epochs: int, reading: str) -> None:
    run = config(method, reading)
    assert epochs_of(run.loss.warmup, 200) == epochs
    assert epochs_of(run.loss.warmup, 20) == epochs / 10


@pytest.mark.parametrize("method", OF_THE_PAPER)
def test_checkpoint_choice_and_evaluation(method: str) -> None:
    paper, official = config(method, "paper"), config(method, "official")
    assert (paper.validation, official.validation) == (0.02, 0)
    assert paper.eval.final == ("natural", "fgsm", "pgd20")
    assert official.eval.final == ("natural", "fgsm-rs", "pgd20")
    assert paper.eval.attack == official.eval.attack == "pgd10"


def test_fgsm_starts_from_the_image_and_fgsm_rs_at_random() -> None:
    fgsm, fgsm_rs = presets()["fgsm"], presets()["fgsm-rs"]
    assert (fgsm.random_start, fgsm_rs.random_start) == ("none", "uniform")
    for attack in (fgsm, fgsm_rs):
        assert (attack.num_steps, attack.step_size, attack.epsilon, attack.bn) == (1, 8 / 255, 8 / 255, "eval")


@pytest.mark.parametrize("method", OF_THE_PAPER)
def test_teachers(method: str) -> None:
    paper, official = config(method, "paper", model="wrn34-10"), config(method, "official", model="wrn34-10")
    for run in (paper, official):
        assert (run.teacher.method, run.teacher_st.method) == ("at", "st")
        assert run.teacher.model is None
    assert paper.teacher_st.model is None
    assert official.teacher_st.model == "resnet18"


@pytest.mark.parametrize("reading", BOTH)
@pytest.mark.parametrize("method", OF_THE_PAPER)
def test_what_both_readings_share(method: str, reading: str) -> None:
    """Section 5.1."""
    run = config(method, reading)
    assert (run.epochs, run.batch_size, run.lr, run.normalize) == (200, 128, 0.1, False)
    assert (run.optim.momentum, run.optim.nesterov, run.optim.weight_decay) == (0.9, False, 2e-4)
    assert (run.loss.tau, run.loss.tau_self, run.loss.beta, run.loss.gamma) == (1, 1, 0.1, None)
    assert (run.loss.lam, run.loss.lam1, run.loss.lam2, run.loss.lam3) == (0, 0.25, 0.5, 0.25)
    assert run.loss.detach_self is False


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def test_the_page_lists_every_key_that_differs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "semantics.md").read_text(encoding="utf-8")
    table = page.split("## Every difference")[1].split("\n## ")[0]
    for method in METHODS:
        for epochs in (200, 100):
            paper = leaves(config(method, "paper", epochs=epochs).tree())
            official = leaves(config(method, "official", epochs=epochs).tree())
            for key, value in paper.items():
                place = table if method in OF_THE_PAPER else page
                assert value == official[key] or f"`{key}`" in place, (method, key)
