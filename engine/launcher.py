"""Several processes of one command on this machine, by torchrun's elastic launcher."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from engine import precision
from engine.stopping import EXIT_FAILED, EXIT_INTERRUPTED

MAX_RESTARTS = 3
SECONDS_TO_SAVE = 120
"""How long the processes have between SIGTERM and SIGKILL: a step and a checkpoint."""


def count(gpus: int | None, processes: int | None, device: str) -> int:
    """Processes to launch for `--gpus` or `--procs`; 0 where neither is given.

    Raises ValueError for GPUs that are not there, and for what excludes each other.
    """
    if gpus is not None and processes is not None:
        raise ValueError("--gpus and --procs exclude each other: GPUs have a process each")
    if gpus is not None:
        there = precision.count_gpus()
        if gpus > there:
            raise ValueError(f"--gpus {gpus}: this machine has {there} CUDA GPU{'s' * (there != 1)}")
        if device not in ("auto", "cuda"):
            raise ValueError(f"--gpus {gpus} and --device {device} exclude each other")
    if processes is not None and (device.startswith("cuda") or (device == "auto" and precision.count_gpus())):
        raise ValueError(f"--procs {processes} is for CPUs: add --device cpu, or use --gpus {processes}")
    return gpus or processes or 0


def launch(processes: int, arguments: Sequence[str], logs: Path | None) -> int:
    """Run `engine ARGUMENTS` in so many processes, again from the start where one fails; the exit code of it all.

    The first process has this one's terminal. What the others print goes to files below logs, their errors to the
    terminal too.
    """
    # Cores are shared: torch would give all of them to each process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    others = range(1, processes)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=MAX_RESTARTS,
        logs_specs=DefaultLogsSpecs(
            log_dir=None if logs is None else str(logs),
            redirects=dict.fromkeys(others, Std.OUT),
            tee=dict.fromkeys(others, Std.ERR),
        ),
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "engine", *arguments)
    except SignalException:
        return EXIT_INTERRUPTED
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else EXIT_FAILED
    return 0
