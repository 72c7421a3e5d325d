"""Message where DALI is not installed."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.pipelines.dali import DALIPipeline
from engine.pipelines.sampling import Sampling
from engine.pipelines.splits import Split


def test_without_dali_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    data = Split(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(ValueError, match=r"^pipeline: dali needs `pip install 'iad-engine\[dali\]'` \([^\n]*\)$"):
        DALIPipeline(data, Sampling(2, 1), augment=True, flip=True, device="cpu")
