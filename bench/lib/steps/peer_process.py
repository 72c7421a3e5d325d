"""Process that steps as it is ordered: `python -m bench.lib.steps.peer_process ORDER`, the `Peer` in JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.lib.memory import Meter, import_compiler
from bench.lib.steps import published
from bench.lib.steps.turns import PeerProcess, Turns
from bench.lib.steps.variants import VARIANTS, Workload, images_of

MODULE = "bench.lib.steps.peer_process"
PUBLISHED = "published"


@dataclass(frozen=True)
class Peer:
    """A candidate's step. candidate: `published` or a variant. iad: the checkout of the published one.

    network: its name in there.
    """

    candidate: str
    method: str
    model: str
    batch_size: int
    dataset: str
    device: str
    iad: str = ""
    network: str = ""

    def start(self, folder: Path) -> PeerProcess:
        """A process of its own, which is ready. folder: for its files."""
        scratch = folder / f"{self.method}-{self.candidate}"
        scratch.mkdir()
        variables = published.environment(torch.device(self.device)) if self.candidate == PUBLISHED else None
        return PeerProcess(MODULE, asdict(self) | {"scratch": str(scratch)}, scratch, variables)


def main(order: str) -> None:
    """Step until no order comes any more. Only answers go to the standard output."""
    given: dict[str, Any] = json.loads(order)
    scratch = Path(given.pop("scratch"))
    peer = Peer(**given)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    images = images_of(peer.dataset, peer.batch_size)
    if peer.candidate == PUBLISHED:
        published.serve(answers, peer.method, Path(peer.iad), peer.network, peer.batch_size, images, scratch)
        return
    device, variant = torch.device(peer.device), VARIANTS[peer.candidate]
    import_compiler()
    with variant.conditions():
        turns = Turns(answers, device, Meter(device))
        step = Workload(peer.method, peer.model, peer.batch_size, images, device).step(variant)
        turns.tell()
        turns.obey(step)


if __name__ == "__main__":
    main(*sys.argv[1:])
