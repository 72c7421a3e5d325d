"""Networks that are run and not trained: the student under attack, and the teachers.

A twin is a network's frozen copy in the form that costs least to run. It needs no gradient of a weight and so
keeps no activation for one; its weights are converted to half precision once, and not in every pass; in evaluation
mode BatchNorm has become part of the convolutions; and its mode never changes, so that a compiled or captured pass
of it stays valid. Whatever is random in train mode, as dropout, is off in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function

from engine.attacks.pgd import BatchNormMode, Division, at_least_float, bn_mode
from engine.models.layers import (
    Conv3x3,
    ImageConv2d,
    Resize,
    Stage,
    StemNetwork,
    has_hooks,
    is_plain,
    release_cached,
)
from engine.models.sync_batch_norm import SyncBatchNorm
from engine.system.precision import Precision

Forward = Callable[[Tensor], Tensor]


class _Folded(NamedTuple):
    """A convolution that has taken in the BatchNorm after it, and the two originals."""

    conv: nn.Conv2d
    original: nn.Conv2d
    norm: _BatchNorm


class Twin:
    """A frozen copy of a network. Images (B, 3, H, W) to logits (B, C), in the precision of the run's passes.

    network: the original; its mode and flags stay. bn: how BatchNorm runs, as `AttackSpec.bn`. "eval": by running
    statistics, folded into the convolution before it where there is one; "train": by those of the batch, and the
    original's running statistics move; "batch": by those of the batch, and the running ones stay.
    make_forward: makes of the module, or of its method, the pass that is run, e.g. a compiled one.
    follows: False lets go of the original, of which nothing that is converted or folded is kept in memory.

    What is neither converted nor folded is shared with the original; the rest is as it was at the last `refresh`.
    is_opaque: True where BatchNorm is as it was because no tracer sees the network's operations.
    """

    def __init__(
        self,
        network: nn.Module,
        bn: str,
        precision: Precision,
        make_forward: Callable[[Forward], Forward] = lambda forward: forward,
        *,
        follows: bool = True,
    ) -> None:
        mode = bn_mode(bn)
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self._precision = precision
        self._converted: list[tuple[Tensor, Tensor]] = []
        self._folded: list[_Folded] = []
        for name, original in network.named_modules():
            self._take(original, self.module.get_submodule(name), mode)
        nodes = [] if mode.by_batch or not _has_batch_norm(network) else traced(self.module)
        self.is_opaque = nodes is None
        for conv, norm in conv_bn_pairs(self.module, nodes or []):
            self._fold(network, conv, norm)
        self.refresh()
        if not follows:
            self._converted, self._folded = [], []
        self._forward = make_forward(self.module)
        self.division: Division | None = None
        """The network as an attack may run it, see `StemNetwork`; None where it is not divisible."""
        if isinstance(self.module, StemNetwork) and self.module.is_divisible:
            rest = make_forward(self.module.rest)
            self.division = Division(
                partial(self._run, self.module.stem),
                lambda x: at_least_float(self._run(rest, x)),
                self.module.stem_update,
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the images, never in half precision."""
        return at_least_float(self._run(self._forward, images))

    def _run(self, forward: Forward, inputs: Tensor) -> Tensor:
        with record_function("network"), self._precision.autocast(cached=False):  # nothing is left to convert
            return forward(inputs)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the original's weights, and where BatchNorm is folded its statistics."""
        release_cached(self.module)
        if self._converted:
            own, originals = zip(*self._converted, strict=True)
            torch._foreach_copy_(own, originals)
        for conv, original, norm in self._folded:
            assert conv.bias is not None
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale_C = norm.weight * (norm.running_var + norm.eps).rsqrt()
            conv.weight.copy_(original.weight * scale_C[:, None, None, None])
            mean_C = norm.running_mean if original.bias is None else norm.running_mean - original.bias
            conv.bias.copy_(norm.bias - mean_C * scale_C)

    def share(self, halves: Mapping[Tensor, Tensor]) -> None:
        """Read these copies of the original's weights, which follow it by themselves, in place of own ones."""
        for own, original in self._converted:
            if original in halves:
                own.data = halves[original].detach()
        self._converted = [pair for pair in self._converted if pair[1] not in halves]

    def _take(self, original: nn.Module, own: nn.Module, mode: BatchNormMode) -> None:
        """Make a module's tensors the original's, or copies in half precision."""
        if isinstance(own, Stage):
            own.recompute = False  # of a frozen pass half as much is kept as of one that is trained
        if isinstance(own, _BatchNorm):
            own.training = mode.by_batch
            own.track_running_stats = own.track_running_stats and mode.tracked
        own._buffers.update(original._buffers)
        half = self._precision.amp_dtype if runs_in_half(own) else None
        for name, value in original.named_parameters(recurse=False):
            taken = nn.Parameter(value.detach() if half is None else value.detach().to(half), requires_grad=False)
            own.register_parameter(name, taken)
            if half is not None:
                self._converted.append((taken, value))

    def _fold(self, network: nn.Module, conv_name: str, norm_name: str) -> None:
        conv, original = self.module.get_submodule(conv_name), network.get_submodule(conv_name)
        norm = network.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(original, nn.Conv2d)
        assert isinstance(norm, _BatchNorm)
        self._converted = [pair for pair in self._converted if pair[1] not in set(original.parameters())]
        conv.weight = nn.Parameter(torch.empty_like(conv.weight), requires_grad=False)
        conv.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels), requires_grad=False)
        rest = _rest(self.module.get_submodule(norm_name))
        assert rest is not None
        self.module.set_submodule(norm_name, rest)
        self._folded.append(_Folded(conv, original, norm))


def runs_in_half(module: nn.Module) -> bool:
    """Autocast would convert its weights, and nothing else reads them."""
    return type(module).forward in (nn.Conv2d.forward, Conv3x3.forward, nn.Linear.forward)


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def _is_plain(conv: nn.Module) -> bool:
    """True for a convolution by its weights as they are, and not by standardised or reparametrised ones, say."""
    forwards = (nn.Conv2d.forward, Conv3x3.forward, ImageConv2d.forward)
    return type(conv).forward in forwards and "weight" in conv._parameters


def _rest(norm: nn.Module) -> nn.Module | None:
    """The rest of a BatchNorm, after it has normalised; None where that is not known."""
    if is_plain(norm) or isinstance(norm, SyncBatchNorm):
        return nn.Identity()
    if f"{type(norm).__module__}.{type(norm).__name__}" == "timm.layers.norm_act.BatchNormAct2d":
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return None


class _Tracer(fx.Tracer):
    """Follows a network down to its layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear | _BatchNorm | Resize) or super().is_leaf_module(
            m, module_qualified_name
        )


def traced(network: nn.Module) -> list[fx.Node] | None:
    """The operations of a network in order; None where no tracer sees them, as its way depends on values."""
    tracer = _Tracer()
    try:
        return list(tracer.trace(network).nodes)
    except Exception:  # a forward that is not of this package may do anything with what is no tensor
        return None
    finally:
        # The tracer and its graph refer to each other: until they are collected it would keep the weights.
        tracer.root = nn.Module()
        tracer.submodule_paths = None
        tracer.tensor_attrs = {}


def conv_bn_pairs(network: nn.Module, nodes: list[fx.Node]) -> list[tuple[str, str]]:
    """Names of each convolution whose only reader is a BatchNorm with running statistics, and of that BatchNorm.

    nodes: as `traced`.
    """
    calls = [node.target for node in nodes if node.op == "call_module"]
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    pairs = []
    for node in nodes:
        if node.op != "call_module" or not node.args or not isinstance(before := node.args[0], fx.Node):
            continue
        if before.op != "call_module" or len(before.users) != 1 or str(before.target) in read:
            continue
        conv, norm = network.get_submodule(str(before.target)), network.get_submodule(str(node.target))
        if (
            _is_plain(conv)
            and isinstance(norm, _BatchNorm)
            and _rest(norm) is not None
            and norm.track_running_stats
            and norm.affine
            and not has_hooks(conv)
            and not has_hooks(norm)
            and calls.count(before.target) == calls.count(node.target) == 1
        ):
            pairs.append((str(before.target), str(node.target)))
    return pairs
