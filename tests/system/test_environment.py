"""The commit that a run records of the source tree that it runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import engine
from engine.system import environment


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "engine").mkdir()
    source = tmp_path / "engine" / "__init__.py"
    source.touch()
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(engine, "__file__", str(source))
    return tmp_path


def test_the_commit_tells_of_edited_and_new_sources(checkout: Path) -> None:
    clean = environment.commit()
    assert clean is not None
    assert len(clean) == 40
    source = checkout / "engine" / "more.py"
    source.touch()
    assert environment.commit() == f"{clean}+changes"
    source.unlink()
    (checkout / "engine" / "__init__.py").write_text("1\n")
    assert environment.commit() == f"{clean}+changes"


def test_results_of_measurements_are_no_changes_of_the_sources(checkout: Path) -> None:
    clean = environment.commit()
    results = checkout / "bench" / "results" / "here"
    results.mkdir(parents=True)
    (results / "step.csv").touch()
    assert environment.commit() == clean
    (checkout / "bench" / "step.py").touch()
    assert environment.commit() == f"{clean}+changes"


def test_without_a_checkout_there_is_no_commit(checkout: Path) -> None:
    (checkout / ".git").rename(checkout / "git")
    assert environment.commit() is None
