"""Built-in loggers: what each tool's own reader finds in its store is what metrics.jsonl holds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import register
from engine.common import optional
from engine.common.stopping import Interrupted
from engine.config import flat, load
from engine.plugins.builtin_loggers import delivery
from engine.plugins.builtin_loggers.delivery import Delivery, Memory
from engine.plugins.builtin_loggers.numbers_of import TIMINGS
from engine.plugins.builtin_loggers.run_facts import History, OpenedRun, RunFacts
from engine.plugins.loggers import Loggers
from engine.runs import lifecycle
from tests.runs.helpers import Listener
from tests.runs.test_resume import StopAt

TOOLS = [name for name in ("trackio", "wandb", "mlflow") if optional.version(name) is not None]


@dataclass
class Stored:
    """Content of a run in a tool: curves as (step, number), histograms, parameters, results, and how it ended."""

    curves: dict[str, list[tuple[int, float]]]
    histograms: dict[str, list[tuple[int, list[float]]]]
    parameters: dict[str, Any]
    results: dict[str, float]
    status: str = ""


@pytest.fixture(scope="module", autouse=True)
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Local stores of all tools, and no key of the user's."""
    root = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/mlflow.db")
        for name in ("WANDB_API_KEY", "WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(root / "none"))
        if "trackio" not in sys.modules:  # it reads the variable as it is imported
            patch.setenv("TRACKIO_DIR", str(root / "trackio"))
        patch.setenv("TRACKIO_PROJECT", f"tests-{os.getpid()}")
        yield root


def by_tag(rows: Sequence[Mapping[str, Any]], skipped: Sequence[str]) -> dict[str, list[tuple[int, Any]]]:
    """Values by name over their steps, in order."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in skipped and name.rpartition("/")[2] not in TIMINGS:
                found.setdefault(name, []).append((int(row["step"]), value))
    return found


def read_trackio(run: Path) -> Stored:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    project, known = os.environ["TRACKIO_PROJECT"], json.loads((run / "loggers.json").read_text())["trackio"]
    logs = storage.get_logs(project, run.name, run_id=known["id"])
    rows = [entry for entry in logs if "epoch" in entry]
    found = by_tag(rows, ("epoch", "step", "timestamp"))
    curves = {name: points for name, points in found.items() if not isinstance(points[0][1], dict)}
    shapes = {
        name: [(step, value["values"]) for step, value in points]
        for name, points in found.items()
        if name not in curves
    }
    results = {key: value for entry in logs if "epoch" not in entry for key, value in entry.items()}
    return Stored(curves, shapes, storage.get_run_config(project, run.name, run_id=known["id"]), results)


def read_mlflow(run: Path) -> Stored:
    client = importlib.import_module("mlflow.tracking").MlflowClient()
    found = client.get_run(json.loads((run / "loggers.json").read_text())["mlflow"]["id"])
    histories = {name: client.get_metric_history(found.info.run_id, name) for name in found.data.metrics}
    curves: dict[str, list[tuple[int, float]]] = {}
    bins: dict[str, dict[int, list[float]]] = {}
    results = {}
    for name, history in sorted(histories.items()):
        event, _, key = name.partition("/")
        if event not in ("step", "epoch"):
            results[name] = history[-1].value
        elif "_histogram/" in name:
            for point in history:
                bins.setdefault(name.rpartition("/")[0], {}).setdefault(point.step, []).append(point.value)
        elif key.rpartition("/")[2] not in TIMINGS and key != "epoch":
            curves[name] = [(point.step, point.value) for point in history]
    shapes = {name: sorted(by_step.items()) for name, by_step in bins.items()}
    return Stored(curves, shapes, found.data.params, results, found.info.status)


def read_wandb(run: Path) -> Stored:
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for folder in sorted(run.glob("wandb/offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
        for record in map(json.loads, lines):
            if record["type"] == "history":
                rows.append(record["history"]["item"])
            elif record["type"] == "run":
                config = record["run"]["config"]["update"]
            elif record["type"] == "summary":
                summary |= record["summary"]["update"]
    assert [row["_step"] for row in rows] == list(range(1, len(rows) + 1))
    found = by_tag(rows, ("epoch", "step", "_step", "_runtime", "_timestamp"))
    curves = {name: points for name, points in found.items() if "_histogram." not in name}
    shapes = {name.removesuffix(".values"): found[name] for name in found if name.endswith("_histogram.values")}
    results = {key: value for key, value in summary.items() if key.partition("/")[0] not in ("step", "epoch")}
    return Stored(curves, shapes, config, results, summary["status"])


READERS: dict[str, Callable[[Path], Stored]] = {
    "trackio": read_trackio,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


def held_by(run: Path) -> Stored:
    """The same from the files of the run itself."""
    curves: dict[str, list[tuple[int, float]]] = {}
    shapes: dict[str, list[tuple[int, list[float]]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        event, step = row.pop("event"), row.pop("step")
        for key, value in row.items():
            if isinstance(value, list):
                shapes.setdefault(f"{event}/{key}", []).append((step, value))
            elif isinstance(value, dict):
                for case, share in value.items():
                    curves.setdefault(f"{event}/{key}/{case}", []).append((step, share))
            elif key not in (*TIMINGS, "epoch", "measured_n") and not isinstance(value, str):
                curves.setdefault(f"{event}/{key}", []).append((step, value))
    return Stored(curves, shapes, {}, {})


@pytest.fixture(scope="module")
def logged(tiny: Any, tmp_path_factory: pytest.TempPathFactory, stores: Path) -> tuple[Path, Listener, str]:
    """A run that ended at the first row of its second epoch, after its last checkpoint, and went on.

    And how MLflow saw it in between.
    """
    if not TOOLS:
        pytest.skip("none of trackio, wandb and mlflow is installed")
    run, listener = tmp_path_factory.mktemp("runs") / "logged", Listener()

    def fail(row: Mapping[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KeyError("as if it were killed")

    with pytest.raises(KeyError):
        lifecycle.train(tiny.config(method="iad1", loggers=TOOLS, out=str(run)), listener, callbacks=[fail])
    between = read_mlflow(run).status if "mlflow" in TOOLS else ""
    lifecycle.resume(run, listener)
    return run, listener, between


@pytest.mark.parametrize("tool", READERS)
def test_a_resumed_run_is_whole_in_the_tool(tool: str, logged: tuple[Path, Listener, str]) -> None:
    if tool not in TOOLS:
        pytest.skip(f"{tool} is not installed")
    run, _, between = logged
    stored, held = READERS[tool](run), held_by(run)
    assert [step for step, _ in held.curves["epoch/robust_accuracy"]] == [6, 12]
    assert "epoch/probe_cases/both_right" in held.curves
    assert stored.curves == held.curves
    assert stored.histograms == held.histograms
    assert "epoch/probe_alpha_histogram" in held.histograms
    summary = json.loads((run / "summary.json").read_text())
    assert stored.results["best/epoch"] == summary["best"]["epoch"]
    assert stored.results["best/robust_accuracy"] == summary["best"]["robust_accuracy"]
    assert stored.results["test_of_last/pgd10"] == summary["test_of_last"]["pgd10"]["accuracy"]
    if tool == "wandb":
        assert stored.parameters["attack"]["num_steps"] == 2
        assert stored.parameters["provenance"]["engine"] == "0.1.0"
        assert stored.status == "finished"
        assert len(list(run.glob("wandb/offline-run-*"))) == 2
    else:
        assert str(stored.parameters["attack.num_steps"]) == "2"
        assert set(flat(load({"method": "iad1"}).tree())) <= set(stored.parameters)
    if tool == "mlflow":
        assert (between, stored.status) == ("FAILED", "FINISHED")


def test_the_user_is_told_where_and_nothing_else(logged: tuple[Path, Listener, str]) -> None:
    _, listener, _ = logged
    said = [line for line in listener.lines if "ogger" in line]
    assert [line.partition(":")[0] for line in said] == [f"Logger {name}" for name in TOOLS] * 2


def test_a_run_that_is_stopped_is_killed_there(tiny: Any, tmp_path: Path) -> None:
    """And a tool that is named when it goes on gets the rows of before."""
    if not {"mlflow", "trackio"} <= set(TOOLS):
        pytest.skip("mlflow or trackio is not installed")
    run = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", loggers="mlflow", out=str(run)), StopAt(9))
    assert read_mlflow(run).status == "KILLED"
    lifecycle.resume(run, loggers="mlflow,trackio")
    assert read_mlflow(run).status == "FINISHED"
    assert read_mlflow(run).curves == read_trackio(run).curves == held_by(run).curves


def test_the_files_of_wandb_tell_what_they_hold(tiny: Any, tmp_path: Path) -> None:
    """A killed session may have lost rows that it had counted, or not have counted its last ones."""
    if "wandb" not in TOOLS:
        pytest.skip("wandb is not installed")
    run = tmp_path / "miscounted"
    with pytest.raises(Interrupted):
        lifecycle.train(tiny.config(method="st", loggers="wandb", out=str(run)), StopAt(9))
    memory = json.loads((run / "loggers.json").read_text())
    memory["wandb"]["rows"] -= 2
    (run / "loggers.json").write_text(json.dumps(memory))
    lifecycle.resume(run)
    assert read_wandb(run).curves == held_by(run).curves


def test_the_bits_are_those_without_loggers(tiny: Any, tmp_path: Path) -> None:
    runs = {}
    for name, loggers in (("with", TOOLS), ("without", [])):
        keys = tiny.config(method="trades", epochs=1, loggers=loggers, out=str(tmp_path / name))
        path = lifecycle.train(keys).path
        runs[name] = torch.load(path / "last.pt", weights_only=True), held_by(path).curves
    (left, rows), (right, others) = runs.values()
    assert rows == others
    assert all(torch.equal(left["student"][key], right["student"][key]) for key in right["student"])


def test_a_package_that_is_not_installed(
    tiny: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "version", lambda *names: None)
    outcome = cli(*tiny.flags(method="st", out=str(tmp_path / "run")), "--log-to", "wandb")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "loggers: wandb needs the package wandb" in outcome.err
    assert "pip install 'iad-engine[wandb]'" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_not_known(tiny: Any, tmp_path: Path, cli: Any) -> None:
    outcome = cli(*tiny.flags(method="st", out=str(tmp_path / "run")), "--log-to", "wandbb")
    assert outcome.code == 2
    assert "'wandbb' is not known; did you mean 'wandb'? known: mlflow, tensorboard, trackio, wandb" in outcome.err
    with pytest.raises(ValueError, match="'mlflow' is built in"):
        register.logger("mlflow", print)


@pytest.mark.parametrize(
    ("mode", "message"),
    [("online", "WANDB_MODE=online needs a key"), ("of", "WANDB_MODE: 'of' is not known; ")],
)
def test_wandb_never_asks_for_a_key(
    mode: str, message: str, tiny: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "wandb" not in TOOLS:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", mode)
    outcome = cli(*tiny.flags(method="st", out=str(tmp_path / "run")), "--log-to", "wandb")
    assert (outcome.code, message in outcome.err, outcome.err.count("\n")) == (2, True, 1)


# ---------------------------------------------------------------- delivery, over a store in memory


@dataclass
class Memorised:
    """A tool whose runs are lists of rows."""

    says_rows: bool = True
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    fails_at: int = 0
    now: str = ""

    def place(self, facts: RunFacts) -> str:
        return "memory"

    def open(self, facts: RunFacts, name: str, known: str | None) -> OpenedRun:
        self.now = known or f"run-{len(self.runs)}"
        self.titles[self.now] = name
        rows = self.runs.setdefault(self.now, [])
        return OpenedRun(self.now, len(rows) if self.says_rows else None, "here")

    def log(self, row: Mapping[str, Any], number: int) -> None:
        if number == self.fails_at:
            raise OSError("no\nroom")
        self.runs[self.now].append(dict(row))
        assert number == len(self.runs[self.now])

    def close(self, numbers: Mapping[str, float], step: int, status: str) -> None:
        self.ended[self.now] = status


def rows_of(*losses: int) -> list[dict[str, Any]]:
    return [{"event": "step", "step": i, "epoch": 1, "loss": loss, "seconds": i} for i, loss in enumerate(losses)]


class Session:
    """A run's rows on their way to a tool; `file` is its metrics.jsonl."""

    def __init__(self, path: Path, tool: Memorised, file: list[dict[str, Any]], kept: int) -> None:
        withdrawn, self.file = file[kept:], file
        del file[kept:]
        history = History(RunFacts(path, {}, {}, {}), lambda: list(file), kept, withdrawn)
        self.delivery = Delivery("memory", tool, history, Memory(path))

    def write(self, *losses: int) -> None:
        for loss in losses:
            row = {"event": "step", "step": len(self.file), "epoch": 1, "loss": loss, "seconds": id(self)}
            self.file.append(row)
            self.delivery(dict(row))

    def cut(self, kept: int) -> None:
        self.wait()  # as the rows of an epoch have gone long before it is rolled back
        del self.file[kept:]
        self.delivery.cut(kept)

    def wait(self) -> None:
        done = threading.Event()
        self.delivery._tasks.put(done.set)
        while not done.wait(1):
            self.delivery.check()

    def kill(self) -> None:
        """End without `close`."""
        self.delivery._tasks.put(None)
        self.delivery._thread.join()
        self.delivery.check()


def losses(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("says_rows", [True, False])
def test_rows_that_are_written_again_are_not_sent_again(says_rows: bool, tmp_path: Path) -> None:
    """The second session is killed before it has written again what the first one had."""
    tool, file = Memorised(says_rows), list[dict[str, Any]]()
    first = Session(tmp_path, tool, file, 0)
    first.write(1, 2, 3, 4)
    first.kill()
    second = Session(tmp_path, tool, file, 1)
    second.write(2)
    second.kill()
    third = Session(tmp_path, tool, file, 1)
    third.write(2, 3, 4, 5)
    third.delivery.close("finished")
    assert [losses(rows) for rows in tool.runs.values()] == [[1, 2, 3, 4, 5]]
    assert list(tool.ended.values()) == ["finished"]


def test_what_a_tool_lost_is_sent_again(tmp_path: Path) -> None:
    """And where nobody knows any more what it has beyond the run's rows, a new run begins."""
    tool, file = Memorised(), list[dict[str, Any]]()
    first = Session(tmp_path, tool, file, 0)
    first.write(1, 2, 3)
    first.kill()
    del tool.runs[tool.now][1:]
    second = Session(tmp_path, tool, file, 3)
    second.write(4)
    second.kill()
    assert [losses(rows) for rows in tool.runs.values()] == [[1, 2, 3, 4]]
    del file[2:]
    third = Session(tmp_path, tool, file, 2)
    third.write(8)
    third.delivery.close("finished")
    assert [losses(rows) for rows in tool.runs.values()] == [[1, 2, 3, 4], [1, 2, 8]]


def test_other_rows_begin_a_new_run(tmp_path: Path) -> None:
    tool, file = Memorised(), list[dict[str, Any]]()
    first = Session(tmp_path, tool, file, 0)
    first.write(1, 2, 3)
    first.kill()
    second = Session(tmp_path, tool, file, 1)
    second.write(2, 9)
    second.cut(1)
    second.write(7)
    second.delivery.close("finished")
    assert [losses(rows) for rows in tool.runs.values()] == [[1, 2, 3], [1, 2, 9], [1, 7]]
    assert list(tool.ended.values()) == ["killed", "killed", "finished"]
    assert sum("begins a new run" in note for note in second.delivery.notes()) == 2
    name = tmp_path.name
    assert list(tool.titles.values()) == [name, f"{name} (2)", f"{name} (3)"]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 2)),
        st.tuples(st.just("resume"), st.integers(0, 3)),
        st.tuples(st.just("cut"), st.integers(0, 2)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, database=None)
@given(events=EVENTS, says_rows=st.booleans())
def test_the_tool_shows_the_rows_of_the_run(
    events: list[tuple[str, int]], says_rows: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After any rows, kills that take the last ones back, and rollbacks."""
    path, tool, file = tmp_path_factory.mktemp("run"), Memorised(says_rows), list[dict[str, Any]]()
    session = Session(path, tool, file, 0)
    for event, number in events:
        if event == "write":
            session.write(number)
        elif event == "cut":
            session.cut(max(0, len(file) - number))
        else:
            session.kill()
            session = Session(path, tool, file, max(0, len(file) - number))
    session.kill()
    shown = losses(tool.runs[tool.now])
    assert shown[: len(file)] == losses(file)
    still_known = Memory(path).get("memory")
    assert still_known is not None
    assert losses(still_known.ahead) == shown[len(file) :]


def test_a_logger_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of in one line; the other one gets every row."""
    from engine.plugins.builtin_loggers import table

    failing, other = Memorised(fails_at=2), Memorised()
    for name, tool in (("mlflow", failing), ("wandb", other)):
        made = table.BuiltIn("", (), lambda tool=tool: tool)  # type: ignore[misc]
        monkeypatch.setitem(table.BUILT_IN, name, made)
    said, file = list[str](), list[dict[str, Any]]()
    history = History(RunFacts(tmp_path, {}, {}, {}), lambda: list(file))

    def train() -> None:
        with Loggers(("mlflow", "wandb"), tmp_path, said.append, (), history) as opened:
            for row in rows_of(1, 2, 3):
                file.append(row)
                opened.write(row)
            raise Interrupted

    with pytest.raises(Interrupted):
        train()
    warnings = [line for line in said if line.startswith("Warning")]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "Warning: the logger mlflow failed and gets no more rows: OSError: no room (test_"
    )
    assert [losses(*tool.runs.values()) for tool in (failing, other)] == [[1], [1, 2, 3]]
    assert (failing.ended, list(other.ended.values())) == ({}, ["killed"])


def test_a_tool_that_does_not_answer_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its beginning nor its end keeps the run waiting."""
    monkeypatch.setattr(delivery, "SECONDS_TO_OPEN", 0.05)
    answer = threading.Event()
    tool = Memorised()
    monkeypatch.setattr(tool, "place", lambda facts: answer.wait(60) and "memory")
    session = Session(tmp_path, tool, [], 0)
    session.delivery.wait(0.05)
    assert "does not answer yet" in next(session.delivery.notes())
    session.write(1)
    with pytest.raises(TimeoutError, match="no answer in 0 s"):
        session.delivery.close("finished")
    answer.set()
    session.delivery._thread.join(30)
    assert losses(*tool.runs.values()) == [1]


def test_a_damaged_memory_is_told(tmp_path: Path) -> None:
    for text in ("[", "[1]", '{"wandb": {"id": 3}}'):
        (tmp_path / "loggers.json").write_text(text)
        with pytest.raises(ValueError, match=r"loggers\.json is damaged"):
            Memory(tmp_path)


def test_names_within_a_group(tmp_path: Path) -> None:
    run = tmp_path / "group" / "seed-3"
    (run / "teacher").mkdir(parents=True)
    (run / "config.yaml").touch()
    assert [RunFacts(path, {}, {}, {}).name for path in (run, run / "teacher", tmp_path)] == [
        "group/seed-3",
        "seed-3/teacher",
        tmp_path.name,
    ]
