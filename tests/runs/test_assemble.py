"""Parts of a run: what the configuration makes of them, with and without a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import engine
from engine import config, register
from engine.common.console import Reporter
from engine.pipelines import datasets
from engine.pipelines.splits import Request
from engine.runs import assemble, lifecycle, trainer
from engine.system import precision
from engine.training import schedule
from tests.runs.helpers import Bar


@pytest.mark.parametrize("method", ["trades", "iad2"])
def test_the_functions_build_what_a_run_trains(method: str, tiny: Any, tmp_path: Path) -> None:
    """Without a run directory, as benchmarks do, to the bit."""
    keys = tiny.config(method=method, epochs=1, validation=0.2, loss={"warmup": 0}, seed=3)
    run = lifecycle.train(keys, out=str(tmp_path / "run"))
    trained = torch.load(run.path / "last.pt", weights_only=True)["student"]

    run_config = config.load(keys)
    at = precision.choose(run_config)
    dataset = assemble.load_data(run_config, Reporter())
    training, _, name = assemble.hold_out(dataset, run_config.validation)
    assert (name, len(training)) == ("validation", 34)
    student = assemble.build_student(run_config, training, at)
    sections = assemble.teacher_sections(run_config)
    assert sections == {"trades": (), "iad2": ("teacher", "teacher_st")}[method]
    teachers = {section: load_teacher(getattr(tiny, section), run_config, training, at) for section in sections}
    counts = assemble.build_telemetry(run_config, (3, 8, 8), at).attack_counts
    learner = assemble.build_learner(run_config, student, teachers, at, counts=counts)
    pipeline = assemble.build_pipeline(run_config, training, at, flips=dataset.flip)
    with precision.deterministic():
        student.train()
        for step, batch in enumerate(pipeline.epoch(0)):
            rate = schedule.learning_rate(run_config, step, pipeline.steps_per_epoch)
            learner.learn(batch, learner.method, rate)
    pipeline.close()
    for key, value in student.state_dict().items():
        assert torch.equal(value, trained[key]), key


def test_the_bar_of_reading_ends_when_data_cannot_be_read(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bar, was_shown = Bar(), []

    def find(name: str, data: str | None, request: Request) -> None:
        assert request.progress is not None
        request.progress("train", 1, 10)
        was_shown.append(bar.is_shown)
        raise PermissionError(13, "Permission denied", "train/0.png")

    monkeypatch.setattr(datasets, "find", find)
    with pytest.raises(ValueError, match=r"^data: cannot read train/0\.png: Permission denied$"):
        assemble.load_data(config.load(tiny.config()), bar)
    assert was_shown == [True]
    assert not bar.is_shown


def load_teacher(path: Path, run_config: config.RunConfig, data: Any, at: precision.Precision) -> torch.nn.Module:
    teacher = assemble.build_student(run_config, data, at)
    teacher.load_state_dict(torch.load(path, weights_only=True)["student"])
    return teacher.eval().requires_grad_(False)


class Tokens(nn.Module):
    """Normalises the tokens of all images together, as several transformers do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 4, 4), nn.BatchNorm1d(6), nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x_BNC = self.conv(images).flatten(2).mT
        logits: Tensor = self.head(self.norm(x_BNC.flatten(0, 1)).view_as(x_BNC).mean(1))
        return logits


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"batch_size": 41}, True),  # 42 images: the last batch has one
        ({"batch_size": 1}, True),
        ({"micro_batch": 1}, True),
        ({"batch_size": 41, "model": "resnet8"}, False),  # its last map is 2x2
        ({"batch_size": 41, "model": "tokens"}, False),
        ({"batch_size": 40, "micro_batch": 3}, False),
    ],
    ids=str,
)
def test_one_image_of_which_batch_norm_has_no_variance(
    keys: dict[str, Any], says: bool, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the training, and only where a map has one pixel: torch refuses the step itself."""
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: {})
    register.model("tokens", Tokens, input_sizes=(8,))
    run = tiny.config(**{"method": "st", "model": "resnet18", "teacher": {"checkpoint": None}} | keys)
    if not says:
        engine.train(run, out=str(tmp_path / "run"))
        return
    with pytest.raises(ValueError, match="^batch_size: a batch or a part of one has a single image, and resnet18"):
        engine.train(run, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
