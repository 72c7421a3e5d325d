"""The clock of the device and captured calls; needs a GPU."""

from __future__ import annotations

import pytest
import torch

from bench.lib.timing import CudaClock, QueuedClock, captured

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("idle", [True, False])
def test_the_clock_calls_as_often_as_it_is_told(idle: bool) -> None:
    counter = torch.zeros((), device="cuda")
    assert CudaClock(torch.device("cuda"), idle=idle).seconds(lambda: counter.add_(1), 5) > 0
    assert counter.item() == 5


def test_calls_are_queued_before_the_device_begins() -> None:
    counter, clock = torch.zeros((), device="cuda"), QueuedClock(torch.device("cuda"))
    assert clock.seconds(lambda: counter.add_(1), 5) > 0
    assert counter.item() % 5 == 0
    with pytest.raises(RuntimeError, match="the host's time would count"):
        clock.seconds(torch.cuda.synchronize, 1)


def test_a_captured_call_is_run_again_by_each_replay() -> None:
    logits = torch.randn(8, 4, device="cuda", requires_grad=True)
    total = torch.zeros(8, 4, device="cuda")

    def call() -> None:
        (grad,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), logits)
        total.add_(grad)

    call()
    replay = captured(call)
    total.zero_()
    for _ in range(3):
        replay()
    torch.testing.assert_close(total, 3 * logits.detach().softmax(dim=1))
