"""The random start as a Triton kernel, in the interpreter: the bits of the reference."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed")

from engine.kernels import random_start
from tests.interpreter.device import imitate


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 5, 7), (1, 4, 1, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize(("seed", "counter"), [(0, 0), (2**64 - 1, 2**32 - 1), (5, torch.tensor(2**32 - 1))])
def test_the_numbers_are_those_of_the_reference(
    layout: torch.memory_format,
    shape: tuple[int, int, int, int],
    seed: int,
    counter: int | torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imitate(monkeypatch)
    x_nat = torch.zeros(shape).contiguous(memory_format=layout)
    sample = torch.tensor([2**32 - 1, 7, 0])[: len(x_nat)]
    starts = []
    for implementation in ("reference", "triton"):
        monkeypatch.setenv("ENGINE_KERNELS", implementation)
        starts.append(
            random_start(
                x_nat, sample, kind="uniform", threat_model="Linf", epsilon=8 / 255, seed=seed, counter=counter
            )
        )
    assert starts[1].stride() == x_nat.stride()
    assert torch.equal(*starts)
    assert torch.equal(starts[0], torch.zeros(shape)) == (len(x_nat) == 0)
