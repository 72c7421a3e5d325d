"""Programs of networks: the operations that a forward does, for any number of images."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from engine.common.errors import printable
from engine.deployment.artefacts.black_box import silent

_KEPT = ("val", "nn_module_stack", "torch_fn", "tensor_meta")
"""Facts of an operation that stay; the others name files and lines of who exported."""


def exportable(network: nn.Module) -> nn.Module:
    """A copy in float32, on the CPU and in evaluation mode, whose parameters need no gradient."""
    return copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)


def example(image_size: tuple[int, int], count: int = 2) -> torch.Tensor:
    """Random images of a fixed seed, (count, 3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, *image_size, generator=generator)


def program_of(network: nn.Module, image_size: tuple[int, int]) -> ExportedProgram:
    """The network's forward as torch.export records it, of images (N, 3, height, width) for every N.

    Raises ValueError where torch.export cannot follow it, or where it depends on the number of images.
    """
    wrapped = _Named(network).eval()
    try:
        with silent(), torch.no_grad():
            program = torch.export.export(
                wrapped, (example(image_size),), dynamic_shapes={"images": {0: Dim("batch", min=1, max=2**20)}}
            )
    except Exception as error:  # torch.export raises kinds without end
        raise ValueError(f"torch.export does not follow this network: {printable(error):.300}") from None
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in _KEPT}
    return program


class _Named(nn.Module):
    """The network with an argument of a plain name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        logits: torch.Tensor = self.network(images)
        return logits
