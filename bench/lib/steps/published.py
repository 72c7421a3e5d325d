"""The training scripts that the IAD paper's authors published, run from a checkout of them, which is not here.

A script runs unmodified, as `python ARD.py ...` would run it. What is put around it: images in the place of the
data set that it would download, a loader that waits for orders between two batches, teachers of random weights
in files, and on a CPU the calls for a GPU do nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bench.lib.memory import Meter, import_compiler
from bench.lib.steps.turns import Turns
from bench.lib.timing import EPOCH_IMAGES
from engine.common.lookup import look_up
from engine.pipelines.splits import Split
from engine.training.performance.speed import forward_flops

NETWORKS = {"resnet18": "ResNet18", "mobilenetv2": "MobileNetV2", "wrn34-10": "WideResNet"}
"""Names of the networks in the scripts, by ours."""
IMAGE_CHW = (3, 32, 32)
STUDENT, TEACHERS = "basic_net", ("teacher_net", "teacher_st_net")


@dataclass(frozen=True)
class Script:
    """A script by its file. teachers: options that name their checkpoints. after_warmup: ends the warm-up."""

    file: str
    teachers: tuple[str, ...] = ("--teacher_path",)
    after_warmup: tuple[str, ...] = ()

    @property
    def options(self) -> tuple[str, ...]:
        """Options that are given to it."""
        return ("--model", "--teacher_model", "--dataset", "--out-dir", *self.teachers, *self.after_warmup[::2])


_TWO = ("--teacher_path", "--teacher_st_path")
SCRIPTS = {
    "ard": Script("ARD.py"),
    "iad1": Script("IAD-I.py", after_warmup=("--begin", "0")),
    "akd2": Script("AKD2.py", _TWO),
    "iad2": Script("IAD-II.py", _TWO, ("--begin", "0")),
}


# ---------------------------------------------------------------- which scripts these are


def check(folder: Path, methods: Iterable[str]) -> None:
    """Raise ValueError, one line, where a method's script is not there or not of the published form."""
    for method in methods:
        script = look_up("method", method, SCRIPTS)
        path = folder / script.file
        if not path.is_file():
            raise ValueError(f"--iad {folder}: it holds no {script.file}, the published script of {method}")
        if fault := _fault(path, script):
            raise ValueError(f"--iad {folder}: {script.file} is not the published script of {method}: {fault}")
    if not (folder / "models").is_dir():
        raise ValueError(f"--iad {folder}: it holds no folder models, with the networks of the published scripts")


def _fault(path: Path, script: Script) -> str:
    """Reason why a script cannot be run, "" where it can."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        return f"it does not parse ({error.args[0]})"
    takes = {
        node.name: [one.arg for one in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    if takes.get("train", [])[:4] != ["epoch", "optimizer", "net", "basic_net"]:
        return "it has no train(epoch, optimizer, net, basic_net, ...)"
    if "main" not in takes:
        return "it has no main()"
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if missing := {STUDENT, *TEACHERS[: len(script.teachers)], "trainloader"} - bound:
        return f"it has no {', '.join(sorted(missing))}"
    declared = Counter(_options(tree))
    if twice := [name for name, count in declared.items() if count > 1]:
        return f"it declares {', '.join(twice)} twice, which argparse refuses"
    if unknown := [name for name in script.options if name not in declared]:
        return f"it has no option {', '.join(unknown)}"
    return ""


def _options(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "add_argument"
        ):
            yield from (str(one.value) for one in node.args if isinstance(one, ast.Constant))


def identity(folder: Path) -> str:
    """The commit of a git checkout; where it was edited the digest too, and where it is none the digest alone.

    The digest is a SHA-256 of the Python files, their names and contents.
    """
    commit, is_edited = _commit(folder)
    if commit and not is_edited:
        return commit
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return f"{commit} edited, " * bool(commit) + f"sha256 {digest.hexdigest()}"


def _commit(folder: Path) -> tuple[str, bool]:
    """The commit of a checkout, "" where the folder is the root of none, and whether its files were edited."""
    if not (folder / ".git").exists():  # in a folder of another checkout, git would tell of that one
        return "", False

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.SubprocessError):
        return "", False


# ---------------------------------------------------------------- the process that runs one


def environment(device: torch.device) -> dict[str, str]:
    """Variables of the process: it sees the one GPU, or none, and leaves nothing in the checkout."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index or 0
    gpu = str(index) if seen is None else seen.split(",")[index]
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": gpu if device.type == "cuda" else "",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def serve(
    answers: Any, method: str, folder: Path, network: str, batch_size: int, images: Split, scratch: Path
) -> None:
    """Run a method's script, step by step as it is ordered.

    network: its name in there. images: NHWC bytes. scratch: a folder for its files.
    """
    script, device = SCRIPTS[method], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        _without_gpu()
    _without_advertorch()
    sys.path.insert(0, str(folder))
    importlib.import_module("tqdm")
    import_compiler()
    turns = Turns(answers, device, Meter(device))
    arguments, size = _teachers(network, script, len(images.class_names), scratch)
    turns.tell(**size)
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(folder / script.file)}
    _give_images(images, batch_size, lambda batches: _in_turn(turns, batches, names))
    os.chdir(scratch)
    sys.argv = [
        script.file, "--model", network, "--teacher_model", network, "--dataset", "CIFAR10",
        "--out-dir", str(scratch / "out"), *arguments, *script.after_warmup,
    ]  # fmt: skip
    source = (folder / script.file).read_bytes()
    with suppress(_NoOrders):
        exec(compile(source, script.file, "exec", dont_inherit=True), names)  # noqa: S102  # what --iad is for


class _NoOrders(BaseException):
    """Ends a script, which would go on for many epochs."""


def _in_turn(turns: Turns, batches: Iterator[Any], names: Mapping[str, Any]) -> Iterator[Any]:
    """Batches as they are ordered. names: those of the script, with the networks whose passes are counted."""
    counted: dict[str, float] = {}
    for order, count in enumerate(turns.orders(counted=counted)):
        with _Passes(names if order == 0 else {}) as passes:
            for _ in range(count):
                yield next(batches)
        if order == 0:
            counted |= {"forwards": passes.forwards / count, "backwards": passes.backwards / count}
    raise _NoOrders


class _Passes:
    """Counts the passes of the script's networks inside.

    forwards: calls of a network. backwards: those of them to whose logits a gradient came.
    """

    def __init__(self, names: Mapping[str, Any]) -> None:
        self.forwards = self.backwards = 0
        networks = [names[name] for name in (STUDENT, *TEACHERS) if name in names]
        self._hooks = [network.register_forward_hook(self._count) for network in networks]

    def __enter__(self) -> _Passes:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, network: nn.Module, given: Any, logits: Tensor) -> None:
        self.forwards += 1
        if logits.requires_grad:
            logits.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1


def _teachers(network: str, script: Script, num_classes: int, scratch: Path) -> tuple[list[str], dict[str, float]]:
    """Write teachers of random weights. Options that name them; parameters and operations of the network."""
    build = getattr(importlib.import_module("models"), network)
    arguments = []
    for seed, option in enumerate(script.teachers):
        torch.manual_seed(seed)
        teacher = build(num_classes=num_classes)
        path = scratch / f"teacher{seed}.pt"
        torch.save({"state_dict": {f"module.{key}": value for key, value in teacher.state_dict().items()}}, path)
        arguments += [option, str(path)]
    return arguments, size_of(teacher)


def size_of(network: nn.Module) -> dict[str, float]:
    """Number of parameters, and of operations of a forward pass over one image."""
    parameters = sum(one.numel() for one in network.parameters())
    return {"parameters": parameters, "flops": forward_flops(network, IMAGE_CHW)[0]}


def _give_images(images: Split, batch_size: int, in_turn: Callable[[Iterator[Any]], Iterator[Any]]) -> None:
    """Give a script images for its data set, by a loader of such batches that waits for orders."""
    import torchvision
    from PIL import Image

    class Images(Dataset[Any]):
        """As many as CIFAR-10 has, by repetition; PIL images and integers as torchvision gives them."""

        def __init__(self, root: str, train: bool = True, transform: Any = None, **_: Any) -> None:
            self._transform = transform

        def __len__(self) -> int:
            return EPOCH_IMAGES

        def __getitem__(self, index: int) -> tuple[Any, int]:
            index %= len(images)
            image = Image.fromarray(images.images[index].numpy())
            return self._transform(image), int(images.labels[index])

    class Loader(DataLoader[Any]):
        def __init__(self, dataset: Any, **given: Any) -> None:
            super().__init__(dataset, **given | {"batch_size": batch_size})

        def __iter__(self) -> Any:
            epochs = (super(Loader, self).__iter__() for _ in itertools.count())
            return in_turn(itertools.chain.from_iterable(epochs))

    torchvision.datasets.CIFAR10 = Images
    torch.utils.data.DataLoader = Loader  # type: ignore[assignment, misc]


def _without_gpu() -> None:
    """Make the calls for a GPU do nothing."""
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    torch.cuda.synchronize = lambda *_: None


def _without_advertorch() -> None:
    """Let the networks be imported without a package that none of those for CIFAR-10 uses."""
    if importlib.util.find_spec("advertorch") is None:
        utils = types.ModuleType("advertorch.utils")
        utils.NormalizeByChannelMeanStd = None  # type: ignore[attr-defined]
        sys.modules |= {"advertorch": types.ModuleType("advertorch"), "advertorch.utils": utils}
