"""Teachers: the cache, runs of their own, and their configurations."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import config
from engine.common.console import Reporter
from engine.runs import assemble, lifecycle, teachers
from tests.runs.helpers import Listener


def test_a_teacher_is_trained_once_and_kept(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "iad2", "teacher": {"checkpoint": None}, "teacher_st": {"checkpoint": None}}
    first, second = Listener(), Listener()
    run = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "a")), first)
    assert json.loads((run.path / "teacher" / "summary.json").read_text())["method"] == "at"
    assert json.loads((run.path / "teacher_st" / "summary.json").read_text())["method"] == "st"
    again = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "b"), seed=0), second)
    assert not (again.path / "teacher").exists()
    assert any("training one first" in line for line in first.lines)
    assert any("teacher cache" in line for line in second.lines)
    records = [json.loads((path / "provenance.json").read_text())["teachers"] for path in (run.path, again.path)]
    assert records[0]["teacher"]["sha256"] == records[1]["teacher"]["sha256"]
    cards = [line for line in second.lines if "PGD-10" in line and "held-out" in line]
    assert len(cards) == 2


def test_another_teacher_s_run_is_not_taken_for_ours(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "ard", "teacher": {"checkpoint": None}, "out": str(tmp_path / "run")}
    lifecycle.train(tiny.config(**keys))
    (tmp_path / "run" / "teacher").rename(tmp_path / "teacher")
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "teacher").rename(tmp_path / "run" / "teacher")
    with pytest.raises(ValueError, match="holds the run of another teacher"):
        lifecycle.train(config.merge(tiny.config(**keys), {"teacher": {"epochs": 3}}))


def test_a_cache_that_cannot_be_written_loses_nothing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    listener = Listener()
    keys = {"method": "ard", "teacher": {"checkpoint": None}, "out": str(tmp_path / "run")}
    run = lifecycle.train(tiny.config(**keys), listener)
    assert any("cannot be kept" in line and "file" in line for line in listener.lines)
    record = json.loads((run.path / "provenance.json").read_text())
    assert record["teachers"]["teacher"]["source"].endswith(str(Path("teacher") / "best.pt"))


def test_test_images_do_not_make_another_teacher_where_validation_is_held_out(tiny: Any) -> None:
    def path(**keys: Any) -> Path:
        complete = config.load(tiny.config(method="ard", **keys))
        return teachers.cache_path(
            teachers.run_config(complete, "teacher"), assemble.load_data(complete, Reporter())
        )

    assert path(validation=0.2) == path(validation=0.2, limit_test=6)
    assert path(validation=0) != path(validation=0, limit_test=6)


def test_a_trades_teacher(tiny: Any, tmp_path: Path) -> None:
    keys = {"method": "ard", "teacher": {"checkpoint": None, "method": "trades", "epochs": 1}}
    run = lifecycle.train(tiny.config(**keys, out=str(tmp_path / "run")))
    teacher = config.load(config.read_file(run.path / "teacher" / "config.yaml"))
    assert (teacher.method, teacher.epochs, teacher.seed) == ("trades", 1, 1)
    assert (teacher.attack.loss, teacher.attack.random_start, teacher.attack.bn) == ("kl", "gaussian", "eval")
    assert teacher.attack.num_steps == 2  # the threat model and the length are the student's


def test_other_data_or_another_recipe_is_another_teacher(tiny: Any) -> None:
    def path(**keys: Any) -> Path:
        complete = config.load(tiny.config(method="ard", **keys))
        dataset = assemble.load_data(complete, Reporter())
        return teachers.cache_path(teachers.run_config(complete, "teacher"), dataset)

    base = path()
    assert path() == base
    assert path(out="elsewhere", log_every=7, loss={"beta": 0.5}, checkpoint_every=3) == base
    different = [
        path(epochs=3), path(limit_train=30), path(seed=1), path(attack={"epsilon": 0.1}), path(batch_size=4),
        path(teacher={"method": "trades"}), path(semantics="official"), path(optim={"weight_decay": 0}),
        path(model="resnet18"), path(amp=True), path(lr=0.05), path(augment=False), path(normalize=True),
    ]  # fmt: skip
    assert len({base, *different}) == 1 + len(different)


CACHED: dict[str, tuple[dict[str, Any], str]] = {
    "aa9e1373ce46": ({"method": "iad1"}, "teacher"),
    "4ea0c7819aab": ({"method": "iad2", "semantics": "official", "lr": 0.05, "validation": 0.1}, "teacher_st"),
    "9b7073db7ee0": (
        {"method": "akd2", "attack": {"epsilon": 0.1, "bn": "batch"}, "optim": {"schedule": "cosine"},
         "workers": 3},
        "teacher",
    ),
    "0ff456114d8e": (
        {"method": "iad1", "semantics": "official", "averaging": {"kind": "ema"}, "compile": "off", "seed": 4,
         "pipeline": "tensor", "eval": {"probe_size": 8, "batch_size": 3}},
        "teacher",
    ),
}  # fmt: skip
"""Places in the cache, with the student they were trained for, as version 0.1.0 had them when it was new."""


@pytest.mark.parametrize("digest", CACHED)
def test_teachers_of_before_are_still_found(digest: str) -> None:
    keys, section = CACHED[digest]
    dataset = SimpleNamespace(sha256="a" * 64, train_sha256="b" * 64)
    wanted = teachers.run_config(config.load(keys), section)
    assert teachers.cache_path(wanted, dataset).stem.endswith(digest)  # type: ignore[arg-type]


def test_a_key_that_came_later_makes_another_teacher_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset: Any = SimpleNamespace(sha256="a" * 64, train_sha256="b" * 64)
    before, after = (config.load({"method": "at", "loss": {"label_smoothing": value}}) for value in (0.0, 0.1))
    old = teachers.cache_path(before, dataset)
    assert teachers.cache_path(after, dataset) != old
    key = dataclasses.replace(config.KEYS["loss.label_smoothing"], later=True)
    without = config.part(before.tree(), lambda known: known.decides and not known.later)
    monkeypatch.setitem(config.KEYS, "loss.label_smoothing", key)
    found = config.part(before.tree(), lambda known: known.decides and not known.later)
    assert "label_smoothing" in without["loss"]
    assert "label_smoothing" not in found["loss"]
    new = teachers.cache_path(before, dataset)
    assert new != old, "as if the key had not been there when the first teachers were kept"
    assert teachers.cache_path(after, dataset) not in (new, old)


def test_official_standard_teachers_are_resnet18(tiny: Any) -> None:
    complete = config.load(tiny.config(method="akd2", semantics="official"))
    assert teachers.run_config(complete, "teacher_st").model == "resnet18"
    assert teachers.run_config(complete, "teacher").model == "resnet8"
