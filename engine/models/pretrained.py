"""Pretrained weights of timm and torchvision, which the libraries download and keep."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.common import optional
from engine.common.errors import printable
from engine.common.lookup import look_up
from engine.models import build_to_fill, is_registered, matching
from engine.models.state_dicts import State
from engine.models.weights import Weights, state_sha256

_WORDNET_ID = re.compile(r"n\d{8}")
_IMAGENET_CLASSES = 1000


def load(library: str, model: str, class_names: Sequence[str]) -> Weights:
    """The library's weights of that architecture, from its cache or the internet.

    class_names: of the data; ImageNet's are known by their WordNet ids, in whose order the library's outputs are.
    Raises ValueError, one line, where the library has none for it, is not installed, or cannot fetch them.
    """
    taken, state = look_up("init", library, _LIBRARIES)(model)
    head = next((key for key in matching.class_rows(model) if key in state), None)
    count = None if head is None else len(state[head])
    names = sorted(class_names)
    if not (count == _IMAGENET_CLASSES == len(names) and all(map(_WORDNET_ID.fullmatch, names))):
        names = [f"class {index} of {library}" for index in range(count or 0)]
    return Weights(
        state=state,
        taken=taken,
        model=model,
        num_classes=count,
        class_names=tuple(names),
        sha256=state_sha256(state),
    )


def _timm(model: str) -> tuple[str, State]:
    family, _, name = model.partition(":")
    if family != "timm":
        raise ValueError(f"init: timm has weights of timm:NAME, and model is {model!r}")
    timm = optional.load("timm", missing="init: timm cannot be imported: {reason}; pip install 'iad-engine[timm]'")
    facts = timm.get_pretrained_cfg(name)
    if facts is None or not facts.has_weights:
        raise ValueError(f"init: timm has no pretrained weights of {name}")

    def fetch() -> State:
        with torch.random.fork_rng(devices=[]):
            network: torch.nn.Module = timm.create_model(name, pretrained=True)
        return network.state_dict()

    taken = name if "." in name or not facts.tag else f"{name}.{facts.tag}"
    return taken, {f"network.{key}": tensor for key, tensor in _fetched("timm", taken, fetch).items()}


def _torchvision(model: str) -> tuple[str, State]:
    from torchvision import models as library

    family, _, name = model.rpartition(":")
    name = name if family else name.removesuffix("-imagenet")
    if family != "torchvision" and (family or is_registered(model) or not _is_of(model, name, library)):
        known = "torchvision:NAME and the ResNets for ImageNet"
        raise ValueError(f"init: torchvision has weights of {known}, and model is {model!r}")
    weights = library.get_model_weights(name).DEFAULT
    taken = str(weights)
    state = _fetched("torchvision", taken, lambda: weights.get_state_dict(progress=False, check_hash=True))
    state = {key: tensor for key, tensor in state.items() if not key.lower().startswith("aux")}  # further logits
    if family:
        return taken, {f"network.{key}": tensor for key, tensor in state.items()}
    facts = weights.transforms()
    numbers = {"normalize.mean": facts.mean, "normalize.std": facts.std}
    return taken, state | {key: torch.tensor(values).reshape(3, 1, 1) for key, values in numbers.items()}


def _is_of(model: str, name: str, library: Any) -> bool:
    """True if the network of torchvision has the very tensors of the architecture."""
    if name not in library.list_models(module=library):
        return False
    with torch.device("meta"):
        theirs = library.get_model(name, weights=None, num_classes=2).state_dict()
    own = build_to_fill(model, 2).state_dict()
    return {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in theirs.items()}


def _fetched(library: str, name: str, fetch: Callable[[], State]) -> State:
    try:
        with _quiet():
            state = fetch()
    except Exception as error:  # of the network, the library, its hub, or the file
        reason = printable(error) or type(error).__name__
        raise ValueError(f"init: {library} cannot fetch its weights {name}: {reason:.160}") from None
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"init: {library}'s weights {name} are no tensors")
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the libraries do not write about what they try; the error tells."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


_LIBRARIES: dict[str, Callable[[str], tuple[str, State]]] = {"timm": _timm, "torchvision": _torchvision}
