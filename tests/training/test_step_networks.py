"""Networks of a step: compiled or not, watched or not, with or without recomputation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from engine import config, methods, models
from engine.attacks.pgd import Attacked, climb
from engine.attacks.twin import Forward, Twin
from engine.models.layers import Stage
from engine.pipelines.base import Batch
from engine.system.distributed import World
from engine.system.precision import Precision
from engine.training import step_networks
from engine.training.learner import Learner
from tests.processes import together

CPU = torch.device("cpu")
F64, F32 = Precision(CPU, torch.float64), Precision(CPU, torch.float32)
AMP = Precision(CPU, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("keys", "device", "compiled"),
    [
        ({}, "cpu", False),
        ({}, "cuda", True),
        ({"compile": "on"}, "cpu", True),
        ({"compile": "off"}, "cuda", False),
        ({"checkpoint_activations": True}, "cuda", False),
    ],
    ids=str,
)
def test_what_is_compiled(keys: dict[str, Any], device: str, compiled: bool) -> None:
    net = models.build("resnet8", 4)
    run = step_networks.forward_maker(config.load(keys), torch.device(device), bool)(net)
    assert (run is not net) == compiled


def test_compilation_and_recomputation_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^compile: 'on' and checkpoint_activations exclude each other$"):
        config.load({"compile": "on", "checkpoint_activations": True})


@pytest.mark.parametrize(("value", "read"), [(True, "on"), (False, "off"), ("on", "on"), ("off", "off")])
def test_yaml_s_truth_values_are_switches(value: object, read: str) -> None:
    run = config.load({"lanes": value, "graphs": value, "compile": value})
    assert (run.lanes, run.compile) == (read, read)
    assert run.graphs == {"on": "step", "off": "off"}[read]  # the name that earlier versions had
    assert config.load({"masking_guard": False}).masking_guard == "off"


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet8", 8),
        pytest.param("timm:test_vit", 16, marks=pytest.mark.slow),
    ],
)
def test_compiled_passes_are_those_that_are_not(name: str, side: int) -> None:
    """By the real compiler: attack and training are two instances, and a smaller batch runs uncompiled."""
    if ":" in name:
        pytest.importorskip("timm")
    run = step_networks.forward_maker(config.load({"compile": "on"}), CPU, (4).__eq__)
    torch.manual_seed(0)
    net, other = models.build(name, 4), models.build(name, 4)
    other.load_state_dict(net.state_dict())
    x, labels = torch.rand(4, 3, side, side), torch.arange(4)
    spec = config.AttackSpec(num_steps=1, bn="train")
    found = []
    for student, how in ((net, run), (other, lambda module: module)):
        twin, trained = Twin(student, "train", F32, how), how(student)
        x_adv = x.clone()
        climb(Attacked(twin), x_adv, x, labels, spec)
        nn.functional.cross_entropy(trained(x), labels).backward()
        part = trained(x[:2])
        gradients = torch.cat([value.grad.flatten() for value in student.parameters() if value.grad is not None])
        found.append((x_adv, gradients, part, dict(student.named_buffers())))
    (x_adv, gradients, part, buffers), expected = found
    assert (x_adv == expected[0]).float().mean() > 0.99  # a sign may differ where a gradient is almost zero
    torch.testing.assert_close(gradients, expected[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(part, expected[2], rtol=1e-4, atol=1e-5)
    for name, value in expected[3].items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if re.search("34|50|101", name) else ()) for name in models.TABLE],
)
def test_a_compiled_pass_is_one_graph(name: str, amp: bool, bf16: None) -> None:
    """The student's, and its twin's under attack; with every torch that is supported."""
    precision = AMP if amp else F32
    student = precision.place(models.build(name, 4))
    graphs = CompileCounterWithBackend("eager")

    def run(forward: Forward) -> Forward:
        compiled: Forward = torch.compile(forward, dynamic=False, backend=graphs)
        return compiled

    passes: tuple[Forward, ...] = (Twin(student, "train", precision, run), run(student))
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    for count, a_pass in enumerate(passes, 1):
        for _ in range(2):
            with precision.autocast():
                a_pass(images.requires_grad_())
        assert graphs.frame_count == count


def test_passes_of_many_kinds_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up after eight by itself, with nothing but a warning."""
    graphs, real = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: real(module, backend=graphs, **how))
    torch._dynamo.reset()
    run = step_networks.forward_maker(config.load({"compile": "on"}), CPU, bool)(models.build("resnet8", 4))
    for size in range(1, 13):
        run(torch.rand(size, 3, 8, 8))
    assert graphs.frame_count == 12


def compiled_sizes(world: World, folder: str, keys: dict[str, Any]) -> None:
    """Compare a compiled student with one that is not; write the numbers of images that compiled passes see."""
    seen: list[int] = []
    real = torch.compile

    def noting(module: nn.Module, **how: Any) -> Any:
        run = real(module, backend="aot_eager", **how)

        def noted(images: Tensor) -> Tensor:
            seen.append(len(images))
            logits: Tensor = run(images)
            return logits

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", noting)
        students = [trained(world, keys | {"compile": wanted}) for wanted in ("on", "off")]
    for mine, other in zip(*(student.state_dict().values() for student in students), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(sorted({*seen})))


def trained(world: World, keys: dict[str, Any]) -> nn.Module:
    """The student after two steps of IAD-I on 8 images and one on 6."""
    run = config.load({"method": "iad1", "dtype": "float64", "batch_size": 8, "attack": {"num_steps": 1}}, keys)
    torch.manual_seed(0)
    student, teacher = (models.build("resnet8", 4).double() for _ in range(2))
    method = methods.get("iad1")
    learner = Learner(student.train(), {"teacher": teacher.eval()}, method, run, F64, world)
    for whole in (8, 8, 6):
        mine = range(world.rank, whole, world.size)
        x = torch.rand(whole, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(whole))
        labels = sample = torch.arange(whole)
        batch = Batch(x[mine], labels[mine] % 4, sample[mine])
        learner.learn(batch, method, 0.1, epoch=0, global_batch_size=whole, on_output=lambda output, labels: None)
    return student


@pytest.mark.parametrize(
    ("processes", "keys", "sizes"),
    [
        (1, {}, [8]),
        (1, {"micro_batch": 3}, [2, 3]),  # 3, 3, 2
        (2, {}, [4]),
        (2, {"micro_batch": 2}, [2]),
    ],
)
def test_what_a_process_really_runs_is_compiled(
    processes: int, keys: dict[str, Any], sizes: list[int], tmp_path: Path
) -> None:
    together(processes, compiled_sizes, str(tmp_path), keys)
    assert [json.loads(path.read_text()) for path in tmp_path.glob("*.json")] == [sizes] * processes


def test_only_trained_passes_are_recomputed() -> None:
    run = config.load({"method": "iad2", "checkpoint_activations": True})
    student, at, st = (models.build("resnet8", 4) for _ in range(3))
    built = step_networks.build(student, {"teacher": at, "teacher_st": st}, methods.get("iad2"), run, F32)
    assert built.adversary is not None

    def stages(network: nn.Module) -> set[bool]:
        return {module.recompute for module in network.modules() if isinstance(module, Stage)}

    assert stages(student) == {True}
    assert stages(built.adversary.twin.module) == stages(built.teachers["teacher"].module) == {False}


def test_a_method_gets_what_it_needs() -> None:
    for name in methods.METHODS:
        method = methods.get(name)
        built = step_networks.build(models.build("resnet8", 4), {}, method, config.load({"method": name}), F32)
        assert (built.adversary is not None) == method.needs_x_adv
