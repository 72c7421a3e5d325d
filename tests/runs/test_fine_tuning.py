"""Fine-tuning a clean network into a robust one: the example, epsilon's growth, and files of such a run."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import config
from engine.attacks import overfitting
from engine.common.stopping import Interrupted
from engine.common.tensor_files import read_tensors, write_tensors
from engine.runs import checkpoints, lifecycle, teachers
from tests.runs.helpers import Listener, rows_of
from tests.runs.test_resume import StopAt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune.yaml"
ADAMW = {"implementation": "adamw", "layer_decay": 0.7}


def digits() -> tuple[Any, Any]:
    """scikit-learn's digits as they are, 8x8: 400 to train on and 200 to test."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8).expand(-1, 3, 8, 8)
    images, labels = (images * 255).to(torch.uint8).contiguous(), torch.tensor(labels)
    return tuple(
        torch.utils.data.TensorDataset(images[part], labels[part]) for part in (slice(400), slice(400, 600))
    )  # type: ignore[return-value]


def test_the_example_is_better_from_clean_weights_than_from_none(tmp_path: Path) -> None:
    """At equal epochs, by robust accuracy on images that no epoch was chosen on."""
    example = config.read_file(EXAMPLE)
    for key in ("dataset", "validation"):
        example.pop(key)
    common = {"device": "cpu", "validation": 0, "model": "resnet8", "batch_size": 32, "augment": False}
    common |= {"eval": {"final": [], "probe_size": 10}}
    attack = {"epsilon": 28 / 255}

    def last(keys: dict[str, Any], name: str, **more: Any) -> tuple[float, float]:
        row = lifecycle.train(keys, dataset=digits(), out=str(tmp_path / name), **more).summary["last"]
        return row["natural_accuracy"], row["robust_accuracy"]

    clean = last(common, "clean", method="st", epochs=8, lr=0.05, attack=attack)
    tuned = last(config.merge(example, common), "tuned", init=str(tmp_path / "clean" / "last.pt"))
    drawn = last(config.merge(example, common), "drawn")
    assert tuned[0] > drawn[0]
    assert tuned[1] > drawn[1] + 0.05
    assert tuned[1] > clean[1] + 0.05
    assert clean[0] > 0.8


def noted(monkeypatch: pytest.MonkeyPatch, place: str, what: Callable[..., Any]) -> list[Any]:
    """Facts of each call of a function, which is called all the same."""
    found: list[Any] = []
    function = pkgutil.resolve_name(place)

    def called(*args: Any, **keys: Any) -> Any:
        result = function(*args, **keys)
        found.append(what(result, *args, **keys))
        return result

    monkeypatch.setattr(place, called)
    return found


def test_a_run_attacks_with_the_epsilon_of_its_epoch_and_evaluates_with_all_of_it(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of every step keep to the ball of their epoch; the probe knows the attack of the training."""
    crafted = noted(
        monkeypatch,
        "engine.training.step_networks.Adversary.__call__",
        lambda x_adv, self, batch, epoch, *more: (int(epoch), float((x_adv - batch.x_nat).abs().max())),
    )
    probed = noted(monkeypatch, "engine.attacks.overfitting.probe", lambda found, *args, **keys: args[3])
    evaluated = noted(monkeypatch, "engine.runs.trainer.evaluate", lambda found, *args, **keys: keys["epsilon"])
    attack = {"epsilon": 9 / 255, "step_size": 12 / 255, "num_steps": 1, "epsilon_warmup": 3}
    keys = tiny.config(method="at", epochs=4, attack=attack, out=str(tmp_path / "run"), overfitting_guard="off")
    run = lifecycle.train(keys).path
    epsilons = pytest.approx([3 / 255, 6 / 255, 9 / 255, 9 / 255], rel=1e-5)
    farthest = [max(far for at, far in crafted if at == epoch) for epoch in range(4)]
    assert farthest == epsilons
    assert [row["attack_epsilon"] for row in rows_of(run, "epoch")] == epsilons
    assert [spec.epsilon for spec in probed] == epsilons
    assert [spec.step_size * 9 / 12 for spec in probed] == epsilons
    assert len(evaluated) >= 4
    assert set(evaluated) == {9 / 255}


def test_a_run_attacks_with_the_steps_of_its_epoch(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its rows tell of them, and count the gradients of so many."""
    climbed = noted(monkeypatch, "engine.attacks.adversary.climb", lambda found, *args, **keys: args[4].num_steps)
    entries = noted(
        monkeypatch, "engine.training.telemetry.Telemetry.update", lambda _, self, *args: self.attack_entries
    )
    attack = {"num_steps": 3, "steps_warmup": 3}
    keys = tiny.config(method="at", epochs=4, attack=attack, eval={"final": []}, out=str(tmp_path / "run"))
    run = lifecycle.train(keys).path
    assert climbed == [steps for steps in (1, 2, 3, 3) for _ in range(6)]
    assert [row["attack_steps"] for row in rows_of(run, "epoch")] == [1, 2, 3, 3]
    assert entries == [steps * 3 * 8 * 8 for steps in climbed]


def test_a_rollback_in_the_warm_up_keeps_to_its_epsilon(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(row: Any, before: Any) -> str:
        return "as told" if row["epoch"] == 2 and row["attack_steps"] < 2 else ""

    monkeypatch.setattr(overfitting, "complaint", complaint)
    used = noted(monkeypatch, "engine.training.step_networks.Adversary.use", lambda _, self, spec: spec)
    keys = tiny.config(
        method="fgsm-rs", epochs=3, attack={"num_steps": 1, "epsilon_warmup": 2}, eval={"final": []},
        loss={"warmup": 0}, out=str(tmp_path / "run"), overfitting_guard="rollback",
    )  # fmt: skip
    lifecycle.train(keys)
    assert [spec.num_steps for spec in used] == [1, 1, 2, 2]
    assert [spec.epsilon * 255 for spec in used] == pytest.approx([4, 8, 8, 8])
    assert [spec.step_size * 255 for spec in used] == pytest.approx([5, 10, 5, 5])  # 1.25 * 8 in two steps


def test_the_probe_of_masked_gradients_has_the_attack_in_force(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: None
) -> None:
    epsilons = noted(monkeypatch, "engine.attacks.masking.probe", lambda found, *args, **keys: args[3].epsilon)
    attack = {"num_steps": 1, "epsilon_warmup": 2}
    lifecycle.train(tiny.config(method="at", attack=attack, amp=True, out=str(tmp_path / "run")))
    assert epsilons == pytest.approx([4 / 255, 8 / 255])


def test_a_run_tells_of_an_attack_that_never_grows(tiny: Any, tmp_path: Path) -> None:
    listener = Listener()
    keys = tiny.config(method="at", epochs=1, attack={"epsilon_warmup": 0.5}, out=str(tmp_path / "run"))
    lifecycle.train(keys, listener)
    (warning,) = (line for line in listener.lines if "changes nothing" in line)
    assert warning.startswith("Warning: attack.epsilon_warmup: 0.5 stands for 1 of 1 epochs, and changes nothing")


def test_a_run_without_adversarial_images_has_no_epsilon(tiny: Any, tmp_path: Path) -> None:
    keys = tiny.config(method="st", attack={"epsilon_warmup": 2}, epochs=1, out=str(tmp_path / "run"))
    (row,) = rows_of(lifecycle.train(keys).path, "epoch")
    assert "attack_epsilon" not in row
    assert not row.get("attack_zero_gradients")


def test_a_teacher_has_the_students_optimizer_and_warm_up_but_no_layer_decay() -> None:
    """It starts from random weights, in which no layer is trained already."""
    optim = ADAMW | {"betas": [0.9, 0.95]}
    student = config.load({"method": "iad1", "optim": optim, "attack": {"epsilon_warmup": 0.2}, "init": "a.pt"})
    teacher = teachers.run_config(student, "teacher")
    assert (teacher.lr, teacher.optim.implementation, teacher.optim.betas) == (1e-3, "adamw", (0.9, 0.95))
    assert (teacher.attack.epsilon_warmup, teacher.optim.layer_decay, teacher.init) == (0.2, 1.0, None)


# ---------------------------------------------------------------- the state of an optimizer in a file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda o: o["state"][0].pop("step"), "'optimizer.state.0' holds"),
        (lambda o: o["state"][0].update(momentum_buffer=torch.ones(1)), "'optimizer.state.0' holds"),
        (lambda o: o["state"][0].update(step=torch.ones(2)), "'optimizer.state.0.step' is of shape"),
        (lambda o: o["state"][0].update(exp_avg=torch.ones(2)), "'optimizer.state.0.exp_avg' is of shape"),
        (lambda o: o["state"][0]["exp_avg_sq"].fill_(torch.inf), "'optimizer.state.0.exp_avg_sq' holds values"),
        (lambda o: o["param_groups"].pop(), "'optimizer.param_groups' holds 9, and not 10"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(change: Any, words: str, tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", optim=ADAMW, out=str(run)), StopAt(3))
    content = read_tensors(run / "last.pt").value
    change(content["optimizer"])
    write_tensors(run / "last.pt", content)
    with pytest.raises(ValueError, match=words) as refusal:
        lifecycle.resume(run)
    assert "\n" not in str(refusal.value)
    assert checkpoints.read(run / "last.pt")["progress"]["step"] == 3
