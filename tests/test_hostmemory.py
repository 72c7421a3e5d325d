"""What becomes of freed memory, counted in pages that the kernel has to hand out."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
import torch
from engine import hostmemory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
found = {"as it is": pages()}
assert hostmemory.keep_freed()
for _ in range(8):  # until the heap has grown to what is needed
    pages()
found["kept"] = pages()
assert hostmemory.give_back_freed()
found["given back"] = pages()
print(json.dumps(found))
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, which is what this is about"
)
def test_kept_memory_is_not_mapped_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    each = 2**26 // 4096
    assert found["kept"] < 0.1 * each
    huge_pages = found["as it is"] < each  # then a page fault brings 2 MiB
    least = each // 512 if huge_pages else 3 * each
    assert found["as it is"] >= least
    assert found["given back"] >= least
