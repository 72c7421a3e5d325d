"""Agreement of an exported file with the network that was exported, on images.

Shape suffixes: N images, C classes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.common.stopping import RunFailed
from engine.common.tensor_files import read_tensors, write_safetensors
from engine.deployment import opening
from engine.deployment.exporting.formats import Format
from engine.deployment.exporting.programs import exportable

_BATCHES = (1, 7)
"""Sizes of the first batches; the other images come in batches of `_USUAL`."""
_USUAL = 32

_RUN_PLAIN = """
import json, sys
sys.modules["engine"] = None  # to import it is an error
sys.path.insert(0, json.loads(sys.argv[1]))
import model
from safetensors.torch import load_file, save_file
given = load_file(json.loads(sys.argv[2]))
import torch
torch.set_num_threads(int(sys.argv[4]))
network = model.load()
with torch.no_grad():
    save_file({name: network(images) for name, images in given.items()}, json.loads(sys.argv[3]))
"""


class Agreement(NamedTuple):
    """Comparison on n images. difference: max |difference of logits|, relative to max(1, max |logit|).

    same: images that get the same class.
    """

    n: int
    difference: float
    same: int
    faults: tuple[str, ...]


def compare(entry: Format, folder: Path, original: nn.Module, images: Tensor) -> Agreement:
    """Run an exported file by its own runtime, in batches of 1, of 7 and of more, and compare its logits.

    images: (N, 3, H, W) in [0, 1]. faults: sentences, none where it agrees within the format's tolerances.
    """
    batches = list(images.float().split(_sizes(len(images))))
    with torch.no_grad():
        expected = torch.cat([original(batch) for batch in batches])
    found = _logits(entry, folder, batches)
    return judged(entry, expected, found)


def judged(entry: Format, expected_NC: Tensor, found_NC: Tensor) -> Agreement:
    """The comparison of logits."""
    scale = max(1.0, float(expected_NC.abs().max()))
    n, faults = len(expected_NC), []
    if found_NC.shape != expected_NC.shape:
        shape, wanted = tuple(found_NC.shape), tuple(expected_NC.shape)
        return Agreement(n, float("inf"), 0, (f"gives {shape}, and the original {wanted}",))
    difference = float((found_NC - expected_NC).abs().max()) / scale
    same = int((found_NC.argmax(dim=1) == expected_NC.argmax(dim=1)).sum())
    most, least, _ = entry.tolerance
    if not found_NC.isfinite().all():
        faults.append("gives logits that are not finite")
    if most is not None and not difference <= most:
        faults.append(f"its logits differ by {difference:.2g} of the largest, and {most:.2g} is the most")
    if same < least * n:
        faults.append(f"gives {same} of {n} images the same class, and {least:.1%} is the least")
    return Agreement(n, difference, same, tuple(faults))


def _sizes(count: int) -> list[int]:
    """Sizes of batches that make up so many images."""
    found: list[int] = []
    for size in (*_BATCHES, *[_USUAL] * (count // _USUAL + 1)):
        if left := count - sum(found):
            found.append(min(size, left))
    return found


def _logits(entry: Format, folder: Path, batches: list[Tensor]) -> Tensor:
    if entry.name == "plain":
        return _by_subprocess(folder, batches)
    loaded = opening.load(folder / entry.main)
    network = loaded.module if loaded.exported else exportable(loaded.module)
    with torch.no_grad():
        return torch.cat([network(batch) for batch in batches])


def _by_subprocess(folder: Path, batches: list[Tensor]) -> Tensor:
    """Logits of model.py, run by a Python that imports no engine and nothing of the current folder."""
    with tempfile.TemporaryDirectory() as place:
        given, made = Path(place) / "images.safetensors", Path(place) / "logits.safetensors"
        write_safetensors(given, {f"{number:06d}": batch for number, batch in enumerate(batches)}, {})
        paths = [json.dumps(str(path.absolute())) for path in (folder, given, made)]
        done = subprocess.run(  # noqa: S603  # this Python, and a source that was written just now
            [sys.executable, "-I", "-B", "-c", _RUN_PLAIN, *paths, str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RunFailed(f"model.py does not run by itself: {last:.300}")
        logits = read_tensors(made).value
        return torch.cat([logits[name] for name in sorted(logits)])
