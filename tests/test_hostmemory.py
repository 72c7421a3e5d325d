"""What becomes of freed memory: pages that the kernel hands out anew, and pages that the process holds."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, pathlib, resource
import torch
from engine import hostmemory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

torch.set_num_threads(1)
found = {"as it is": (faults(64), held())}
assert hostmemory.keep_freed()
for _ in range(8):  # until the heap has grown to what is needed
    faults(64)
found["kept"] = (faults(64), held())
assert hostmemory.give_back_freed()
found["given back"] = (0, held())
found["and from then on"] = (faults(1024), held())  # more than any hole in the heap
print(json.dumps(found))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, which is what this is about"
)
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    each = 64 * 2**20 // 4096
    faults, held = found["as it is"]
    assert faults >= 4 * each // 512, "a page is 4 KiB or 2 MiB"
    assert found["kept"][0] < 0.1 * faults
    assert found["kept"][1] > held + 0.9 * each
    assert found["given back"][1] < held + 0.1 * each
    assert found["and from then on"][0] >= 4 * 16 * each // 512
    assert found["and from then on"][1] < held + 0.1 * each
