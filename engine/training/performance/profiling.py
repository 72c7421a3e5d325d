"""`engine train --profile N`: a trace of N steps, and a table of where their time goes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

from engine.common.console import Reporter
from engine.common.files import replacing, write_atomically

SKIPPED = 3  # steps in which things are compiled, captured and allocated for the first time

PHASES = {
    "data": "the next batch: loaded, cropped and flipped, on its lane",
    "attack": "x~ against the student",
    "attack: forward": "in one step of the attack: the network and its loss",
    "attack: backward": "in one step of the attack: the gradient of the images, or of the stem's output",
    "attack: update": "in one step of the attack: x~ moved and projected, and before it the gradient of the stem",
    "teachers": "the teachers' passes, on their lane",
    "student": "the student's passes of x~ and x",
    "loss": "the weighted sum of the terms",
    "backward": "the gradients of the weights",
    "weight attack": "adversarial weight perturbation, with a `student` and a `loss` of its own",
    "optimizer": "clipping and the update of the weights",
}
"""Ranges of a step, in its order, by the name that torch's profiler shows: the rows of profile.csv."""

DETAILS = {
    "crop_flip": "in `data`: images cropped, flipped and scaled on the device",
    "mix": "in `data`: mixup and CutMix, where they are used",
    "random_start": "in `attack`: the perturbation that it starts from",
    "network": "in any phase: one pass of one network",
}
"""Finer ranges within the phases, which the trace shows and `bench.profile` counts."""

Interval = tuple[float, float]


class Line(NamedTuple):
    """A phase in one step: calls, and milliseconds on the host and on the device, 0 where there is none."""

    name: str
    calls: float
    host_ms: float
    device_ms: float


class Profiler:
    """Records so many training steps after the first few, then writes trace.json and profile.csv."""

    def __init__(self, steps: int, folder: Path, device: torch.device, reporter: Reporter) -> None:
        self._steps, self._folder, self._device, self._reporter = steps, folder, device, reporter
        self._done = 0
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)

    def step(self) -> None:
        """Count a training step that is over; start and end the recording where it is time to."""
        self._done += 1
        if self._done == SKIPPED:
            self._wait()
            self._profile.start()
        elif self._done == SKIPPED + self._steps:
            self._wait()
            self._profile.stop()
            self._write()

    def close(self) -> None:
        """Tell of a run that was too short for the profile."""
        needed = SKIPPED + self._steps
        if self._done < needed:
            if self._done >= SKIPPED:
                self._profile.stop()
            self._reporter.message(f"There is no profile: it takes {needed} steps, and the run had {self._done}")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self) -> None:
        trace = self._folder / "trace.json"
        with replacing(trace) as temporary:
            self._profile.export_chrome_trace(str(temporary))
        lines = summed(self._profile.key_averages(), self._steps)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(Line._fields)
        writer.writerows((line.name, *(f"{value:.6g}" for value in line[1:])) for line in lines)
        write_atomically(self._folder / "profile.csv", text.getvalue().encode())
        self._reporter.message(
            f"Profile of {self._steps} steps, in milliseconds a step, on the host and the device:"
        )
        for line in lines:
            self._reporter.message(f"  {line.name:<17}{line.host_ms:10.2f}{line.device_ms:10.2f}")
        if (shared := overlap(streams_of(self._profile.events() or ()))) is not None:
            self._reporter.message(f"  {shared:.0%} of the shorter lanes' time ran beside the main lane")
        self._reporter.message(f"  {trace} opens in https://ui.perfetto.dev")


def summed(averages: Any, steps: int) -> list[Line]:
    """Phases that ran, in the order of a step. averages: of torch's profiler."""
    found = {event.key: event for event in averages if event.key in PHASES and event.cpu_time_total}
    return [
        Line(
            name,
            found[name].count / steps,
            found[name].cpu_time_total / steps / 1e3,
            found[name].device_time_total / steps / 1e3,
        )
        for name in PHASES
        if name in found
    ]


def streams_of(events: Sequence[Any]) -> list[list[Interval]]:
    """Intervals in which kernels ran, by stream, in microseconds."""
    streams: dict[int, list[Interval]] = {}
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            interval = (event.time_range.start, event.time_range.end)
            streams.setdefault(event.device_resource_id, []).append(interval)
    return list(streams.values())


def overlap(streams: Sequence[Sequence[Interval]]) -> float | None:
    """Share of the time of all streams but the busiest in which the busiest one ran too; None for a single one."""
    if len(streams) < 2:
        return None
    merged = sorted((_merged(stream) for stream in streams), key=_length, reverse=True)
    others = [interval for stream in merged[1:] for interval in stream]
    shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in others for b in merged[0])
    return shared / _length(others)


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    """Union of the intervals, as intervals that do not touch."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)
