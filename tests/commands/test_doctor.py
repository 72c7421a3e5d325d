"""The doctor tells the truth about this machine, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.commands import doctor
from engine.common import optional
from engine.kernels import native
from engine.runs import format_probe


def found() -> dict[str, doctor.Finding]:
    return {one.name: one for one in doctor.examine()}


def test_what_is_there_is_told_with_its_version() -> None:
    findings = found()
    assert findings["Python"].detail == platform.python_version()
    assert findings["torch"].detail == torch.__version__
    assert f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores" in findings["processor"].detail
    assert findings["AutoAttack"] == doctor.Finding("AutoAttack", True, metadata.version("pyautoattack"))
    assert findings["native ops, CPU"].is_there == (not native.missing("cpu"))
    gpus = [one for name, one in findings.items() if name.startswith("GPU")]
    assert sum(one.is_there for one in gpus) == torch.cuda.device_count()
    assert findings["gloo"].is_there


@pytest.mark.parametrize(
    ("gain", "is_there", "detail"),
    [
        (
            1.9,
            True,
            "bfloat16 is 1.90x of float32 on this processor: bfloat16 is used by --amp, measured with resnet18",
        ),
        (
            0.51,
            False,
            "bfloat16 is 0.51x of float32 on this processor: float32 is used by --amp, measured with resnet18",
        ),
    ],
)
def test_amp_is_recommended_where_it_is_faster(
    gain: float, is_there: bool, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        format_probe, "gains_of", lambda config: {"float32": 1.0, "winograd": 1.0, "bfloat16": gain}
    )
    assert found()["bfloat16 on the CPU"] == doctor.Finding("bfloat16 on the CPU", is_there, detail)


@pytest.mark.parametrize(
    ("module", "name", "how"),
    [
        ("engine.pipelines.ffcv.repairs", "FFCV", "make setup-ffcv"),
        ("nvidia.dali", "DALI", "pip install 'iad-engine[dali]'"),
        ("apex", "apex", "build it from source: https://github.com/NVIDIA/apex"),
        ("onnxruntime", "ONNX", "pip install 'iad-engine[export]'"),
    ],
)
def test_what_is_missing_is_told_with_the_way_to_get_it(
    module: str, name: str, how: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    finding = found()[name]
    assert (finding.is_there, finding.how) == (False, how)
    outcome = cli("doctor")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(f"no   {name} ")]
    assert lines[at + 1].split() == f"to get it: {how}".split()


def test_loggers_are_told_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"trackio": "1.2", "mlflow": None}
    monkeypatch.setattr(optional, "version", lambda *names: versions.get(names[0]))
    findings = found()
    assert findings["trackio"] == doctor.Finding("trackio", True, "1.2")
    assert findings["mlflow"].how == "pip install 'iad-engine[mlflow]'"
    assert findings["wandb"].detail == "wandb needs the package wandb, which is not installed"
    assert "tensorboard" not in findings  # every run has it


def test_a_library_that_is_not_built_is_told_with_the_way_to_build_it(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "missing", lambda device_type: "not built")
    for name in ("native ops, CPU", "native ops, CUDA"):
        assert found()[name] == doctor.Finding(name, False, "not built", "make native")


def test_places_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "images"))
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "cache"))
    findings = found()
    places = f"{tmp_path / 'images'} and ./data and {tmp_path / 'cache'}"
    assert findings["data sets"].detail == f"looked for in {places}"
    assert findings["teachers"].detail == f"kept in {tmp_path / 'cache' / 'teachers'}"
