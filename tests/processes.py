"""Several processes that run one function together, as a launcher would start them.

`python -m tests.processes MODULE FUNCTION ARGUMENTS` is one of them.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import config
from engine.system import distributed
from engine.system.distributed import World

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables that a launcher gives to a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    told = {name: str(number) for name, number in numbers.items()}
    return os.environ | told | {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}


def start(size: int, command: list[str], **keys: Any) -> list[subprocess.Popen[str]]:
    """Processes of a command that find each other."""
    port = free_port()
    return [
        subprocess.Popen(  # the tests' own command
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **keys,
        )
        for rank in range(size)
    ]


def together(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call function(world, *arguments) in each of so many processes; arguments are plain values.

    One process is a process of its own too, so that all are alike.
    """
    command = ["-m", "tests.processes", function.__module__, function.__name__, json.dumps(arguments)]
    running = start(size, command)
    ended = [process.communicate(timeout=600) for process in running]
    printed = "\n".join(out + err for out, err in ended)
    assert [process.returncode for process in running] == [0] * size, printed


def main() -> None:
    torch.set_num_threads(1)
    module, function, arguments = sys.argv[1:]
    with distributed.joined(config.load({"device": "cpu"}), timeout=60) as world:
        assert isinstance(world, World)
        try:
            getattr(importlib.import_module(module), function)(world, *json.loads(arguments))
        except Exception:
            traceback.print_exc()
            raise


if __name__ == "__main__":
    main()
