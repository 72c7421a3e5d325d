"""Building the native library: what is in it, what it needs, and installations with and without a compiler."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import engine
from tests.packages import ROOT, contents, make, run

SETS = {"generic": "xmm", "avx2": "ymm", "avx512": "zmm"}  # and the widest registers of each
VECTOR = "#pragma omp simd"  # stands before each loop that is meant to be in vector instructions
SOURCES = [file.name for file in (ROOT / "kernels" / "csrc").glob("*.cpp") if "ENGINE_SET {" in file.read_text()]
HEADERS = ("linf.h",)  # with loops
LOOPS = [
    (name, file)
    for name in SOURCES
    for file in (name, *HEADERS)
    if file == name or f'#include "{file}"' in (ROOT / "kernels" / "csrc" / name).read_text()
    if VECTOR in (ROOT / "kernels" / "csrc" / file).read_text()
] + [("random_start.cpp", "philox.h")]  # which crop_flip.cpp includes too, for one counter at a time


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a build without CUDA."""
    need("cmake", "c++")
    folder = tmp_path_factory.mktemp("build")
    run("cmake", "-S", ROOT, "-B", folder, "-DENGINE_CUDA=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    run("cmake", "--build", folder, "--parallel", "2")
    return folder


@pytest.fixture
def objects(build: Path) -> Callable[[str], list[Path]]:
    """The object files of an instruction set, a skip where the build has no such set."""

    def find(instruction_set: str) -> list[Path]:
        found = sorted((build / "CMakeFiles" / f"{instruction_set}.dir").rglob("*.o"))
        if not found:
            pytest.skip(f"a library for this processor has no {instruction_set}")
        assert {file.stem for file in found} == set(SOURCES)
        return found

    return find


# ---------------------------------------------------------------- what is in the library


def test_the_library_needs_neither_torch_nor_python_nor_cuda(build: Path) -> None:
    need("readelf")
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "--dynamic", build / "_native.so"))
    system = re.compile(r"(libc|libm|libgcc_s|libstdc\+\+|ld-linux.*)\.so\.\d+")
    assert needed
    assert not [name for name in needed if not system.fullmatch(name)]


def test_the_library_shows_only_its_entry_points(build: Path) -> None:
    need("nm")
    names = re.findall(r" [A-Z] (\w+)", run("nm", "--dynamic", "--defined-only", build / "_native.so"))
    assert {"engine_cpu_distill_loss", "engine_cpu_pgd_update", "engine_cpu_crop_flip"} < set(names)
    assert not [name for name in names if not name.startswith("engine_")]


@pytest.mark.parametrize("instruction_set", SETS)
def test_no_function_is_shared_between_instruction_sets(
    objects: Callable[[str], list[Path]], instruction_set: str
) -> None:
    """A function that several files hold is merged by the linker, and could then be the one in AVX-512 for all."""
    need("nm")
    for file in objects(instruction_set):
        defined = re.findall(r" ([A-Za-z]) (.+)", run("nm", "--defined-only", "--demangle", file))
        shown = [name for kind, name in defined if kind in "TWVu"]
        op = f"engine::{instruction_set}::{file.stem.removesuffix('.cpp')}"
        assert all(name.startswith((f"{op}(", f"{op}_backward(")) for name in shown)
        assert 1 <= len(shown) <= 2


@pytest.mark.parametrize("instruction_set", SETS)
def test_each_set_uses_its_registers_and_no_wider_ones(
    objects: Callable[[str], list[Path]], instruction_set: str
) -> None:
    need("objdump")
    for file in objects(instruction_set):
        used = set(re.findall(r"%([xyz]mm)", run("objdump", "--disassemble", file)))
        assert max(used) <= SETS[instruction_set]
        assert file.stem not in dict(LOOPS) or max(used) == SETS[instruction_set]


@pytest.mark.parametrize(("source", "file"), LOOPS)
@pytest.mark.parametrize("instruction_set", SETS)
def test_every_loop_that_is_meant_to_be_is_in_vector_instructions(
    build: Path, instruction_set: str, source: str, file: str
) -> None:
    """A branch or a possible overlap leaves a loop scalar without a word, and several times slower."""
    if "Free Software Foundation" not in run("c++", "--version"):
        pytest.skip("only GCC tells which loops it made vectors of, in the way that is read here")
    commands = json.loads((build / "compile_commands.json").read_text())
    mine = [command["command"] for command in commands if f"ENGINE_SET={instruction_set} " in command["command"]]
    (command,) = [command for command in mine if command.endswith(f"/{source}")] or [""]
    if not command:
        pytest.skip(f"a library for this processor has no {instruction_set}")
    command = re.sub(r" -o \S+", f" -o {os.devnull}", command) + " -fopt-info-vec-all"
    told = re.findall(
        rf"{file}:(\d+):\d+: (optimized: loop|missed: couldn't vectorize)", run(*shlex.split(command))
    )
    done = {int(line) for line, word in told if word.startswith("optimized")}
    done -= {int(line) for line, word in told if word.startswith("missed")}
    lines = (ROOT / "kernels" / "csrc" / file).read_text().splitlines()
    meant = {number + 2 for number, line in enumerate(lines) if line.startswith(VECTOR)}
    # GCC names a loop by its head or by the first line of its body.
    assert not [line for line in meant if not done & {line, line + 1}]


# ---------------------------------------------------------------- choices of the build


def test_without_cuda_the_library_says_so(build: Path) -> None:
    program = f"""
from pathlib import Path
from engine.kernels import native
native._FILE = Path({str(build / "_native.so")!r})
assert native.missing("cpu") == "", native.missing("cpu")
print(native.missing("cuda"))
"""
    assert run(sys.executable, "-c", program).strip() == (
        "the native library was built without CUDA (make native where there is a CUDA compiler)"
    )


def test_a_cuda_compiler_that_does_not_work_is_as_good_as_none(tmp_path: Path) -> None:
    need("cmake", "c++")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho this is no compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    assert "no CUDA" in run("cmake", "-S", ROOT, "-B", tmp_path / "build", CUDACXX=str(nvcc))


def test_another_processor_gets_the_generic_set_alone(tmp_path: Path) -> None:
    need("cmake", "c++")
    other = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DENGINE_CUDA=OFF")
    assert "CPU generic; no CUDA" in run("cmake", "-S", ROOT, "-B", tmp_path, *other)


# ---------------------------------------------------------------- installations


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what an installation starts from, with its links, without what was built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "CMakeLists.txt",
        "Makefile",
        "README.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("engine", "kernels", "pipelines"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH with neither CMake nor a compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "uname"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    return str(folder)


@pytest.mark.slow
def test_a_wheel_holds_the_library_and_serves_every_python(source: Path, tmp_path: Path) -> None:
    need("cmake", "c++")
    wheel = make("wheel", source, tmp_path, ENGINE_NATIVE="1")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name == f"iad_engine-{engine.__version__}-py3-none-{platform}.whl"
    names, about = contents(wheel)
    assert "engine/kernels/_native.so" in names
    assert "Root-Is-Purelib: false" in about
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu")) or ".data/" in name]


def test_without_cmake_a_wheel_is_pure_python(source: Path, tmp_path: Path, bare: str) -> None:
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (stale / "engine" / "kernels").mkdir(parents=True)
    (stale / "engine" / "kernels" / "_native.so").write_text("of an earlier build")
    wheel = make("wheel", source, tmp_path, PATH=bare)
    assert wheel.name == f"iad_engine-{engine.__version__}-py3-none-any.whl"
    names, about = contents(wheel)
    assert "engine/kernels/native.py" in names
    assert "Root-Is-Purelib: true" in about
    assert not [name for name in names if name.endswith(".so") or ".data/" in name]


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "cmake is not installed"),
        ({"CXX": "/bin/false", "PATH": os.environ["PATH"]}, "cmake -S failed, as told above"),
    ],
    ids=["no cmake", "no working compiler"],
)
def test_the_reason_of_a_missing_library_is_told_and_can_be_an_error(
    source: Path, bare: str, environment: dict[str, str], reason: str
) -> None:
    pytest.importorskip("setuptools", minversion="77")
    if environment:
        need("cmake")
    environment = {"PATH": bare} | environment
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    told = f'building extension "engine.kernels._native" failed: {reason}'
    assert told in run(*command, cwd=source, **environment)
    assert not list(source.glob("kernels/*.so"))
    with pytest.raises(AssertionError, match=reason):
        run(*command, cwd=source, ENGINE_NATIVE="1", **environment)
    assert "_native" not in run(*command, cwd=source, ENGINE_NATIVE="0", **environment)
    with pytest.raises(AssertionError, match="ENGINE_NATIVE: 'yes' is unknown; known are auto, 0, 1"):
        run(*command, cwd=source, ENGINE_NATIVE="yes", **environment)


@pytest.mark.slow
def test_an_sdist_holds_all_that_a_build_needs(source: Path, tmp_path: Path) -> None:
    need("cmake", "c++")
    with tarfile.open(make("sdist", source, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"iad_engine-{engine.__version__}"
    assert sorted(file.name for file in unpacked.glob("engine/kernels/csrc/*")) == sorted(
        file.name for file in ROOT.glob("kernels/csrc/*")
    )
    names, _ = contents(make("wheel", unpacked, tmp_path, ENGINE_NATIVE="1"))
    assert "engine/kernels/_native.so" in names


@pytest.mark.slow
def test_an_editable_installation_in_a_fresh_environment_has_the_library(source: Path, tmp_path: Path) -> None:
    need("cmake", "c++")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where).strip())
    parent = sysconfig.get_path("purelib")  # whose setuptools builds and whose torch loads: nothing is fetched
    (packages / "parent.pth").write_text(parent)
    install = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", source)
    run(*install, PYTHONPATH=parent)
    report = "from engine.kernels import native; print(native._FILE, native.missing('cpu'))"
    file, *reason = run(python, "-c", report, cwd=tmp_path).split()
    assert (Path(file).resolve(), reason) == (source / "kernels" / "_native.so", [])


@pytest.mark.slow
def test_make_native_builds_in_place(source: Path) -> None:
    need("cmake", "c++", "make")
    run("make", "native", cwd=source)
    assert (source / "kernels" / "_native.so").is_file()
