"""`engine doctor`: what this machine offers a training, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import click


@click.command()
def doctor() -> None:
    """Tell what this machine offers, what is missing, and how to get it."""
    from engine.common import standard_streams
    from engine.common.console import ConsoleReporter

    reporter = ConsoleReporter()
    for one in examine():
        reporter.message(f"{'yes' if one.is_there else 'no':4} {one.name:20} {one.detail}")
        if one.how:
            reporter.message(f"{'':25} to get it: {one.how}")
    standard_streams.check_stdout()


@dataclass(frozen=True)
class Finding:
    """One thing that a training may use. detail: what is there, or why it is not; how: the command to get it."""

    name: str
    is_there: bool
    detail: str
    how: str = ""


def examine() -> list[Finding]:
    """All findings, in the order in which a user asks for them."""
    import torch
    import torch.distributed as dist

    from engine.config import RunConfig
    from engine.evaluation.measure import check_names
    from engine.kernels import dispatch
    from engine.pipelines import dali, ffcv
    from engine.pipelines.datasets import cache_dir
    from engine.runs import format_probe
    from engine.system import environment, precision
    from engine.training.weights.optimizer import check_apex

    has_gpu, usable = precision.count_gpus() > 0, len(os.sched_getaffinity(0))
    given = [os.environ["ENGINE_DATA"]] if "ENGINE_DATA" in os.environ else []
    usual = RunConfig()
    gains = format_probe.gains_of(usual)
    return [
        Finding("Python", True, platform.python_version()),
        Finding("torch", True, torch.__version__),
        Finding(
            "processor",
            True,
            f"{environment.processor()}, {usable} of {os.cpu_count()} cores for this process",
        ),
        Finding(
            "bfloat16 on the CPU",
            format_probe.faster(gains) == "bfloat16",
            f"{format_probe.describe_gain(gains)} by --amp, measured with {usual.model}",
        ),
        *_gpus(),
        Finding("gloo", dist.is_available() and dist.is_gloo_available(), "between CPUs: --procs"),
        _nccl(has_gpu),
        _checked("Triton", lambda: _raise(dispatch.missing("triton", "cuda")), ("triton",), "pip install triton"),
        _native("cpu", "native ops, CPU"),
        _native("cuda", "native ops, CUDA"),
        _checked("FFCV", ffcv.check_installed, ("ffcv",), "make setup-ffcv"),
        _checked(
            "DALI",
            dali.check_installed,
            ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
            "pip install 'iad-engine[dali]'",
        ),
        _checked("apex", check_apex, (), "build it from source: https://github.com/NVIDIA/apex"),
        _checked(
            "AutoAttack",
            lambda: check_names(("aa",)),
            ("pyautoattack", "autoattack"),
            "pip install pyautoattack",
        ),
        _onnx(),
        *_loggers(),
        *(_tool(name, what) for name, what in (("cmake", "builds native ops"), ("nvcc", "builds those for CUDA"))),
        Finding("data sets", True, f"looked for in {' and '.join((*given, './data', str(cache_dir())))}"),
        Finding("teachers", True, f"kept in {cache_dir() / 'teachers'}"),
    ]


def _gpus() -> list[Finding]:
    import torch

    from engine.system import precision

    if not precision.count_gpus():
        built = (
            f"torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch is built without CUDA"
        )
        how = "" if torch.version.cuda else "install torch for CUDA: https://pytorch.org/get-started"
        return [Finding("GPU", False, f"none is visible; {built}", how)]
    found = []
    for index in range(precision.count_gpus()):
        gpu = torch.cuda.get_device_properties(index)
        amp = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        memory = gpu.total_memory / 2**30
        detail = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB, --amp in {amp}"
        found.append(Finding(f"GPU {index}", True, detail))
    return found


def _onnx() -> Finding:
    from engine.deployment.exporting.formats import FORMATS, check_installed

    onnx = FORMATS["onnx"]
    missing = partial(check_installed, (onnx,))
    return _checked("ONNX", missing, onnx.packages, "pip install 'iad-engine[export]'")


def _loggers() -> list[Finding]:
    from engine.plugins.builtin_loggers import table

    return [
        _checked(name, partial(table.check_installed, name), one.distributions, table.how_to_install(name))
        for name, one in table.BUILT_IN.items()
        if one.make is not None
    ]


def _nccl(has_gpu: bool) -> Finding:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return Finding("NCCL", False, "torch is built without it; between GPUs: --gpus")
    version = ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else "in torch"
    return Finding("NCCL", True, f"{version}; between GPUs: --gpus")


def _native(device_type: str, name: str) -> Finding:
    from engine.kernels import native

    if reason := native.missing(device_type):
        return Finding(name, False, reason, "make native")
    return Finding(name, True, native.description(device_type))


def _checked(name: str, check: Callable[[], object], packages: tuple[str, ...], how: str = "") -> Finding:
    """check: raises ValueError, `WHAT: reason; advice`, where it is missing. packages: whose version is told."""
    from engine.common import optional

    try:
        check()
    except ValueError as error:
        reason = str(error).partition(": ")[2] or str(error)
        return Finding(name, False, reason.partition("; ")[0], how)
    return Finding(name, True, optional.version(*packages) or "")


def _raise(reason: str) -> None:
    if reason:
        raise ValueError(reason)


def _tool(name: str, what: str) -> Finding:
    place = shutil.which(name)
    return Finding(name, place is not None, f"{place or 'not found'}; {what}", "" if place else f"install {name}")
