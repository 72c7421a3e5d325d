"""Facts that an exported file carries of its network, as text in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from engine.common.tensor_files import short_repr
from engine.config import load
from engine.models.weights import LoadedModel, made_by, weights_sha256

EXTRA_FILE = "facts.json"
"""File in archives that has them."""
_SIGN = "engine_format"


class Original(BaseModel):
    """Checkpoint that was exported. path: absolute, where it lay. sha256: of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: str
    sha256: str
    weights_sha256: str


class ArtefactFacts(BaseModel):
    """All that is known of the network in an exported file.

    image_size: height and width of its images. epsilon, threat_model: of its training, None where it is not known.
    config: of its training. quantized: the number format of its weights and activations, where it is another one.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    engine_format: Literal[1]
    model: str
    num_classes: Annotated[int, Field(ge=2)]
    class_names: list[str] | None
    image_size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    input: str
    output: str
    normalize: list[list[float]] | None
    epsilon: float | None
    threat_model: str | None
    dataset: str | None
    config: dict[str, JsonValue] | None
    quantized: str | None
    checkpoint: Original
    made_by: dict[str, str]

    def as_metadata(self) -> dict[str, str]:
        """Each fact by its name, in JSON."""
        return {key: json.dumps(value) for key, value in self.model_dump().items()}


def facts_of(loaded: LoadedModel, image_size: tuple[int, int], quantized: str | None = None) -> ArtefactFacts:
    """The facts of a network, for images (height, width)."""
    epsilon, threat_model = ball_of(loaded)
    path = str(Path(loaded.path).absolute())
    return ArtefactFacts(
        engine_format=1,
        model=loaded.name,
        num_classes=loaded.num_classes,
        class_names=None if loaded.class_names is None else list(loaded.class_names),
        image_size=list(image_size),
        input="images: float32, NCHW, RGB, in [0, 1]; normalisation is inside",
        output="logits: float32, (N, classes)",
        normalize=None if loaded.normalize is None else [list(numbers) for numbers in loaded.normalize],
        epsilon=epsilon,
        threat_model=threat_model,
        dataset=loaded.dataset,
        config=loaded.config,
        quantized=quantized,
        checkpoint=Original(path=path, sha256=loaded.sha256, weights_sha256=weights_sha256(loaded.module)),
        made_by=made_by(),
    )


def ball_of(loaded: LoadedModel) -> tuple[float | None, str | None]:
    """Epsilon and threat model of a network's training; None where the file does not tell."""
    given = (loaded.config or {}).get("attack")
    if not isinstance(given, dict):
        return None, None
    attack = load({"attack": {key: given[key] for key in ("epsilon", "threat_model") if key in given}}).attack
    return float(attack.epsilon), attack.threat_model


def from_metadata(metadata: Mapping[str, str]) -> ArtefactFacts | None:
    """The facts in a file's metadata, among others'; None where another program has written it.

    Raises ValueError, one line, where they are not as they were written.
    """
    if _SIGN not in metadata:
        return None
    try:
        told: dict[str, Any] = {
            key: json.loads(text) for key, text in metadata.items() if key in ArtefactFacts.model_fields
        }
        facts = ArtefactFacts.model_validate(told)
    except (ValueError, RecursionError, ValidationError) as error:
        raise ValueError(f"its metadata is none of this version: {short_repr(str(error))[1:-1]}") from None
    names = facts.class_names
    if names is not None and (len(names) != facts.num_classes or len(set(names)) != len(names)):
        raise ValueError(f"its metadata names {len(names)} classes, and {facts.num_classes} are told")
    return facts


def from_json(text: str) -> ArtefactFacts | None:
    """The same of the text of `EXTRA_FILE`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its {EXTRA_FILE} is no JSON") from None
    if not isinstance(content, dict):
        return None
    return from_metadata({key: json.dumps(value) for key, value in content.items()})
