"""SGD of torch, and apex where it is NVIDIA's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import config
from engine.training.weights import optimizer


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
