"""Several processes train as one: the same numbers, whatever their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from engine import config, methods, models
from engine.common.console import Reporter
from engine.common.stopping import Interrupted, ProcessLost, RunFailed, Stop
from engine.models.sync_batch_norm import SyncBatchNorm, synchronise
from engine.pipelines.base import Batch
from engine.plugins.builtin_loggers.numbers_of import TIMINGS
from engine.runs import lifecycle
from engine.system import distributed
from engine.system.data_parallel import replicate
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training import learner as learners
from engine.training.capture import captured_step
from engine.training.learner import Learner
from tests.conftest import Cli, write_checkpoint
from tests.processes import ROOT, start, together

F64 = Precision(torch.device("cpu"), torch.float64)


def run_of(method: str, data: dict[str, Any], teachers: Path, **keys: Any) -> dict[str, Any]:
    """Ten steps in float64: 35 images in batches of 8, the last of 3: of four processes one has none."""
    base = {
        "method": method, "model": "resnet8", "epochs": 2, "batch_size": 8, "limit_train": 35, "limit_test": 20,
        "validation": 0, "dtype": "float64", "device": "cpu", "sync_bn": "on", "log_every": 4,
        "attack": {"num_steps": 2}, "loss": {"warmup": 1},
        "teacher": {"checkpoint": str(teachers / "at.pt")}, "teacher_st": {"checkpoint": str(teachers / "st.pt")},
        "eval": {"attack": "fgsm", "final": ["natural", "fgsm"], "probe_size": 10, "batch_size": 4},
    }  # fmt: skip
    return config.merge(base, data, keys)


def train_each(world: World, runs: dict[str, dict[str, Any]]) -> None:
    for out, keys in runs.items():
        lifecycle.train(keys | {"out": out}, Reporter(), world=world)


def state(path: Path) -> dict[str, Tensor]:
    """Weights, running statistics, momentum."""
    saved = torch.load(path / "last.pt", weights_only=True)
    kept = saved["optimizer"]["state"].items()
    momentum = {f"{name} {key}": value for key, values in kept for name, value in values.items()}
    return {**saved["student"], **momentum}


def assert_near(left: dict[str, Tensor], right: dict[str, Tensor], within: float = 1e-9) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.allclose(right[name].double(), value.double(), rtol=within, atol=within), name


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_trajectory(alone: Path, together: Path) -> None:
    assert_near(state(alone), state(together))
    left, right = rows(alone), rows(together)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - TIMINGS:
            same = one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-9, abs=1e-12)
            assert other[key] == same, key
    tested = [json.loads((path / "summary.json").read_text())["test_of_last"] for path in (alone, together)]
    assert tested[0].keys() == tested[1].keys()
    for name in tested[0]:
        assert tested[0][name]["correct"] == tested[1][name]["correct"]


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for seed, name in enumerate(("at", "st"), 1):
        write_checkpoint(root / f"{name}.pt", seed, 10)
        # Without names of classes: it serves digits and photographs.
        torch.save(torch.load(root / f"{name}.pt", weights_only=True)["student"], root / f"{name}.pt")
    return root


def trajectories(
    data: dict[str, Any],
    teachers: Path,
    root: Path,
    names: tuple[str, ...],
    by_four: tuple[str, ...] | None = None,
) -> None:
    """Runs of each method by 1 and 2 processes, and of those named by 4; None: of all."""
    by_four = names if by_four is None else by_four
    for size, of_size in ((1, names), (2, names), (4, by_four)):
        runs = {str(root / f"{name}-{size}"): run_of(name, data, teachers) for name in of_size}
        together(size, train_each, runs)
    for size, of_size in ((2, names), (4, by_four)):
        for name in of_size:
            assert_same_trajectory(root / f"{name}-1", root / f"{name}-{size}")


# One of each kind: losses of one and of two kinds of images, two teachers, and what processes tell each other.
ON_DIGITS = ("trades", "iad1", "iad2", "mtard", "saad")


def test_processes_train_as_one_on_digits(ten_classes: Path, tmp_path: Path) -> None:
    trajectories({"dataset": "digits"}, ten_classes, tmp_path, ON_DIGITS, by_four=("saad",))


@pytest.mark.slow
def test_processes_train_as_one_on_digits_by_every_other_method(ten_classes: Path, tmp_path: Path) -> None:
    covered = (*ON_DIGITS, "fgsm-rs", "n-fgsm")  # the last two are "at" in one step
    names = tuple(name for name in methods.METHODS if name not in covered)
    trajectories({"dataset": "digits"}, ten_classes, tmp_path, names, by_four=names[:1])


def test_processes_train_as_one_on_photographs(real_images: Path, ten_classes: Path, tmp_path: Path) -> None:
    data = {"dataset": "cifar10", "data": str(real_images)}
    trajectories(data, ten_classes, tmp_path, ("iad2",))


@pytest.mark.slow
def test_processes_train_as_one_on_photographs_by_every_method(
    real_images: Path, ten_classes: Path, tmp_path: Path
) -> None:
    data = {"dataset": "cifar10", "data": str(real_images)}
    trajectories(data, ten_classes, tmp_path, tuple(methods.METHODS))


HARDENED: dict[str, dict[str, Any]] = {
    # Five steps: a direction that is normalised multiplies what rounding does to it.
    "weights' attack": {"awp": {"gamma": 0.01}, "epochs": 1, "loss": {"warmup": 0}, "averaging": {"kind": "ema"}},
    "ema": {
        "averaging": {"kind": "ema", "decay": 0.5}, "loss": {"label_smoothing": 0.1},
        "optim": {"clip_norm": 0.5, "schedule": "cosine", "lr_warmup": 1},
    },
    "swa": {"averaging": {"kind": "swa", "start": 0}, "optim": {"schedule": "one-cycle"}, "lr_scale": "linear"},
    "adamw": {
        "averaging": {"kind": "ema"}, "attack": {"num_steps": 2, "epsilon_warmup": 2},
        "optim": {"implementation": "adamw", "layer_decay": 0.7, "clip_norm": 0.5},
    },
}  # fmt: skip


def test_what_people_add_is_the_same_by_any_number_of_processes(ten_classes: Path, tmp_path: Path) -> None:
    data = {"dataset": "digits"}
    runs = {name: run_of("iad1", data, ten_classes, **keys) for name, keys in HARDENED.items()}
    for size in (1, 2):
        together(size, train_each, {str(tmp_path / f"{name}-{size}"): keys for name, keys in runs.items()})
    for name in runs:
        one, two = (torch.load(tmp_path / f"{name}-{size}" / "last.pt", weights_only=True) for size in (1, 2))
        assert_near(one["averaged"], two["averaged"])
        assert_near(state(tmp_path / f"{name}-1"), state(tmp_path / f"{name}-2"))


# ---------------------------------------------------------------- one step


def student_of(seed: int = 0, model: str = "resnet8") -> torch.nn.Module:
    torch.manual_seed(seed)
    return F64.place(models.build(model, 4)).train()


def images(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x_nat = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x_nat.to(memory_format=torch.channels_last), torch.arange(count) % 4, torch.arange(count))


def part_of(whole: Batch, rank: int, size: int) -> Batch:
    return whole.split(size)[rank]


def learner_of(world: World, method: str = "at", **keys: Any) -> Learner:
    base = {"method": method, "model": "resnet8", "dtype": "float64", "device": "cpu", "attack": {"num_steps": 2}}
    complete = config.load(base, keys)
    student = student_of(model=complete.model)
    if complete.sync_bn == "on" and world.size > 1:
        student = synchronise(student, F64.device)
    teachers = {"teacher": student_of(1).eval(), "teacher_st": student_of(2).eval()}
    row = methods.get(method, semantics=complete.semantics, loss=complete.loss)
    return Learner(student, teachers, row, complete, F64, world)


def learn(learner: Learner, batch: Batch, whole: int) -> None:
    learner.learn(
        batch, learner.method, 0.1, epoch=5, global_batch_size=whole, on_output=lambda output, labels: None
    )


def step_of_two(world: World, out: str) -> None:
    """A batch of 7: 4 images for one process, 3 for the other."""
    learner = learner_of(world)
    learn(learner, part_of(images(7), world.rank, world.size), 7)
    torch.save(learner.student.state_dict(), f"{out}-{world.rank}.pt")


def test_without_synchronisation_each_process_normalises_its_part(tmp_path: Path) -> None:
    """The gradient is the parts' mean by images, so are the running statistics; all processes hold the same."""
    together(2, step_of_two, str(tmp_path / "after"))
    found = [torch.load(tmp_path / f"after-{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    alone = []
    for rank in range(2):
        learner, part = learner_of(World()), part_of(images(7), rank, 2)
        learn(learner, part, len(part.labels))
        alone.append(learner.student.state_dict())
    for name, value in found[0].items():
        if "num_batches" not in name:
            assert torch.allclose(value, (4 * alone[0][name] + 3 * alone[1][name]) / 7, rtol=1e-12), name


def steps_of_two(world: World, out: str) -> None:
    """Three steps with messages of torch's, and with one message between the parts of a step."""
    for name in ("torch", "one message"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learners, "_is_captured", lambda *given, name=name: name == "one message")
            patch.setattr(captured_step, "CAPTURED_AT", 100)  # there is no GPU: op by op
            learner = learner_of(world, "iad1", optim={"clip_norm": 0.5})
            part = part_of(images(7), world.rank, world.size)
            for _ in range(3):
                learner.learn(part, learner.method, 0.1, epoch=5, global_batch_size=7)
        torch.save(learner.student.state_dict(), f"{out}-{world.rank}-{name}.pt")


def test_one_message_has_the_bits_of_torch_s_many(tmp_path: Path) -> None:
    together(2, steps_of_two, str(tmp_path / "after"))
    one, *others = (
        torch.load(tmp_path / f"after-{rank}-{name}.pt", weights_only=True)
        for rank in range(2)
        for name in ("torch", "one message")
    )
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def micro_batches_of_two(world: World, out: str) -> None:
    learner = learner_of(world, "iad1", micro_batch=1, attack={"bn": "eval"})
    learner.student.eval()
    for _ in range(3):
        learn(learner, part_of(images(7), world.rank, world.size), 7)
    torch.save(learner.student.state_dict(), f"{out}-{world.rank}.pt")


def test_micro_batches_of_processes_give_the_update_of_the_whole(tmp_path: Path) -> None:
    """BatchNorm in evaluation mode; 4 and 3 images in 4 parts each, of which one is empty."""
    together(2, micro_batches_of_two, str(tmp_path / "after"))
    whole = learner_of(World(), "iad1", attack={"bn": "eval"})
    whole.student.eval()
    for _ in range(3):
        learn(whole, images(7), 7)
    for rank in range(2):
        assert_near(whole.student.state_dict(), torch.load(tmp_path / f"after-{rank}.pt", weights_only=True))


def transformer_of_two(world: World, out: str) -> None:
    """Four images and three; then one, and none, which a transformer cannot reshape."""
    learner = learner_of(world, model="timm:test_vit")
    for count in (7, 1):
        learn(learner, part_of(images(count), world.rank, world.size), count)
    torch.save(learner.student.state_dict(), f"{out}-{world.rank}.pt")


def test_a_transformer_of_two_processes_gets_the_update_of_one(tmp_path: Path) -> None:
    """Without BatchNorm nothing depends on the number of processes."""
    pytest.importorskip("timm")
    together(2, transformer_of_two, str(tmp_path / "after"))
    transformer_of_two(World(), str(tmp_path / "one"))
    for rank in range(2):
        found, expected = (
            torch.load(tmp_path / name, weights_only=True) for name in (f"after-{rank}.pt", "one-0.pt")
        )
        assert_near(found, expected)


def calls_of_steps(world: World, out: str, keys: dict[str, Any], steps: int) -> None:
    """Names of all collectives that so many steps ask for, and of those that the attack asks for."""
    learner = learner_of(world, "iad1", **keys)
    batch = part_of(images(), world.rank, world.size)
    for _ in range(4):  # buckets are arranged in the first ones
        learn(learner, batch, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            learn(learner, batch, 8)
            world.delayed_any(False)
    events = profile.events()
    attacks = [event.time_range for event in events if event.name == "attack"]
    calls = [event for event in events if event.name.startswith("c10d::")]
    inside = [call for call in calls if any(a.start <= call.time_range.start <= a.end for a in attacks)]
    if world.is_main:
        counted = {"steps": [call.name for call in calls], "attack": [call.name for call in inside]}
        Path(out).write_text(json.dumps(counted))


@pytest.mark.parametrize("sync_bn", ["off", "on"])
def test_a_step_has_one_reduction_of_gradients_and_the_attack_has_none(sync_bn: str, tmp_path: Path) -> None:
    steps, out = 3, tmp_path / "calls.json"
    together(2, calls_of_steps, str(out), {"sync_bn": sync_bn}, steps)
    calls = json.loads(out.read_text())
    if sync_bn == "off":
        # Gradients (one bucket), running statistics, and whether to stop.
        assert calls == {"steps": ["c10d::allreduce_"] * 3 * steps, "attack": []}
    else:
        layers = sum(
            isinstance(module, SyncBatchNorm) for module in synchronise(student_of(), F64.device).modules()
        )
        # Two steps of the attack, S(x~) and S(x): each layer tells its statistics, and in the backward its sums.
        assert calls["steps"].count("c10d::allgather_") == 4 * layers * steps
        assert calls["steps"].count("c10d::allreduce_") == (4 * layers + 2) * steps
        assert calls["attack"].count("c10d::allgather_") == 2 * layers * steps
        assert calls["attack"].count("c10d::allreduce_") == 2 * layers * steps


@pytest.mark.parametrize("model", list(models.TABLE))
def test_every_parameter_gets_a_gradient(model: str) -> None:
    """A replica need not look for unused parameters."""
    size = min(models.TABLE[model].input_sizes[0], 64)  # a network for larger images takes these, too
    student = models.build(model, 4)
    student(torch.rand(2, 3, size, size)).sum().backward()
    assert [name for name, weight in student.named_parameters() if weight.grad is None] == []


# ---------------------------------------------------------------- BatchNorm


def normalised(world: World, out: str, counts: list[int], dtype: str) -> None:
    """Output, gradients and statistics of a layer over the images that this process has."""
    torch.manual_seed(0)
    network = synchronise(torch.nn.Sequential(torch.nn.BatchNorm2d(5)), F64.device).to(torch.float64)
    norm = network.get_submodule("0")
    values = torch.randn(sum(counts), 5, 3, 3, dtype=torch.float64).to(getattr(torch, dtype))
    upstream = torch.randn(values.shape, dtype=torch.float64)
    first = sum(counts[: world.rank])
    mine = slice(first, first + counts[world.rank])
    x = values[mine].clone().requires_grad_()
    result = network(x)
    (result.double() * upstream[mine]).sum().backward()
    found = {"out": result.detach(), "grad": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    torch.save(found | network.state_dict(), f"{out}-{world.rank}.pt")


@pytest.mark.parametrize(("dtype", "within"), [("float64", 1e-12), ("bfloat16", 2e-2)])
def test_batch_norm_of_processes_equals_batch_norm_of_all_images(
    dtype: str, within: float, tmp_path: Path
) -> None:
    """Forward, both gradients and statistics, one process having no image at all."""
    counts = [4, 0, 3]
    together(3, normalised, str(tmp_path / "found"), counts, dtype)
    found = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(3)]
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(5).double()
    x = torch.randn(7, 5, 3, 3, dtype=torch.float64).to(getattr(torch, dtype)).double().requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64)
    expected = norm(x)
    (expected * upstream).sum().backward()
    for name, value in (("out", expected.detach()), ("grad", x.grad)):
        assert value is not None
        joined = torch.cat([one[name] for one in found]).double()
        assert torch.allclose(joined, value, rtol=within, atol=within), name
    for name, weight in (("weight", norm.weight), ("bias", norm.bias)):
        assert weight.grad is not None
        assert torch.allclose(sum(one[name] for one in found), weight.grad, rtol=within, atol=within), name
    for one in found:
        for name in ("running_mean", "running_var"):
            assert torch.allclose(one[f"0.{name}"].double(), norm.state_dict()[name].double(), rtol=within), name


# ---------------------------------------------------------------- agreement


def one_hangs(world: World, out: str) -> None:
    if world.rank == 1:
        time.sleep(8)
    try:
        world.timeout = 2.0
        world.barrier()
    except ProcessLost as error:
        Path(f"{out}-{world.rank}").write_text(str(error))
    world.timeout = 60.0


def test_a_process_that_misses_a_barrier_is_named(tmp_path: Path) -> None:
    together(2, one_hangs, str(tmp_path / "said"))
    assert (tmp_path / "said-0").read_text().startswith("process 1 of 0..1 did not answer")
    assert not (tmp_path / "said-1").exists()


def one_is_asked_to_stop(world: World, out: str) -> None:
    """All stop at the same step, and all stop in work that is not done in steps."""
    stopped = next(step for step in range(100) if world.delayed_any(world.rank == 1 and step == 7))
    stop = Stop()
    stop.requested = world.rank == 1
    try:
        for _ in range(1000):
            world.check(stop)
        world.barrier(stop)
        interrupted = False
    except Interrupted:
        interrupted = True
    Path(f"{out}-{world.rank}").write_text(json.dumps([stopped, interrupted]))


def test_a_stop_of_one_process_stops_all(tmp_path: Path) -> None:
    together(2, one_is_asked_to_stop, str(tmp_path / "stopped"))
    for rank in range(2):
        assert json.loads((tmp_path / f"stopped-{rank}").read_text()) == [8, True]


JOINING = """
import sys
from engine import config
from engine.system import distributed
from engine.common.stopping import Interrupted
from tests.pipelines.loaders import threads, threads_end

before = len(threads())
try:
    with distributed.joined(config.load({"device": "cpu"})) as world:
        world.delayed_any(False)
        assert any("gloo" in name for name in threads())
        if sys.argv[1] == "stopped":
            raise Interrupted("as asked")
except Interrupted:
    pass
assert threads_end(before), threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by /proc")
@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_no_thread_of_a_group_outlives_it(end: str) -> None:
    """One that does may abort the process at its exit, and the launcher would start a finished run again."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", JOINING, end],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.text().map(Path),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(PLAIN)
@example({1: (2, 3.5), "dict": [], "Path": {"list": ()}})
@example(Path(os.fsdecode(b"\xff")))
@example(float("nan"))
def test_what_processes_tell_each_other_keeps_its_types_and_its_bits(value: object) -> None:
    told = json.loads(json.dumps(distributed._encode(value)))
    assert repr(distributed._decode(told)) == repr(value)


class Named(NamedTuple):
    one: int


@pytest.mark.parametrize(
    "value", [{1, 2}, b"", np.float64(1), torch.ones(1), Named(1), [object()], {(1, Named(1)): 0}]
)
def test_what_would_need_a_pickle_is_not_told(value: object) -> None:
    with pytest.raises(TypeError, match="processes tell each other None, bool, "):
        distributed._encode(value)


def errors_of_main(world: World, out: str) -> None:
    """Each call ends on all processes: with the error of the main one, its kind where the user can read it."""

    def fails(error: Exception) -> Callable[[], None]:
        def fail() -> None:
            raise error

        return fail

    def refuse() -> Any:
        return config.load({"epochs": 0})

    def decode() -> str:
        return b"\xff".decode()

    found = []
    for make in (
        refuse, decode, fails(RunFailed("full")), fails(ProcessLost("lost")), fails(Interrupted("stopped")),
        fails(OSError("unreadable")), lambda: {1}, lambda: Path("there"),
    ):  # fmt: skip
        try:
            found.append(str(world.broadcast_from_main(make)))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}"[:40])
    with pytest.raises(ValueError, match="the data set of process 1 differs from that of process 0"):
        world.check_same("the data set", f"hash {world.rank}")
    Path(f"{out}-{world.rank}").write_text(json.dumps(found))


def test_an_error_of_the_main_process_ends_it_on_all(tmp_path: Path) -> None:
    together(2, errors_of_main, str(tmp_path / "found"))
    main, other = (json.loads((tmp_path / f"found-{rank}").read_text()) for rank in range(2))
    assert [(mine, its) for mine, its in zip(main, other, strict=True) if mine != its] == [
        ("UnicodeDecodeError: 'utf-8' codec can't ", "ProcessLost: "),
        ("OSError: unreadable", "ProcessLost: "),
    ]
    assert [text.split()[0] for text in main] == [
        "ValueError:", "UnicodeDecodeError:", "RunFailed:", "ProcessLost:", "Interrupted:", "OSError:",
        "TypeError:", "there",
    ]  # fmt: skip


ENDS = """
import os, sys
from engine import config
from engine.system import distributed

rank = int(os.environ["RANK"])
try:
    with distributed.joined(config.load({"device": sys.argv[2] if rank else "cpu"})) as world:
        if sys.argv[1] == "all":
            distributed.check_timeout(0)
        if sys.argv[1] == "main":
            world.broadcast_from_main(lambda: [][1])
        world.check_same("the device", "")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("which", "device", "expected"),
    [
        ("all", "cpu", ["ValueError", "ValueError --timeout 0"]),
        ("main", "cpu", ["ProcessLost", "UnexpectedError unforeseen IndexError"]),
        ("none", "cuda:77", ["ValueError --device"]),
    ],
)
def test_one_process_says_what_ended_all(which: str, device: str, expected: list[str], tmp_path: Path) -> None:
    """Also where the device of one is not there: it says so, before the others have met it."""
    running = start(2, ["-c", ENDS, which, device])
    for process in running if which != "none" else running[1:]:
        process.wait(timeout=120)
    for process in running:
        process.kill()
    said = sorted(line for process in running for line in process.communicate()[0].splitlines())
    assert len(said) == len(expected), said
    assert all(line.startswith(begin) for line, begin in zip(said, expected, strict=True)), said


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.5, 604_801.0, 1e300, float("inf"), float("nan"), float("-inf")])
def test_a_time_that_cannot_be_waited_for_is_refused(seconds: float, cli: Cli) -> None:
    with pytest.raises(ValueError, match=r"^--timeout \S+ is not between 1 and 604,800 seconds$"):
        distributed.check_timeout(seconds)
    for command in (["train", "--dataset", "digits"], ["eval", "nothing.pt"]):
        outcome = cli(*command, "--device", "cpu", "--procs", "2", "--timeout", str(seconds))
        assert outcome.code == 2
        assert outcome.err == f"engine: --timeout {seconds:g} is not between 1 and 604,800 seconds\n"


def test_one_machine_listens_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever several machines are told to use."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth0")
    distributed._use_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"


def test_a_process_by_itself_asks_nobody() -> None:
    world = World()
    assert world.is_main
    assert world.delayed_any(True)
    assert world.gather(torch.tensor([1.0, 2.0])).tolist() == [[1.0, 2.0]]
    world.barrier()
    student = student_of()
    assert replicate(student, world, F64.device, every_backward=True) is student
    assert not distributed.is_launched()
