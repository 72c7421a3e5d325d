"""Networks as safetensors files, with all in the metadata that is needed to build them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor

from engine.common.tensor_files import short_repr, write_safetensors

_SEAL, _DIGEST = "engine_sha256", "weights_sha256"


class NetworkFacts(BaseModel):
    """NetworkFacts of a network beside its tensors: each is a key of the metadata, in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    num_classes: Annotated[int, Field(ge=2)]
    class_names: list[str] | None
    normalize: list[list[float]] | None
    weights_sha256: str
    dataset: str | None
    config: dict[str, JsonValue] | None
    made_by: dict[str, str]


def write(path: Path, tensors: Mapping[str, Tensor], facts: NetworkFacts) -> None:
    """Write them into a file that any reader of safetensors reads, atomically."""
    told = {key: json.dumps(value) for key, value in facts.model_dump().items()}
    metadata = {"format": "pt", **told}
    write_safetensors(path, tensors, {**metadata, _SEAL: _seal(tensors, metadata)})


def facts_in(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> NetworkFacts | None:
    """The facts in a file's metadata; None where another program has written it.

    Raises ValueError, one line, where tensors or metadata are not as they were written.
    """
    if not {_SEAL, _DIGEST} & set(metadata):
        return None
    others = {key: text for key, text in metadata.items() if key != _SEAL}
    if _seal(tensors, others) != metadata.get(_SEAL):
        raise ValueError("is damaged: its content does not fit its checksum")
    try:
        told = {key: json.loads(text) for key, text in others.items() if key != "format"}
        return NetworkFacts.model_validate(told)
    except (ValueError, RecursionError, ValidationError) as error:
        raise ValueError(f"its metadata is none of this version: {short_repr(str(error))[1:-1]}") from None


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of metadata and tensors, in the order of their names."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
