"""Classifiers of timm and torchvision, which are imported when one of them is asked for.

Under AMP they run as the networks of this package: the convolution that reads the images and the layer that gives
the logits stay in full precision, where they are torch's plain ones.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.common.errors import printable
from engine.models.architecture import Architecture
from engine.models.layers import Classifier, ImageConv2d, Resize, running_statistics_stay
from engine.models.normalize import RGB, Normalize
from engine.models.sync_batch_norm import is_synchronised

Size = tuple[int, int]


class LibraryNetwork(nn.Module):
    """A library's network behind its normalisation.

    heads: its layers that give logits. size: the only height and width that it takes, if it takes one alone.
    """

    def __init__(
        self,
        network: nn.Module,
        heads: Sequence[nn.Module],
        normalization: tuple[RGB, RGB],
        size: Size | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(*normalization)
        self.resize = nn.Identity() if size is None else Resize(size)
        self.network = network
        for module in network.modules():
            if type(module) is nn.Conv2d and module.in_channels == 3:
                module.__class__ = ImageConv2d
        for module in heads:
            if type(module).__name__ == "Linear":  # torch's, or timm's, which is the same but for TorchScript
                module.__class__ = Classifier

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of images in [0,1]; of another size than the network takes, they are resized."""
        if (
            isinstance(x_BCHW, Tensor) and x_BCHW.shape[0] == 0 and not is_synchronised(self)
        ):  # no tensor: a tracer's
            return self._of_none(x_BCHW)
        logits_BC: Tensor = self.network(self.resize(self.normalize(x_BCHW)))
        return logits_BC

    def _of_none(self, x_BCHW: Tensor) -> Tensor:
        """No logits, of no images, as a process may have: transformers cannot reshape them."""
        with running_statistics_stay(self):
            logits_BC: Tensor = self(torch.cat((x_BCHW, x_BCHW.new_zeros(2, *x_BCHW.shape[1:]))))
        return logits_BC[:0]


def timm(found: re.Match[str]) -> Architecture:
    """The architecture `timm:NAME`. Raises ValueError where timm is not installed, or knows no such name."""
    name = found["name"]
    try:
        import timm as library
    except ImportError as error:
        raise ValueError(f"model: {found[0]!r} needs timm: pip install 'iad-engine[timm]'") from error
    if ":" in name or not library.is_model(name):  # "hf-hub:..." would be looked up on the internet
        raise _unknown("timm", name, library.list_models())
    try:
        facts = library.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"model: {found[0]!r}: {printable(error)}") from None
    normalization, size = (tuple(facts.mean), tuple(facts.std)), tuple(facts.input_size[1:])

    def build(num_classes: int) -> nn.Module:
        network = library.create_model(name, pretrained=False, num_classes=num_classes)
        if not hasattr(network, "get_classifier"):
            raise ValueError(f"model: {found[0]!r} is no classifier")
        parts = network.get_classifier()
        parts = nn.ModuleList(parts if isinstance(parts, tuple) else [parts])  # of a distilled network two
        heads = [module for module in _linear(parts) if module.out_features == num_classes]
        return LibraryNetwork(network, heads, normalization, size if facts.fixed_input_size else None)

    return replace(_architecture(library, name, build, size[0], normalization), renamed=_renamed_by_timm)


def _renamed_by_timm(network: nn.Module, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of a file of an older timm under the names of this one, as timm reads its own files."""
    assert isinstance(network, LibraryNetwork)
    convert = getattr(sys.modules[type(network.network).__module__], "checkpoint_filter_fn", None)
    found: Mapping[str, Tensor] = tensors if convert is None else convert(tensors, network.network)
    return found


def torchvision(found: re.Match[str]) -> Architecture:
    """The architecture `torchvision:NAME`. Raises ValueError where torchvision has no such classifier."""
    import torchvision as library

    models, name = library.models, found["name"]
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    facts = models.get_model_weights(name).DEFAULT.transforms()
    normalization, (size,) = (tuple(facts.mean), tuple(facts.std)), facts.crop_size
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Without their further logits; published weights want the images in another normalisation, made inside.
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": size}
    is_fixed = name.startswith(("vit_", "maxvit_"))

    def build(num_classes: int) -> nn.Module:
        network = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return LibraryNetwork(network, _linear(network)[-1:], normalization, (size, size) if is_fixed else None)

    return _architecture(library, name, build, size, normalization)


def _architecture(
    library: Any, name: str, builder: Any, size: int, normalization: tuple[RGB, RGB]
) -> Architecture:
    version = f"{library.__name__} {library.__version__}"
    return Architecture(f"{name} of {version}", builder, (size,), version, normalization)


def _linear(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def _unknown(library: str, name: str, known: Sequence[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {len(known)}, e.g. {known[0]!r}"
    return ValueError(f"model: {library} has no classifier {name!r:.100}; {hint}")
