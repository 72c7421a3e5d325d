"""The mock itself: does it see what the tests that use it rely on, and refuse what a GPU refuses?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.fake_cuda import FakeCuda
from tests.fake_cuda.journal import Call, of, recorded


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return str(error).splitlines()[0]
    return ""


def capture(work: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def session() -> dict[str, Any]:
    x = torch.ones(1000, device="cuda")
    side = torch.cuda.Stream()
    seen: dict[str, Any] = {"device": torch.cuda.get_device_capability(), "side stream": str(side.cuda_stream)}

    def record(name: str, work: Callable[[], Any]) -> None:
        with recorded() as calls:
            work()
        seen[name] = calls

    def on_side() -> None:
        with torch.cuda.stream(side):
            x.mul_(2)

    def wait_for_side() -> None:
        side.wait_stream(torch.cuda.current_stream())
        on_side()
        torch.cuda.current_stream().wait_stream(side)

    record("default", lambda: x.mul_(2))
    record("side", on_side)
    record("ordered", wait_for_side)
    record("item", lambda: x[0].item())
    record("pageable", lambda: torch.ones(5).cuda())
    pinned = torch.ones(5).pin_memory()
    record("pinned", lambda: pinned.to("cuda", non_blocking=True))
    record("zeros", lambda: torch.zeros(5, device="cuda"))
    record("captured", lambda: capture(wait_for_side).replay())

    def fork_only() -> None:
        side.wait_stream(torch.cuda.current_stream())
        on_side()

    seen["wait in a capture"] = error_of(lambda: capture(lambda: x[0].item()))
    seen["capture that is not joined"] = error_of(lambda: capture(fork_only))
    seen["too much memory"] = error_of(lambda: torch.empty(100 << 30, dtype=torch.uint8, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    seen["wait in debug mode"] = error_of(lambda: x[0].item())
    return seen


@pytest.fixture(scope="module")
def seen(fake_cuda: FakeCuda) -> dict[str, Any]:
    result: dict[str, Any] = fake_cuda.run(session)
    return result


def kinds(calls: list[Call]) -> list[str]:
    return [call["call"] for call in calls]


def test_kernels_are_seen_with_their_stream(seen: dict[str, Any]) -> None:
    assert seen["device"] == [9, 0]
    (default,), (side,) = of("kernel", seen["default"]), of("kernel", seen["side"])
    assert "MulFunctor" in default["name"]
    assert (default["stream"], side["stream"]) == ("0", seen["side stream"])


def test_the_order_between_streams_is_seen(seen: dict[str, Any]) -> None:
    assert kinds(seen["ordered"]) == ["record", "wait", "kernel", "record", "wait"]
    assert [call["stream"] for call in seen["ordered"]] == ["0", *[seen["side stream"]] * 3, "0"]


def test_waits_and_copies_are_seen(seen: dict[str, Any]) -> None:
    (copy,) = of("copy", seen["item"])
    assert (copy["kind"], copy["bytes"]) == ("D2H", "4")
    assert of("synchronize", seen["item"])[0]["stream"] == "0"
    assert [(call["kind"], call["host"]) for call in of("copy", seen["pageable"])] == [("H2D", "pageable")]
    assert [(call["kind"], call["host"]) for call in of("copy", seen["pinned"])] == [("H2D", "pinned")]
    assert of("synchronize", seen["pageable"])
    assert not of("synchronize", seen["pinned"])
    assert len(of("kernel", seen["zeros"]) + of("fill", seen["zeros"])) == 1


def test_a_graph_holds_what_was_captured(seen: dict[str, Any]) -> None:
    assert [call["nodes"] for call in of("capture_end", seen["captured"])] == ["1"]
    assert [call["nodes"] for call in of("graph_launch", seen["captured"])] == ["1"]


def test_what_a_gpu_refuses_is_refused(seen: dict[str, Any]) -> None:
    assert "previous error during capture" in seen["wait in a capture"]
    assert "unjoined work" in seen["capture that is not joined"]
    assert "out of memory" in seen["too much memory"]
    assert "synchronizing CUDA operation" in seen["wait in debug mode"]


def on_two_devices() -> dict[str, Any]:
    x = torch.ones(5, device="cuda:1")
    with recorded() as guarded:
        x.mul_(2)
    return {"count": torch.cuda.device_count(), "guarded": guarded}


def test_there_may_be_several_devices(fake_cuda: FakeCuda) -> None:
    seen = fake_cuda.run(on_two_devices, devices=2)
    assert seen["count"] == 2
    assert [call["device"] for call in of("kernel", seen["guarded"])] == ["1"]


def copies_to_another_stream() -> list[bool]:
    """Objections of torch's sanitizer to work that reads a copy, with and without a wait for it."""
    host, side, current = torch.ones(5).pin_memory(), torch.cuda.Stream(), torch.cuda.current_stream()

    def read_copy(wait: bool) -> None:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            x = host.to("cuda", non_blocking=True)
        if wait:
            current.wait_stream(side)
        x.add(1)

    return [bool(error_of(partial(read_copy, wait))) for wait in (True, False)]


def test_a_missing_wait_is_found_by_the_sanitizer(fake_cuda: FakeCuda) -> None:
    assert fake_cuda.run(copies_to_another_stream, TORCH_CUDA_SANITIZER="1") == [False, True]
