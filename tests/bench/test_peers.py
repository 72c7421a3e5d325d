"""bench.peers: which published scripts are known, how they are run, and what the numbers mean."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import subprocess
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner

from bench import gate, peers
from bench.lib.machine import Facts
from bench.lib.output import chart, csv_rows
from bench.lib.output.csv_rows import MeasuredRow, PeerRow
from bench.lib.steps import published, textbook, variants
from bench.lib.steps.peer_process import PUBLISHED, Peer
from bench.lib.steps.plain import PlainStep
from bench.lib.steps.turns import PeerProcess, PeerRound
from engine import models
from tests.bench.readme import documented

FACTS = Facts(
    date="2026-01-02T03:04:05", commit="abc", device="cpu", processor="P", cores=2, threads=2, python="3",
    torch="2", triton="",
)  # fmt: skip
CPU = torch.device("cpu")
NUM_STEPS = 2
SCRIPT = f"""
import argparse, os, torch, torchvision
from torchvision import transforms
from tqdm import tqdm
from models import *

parser = argparse.ArgumentParser()
parser.add_argument('--model', default='ResNet18')
parser.add_argument('--teacher_model', default='ResNet18')
parser.add_argument('--dataset', default='CIFAR10')
parser.add_argument('--out-dir', default='./out')
parser.add_argument('--teacher_path', default='./none.pt')
args = parser.parse_args()
os.makedirs(args.out_dir)
print('a script talks')
to_tensor = transforms.ToTensor()
trainset = torchvision.datasets.CIFAR10(root='~/none', train=True, download=True, transform=to_tensor)
trainloader = torch.utils.data.DataLoader(trainset, batch_size=128, shuffle=True, num_workers=0)
basic_net = torch.nn.DataParallel(ResNet18(num_classes=10))
teacher_net = torch.nn.DataParallel(ResNet18(num_classes=10))
teacher_net.load_state_dict(torch.load(args.teacher_path)['state_dict'])
teacher_net.requires_grad_(False)

def train(epoch, optimizer, net, basic_net, teacher_net):
    for inputs, targets in tqdm(trainloader):
        assert inputs.shape == ({peers.QUICK_BATCH}, 3, 32, 32) and inputs.max() <= 1
        ones = torch.ones(len(inputs)).cuda()
        torch.cuda.synchronize()
        adv = inputs
        for _ in range({NUM_STEPS}):
            adv = adv.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(net(adv), targets)
            adv = adv + torch.autograd.grad(loss, [adv])[0].sign() / 255
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(adv.detach()), teacher_net(inputs) * ones[:, None]).backward()
        optimizer.step()

def main():
    optimizer = torch.optim.SGD(basic_net.parameters(), lr=0.1)
    train(0, optimizer, basic_net, basic_net, teacher_net)
    raise SystemExit('the epoch was never to end')

if __name__ == '__main__':
    main()
"""
NETWORK = (
    "from engine import models\ndef ResNet18(num_classes):\n    return models.build('resnet8', num_classes)\n"
)


@pytest.fixture
def iad(tmp_path: Path) -> Path:
    """A checkout with a script of the published form."""
    folder = tmp_path / "iad"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text(NETWORK)
    (folder / "ARD.py").write_text(SCRIPT)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=N", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# ---------------------------------------------------------------- which scripts these are


def test_a_script_of_the_published_form_is_known(iad: Path) -> None:
    published.check(iad, ["ard"])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("def train(epoch, ", "def train(", "it has no train(epoch, optimizer, net, basic_net"),
        ("def main():", "def start():", "it has no main()"),
        ("trainloader = ", "loader = ", "it has no trainloader"),
        ("'--teacher_path'", "'--teacher'", "it has no option --teacher_path"),
        ("'--dataset'", "'--model'", "it declares --model twice, which argparse refuses"),
        ("def main():", "def main(:", "it does not parse"),
    ],
)
def test_an_unknown_script_is_refused_in_one_line(iad: Path, old: str, new: str, told: str) -> None:
    (iad / "ARD.py").write_text(SCRIPT.replace(old, new))
    with pytest.raises(ValueError, match="ARD.py is not the published script of ard") as refused:
        published.check(iad, ["ard"])
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_not_there_is_told(iad: Path) -> None:
    with pytest.raises(ValueError, match="holds no IAD-II.py, the published script of iad2"):
        published.check(iad, ["ard", "iad2"])
    (iad / "models").rename(iad / "networks")
    with pytest.raises(ValueError, match="holds no folder models"):
        published.check(iad, ["ard"])


def test_the_commit_of_a_checkout_is_told_and_a_digest_where_there_is_none(iad: Path) -> None:
    digest = hashlib.sha256()
    for name, text in (("ARD.py", SCRIPT), ("models/__init__.py", NETWORK)):
        digest.update(f"{name} {len(text)}\n{text}".encode())
    assert published.identity(iad) == f"sha256 {digest.hexdigest()}"
    git(iad.parent, "init", "--quiet")  # that of another project, around it
    assert published.identity(iad) == f"sha256 {digest.hexdigest()}"
    git(iad, "init", "--quiet")
    git(iad, "add", ".")
    git(iad, "commit", "--quiet", "--message", "as published")
    commit = git(iad, "rev-parse", "HEAD")
    assert published.identity(iad) == commit
    (iad / "ARD.py").write_text(SCRIPT + "\n")
    edited = published.identity(iad)
    assert edited.startswith(f"{commit} edited, sha256 ")
    assert digest.hexdigest() not in edited


# ---------------------------------------------------------------- what is timed


def test_the_plain_step_is_the_textbook_s_with_another_way_to_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 16, 16, generator=generator)
    labels = torch.randint(10, (4,), generator=generator)
    states, held = [], []
    for kind in (textbook.TextbookStep, PlainStep):
        student, at, st = (textbook.plain(one).double() for one in variants.random_networks("resnet8", 10))
        sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        step = kind(textbook.StepSetting("at", num_steps=2), student, at, st, sgd)
        step.attack(x.double(), labels, x.double())
        held.append(any(weight.grad is not None for weight in student.parameters()))
        step(x.double(), labels, x.double())
        states.append(student.state_dict())
    assert held == [False, True]
    first, second = states
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize(
    ("wanted", "iad", "quick", "expected"),
    [
        ((), None, False, ("textbook", "plain", "expert", "expert-fp32", "engine", "engine-amp")),
        ((), Path("x"), True, ("published", "textbook", "plain", "engine", "engine-amp")),
        (("engine", "published"), Path("x"), False, ("published", "engine")),
    ],
)
def test_the_candidates(wanted: tuple[str, ...], iad: Path | None, quick: bool, expected: tuple[str, ...]) -> None:
    assert peers.chosen(wanted, iad, CPU, quick=quick) == expected


def test_as_published_needs_a_checkout_and_a_network_of_it(iad: Path) -> None:
    with pytest.raises(ValueError, match="--candidate published needs --iad PATH"):
        peers.chosen(["published"], None, CPU, quick=False)
    with pytest.raises(ValueError, match="--model resnet8: the published code has resnet18, "):
        peers.PublishedSource.of(iad, ["ard"], "resnet8")
    origin = peers.PublishedSource.of(iad, ["at", "ard"], "resnet18")  # there is no script of at
    peer = Peer("", "ard", "resnet18", 4, "random", "cpu")
    assert peers._peer(peer, PUBLISHED, None) is None
    assert peers._peer(dataclasses.replace(peer, method="at"), PUBLISHED, origin) is None
    found = peers._peer(peer, PUBLISHED, origin)
    assert found
    assert (found.iad, found.network) == (str(iad), "ResNet18")


def test_another_network_is_refused() -> None:
    peer = Peer(PUBLISHED, "ard", "resnet8", 4, "random", "cpu", "x", "ResNet18")
    first = PeerRound(1.0, 1.0, {"counted": {"forwards": 13.0, "backwards": 12.0}})
    same: Any = types.SimpleNamespace(first=published.size_of(models.build("resnet8", 10)))
    assert peers.passes_of(peer, same, first) == (13.0, 12.0)
    other: Any = types.SimpleNamespace(first=published.size_of(models.build("resnet8", 100)))
    with pytest.raises(ValueError, match=r"^the published ResNet18 has [\d,]+ parameters and .*; resnet8 has"):
        peers.passes_of(peer, other, first)


@pytest.mark.parametrize(
    ("method", "semantics", "expected"),
    [
        ("at", "paper", (11, 11)),
        ("ard", "paper", (13, 11)),  # S(x) for BatchNorm alone
        ("ard", "official", (13, 12)),
        ("iad1", "official", (16, 12)),
        ("akd2", "official", (13, 11)),
    ],
)
def test_the_passes_that_are_planned(method: str, semantics: str, expected: tuple[int, int]) -> None:
    assert peers.planned(method, semantics) == expected


def test_a_process_that_ends_is_told_of_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"exit code 2: .*error: unrecognized|exit code \d+: .*"):
        PeerProcess("calendar", {"no": "year"}, tmp_path)


def test_the_process_of_a_script_sees_one_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(device: str) -> str:
        return published.environment(torch.device(device))["CUDA_VISIBLE_DEVICES"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (seen("cpu"), seen("cuda"), seen("cuda:1")) == ("", "0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert seen("cuda:1") == "5"


# ---------------------------------------------------------------- rows


def rows(**seconds: Sequence[float]) -> list[PeerRow]:
    """Rows of ARD. seconds: of a step in each round, by candidate."""
    peaks = {name: 100.0 * (1 + index) for index, name in enumerate(seconds)}
    return [
        csv_rows.peer_row(
            FACTS,
            Peer(name, "ard", "resnet18", 128, "random", "cpu"),
            "abc" if name == PUBLISHED else "",
            seconds,
            1,
            (13.0, 11.0) if name == PUBLISHED else None,
            peaks,
        )
        for name in seconds
    ]


def test_the_ratios_are_those_of_a_round() -> None:
    theirs, plain, ours = rows(published=[2.0, 4.0, 12.0], plain=[3.0, 6.0, 12.0], engine=[1.0, 4.0, 3.0])
    assert (theirs.speedup_over_published, plain.speedup_over_plain) == (1, 1)
    assert (ours.speedup_over_published, ours.speedup_over_plain) == (2, 3)  # of 2, 1, 4 and of 3, 1.5, 4
    assert (ours.median_s, ours.epoch_s) == (3, 3 * 391)
    assert (ours.peak_mib, ours.relative_memory) == (300, 3)
    assert (theirs.source, ours.source) == ("abc", "")
    (alone,) = rows(engine=[1.0, 2.0])
    assert (alone.speedup_over_published, alone.speedup_over_plain, alone.relative_memory) == (None, None, None)


def test_other_passes_than_planned_are_told() -> None:
    (theirs, _) = found = rows(published=[1.0, 1.0], engine=[1.0, 1.0])
    assert peers.other_passes(found) == [
        "ard as published runs 13 passes, 11 with a backward pass; --semantics official plans 13 and 12"
    ]
    assert peers.other_passes([dataclasses.replace(theirs, backwards=12.0)]) == []


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    chart.draw_peers(tmp_path / "peers.png", rows(published=[1.0, 1.0], engine=[1.0, 1.0]))
    assert (tmp_path / "peers.png").stat().st_size > 5000


def test_the_columns_are_documented() -> None:
    common = len(dataclasses.fields(MeasuredRow))
    assert documented("peers.csv") == [field.name for field in dataclasses.fields(PeerRow)][common:]


# ---------------------------------------------------------------- the command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(peers.main, [str(one) for one in arguments])


def test_a_run_with_a_script(iad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *_: True)
    monkeypatch.setitem(published.NETWORKS, "resnet8", "ResNet18")
    small = ("--quick", "--model", "resnet8", "--device", "cpu", "--out", tmp_path / "out")
    done = invoke("--iad", iad, *small, "--method", "at", "--method", "ard", "--candidate", PUBLISHED)
    assert done.exit_code == 0, done.output
    assert "left out: at as published" in done.output
    assert f"ard as published runs {NUM_STEPS + 2} passes, {NUM_STEPS + 1} with a backward pass" in done.output
    with (tmp_path / "out" / "peers.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["candidate"], row["source"]) == (PUBLISHED, published.identity(iad))
    assert (row["forwards"], row["backwards"]) == (str(NUM_STEPS + 2), str(NUM_STEPS + 1))
    assert float(row["median_s"]) > 0
    assert float(row["peak_mib"]) > 0
    assert {path.name for path in iad.rglob("*")} == {"ARD.py", "models", "__init__.py"}  # left as it was


def test_a_run_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "tests_pass", lambda *_: True)
    small = ("--quick", "--model", "resnet8", "--device", "cpu", "--out", tmp_path)
    done = invoke(*small, "--method", "at", "--candidate", "engine")
    assert done.exit_code == 0, done.output
    assert "left out: published: no --iad PATH" in done.output
    with (tmp_path / "peers.csv").open() as file:
        (ours,) = csv.DictReader(file)
    assert (ours["speedup_over_published"], ours["speedup_over_plain"], ours["source"]) == ("", "", "")
    assert (ours["forwards"], ours["backwards"]) == ("11", "11")


def test_an_unknown_checkout_ends_with_exit_code_2(tmp_path: Path) -> None:
    done = invoke("--iad", tmp_path, "--quick", "--method", "ard", "--device", "cpu")
    assert done.exit_code == 2
    assert "holds no ARD.py" in done.output


def test_a_candidate_that_fails_is_named_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steps:
        first: ClassVar[dict[str, Any]] = {}

        def __init__(self, name: str) -> None:
            self.name, self.left = name, 2

        def __enter__(self) -> Steps:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def steps(self, count: int) -> PeerRound:
            if self.name == "plain" and not self.left:
                raise ChildProcessError("it fell over")
            self.left -= 1
            return PeerRound(1.0, 5.0, {})

    def start(peer: Peer, folder: Path) -> Steps:
        if peer.candidate == "expert":
            raise ChildProcessError("no compiler")
        return Steps(peer.candidate)

    monkeypatch.setattr(Peer, "start", start)
    failures: list[str] = []
    asked = [Peer(name, "at", "resnet8", 4, "random", "cpu") for name in ("plain", "expert", "engine")]
    (row,) = peers.measure(asked, 3, FACTS, "", failures)
    assert (row.candidate, row.rounds) == ("engine", 3)
    assert failures == ["at, expert: no compiler", "at, plain: it fell over"]
