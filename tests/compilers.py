"""Compilers that take note of what they are given."""

from __future__ import annotations

from typing import Any

import torch


def convolution_gradients() -> tuple[list[list[bool]], Any]:
    """A compiler, and what it takes note of: whether each convolution's backward gives input, weight and bias."""
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.backends.common import aot_autograd

    masks: list[list[bool]] = []

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                masks.append(list(node.args[-1]))
        return make_boxed_func(graph.forward)

    def forward(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    return masks, aot_autograd(fw_compiler=forward, bw_compiler=backward)
