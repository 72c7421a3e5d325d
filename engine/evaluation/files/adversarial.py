"""The file of adversarial images that an evaluation has found: safetensors, with the result of every image.

Shape suffixes: N images of a result, R saved ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.attacks.autoattack import NO_ATTACK
from engine.attacks.kinds import AutoAttackPart, EvaluationAttack
from engine.attacks.table import ATTACKS
from engine.common.files import create
from engine.common.stopping import RunFailed
from engine.common.tensor_files import Content, safetensors_bytes
from engine.evaluation.results import Hits, Result

_FORMAT = 1
_OPTION = "--save-adversarial"
_COLUMNS = ("samples", "labels", "predicted", "part", "rank")
_KEPT = "what was measured is kept: the same command goes on"


class Rows(NamedTuple):
    """The images of one result in a file. fell: as in `Hits`."""

    images: Tensor
    samples: Tensor
    labels: Tensor
    predicted: Tensor
    part: Tensor
    rank: Tensor
    fell_N: Tensor


def check(path: Path, attacks: Sequence[EvaluationAttack]) -> None:
    """Raise ValueError where the file is there, or has no folder, or an attack gives no images for it."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{_OPTION}: {path} exists; remove it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{_OPTION}: {path.absolute().parent} is no folder")
    known = ", ".join(name for name, attack in ATTACKS.items() if isinstance(attack, AutoAttackPart))
    for attack in attacks:
        if not isinstance(attack, AutoAttackPart) and attack.name != NO_ATTACK:
            raise ValueError(f"{_OPTION}: the images of {attack.name} are not kept; those that are: {known}")
    if all(attack.name == NO_ATTACK for attack in attacks):
        raise ValueError(f"{_OPTION}: no attack is asked for that finds images; those that do: {known}")


def write(
    path: Path, results: Mapping[str, Result], parameters: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """Write the images of all results into a new file; what the report in a folder says of it, by attack.

    Raises RunFailed where there is a file already, or it cannot be written.
    """
    hits = {attack: result.hits for attack, result in results.items() if result.hits is not None}
    tensors = {name: torch.cat([getattr(each, name) for each in hits.values()]) for name in ("images", *_COLUMNS)}
    counts = [len(each.samples) for each in hits.values()]
    tensors["result"] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    tensors |= {_fell(number): each.fell.to(torch.int16) for number, each in enumerate(hits.values())}
    content = safetensors_bytes(tensors, _metadata(results, hits, parameters))
    try:
        create(path, content)
    except FileExistsError:
        raise RunFailed(f"{_OPTION}: {path} has come into being meanwhile; {_KEPT}, with another name") from None
    except OSError as error:
        raise RunFailed(f"{_OPTION}: {path} was not written: {error.strerror}; {_KEPT}") from None
    name, digest = os.path.relpath(path, folder), hashlib.sha256(content).hexdigest()
    return {
        attack: {
            "file": name,
            "sha256": digest,
            "images": len(each.samples),
            "still_adversarial_as_uint8": int(each.rounded.sum()),
        }
        for attack, each in hits.items()
    }


def doubts(results: Mapping[str, Result]) -> list[str]:
    """Warnings of images that are classified correctly when the network sees them in another batch."""
    told = []
    for attack, result in results.items():
        if result.hits is not None and (count := int((result.hits.predicted == result.hits.labels).sum())):
            told.append(
                f"Warning: {attack}: {count} of the images that broke are classified correctly in another batch; "
                "engine verify will name them"
            )
    return told


def _metadata(
    results: Mapping[str, Result], hits: Mapping[str, Hits], parameters: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    # One key: the order of several in the file is random, and equal results are to give equal files.
    told = [
        {"attack": attack, "parts": list(results[attack].parts), "parameters": parameters[attack]}
        for attack in hits
    ]
    first = parameters[next(iter(hits))]
    shared = {key: first[key] for key in ("checkpoint", "weights", "data", "epsilon", "threat_model")}
    return {"engine_adversarial": json.dumps({"format": _FORMAT, **shared, "results": told})}


def rows_of(content: Content, entry: Mapping[str, Any]) -> Rows:
    """The images of a report's entry. Raises ValueError, without the path, where it has none of that entry."""
    try:
        told = json.loads(content.metadata["engine_adversarial"])
        if told["format"] != _FORMAT:
            raise ValueError(f"is of format {told['format']!r:.20}, and {_FORMAT} is known")
        names = [(each["attack"], each["parameters"]) for each in told["results"]]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError("is no file of adversarial images") from None
    wanted = (entry["attack"], entry["parameters"])
    if wanted not in names:
        raise ValueError(f"has no images of {entry['attack']} with the parameters of the report")
    number = names.index(wanted)
    tensors = content.value
    expected = {"images", "result", *_COLUMNS, _fell(number)}
    if missing := sorted(expected - tensors.keys()):
        raise ValueError(f"has no tensor {missing[0]!r}")
    count = len(tensors["images"])
    for name in ("result", *_COLUMNS):
        if tensors[name].shape != (count,) or tensors[name].dtype != torch.int64:
            raise ValueError(f"{name}: expected {count} numbers, got {tuple(tensors[name].shape)}")
    if tensors["images"].dim() != 4 or not tensors["images"].dtype.is_floating_point:
        raise ValueError("images: expected floats of shape (N, C, H, W)")
    mine = tensors["result"] == number
    columns = {name: tensors[name][mine] for name in ("images", *_COLUMNS)}
    return Rows(**columns, fell_N=tensors[_fell(number)].long())


def _fell(number: int) -> str:
    """Name of the tensor that tells which part broke each image of a result."""
    return f"fell.{number}"
