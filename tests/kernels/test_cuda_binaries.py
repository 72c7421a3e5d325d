"""Budgets of the CUDA C++ kernels, read from the machine code in the library."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

ARCHITECTURES = (80, 90, 100)

# Registers with which as many threads are resident as hide the latency of memory: 65536 per multiprocessor.
REGISTERS = {"pgd_update_linf": 48, "pgd_update_l2": 64, "crop_flip": 40}


@dataclass(frozen=True)
class Binary:
    """One instance of a kernel for one architecture. asserts: whether its file may stop the device."""

    name: str
    dtype: str
    wide: bool
    counting: bool
    resources: dict[str, int]
    instructions: Counter[str]
    asserts: bool

    def count(self, pattern: str) -> int:
        return sum(number for name, number in self.instructions.items() if re.fullmatch(pattern, name))


def tool(name: str) -> str:
    """A program of the CUDA toolkit, or the one that triton brings along."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(str(spec.origin)).parent / "backends/nvidia/bin" / name if spec else None
    found = shutil.which(name) or (str(bundled) if bundled is not None and bundled.exists() else None)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


@pytest.fixture(scope="module")
def cubins(cuda_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cubins")
    run(tool("cuobjdump"), "-xelf", "all", cuda_library, cwd=folder)
    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES, ids="sm_{}".format)
def binaries(request: pytest.FixtureRequest, cubins: Path) -> list[Binary]:
    """All kernels of an architecture, as they lie in the library."""
    return [binary for cubin in cubins.glob(f"*.sm_{request.param}.cubin") for binary in read(cubin)]


def read(cubin: Path) -> Iterator[Binary]:
    resources = dict(re.findall(r"Function (\w+):\s+(.*)", run(tool("cuobjdump"), "--dump-resource-usage", cubin)))
    code = re.split(r"(?m)^\.text\.(\w+):", run(tool("nvdisasm"), "-c", cubin))[1:]
    for mangled, body in zip(code[::2], code[1::2], strict=True):
        match = re.search(r"\d(pgd_update_linf|pgd_update_l2|crop_flip)I(.*?)Lb([01])E(?:Lb([01])E)?", mangled)
        assert match, mangled
        yield Binary(
            name=match[1],
            dtype=match[2],
            wide=match[3] == "1",
            counting=match[4] == "1",
            resources={key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources[mangled])},
            instructions=Counter(
                re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
            ),
            asserts=b"__assertfail" in cubin.read_bytes(),
        )


def test_every_instance_is_there(binaries: list[Binary]) -> None:
    instances = {(binary.name, binary.dtype, binary.wide, binary.counting) for binary in binaries}
    dtypes = ("f", "6__half", "13__nv_bfloat16")
    updates = product(("pgd_update_linf", "pgd_update_l2"), dtypes, (False, True), (False, True))
    assert instances == {*updates, *product(["crop_flip"], [""], (False, True), [False])}
    assert len(instances) == len(binaries)


def test_nothing_spills_and_registers_are_few(binaries: list[Binary]) -> None:
    for binary in binaries:
        assert binary.resources["STACK"] == binary.resources["LOCAL"] == 0, binary
        assert binary.count(r"(LDL|STL)\b.*") == 0, binary
        assert binary.resources["REG"] <= REGISTERS[binary.name], binary
        assert binary.resources["SHARED"] <= 2048, binary


def test_memory_is_moved_16_bytes_at_a_time(binaries: list[Binary]) -> None:
    loads, stores = r"LDG\.E(\.\w+)*\.128(\.\w+)*", r"STG\.E(\.\w+)*\.128(\.\w+)*"
    for binary in binaries:
        assert (binary.count(stores) > 0) == binary.wide, binary
        if binary.name != "crop_flip":  # which reads single bytes
            assert (binary.count(loads) > 0) == binary.wide, binary


def test_what_is_not_counted_costs_nothing(binaries: list[Binary]) -> None:
    for binary in binaries:
        assert (binary.count(r"(RED|REDG|ATOM|ATOMG)\b.*") > 0) == binary.counting, binary
        if binary.name == "pgd_update_linf":
            assert (binary.count(r"BAR\b.*") > 0) == binary.counting, binary


def test_arithmetic_stays_in_single_precision(binaries: list[Binary]) -> None:
    for binary in binaries:
        assert binary.count(r"D(ADD|MUL|FMA|SETP)\b.*|F2F\.F64.*") == 0, binary


def test_the_device_refuses_unknown_samples_in_a_release_too(binaries: list[Binary]) -> None:
    for binary in binaries:
        assert binary.asserts == (binary.name == "crop_flip"), binary
