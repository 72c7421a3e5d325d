"""Builds what stands in for a GPU in the tests: see README.md."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "kernels" / "csrc"

# Libraries that torch links against, whose calls come to nothing; products of matrices are launches.
STUBBED = re.compile(r"(cublas|cublasLt|cudnn|cufft|cusolver|cusparse|cusparseLt)[A-Z]\w+")
PRODUCT = re.compile(r"cublas[A-Z]?[gG]emm\w*")
DEFINED = ("cublasSetStream_v2",)  # by the mock


def emulated_kernels(directory: Path) -> ctypes.CDLL:
    """The CUDA C++ kernels, to be called with tensors of the CPU."""
    sources = [*SOURCES.glob("*.cu"), HERE / "emulator" / "controls.cpp"]
    # As nvcc does, a product and a sum in one rounding, where the processor can.
    arithmetic = ["-O2", "-march=native", "-ffp-contract=fast"]
    flags = [*arithmetic, "-Wno-unknown-pragmas", f"-I{HERE / 'emulator'}", "-x", "c++"]
    return ctypes.CDLL(str(_compile(directory / "kernels.so", sources, flags)))


def mock_runtime(directory: Path) -> Path:
    """The mock of the CUDA runtime and driver, under the name by which a driver is looked for."""
    headers = _cuda_headers()
    (directory / "stubs.inc").write_text(_stubs())
    flags = [f"-I{headers}", f"-I{directory}", "-Wl,-soname,libcuda.so.1"]
    return _compile(directory / "libcuda.so.1", sorted((HERE / "mock").glob("*.cpp")), flags)


def native_library(directory: Path) -> Path:
    """The native library with its CUDA part: as in a release, but for the CUDA runtime, which may be a mock."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("nvcc") is None:
        pytest.skip("CMake or the CUDA toolkit (nvcc) is not installed")
    _run(cmake, "-S", ROOT, "-B", directory, "-DCMAKE_CUDA_RUNTIME_LIBRARY=Shared")
    _run(cmake, "--build", directory, "--parallel", "2")
    return directory / "_native.so"


def _compile(output: Path, sources: list[Path], flags: list[str]) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    options = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags)
    _run(compiler, *options, *sources, "-o", output, "-ldl")
    return output


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _cuda_headers() -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("the CUDA toolkit (nvcc) is not installed")
    printed = subprocess.run([nvcc, "--dryrun", "-E", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", printed, re.M)
    assert top, printed
    headers = Path(top[1]) / "include"
    version = re.search(r"#define CUDART_VERSION\s+(\d+)", (headers / "cuda_runtime_api.h").read_text())
    assert version
    major = int(version[1]) // 1000
    if torch.version.cuda is None or not torch.version.cuda.startswith(f"{major}."):
        pytest.skip(f"torch was built for CUDA {torch.version.cuda}, the toolkit here is CUDA {major}")
    return headers


def _stubs() -> str:
    """A line for each function that torch calls of those libraries and the mock does not define."""
    libraries = Path(torch.__file__).parent.glob("lib/libtorch_cuda*.so")
    listing = _run("nm", "-D", "--undefined-only", *libraries)
    names = sorted({name for name in re.findall(r" U (\w+)", listing) if STUBBED.fullmatch(name)})
    # Texts and versions come from the libraries themselves, which are there.
    names = [name for name in names if not name.endswith(("String", "Version", "Name")) and name not in DEFINED]
    return "".join(f"{'PRODUCT' if PRODUCT.fullmatch(name) else 'STUB'}({name});\n" for name in names)
