"""The uniform random start of every implementation, number by number against Philox's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels import dispatch, random_start
from engine.kernels.philox import Stream, random_words

IMPLEMENTATIONS = ("reference", "native")


def by_hand(sample: list[int], shape: tuple[int, int, int], epsilon: float, seed: int, counter: int) -> Tensor:
    """Number n of a sample is epsilon (2 u - 1), u the upper 24 bits of its word n, as float32 rounds once."""
    words = random_words(seed, Stream.ATTACK_START, counter, torch.tensor(sample), int(np.prod(shape))).numpy()
    centred = (2 * (words >> 8) / 2.0**24 - 1).astype(np.float32)
    return torch.from_numpy(np.float32(epsilon) * centred).view(len(sample), *shape)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(
    sample=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    epsilon=st.floats(1e-3, 1),
    seed=st.integers(0, 2**64 - 1),
    counter=st.integers(0, 2**32 - 1),
    channels_last=st.booleans(),
)
def test_every_number_is_that_of_its_word(
    implementation: str,
    sample: list[int],
    shape: tuple[int, int, int],
    epsilon: float,
    seed: int,
    counter: int,
    channels_last: bool,
) -> None:
    if reason := dispatch.missing(implementation, "cpu"):
        pytest.skip(reason)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x_nat = torch.zeros(len(sample), *shape).contiguous(memory_format=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGINE_KERNELS", implementation)
        noise = random_start(
            x_nat, torch.tensor(sample), kind="uniform", threat_model="Linf", epsilon=epsilon, seed=seed,
            counter=counter,
        )  # fmt: skip
    assert noise.stride() == x_nat.stride()
    assert torch.equal(noise, by_hand(sample, shape, epsilon, seed, counter))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("threat_model", ["Linf", "L2"])
@pytest.mark.parametrize("kind", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("counter", [0, 7, 2**32 - 1])
def test_a_counter_on_the_device_is_that_number(
    kind: str, threat_model: str, counter: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := dispatch.missing(implementation, "cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("ENGINE_KERNELS", implementation)

    def noise(counter: int | Tensor) -> Tensor:
        return random_start(
            torch.zeros(3, 3, 5, 4), torch.tensor([4, 1, 9]), kind=kind, threat_model=threat_model, epsilon=0.1,
            seed=2**40 + 3, counter=counter,
        )  # fmt: skip

    assert torch.equal(noise(torch.tensor(counter)), noise(counter))


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("sample", [torch.arange(1), torch.arange(2, dtype=torch.int32), torch.zeros(2, 1)])
def test_samples_that_do_not_fit_are_refused(kind: str, sample: Tensor) -> None:
    x_nat = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sample_B: expected int64 \(2,\), got"):
        random_start(x_nat, sample, kind=kind, threat_model="Linf", epsilon=0.5, seed=1, counter=2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_image_and_a_layout_with_gaps(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := dispatch.missing(implementation, "cpu"):
        pytest.skip(reason)
    monkeypatch.setenv("ENGINE_KERNELS", implementation)

    def start(x_nat: Tensor, sample: Tensor) -> Tensor:
        return random_start(x_nat, sample, kind="uniform", threat_model="Linf", epsilon=0.5, seed=1, counter=2)

    assert start(torch.zeros(0, 3, 4, 4), torch.arange(0)).shape == (0, 3, 4, 4)
    gaps = torch.zeros(2, 3, 4, 10)[..., ::2]
    assert torch.equal(start(gaps, torch.arange(6)[::3]), by_hand([0, 3], (3, 4, 5), 0.5, 1, 2))
