"""Whose a run directory is, which one `--resume auto` goes on with, and what of it may be taken back."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import config
from engine.common.stopping import EXIT_USER_ERROR, Interrupted, RunFailed
from engine.pipelines import datasets
from engine.runs import lifecycle
from engine.runs.run_directory import PreparedRun, RunDir
from engine.system import launcher
from tests.runs.test_resume import StopAt, assert_same_run, start

WANTED: dict[str, Any] = {"method": "at", "dataset": "digits", "model": "resnet8", "epochs": 2}


def begun(name: str, age: float, **keys: Any) -> RunDir:
    """A run below runs/ that was configured so many seconds ago."""
    run = RunDir.create(config.load(WANTED, keys, {"out": f"runs/{name}"})).run
    now = run.config.stat().st_mtime
    os.utime(run.config, (now - age, now - age))
    return run


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_a_place_it_is_the_latest_unfinished_one_of_the_same_settings() -> None:
    wanted = config.load(WANTED)
    assert RunDir.find(wanted) is None
    begun("older", 20)
    begun("latest", 10)
    begun("finished", 5).summary.write_text("{}")
    begun("of another seed", 4, seed=1)
    begun("damaged", 3).config.write_text("method: [")
    begun("of another version", 2).config.write_text("method: at\nno_such_key: 1\n")
    found = RunDir.find(wanted)
    assert found is not None
    assert found.run.path == Path("runs/latest")


def test_runs_that_begin_at_once_have_places_of_their_own() -> None:
    with ThreadPoolExecutor(8) as pool:  # as the jobs of an array, one for each seed
        runs = list(pool.map(lambda seed: RunDir.create(config.load(WANTED, {"seed": seed})).run, range(8)))
    assert len({run.path for run in runs}) == 8
    for seed, run in enumerate(runs):
        assert RunDir.existing(run.path)[1].seed == seed


def test_in_its_place_it_must_have_the_same_settings() -> None:
    run = begun("mine", 0)
    same = config.load(WANTED, {"out": str(run.path)})
    found = RunDir.find(same)
    assert found is not None
    assert found.run.path == run.path
    with pytest.raises(ValueError, match="holds a run of another configuration, which differs in lr, seed$"):
        RunDir.find(config.load(WANTED, {"out": str(run.path), "seed": 1, "lr": 0.2}))
    assert RunDir.find(config.load(WANTED, {"out": "runs/none"})) is None


def test_the_same_call_goes_on_and_then_begins_anew(tiny: Any, tmp_path: Path) -> None:
    keys = tiny.config(method="at")
    whole = lifecycle.train(keys | {"out": str(tmp_path / "whole")})
    with pytest.raises(Interrupted):
        lifecycle.train(keys, StopAt(4), again=True)
    (stopped,) = Path("runs").iterdir()
    result = lifecycle.train(keys, again=True)
    assert result.path.resolve() == stopped.resolve()
    assert_same_run(whole.path, result.path)
    later = lifecycle.begin(config.load(keys), again=True).run
    assert later.path != result.path, "what is finished is not the one to go on with"


# ---------------------------------------------------------------- what a call made, and what it may take back


@contextmanager
def held(run: RunDir) -> Iterator[None]:
    """As by a process that trains it: a lock of its own."""
    directory = os.open(run.path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(directory)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_place_is_given_to_one_run_alone() -> None:
    """One of eight that begin in it at once, each with its own seed, has it, and its configuration is whole."""

    def begin(seed: int) -> str:
        try:
            RunDir.create(config.load(WANTED, {"seed": seed, "out": "runs/one"}))
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(begin, range(8)))
    assert said.count("") == 1
    assert all("--out runs/one holds a run already" in text for text in said if text)
    assert RunDir.existing(Path("runs/one"))[1].seed == said.index("")
    assert [path.name for path in Path("runs/one").iterdir()] == ["config.yaml"]


ENTRIES = ("logs/1/process-1.log", "log.txt", "provenance.json", "teacher/config.yaml", "teacher_st/last.pt",
           "metrics.jsonl", "last.pt", "best.eval.json", "notes.txt")  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.sets(st.sampled_from(ENTRIES)),
    is_new=st.booleans(),
    made_folder=st.booleans(),
    is_held=st.booleans(),
)
def test_only_what_this_call_made_and_nobody_entered_is_taken_back(
    entries: set[str], is_new: bool, made_folder: bool, is_held: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("place") / "run"
    if not made_folder:
        place.mkdir()
    begun = RunDir.create(config.load(WANTED, {"out": str(place)}))
    assert (begun.is_new, begun.made_folder) == (True, made_folder)
    for entry in entries:
        (place / entry).parent.mkdir(parents=True, exist_ok=True)
        (place / entry).write_bytes(b"precious")
    before = contents(place)
    with held(begun.run) if is_held else nullcontext():
        (begun if is_new else PreparedRun(begun.run)).remove_if_unused()
    unentered = entries <= {"logs/1/process-1.log", "log.txt"}
    if is_new and unentered and not is_held:
        del before["config.yaml"]
    assert (contents(place) if place.exists() else {}) == before
    assert place.exists() == (bool(before) or not made_folder)


def test_a_failure_takes_back_what_is_new_and_nothing_else() -> None:
    for error in (ValueError("data"), RunFailed("disk")):
        begun = RunDir.create(config.load(WANTED, {"out": "runs/new"}))
        with pytest.raises(type(error)), begun.removed_on_failure():
            raise error
        assert not Path("runs/new").exists()
    run = RunDir.create(config.load(WANTED, {"out": "runs/old"})).run
    with pytest.raises(ValueError, match="data"), PreparedRun(run).removed_on_failure():
        raise ValueError("data")
    assert run.config.exists()


def test_a_run_that_was_taken_back_meanwhile_is_no_run() -> None:
    begun = RunDir.create(config.load(WANTED, {"out": "runs/gone"}))
    begun.remove_if_unused()
    with pytest.raises(ValueError, match="--resume: cannot use runs/gone: No such file"), begun.run.locked():
        pass
    Path("runs/gone").mkdir()
    with pytest.raises(ValueError, match="--resume: runs/gone is no run directory"), begun.run.locked():
        pass


FAULTS = {
    "data that are not mounted": ["--set", "data=/nowhere"],
    "a second process": [],
    "a wrong batch": ["--set", "batch_size=7", "--procs", "2"],
    "another configuration": ["--lr", "0.3"],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("again", ["--resume auto", "--out", "--resume"])
def test_a_run_that_waits_for_its_teacher_keeps_its_configuration(
    fault: str, again: str, tiny: Any, cli: Any, tmp_path: Path
) -> None:
    """Before its teachers are there a run is nothing but config.yaml: no other command may remove that."""
    run = tmp_path / "run"
    flags = tiny.flags(method="st", out=str(run))
    begun = RunDir.create(config.with_absolute_paths(config.load(tiny.config(method="st"), {"out": str(run)})))
    (run / "teacher").mkdir()
    (run / "teacher" / "last.pt").write_bytes(b"half trained")
    before = contents(run)
    if again == "--resume":
        arguments = ["train", "--resume", str(run), *FAULTS[fault]]
    else:
        arguments = [*flags, *FAULTS[fault], *(["--resume", "auto"] if again == "--resume auto" else [])]
    with held(begun.run):
        outcome = cli(*arguments)
    assert outcome.code == EXIT_USER_ERROR, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert contents(run) == before


@pytest.mark.parametrize("how", ["new", "auto", "resume"])
def test_the_launcher_takes_back_what_it_began(
    how: str, tiny: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "launch", lambda *arguments: EXIT_USER_ERROR)
    run, flags = tmp_path / "run", [*tiny.flags(method="st", out=str(tmp_path / "run")), "--resume", "auto"]
    if how != "new":
        RunDir.create(config.with_absolute_paths(config.load(tiny.config(method="st"), {"out": str(run)})))
    arguments = ["train", "--resume", str(run)] if how == "resume" else flags
    assert cli(*arguments, "--procs", "3" if how == "resume" else "2").code == EXIT_USER_ERROR
    assert run.exists() == (how != "new")


@pytest.mark.parametrize("auto", [(), ("--resume", "auto")], ids=["new", "auto"])
def test_two_identical_commands_at_once(auto: tuple[str, ...], tiny: Any, tmp_path: Path) -> None:
    """One trains; the other says so in one line and leaves everything as it is."""
    run = tmp_path / "run"
    flags = [*tiny.flags(method="st", epochs=2, out=str(run)), *auto]
    processes = [start(flags), start(flags)]
    ended = [(*process.communicate(timeout=240), process.returncode) for process in processes]
    codes = sorted(code for *_, code in ended)
    assert codes in ([0, 2], [0, 0]) if auto else codes == [0, 2], ended  # the second may come when all is done
    for _, err, code in ended:
        assert code == 0 or len(err.strip().splitlines()) == 1, err
    assert json.loads((run / "summary.json").read_text())["last"]["epoch"] == 2


# ---------------------------------------------------------------- places that are none


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """Inside, this process may do nothing in that folder."""
    is_root = os.geteuid() == 0
    folder.chmod(0o700 if is_root else 0)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o700)


@pytest.mark.parametrize("how", ["--out", "--resume", "--resume auto"])
@pytest.mark.parametrize("place", ["x" * 300, "locked/run", "file/run", "loop/run", "locked"])
def test_a_place_that_cannot_be_used(how: str, place: str, tiny: Any, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "loop").symlink_to("loop")
    path = str(tmp_path / place)
    arguments = ["train", "--resume", path]
    if how != "--resume":
        arguments = [*tiny.flags(method="st", out=path), *(["--resume", "auto"] if "auto" in how else [])]
    with without_permission(tmp_path / "locked"):
        outcome = cli(*arguments)
    assert outcome.code == EXIT_USER_ERROR, outcome.err
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith(f"engine: {how.removesuffix(' auto') if how == '--resume' else '--out'}"), line
    assert place[:50] in line


def test_data_that_cannot_be_read_leave_nothing_behind(
    tiny: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/data/train")

    monkeypatch.setattr(datasets, "find", refused)
    outcome = cli(*tiny.flags(method="st", out=str(tmp_path / "run")))
    assert outcome.code == EXIT_USER_ERROR
    assert outcome.err == "engine: data: cannot read /data/train: Permission denied\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["data", "teacher.checkpoint", "teacher_st.checkpoint"])
def test_a_user_who_is_not_there(key: str, tiny: Any, cli: Any, tmp_path: Path) -> None:
    outcome = cli(*tiny.flags(method="st", out=str(tmp_path / "run")), "--set", f"{key}=~nosuchuser/x")
    assert outcome.code == EXIT_USER_ERROR
    assert outcome.err == f"engine: {key}: ~nosuchuser/x begins with a user who has no home here\n"
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- files that somebody changed

ROW = {"epoch": 2, "natural_accuracy": 0.5, "robust_accuracy": 0.25, "measured_on": "test"}
RESULT = {"natural": {"accuracy": 0.5, "n": 10, "description": "no attack"}}
SUMMARY: dict[str, Any] = {
    "selected_on": "test",
    "best": ROW,
    "last": ROW,
    "test_of_best": RESULT,
    "test_of_last": RESULT,
}


def damaged() -> Iterator[tuple[str, object]]:
    """A finished run's summary with one thing missing, or of a wrong type."""
    others: list[Any] = [3, None, "x", []]
    for key in ("best", "last"):
        yield f"no {key}", {name: value for name, value in SUMMARY.items() if name != key}
        for inner in ROW:
            yield f"{key} without {inner}", SUMMARY | {key: {name: 1 for name in ROW if name != inner}}
        for other in others:
            yield f"{key} {other!r}", SUMMARY | {key: other}
    for other in (*others, {"natural": 3}, {"natural": {"n": 10}}, {"natural": RESULT["natural"] | {"n": None}}):
        yield f"test_of_best {other!r}", SUMMARY | {"test_of_best": other}
    for other in others:
        yield f"{other!r}", other


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in damaged()])
def test_a_damaged_summary_is_named(content: object, cli: Any) -> None:
    run = begun("mine", 0)
    run.summary.write_text(json.dumps(content))
    outcome = cli("train", "--resume", str(run.path))
    assert outcome.code == EXIT_USER_ERROR
    (line,) = outcome.err.strip().splitlines()
    assert f"{run.summary} is damaged" in line


FORMATS = '"precision": {"training": "float32"}'


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", "\xff", '{"precision": 3}', f'{{{FORMATS}, "earlier_sessions": 3}}',
     f'{{{FORMATS}, "earlier_sessions": [3]}}'],
)  # fmt: skip
def test_provenance_that_is_damaged_is_named(content: str, cli: Any) -> None:
    run = begun("mine", 0)
    run.provenance.write_bytes(content.encode("latin-1"))
    outcome = cli("train", "--resume", str(run.path), "--device", "cpu")
    assert outcome.code == EXIT_USER_ERROR
    (line,) = outcome.err.strip().splitlines()
    assert f"{run.provenance} is damaged" in line


def test_a_damaged_key_is_named_with_its_fault() -> None:
    run = begun("mine", 0)
    run.summary.write_text(json.dumps({"best": {"epoch": "third"}}))
    with pytest.raises(ValueError, match=r"summary\.json is damaged: selected_on: Field required$"):
        run.read_summary()


@pytest.mark.parametrize("line", ["3", "{", "[1]", "null"])
def test_a_damaged_row_is_named_with_its_line(line: str) -> None:
    run = begun("mine", 0)
    run.metrics.write_text(f'{{"event": "step"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 2 is no row"):
        list(run.rows())
