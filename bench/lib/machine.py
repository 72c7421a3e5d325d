"""Facts of a measurement: hardware, versions, date, commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict

import torch

from engine.system import environment, precision
from engine.system.precision import Precision

BENCH = Path(__file__).resolve().parents[1]
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Facts(TypedDict):
    """Columns that every row of a measurement begins with."""

    date: str
    commit: str
    device: str
    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    triton: str


def facts(device: torch.device) -> Facts:
    """Entries of a run's `provenance.json` that decide a time."""
    session = environment.session(Precision(device, torch.float32))
    versions, hardware = session["versions"], session["hardware"]
    return Facts(
        date=session["started"],
        commit=session["commit"] or "",
        device=hardware["device"],
        processor=hardware["processor"],
        cores=hardware["cores"],
        threads=hardware["threads"],
        python=versions["python"],
        torch=torch.__version__,
        triton=versions["triton"] or "",
    )


def device(name: str) -> torch.device:
    """The device that `--device` names. Raises ValueError where it is not there."""
    return precision.device(name)


def cache_bytes(device: torch.device) -> int:
    """Size of the last level of cache; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = {
        int((cache / "level").read_text()): (cache / "size").read_text().strip() for cache in CACHES.glob("index*")
    }
    return int(sizes[max(sizes)].removesuffix("K")) * 1024 if sizes else 0


def results_folder(facts: Facts) -> Path:
    """bench/results/DEVICE-DATE: the folder of results that were given none."""
    name = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return BENCH / "results" / f"{slug}-{facts['date'][:10]}"
