"""--import, entry points, and what a run directory says of them."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine import config, methods
from engine.common.tensor_files import read_tensors
from engine.plugins import imports
from engine.plugins.origins import REGISTERED
from engine.runs.run_directory import RunDir
from engine.system import launcher
from tests.conftest import Cli

OWN = """
import torch
import torch.nn.functional as F
from torch import nn
from engine import register

register.method("by-terms", terms=lambda p: {"ce_nat": 0.5, "ce_adv": (0.25, 0.25)}, attack={"num_steps": 2})


def loss(logits, labels):
    far = F.kl_div(logits["s_adv"].log_softmax(1), logits["t_at_nat"].softmax(1), reduction="none").sum(1)
    return F.cross_entropy(logits["s_adv"], labels, reduction="none") + far


register.method("by-function", loss=loss, reads=[("student", "x_adv"), ("teacher", "x")], attack={"num_steps": 2})


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.shift = torch.full((3, 1, 1), 0.5)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
        )

    def forward(self, images):
        return self.model(images - self.shift)


register.model("net", Net, summary="one convolution", input_sizes=(8,))


def stripes():
    generator = torch.Generator().manual_seed(0)

    def part(count):
        labels = torch.arange(count) % 3
        images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        images[torch.arange(count), labels] += 100
        return images, labels

    return part(48), part(24)


register.dataset("stripes", stripes, class_names=("red", "green", "blue"), summary="coloured noise")
register.attack("signs", lambda model, x, y, epsilon: (x + epsilon * torch.randn_like(x).sign()).clamp(0, 1))


def count(row, run):
    with (run / "rows.txt").open("a") as file:
        print(row["event"], row["step"], file=file)


register.logger("count", count)
"""
KEYS = (
    "--method=by-function", "--model=net", "--dataset=stripes", "--epochs=3", "--batch-size=8", "--device=cpu",
    "--set=validation=0.25", "--set=loggers=[count]", "--set=eval.final=[natural,signs]", "--set=teacher.epochs=1",
    "--set=log_every=2", "--set=eval.probe_size=6",
)  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.py"
    path.write_text(OWN)
    return path


def engine(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        launcher.command(*map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def weights(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_tensors(path).value
    return {name: tensor.tolist() for name, tensor in value["student"].items()}


@pytest.mark.slow
def test_one_of_each_through_two_processes_a_kill_a_resume_eval_and_report(own: Path) -> None:
    whole = ended(engine("train", "--import", "my.py", *KEYS, "--procs", "2", "--out", "whole"))
    assert whole[0] == 0, whole[1]
    process = engine("train", "--import", "my.py", *KEYS, "--procs", "2", "--out", "killed")
    deadline = time.monotonic() + 100
    while not (own.parent / "killed/last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, told = ended(process)
    assert code == 130, told
    code, told = ended(engine("train", "--resume", "killed", "--procs", "2"))
    assert code == 2
    assert f"this run needs --import {own}" in told
    code, told = ended(engine("train", "--resume", "killed", "--import", "my.py", "--procs", "2"))
    assert code == 0, told
    assert weights(own.parent / "killed/last.pt") == weights(own.parent / "whole/last.pt")
    rows = [f"{row['event']} {row['step']}" for row in RunDir(own.parent / "whole").rows()]
    assert (own.parent / "whole/rows.txt").read_text().splitlines() == rows, "from the main process alone"
    for command in (["eval", "killed", "--attacks=natural,signs"], ["report", "whole", "killed", "--out=r.html"]):
        code, told = ended(engine(*command, "--import", own))
        assert code == 0, told
    report = json.loads((own.parent / "killed/best.pt.eval.json").read_text())
    assert "signs" in json.dumps(report)


def test_a_run_says_what_it_imported_and_a_change_of_it(own: Path, cli: Cli) -> None:
    keys = [*KEYS, "--epochs=1", "--method=by-terms", "--set=snapshot_every=0"]
    made = cli("train", "--import", "my.py", *keys, "--out", "run")
    assert made.code == 0, made.err
    run, begun = RunDir.existing(Path("run"))
    assert begun.imports == (str(own),)
    (session,) = run.sessions()
    before = session["plugins"]["imports"]
    assert before == {str(own): hashlib.sha256(own.read_bytes()).hexdigest()}
    own.write_text(OWN + "\n# changed\n")
    again = cli("train", "--resume", "run", "--import", "my.py", "--epochs", "2")
    assert again.code == 0, again.err
    assert f"Warning: {own} changed since this run's last session" in again.out
    assert RunDir(Path("run")).sessions()[-1]["plugins"]["imports"] != before


def test_own_networks_on_own_data_are_compared_as_teachers(own: Path, cli: Cli) -> None:
    made = cli("train", "--import", "my.py", *KEYS, "--epochs=1", "--out", "run")
    assert made.code == 0, made.err
    compared = cli("teachers", "run", "--import", "my.py", "--dataset", "stripes", "--device", "cpu")
    assert compared.code == 0, compared.err
    assert "24 test images of stripes" in compared.out


def test_nothing_is_run_because_a_file_names_it(own: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    own.write_text("raise SystemExit('it was run')")
    Path("config.yaml").write_text(f"imports: [{own}]\ndataset: digits\nmodel: resnet8\nmethod: at\n")
    monkeypatch.setattr(launcher, "launch", lambda *given, **keys: pytest.fail("processes were started"))
    for more in ([], ["--procs", "2"], ["--seeds", "0,1"]):
        told = cli("train", "--config", "config.yaml", "--device", "cpu", *more)
        assert told.code in (1, 2)
        assert f"needs --import {own}" in told.err + told.out
    Path("run").mkdir()
    Path("config.yaml").rename("run/config.yaml")
    for more in ([], ["--procs", "2"]):
        told = cli("train", "--resume", "run", "--device", "cpu", *more)
        assert told.code == 2
        assert f"needs --import {own}" in told.err
    told = cli("train", "--set", f"imports=[{own}]", "--dataset", "digits", "--device", "cpu")
    assert told.code == 2


def test_lists_have_what_is_imported(own: Path, cli: Cli) -> None:
    for command, name in (
        ("methods", "by-terms"),
        ("models", "net"),
        ("datasets", "stripes"),
        ("attacks", "signs"),
    ):
        assert name in cli(command, "--import", "my.py").out


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\nprint(y)", r"--import bad.py: NameError: name 'y' is not defined \(bad.py, line 2\)"),
        ("def f(:", r"--import bad.py: SyntaxError: .* \(bad.py, line 1\)"),
        ("raise SystemExit(3)", "--import bad.py: SystemExit: 3"),
        ("import nothing_of_that_name", "--import bad.py: ModuleNotFoundError"),
        ("import beside", "--import bad.py: ModuleNotFoundError: No module named 'beside'"),
        ("from engine import register\nregister.model('at', 3)", "--import bad.py: model 'at': builder"),
        ("\0", "--import bad.py: "),
    ],
)
def test_a_file_that_fails_is_told_in_one_line(text: str, told: str, own: Path) -> None:
    Path("bad.py").write_text(text)
    Path("beside.py").write_text("")
    for _ in range(2):
        with pytest.raises(ValueError, match=told) as error:
            imports.load("bad.py")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing.py", "cannot read missing.py: No such file"),
        ("folder.py", "cannot read folder.py: Is a directory"),
        ("my.txt/", "is no Python file"),
        ("a-b", "is no Python file NAME.py and no module"),
        ("my", "no module of that name is installed"),
        ("", "is no Python file"),
        ("sys.path", "No module|ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_imported_is_told(name: str, told: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    Path("folder.py").mkdir()
    with pytest.raises(ValueError, match=f"--import.*({told})"):
        imports.load(name)


def test_a_file_is_read_again_only_where_it_changed(own: Path) -> None:
    log = own.with_name("log")
    own.write_text(
        f"open({str(log)!r}, 'a').write('x')\n"
        "from engine import register\nregister.method('m', terms={'ce_nat': 1})"
    )
    assert imports.load("my.py", str(own)) == (str(own), str(own))
    assert log.read_text() == "x"
    own.write_text(own.read_text().replace("1}", "2}"))
    imports.load("my.py")
    assert log.read_text() == "xx"
    assert methods.get("m").weights["ce_nat"].a == 2
    assert not own.with_name("__pycache__").exists()


def test_a_module_is_imported_from_the_path_of_modules(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = own.parent / "installed"
    (place / "their_package").mkdir(parents=True)
    (place / "their_package/__init__.py").write_text("")
    (place / "their_package/methods.py").write_text(
        "from engine import register\nregister.method('theirs', terms={'ce_nat': 1})"
    )
    monkeypatch.syspath_prepend(str(place))
    assert imports.load("their_package.methods") == ("their_package.methods",)
    assert REGISTERED["method", "theirs"].where == "their_package.methods"
    assert len(REGISTERED["method", "theirs"].version) == 64
    wanted = config.load({"method": "theirs", "imports": ["their_package.methods"]})
    imports.check_loaded(wanted)
    assert imports.arguments(wanted) == ["--import", "their_package.methods"]


def test_installed_packages_register_by_their_entry_points(
    own: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    for name, text in (
        ("good", "from engine import register\ndef add():\n    register.method('of-good', terms={'ce_nat': 1})"),
        ("broken", "import nothing_of_that_name"),
    ):
        (own.parent / f"{name}_plugin.py").write_text(text)
        info = own.parent / f"{name}_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[engine.plugins]\n{name} = {name}_plugin{':add' * (name == 'good')}\n"
        )
    monkeypatch.syspath_prepend(str(own.parent))
    monkeypatch.setattr(imports, "_installed", [])
    found = cli("methods")
    assert found.code == 0
    assert "of-good" in found.out
    assert (
        "engine: Warning: the plugin broken_plugin of the package broken-plugin 1.0 failed: ModuleNotFoundError: "
        "No module named 'nothing_of_that_name' (broken_plugin.py, line 1)"
    ) in found.err
    assert cli("methods").err == "", "told once a process"
    used = imports.record(config.load({"method": "of-good"}))
    assert used == {"imports": {}, "packages": ["good-plugin 1.0"]}
    assert imports.record(config.load({"method": "at"}))["packages"] == []
    assert imports.changed(used, used | {"packages": ["good-plugin 1.1"]}) == [
        "the plugin packages were good-plugin 1.0, and are good-plugin 1.1"
    ]


def test_help_loads_no_plugin(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr(imports, "load_installed", lambda say: pytest.fail("plugins were loaded"))
    for command in (["--help"], ["train", "--help"], ["eval", "--help"], ["--version"]):
        assert cli(*command).code == 0
