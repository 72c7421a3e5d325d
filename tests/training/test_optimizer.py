"""SGD of torch, and apex where it is NVIDIA's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import config
from engine.training import optimizer
from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import of, recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [False, True])
def test_fused_sgd_is_the_loop_written_out(dtype: torch.dtype, nesterov: bool) -> None:
    torch.manual_seed(0)
    run = config.load({"lr": 0.1, "optim": {"momentum": 0.8, "weight_decay": 0.01, "nesterov": nesterov}})
    network = nn.ParameterList([torch.randn(50, dtype=dtype)])
    weight = network[0]
    expected, momentum = weight.detach().double().clone(), torch.zeros(50, dtype=torch.float64)
    sgd = optimizer.build(network, run)
    for _ in range(4):
        gradient = torch.randn(50, dtype=dtype)
        weight.grad = gradient.clone()
        sgd.step()
        decayed = gradient.double() + 0.01 * expected
        momentum = 0.8 * momentum + decayed
        expected = expected - 0.1 * (decayed + 0.8 * momentum if nesterov else momentum)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(weight.detach().double(), expected, rtol=tolerance, atol=tolerance)
    assert sgd.param_groups[0]["fused"]


@pytest.mark.parametrize("implementation", ["torch", "adamw"])
def test_a_rate_on_the_device_trains_as_a_number_does(implementation: str) -> None:
    """Rates that float32 holds exactly: the same bits."""
    run = config.load({"lr": 0.5, "optim": {"implementation": implementation, "weight_decay": 0.01}})
    torch.manual_seed(0)
    networks = [nn.ParameterList([torch.randn(50)]) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    by_number, by_tensor = (optimizer.build(network, run) for network in networks)
    optimizer.put_rate_on_device(by_tensor)
    tensor = by_tensor.param_groups[0]["lr"]
    for rate in (0.5, 0.25, 0.125):
        gradient = torch.randn(50)
        for network, made in zip(networks, (by_number, by_tensor), strict=True):
            optimizer.set_rate(made, rate)
            network[0].grad = gradient.clone()
            made.step()
        assert torch.equal(*(network[0] for network in networks))
    optimizer.put_rate_on_device(by_tensor)
    assert by_tensor.param_groups[0]["lr"] is tensor


def test_the_rate_and_the_state_are_numbers_where_the_device_has_the_rate() -> None:
    network = nn.ParameterList([torch.randn(5)])
    run = config.load({"lr": 0.5})
    made = optimizer.build(network, run)
    optimizer.put_rate_on_device(made)
    optimizer.set_rate(made, 0.1)
    tensor = made.param_groups[0]["lr"]
    assert tensor.dtype == torch.float32
    assert tensor == torch.tensor(0.1)
    assert optimizer.rate(made) == 0.1  # and not what float32 makes of it
    other = optimizer.build(network, run)
    optimizer.set_rate(other, 0.1)
    state = optimizer.state_dict(made)
    assert state == optimizer.state_dict(other) == other.state_dict()
    made.load_state_dict(state)
    assert made.param_groups[0]["lr"] == optimizer.rate(made) == 0.1
    optimizer.set_rate(made, 0.2)
    assert optimizer.rate(made) == 0.2


def test_an_optimizer_that_takes_no_tensor_is_refused() -> None:
    other = torch.optim.Adagrad([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match=r"Adagrad takes no tensor for its rate; known are SGD, AdamW"):
        optimizer.put_rate_on_device(other)


def captured_update(implementation: str) -> dict[str, Any]:
    """Calls of a captured update, and of other rates before replays, where a wait is an error."""
    run = config.load({"lr": 0.5, "optim": {"implementation": implementation}})
    network = nn.ParameterList([torch.zeros(50, device="cuda"), torch.zeros(7, 3, device="cuda")])
    made = optimizer.build(network, run)
    optimizer.put_rate_on_device(made)
    for weight in network:
        weight.grad = torch.zeros_like(weight)
    made.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        made.step()
    torch.cuda.set_sync_debug_mode("error")
    with recorded() as calls:
        for rate in (0.25, 0.125):
            optimizer.set_rate(made, rate)
            graph.replay()
            assert optimizer.rate(made) == rate
    return {"calls": calls, "groups": len(made.param_groups)}


@pytest.mark.parametrize("implementation", ["torch", "adamw"])
def test_a_captured_update_follows_the_rate_without_a_wait(implementation: str, fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(captured_update, implementation)
    kinds = [call["call"] for call in seen["calls"]]
    assert kinds == (["kernel"] * seen["groups"] + ["graph_launch"]) * 2
    launches = of("graph_launch", seen["calls"])
    assert all(int(call["nodes"]) >= seen["groups"] for call in launches)


def apex_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **modules: str) -> None:
    """A package named apex with these modules, first on the path."""
    (tmp_path / "apex").mkdir()
    for name, content in modules.items():
        (tmp_path / "apex" / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, module)


def refuse(cli: Any, tiny: Any, out: Path) -> str:
    outcome = cli(*tiny.flags(method="st", out=str(out)), "--optimizer", "apex")
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert not out.exists()
    return str(line)


def test_apex_that_is_absent_is_told(cli: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    assert "NVIDIA's apex is not installed" in refuse(cli, tiny, tmp_path / "run")


def test_the_apex_of_pypi_is_recognised(
    cli: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apex_of(tmp_path, monkeypatch, __init__="# a toolkit for web applications\n")
    line = refuse(cli, tiny, tmp_path / "run")
    assert "is not NVIDIA's apex, but PyPI's unrelated package" in line
    assert str(tmp_path / "apex") in line


def test_apex_without_a_gpu_is_told(cli: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apex_of(tmp_path, monkeypatch, __init__="", optimizers="class FusedSGD: pass\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU" in refuse(cli, tiny, tmp_path / "run")
