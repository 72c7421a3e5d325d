"""Trained networks from any file: a checkpoint, or an exported file, whose network is a black box."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.common.files import regular_file
from engine.common.lookup import look_up
from engine.common.tensor_files import exported_format
from engine.deployment.artefacts.black_box import OPENERS, BlackBox
from engine.deployment.artefacts.facts import ArtefactFacts
from engine.models.weights import LoadedModel, load_model


@dataclass(frozen=True)
class Artefact(LoadedModel):
    """The network in an exported file. facts: in the file; None where another program has written it."""

    facts: ArtefactFacts | None = None

    def reorder(self, order: list[int]) -> None:
        """Put the network's outputs into another order, in place."""
        assert isinstance(self.module, BlackBox)
        self.module.order = order

    def original(self) -> Path | None:
        """The checkpoint that was exported, where it lies as it was recorded; None elsewhere."""
        if self.facts is None:
            return None
        path = Path(self.facts.checkpoint.path)
        try:
            same = hashlib.sha256(regular_file(path).read_bytes()).hexdigest() == self.facts.checkpoint.sha256
        except OSError:
            return None
        return path if same else None


def load(
    path: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
) -> LoadedModel:
    """The network in a checkpoint, as `load_model`, or in an exported file: ONNX, torch.export's or TorchScript.

    The content decides, and not the name. Of an exported file the module maps images BCHW in [0, 1] to logits,
    on the CPU; class names, data set and configuration are those that its metadata has. Nothing in it is run as
    Python. Raises ValueError, one line with the path, where anything does not fit.
    """
    if (name := format_of(path)) is None:
        return load_model(
            path,
            model=model,
            num_classes=num_classes,
            class_names=class_names,
            weights=weights,
            normalize=normalize,
        )
    for argument, given in (("model", model), ("weights", weights), ("normalize", normalize)):
        if given is not None:
            raise ValueError(f"{path}: {argument}: an exported file tells that itself; drop it")
    loaded = _artefact(path, name)
    if num_classes is not None and loaded.num_classes != num_classes:
        raise ValueError(f"{path}: gives {loaded.num_classes} logits, the data set has {num_classes} classes")
    return loaded if class_names is None else loaded.for_classes(class_names)


def format_of(path: str | Path) -> str | None:
    """Format of an exported file, by its content; None for a checkpoint, and for what cannot be read."""
    try:
        with regular_file(Path(path)).open("rb") as file:
            return exported_format(file)
    except OSError:
        return None


def _artefact(path: str | Path, name: str) -> Artefact:
    data = Path(path).read_bytes()
    try:
        network, facts = look_up("format", name, OPENERS)(data)
        count = network.probe()
        if facts is not None and facts.num_classes != count:
            raise ValueError(f"gives {count} logits, and its metadata tells of {facts.num_classes} classes")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [f"an exported file ({name}{_quantized(facts)}), {_gradients(network)}: it is attacked as it is"]
    if facts is None:
        notes.append("another program has written it: images in [0, 1] are given to it, RGB and not normalised")
    names = None if facts is None or facts.class_names is None else tuple(facts.class_names)
    mean_std = None if facts is None or facts.normalize is None else [tuple(part) for part in facts.normalize]
    return Artefact(
        path=path,
        module=network.eval(),
        name=name if facts is None else facts.model,
        num_classes=count,
        class_names=names,
        taken="",
        normalize=None if mean_std is None else (mean_std[0], mean_std[1]),  # type: ignore[arg-type]
        dataset=None if facts is None else facts.dataset,
        config=None if facts is None else facts.config,
        sha256=hashlib.sha256(data).hexdigest(),
        notes=tuple(notes),
        exported=name,
        has_gradients=network.has_gradients,
        facts=facts,
    )


def _quantized(facts: ArtefactFacts | None) -> str:
    return f", {facts.quantized}" if facts is not None and facts.quantized else ""


def _gradients(network: BlackBox) -> str:
    return "with gradients" if network.has_gradients else "without gradients"
