"""What this machine has and what it lacks: `python -m bench.environment`. Needs nothing but Python itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

# Distribution -> what cannot be done without it.
NEEDED = {
    "torch": "anything",
    "numpy": "anything",
    "pydantic": "anything",
    "PyYAML": "anything",
    "click": "anything",
    "rich": "anything",
    "pillow": "anything",
    "matplotlib": "charts",
    "triton": "Triton kernels",
    "pytest": "tests and timings",
    "hypothesis": "tests and timings",
    "scipy": "tests of the random numbers",
}
PROGRAMS = {"cmake": "the native library", "c++": "the native library", "nvcc": "CUDA C++", "nvidia-smi": "a GPU"}


def main() -> None:
    """Print both; exit code 1 where something is missing."""
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} processors")
    missing = []
    for name, purpose in NEEDED.items():
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{name}, without which there is no: {purpose}")
    for name, purpose in PROGRAMS.items():
        if path := shutil.which(name):
            print(path)
        else:
            missing.append(f"{name}, without which there is no: {purpose}")
    if gpu := shutil.which("nvidia-smi"):
        sys.stdout.flush()
        subprocess.run([gpu], check=False)  # noqa: S603  # found on the path
    for line in missing:
        print(f"missing: {line}")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
