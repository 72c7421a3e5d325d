"""Freed memory: pages that the kernel hands out anew, and pages that the process holds."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, pathlib, resource
import torch
from engine.common import host_memory as hostmemory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1])

torch.set_num_threads(1)
mapped, holds = {"as it is": faults(64)}, {"as it is": held()}
assert hostmemory.keep_freed_memory()
for _ in range(8):  # until the heap has grown to what is needed
    faults(64)
mapped["kept"], holds["kept"] = faults(64), held()
assert hostmemory.return_freed_memory()
holds["given back"] = held()
mapped["from then on"], holds["from then on"] = faults(1024), held()  # more than any hole in the heap
below, above = torch.ones(2**28), torch.ones(2**28)
holds["both"] = held()
del below
holds["one"] = held()
print(json.dumps([mapped, holds]))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, which is what this is about"
)
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    mapped, holds = json.loads(done.stdout)
    each = 2**26 // 4096
    huge_pages = mapped["as it is"] < each  # then a page fault brings 2 MiB
    least = each // 512 if huge_pages else 3 * each
    assert mapped["as it is"] >= least
    assert mapped["kept"] < 0.1 * min(each, mapped["as it is"])
    assert mapped["from then on"] >= 16 * least
    assert holds["kept"] > holds["as it is"] + 0.9 * each
    assert holds["given back"] < holds["as it is"] + 0.1 * each
    assert holds["from then on"] < holds["as it is"] + 0.1 * each
    assert holds["one"] < holds["both"] - 15 * each, "the hole below an array is not kept"
