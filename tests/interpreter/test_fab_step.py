"""The step of FAB as a Triton kernel, in the interpreter: against float64."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "it takes a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed")

import torch
from hypothesis import given, settings

from tests.interpreter.device import imitate
from tests.kernels.fab_cases import ANY_FAB, FAB_CASES, FabCase, check_fab_step, check_many_corners, uneven

# numpy's, of entries that are not finite or that a mask then drops
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def like_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch)


@pytest.mark.parametrize("case", FAB_CASES, ids=str)
def test_it_equals_numpy_image_by_image(case: FabCase) -> None:
    check_fab_step(case, "triton")


@settings(max_examples=50, deadline=None)
@given(case=ANY_FAB)
def test_any_step(case: FabCase) -> None:
    check_fab_step(case, "triton")


@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
def test_images_of_many_blocks(threat_model: str) -> None:
    check_fab_step(FabCase((1, 3, 224, 224), threat_model, uneven, layout=torch.channels_last), "triton")


@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
def test_pixels_that_reach_the_border_one_by_one(threat_model: str) -> None:
    check_many_corners(threat_model, "triton")
