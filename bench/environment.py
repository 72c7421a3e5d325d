"""List of what this machine has and lacks: `python -m bench.environment`. Needs nothing but Python itself."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

ALL = "anything"
# Distribution -> what cannot be done without it.
NEEDED = {
    "torch": ALL,
    "numpy": ALL,
    "pydantic": ALL,
    "PyYAML": ALL,
    "click": ALL,
    "rich": ALL,
    "pillow": ALL,
    "tensorboard": "training",
    "matplotlib": "training and charts",
    "scikit-learn": "the data set digits",
    "torchvision": "CIFAR and SVHN, and the DataLoader to compare with",
    "pyautoattack": "AutoAttack",
    "triton": "Triton kernels",
    "pytest": "tests and timings",
    "hypothesis": "tests and timings",
    "pytest-xdist": "tests in several processes",
    "scipy": "comparisons of networks",
}
PROGRAMS = {
    "make": "the native library",
    "cmake": "the native library",
    "c++": "the native library",
    "nvcc": "CUDA C++",
    "nvidia-smi": "a GPU",
    "compute-sanitizer": "a search for accesses out of bounds on a GPU",
    "ncu": "counters of a GPU's kernels",
}


def main() -> None:
    """Print both; exit code 1 where nothing works without what is missing."""
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} processors")
    missing = {}
    for name, purpose in NEEDED.items():
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing[name] = purpose
    for name, purpose in PROGRAMS.items():
        if path := shutil.which(name):
            print(path)
        else:
            missing[name] = purpose
    if gpu := shutil.which("nvidia-smi"):
        sys.stdout.flush()
        subprocess.run([gpu], check=False)  # noqa: S603  # found on the path
    for name, purpose in missing.items():
        print(f"missing: {name}, without which there is no: {purpose}")
    sys.exit(ALL in missing.values())


if __name__ == "__main__":
    main()
