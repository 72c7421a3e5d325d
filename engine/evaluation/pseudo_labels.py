"""Labels of images by a network: its most likely class of each, kept in the cache.

Shape suffixes: B batch, C classes, N images.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.attacks.evaluated import undisturbed
from engine.attacks.parts import size_of_batch
from engine.common.files import cache_dir
from engine.common.stopping import Stop
from engine.common.tensor_files import read_tensors, write_tensors
from engine.evaluation.batches import batch_of
from engine.models.weights import weights_sha256
from engine.pipelines.datasets import AnySplit
from engine.pipelines.splits import Split
from engine.system.distributed import World

_FORMAT = 1  # of the labels: with another batch size or precision they are others


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """labels: int64 N. confidence: float64 N, the softmax of the class that was chosen."""

    labels: Tensor
    confidence: Tensor

    def describe(self, class_names: tuple[str, ...]) -> str:
        """One line: images of each class, of many classes the fewest and most, and the mean confidence."""
        counts = self.labels.bincount(minlength=len(class_names)).tolist()
        if len(counts) <= 20:
            told = ", ".join(f"{name}: {count:,}" for name, count in zip(class_names, counts, strict=True))
        else:
            told = f"{min(counts):,} to {max(counts):,} images in each of {len(counts)} classes"
        return f"{told}; mean confidence {self.confidence.mean():.3f}"


def label(
    network: nn.Module,
    images: AnySplit,
    *,
    version: str | None,
    device: torch.device,
    world: World | None = None,
    stop: Stop | None = None,
) -> PseudoLabels:
    """The network's classes of images as evaluation sees them: in eval mode and in full precision.

    version: of the network's code, which decides beside its weights; None: nobody knows, and nothing is kept.
    Processes share the batches, and each gets all labels, which do not depend on their number.
    Raises ValueError, naming an image, where a network gives no finite logits of the classes.
    """
    world, stop = world or World(), stop or Stop()
    path = None if version is None else world.broadcast_from_main(lambda: _place(network, images, version))
    known = None if path is None or not world.is_main else _kept(path, len(images))
    if world.broadcast_from_main(lambda: known is not None):
        mine = torch.zeros(2, len(images), dtype=torch.float64) if known is None else known
    else:
        mine = _share(network, images, device, world, stop)
    world.barrier(stop)
    labels_N, confidence_N = world.gather(mine).sum(0)
    if len(bad := (~confidence_N.isfinite()).nonzero()[:, 0]):
        where = images.where(int(bad[0]))
        raise ValueError(
            f"extra_labels: the network's logits of {where}, and of {len(bad) - 1} more, are not finite"
        )
    if path is not None and world.is_main and known is None:
        with suppress(OSError):  # a cache that nobody may write to
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"found": torch.stack((labels_N, confidence_N))})
    return PseudoLabels(labels_N.long(), confidence_N)


def _share(network: nn.Module, images: AnySplit, device: torch.device, world: World, stop: Stop) -> Tensor:
    """Labels and confidences of this process's batches, 0 elsewhere; float64 (2, N)."""
    dtype, classes = next(network.parameters()).dtype, len(images.class_names)
    batch_size = size_of_batch(None, device, *images.shape)
    found = torch.zeros(2, len(images), dtype=torch.float64)
    with undisturbed(network, device):
        for sample_B in torch.arange(len(images)).split(batch_size)[world.rank :: world.size]:
            x_B, _ = batch_of(images.images, images.labels, sample_B, device, dtype)
            logits_BC = network(x_B)
            if logits_BC.shape != (len(sample_B), classes):
                raise ValueError(
                    f"extra_labels: logits of {len(sample_B)} images and {classes} classes are expected, got "
                    f"{tuple(logits_BC.shape)}"
                )
            confidence_B, label_B = logits_BC.double().softmax(1).max(1)
            found[0, sample_B], found[1, sample_B] = label_B.double().cpu(), confidence_B.cpu()
            world.check(stop)
    return found


def _place(network: nn.Module, images: AnySplit, version: str) -> Path:
    """Path in the cache, by everything that decides the labels."""
    digest = hashlib.sha256(json.dumps([_FORMAT, version, weights_sha256(network), images.shape]).encode())
    digest.update(json.dumps([images.any_size, len(images)]).encode())
    if isinstance(images, Split):
        digest.update(images.images.contiguous().numpy())
    else:
        with ThreadPoolExecutor() as pool:
            for content in pool.map(lambda name: hashlib.sha256(images.tree.read(name)).digest(), images.names):
                digest.update(content)
    return cache_dir() / "labels" / f"{digest.hexdigest()[:16]}.pt"


def _kept(path: Path, count: int) -> Tensor | None:
    """The labels and confidences in a file, if it is whole."""
    with suppress(ValueError, KeyError):
        content = read_tensors(path)
        found = content.value["found"]
        if content.sealed and isinstance(found, Tensor) and found.shape == (2, count):
            return found
    return None
