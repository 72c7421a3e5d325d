"""Layers that the architectures share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from engine.kernels import WeightTransforms, batch_norm, conv3x3, image_conv3x3, image_conv3x3_update
from engine.kernels.layers.conv3x3 import least_batch
from engine.models.normalize import Normalize

_MOST_KEPT = 2**30

Block = Callable[[int, int, int], nn.Module]
"""Makes a residual block from (in_channels, channels, stride)."""


def conv(in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Convolution that keeps H and W at stride 1, without the bias that a BatchNorm would cancel or repeat."""
    padding = kernel_size // 2
    if kernel_size == 3 and stride == groups == 1:
        return Conv3x3(in_channels, channels, kernel_size, stride, padding, bias=False)
    return nn.Conv2d(in_channels, channels, kernel_size, stride, padding, groups=groups, bias=False)


def init_convolutions(network: nn.Module) -> None:
    """Draw the weights of all convolutions He-normal by fan-out: std sqrt(2 / (k^2 C_out))."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def image_conv(channels: int, kernel_size: int, stride: int = 1) -> ImageConv2d:
    """The first convolution of a network, as `conv`."""
    return ImageConv2d(3, channels, kernel_size, stride, kernel_size // 2, bias=False)


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of 3x3 with stride 1 and padding 1. winograd: without autocast by `engine.kernels.conv3x3`.

    transforms: keeps what that computes of the weight, where it does not change.
    """

    winograd = False
    transforms: WeightTransforms | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.winograd or _autocasts(input):
            return super().forward(input)
        return conv3x3(input, self.weight, self.bias, transforms=self.transforms)


@torch.no_grad()
def fewest_images(network: nn.Module, image_1: Tensor) -> int:
    """Images from which on no convolution by Winograd's algorithm depends on their number; 1 without one.

    image_1: one image, (1, 3, H, W).
    """
    found = [1]

    def note(conv: nn.Module, given: tuple[Tensor]) -> None:
        assert isinstance(conv, Conv3x3)
        height, width = given[0].shape[2:]
        found.append(least_batch(height, width, conv.transforms))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in network.modules()
        if isinstance(module, Conv3x3) and module.winograd
    ]
    try:
        if hooks:
            network(image_1)
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)


def use_winograd(network: nn.Module, *, wanted: bool = True, keeps: bool = False) -> None:
    """Compute the network's 3x3 convolutions of stride 1 by `engine.kernels.conv3x3`, or by torch.

    keeps: the weights stay, so that what is computed of them is kept, unless that takes more than a GiB.
    """
    convolutions = [module for module in network.modules() if isinstance(module, Conv3x3)]
    keeps = keeps and sum(WeightTransforms.most_bytes(module.weight) for module in convolutions) <= _MOST_KEPT
    for module in convolutions:
        module.winograd = wanted
        module.transforms = WeightTransforms() if wanted and keeps else None


class ImageConv2d(nn.Conv2d):
    """The first convolution, in full precision under autocast too, which would round the image itself.

    bfloat16 moves a pixel by up to half a grey level, a quarter of the attack's step. What leaves is in autocast's
    format, as it would be anyway. 3x3 with stride 1 it is `engine.kernels.image_conv3x3`.
    """

    def forward(self, images: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """The convolution of the images, or of (images - mean) / std."""
        autocasts, device = _autocasts(images), images.device.type
        dtype = torch.get_autocast_dtype(device) if autocasts else images.dtype
        with torch.autocast(device, enabled=False) if autocasts else nullcontext():
            if self.is_3x3:
                return image_conv3x3(images, self.weight, self.bias, mean, std, dtype=dtype)
            normalised = images if mean is None or std is None else (images - mean) / std
            return super().forward(normalised).to(dtype)

    @property
    def is_3x3(self) -> bool:
        """True for a plain convolution 3x3 of three channels with stride 1 and a border of zeros."""
        numbers = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.in_channels)
        return numbers == ((3, 3), (1, 1), (1, 1), (1, 1), 1, 3) and self.padding_mode == "zeros"


class StemNetwork(nn.Module):
    """A network of images in [0, 1] that begins with their normalisation and one convolution, its stem.

    logits (B, C) = rest(stem(images)). An attack may run both apart, and step by `stem_update`.
    """

    normalize: nn.Module
    first = "conv1"
    """Name of the convolution."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, C) of images in [0,1]."""
        return self.rest(self.stem(x_BCHW))

    def stem(self, x_BCHW: Tensor) -> Tensor:
        """The convolution of the normalised images."""
        conv, normalize = self.get_submodule(self.first), self.normalize
        # Another module may be in the place of either, and a hook wants to see what comes between them.
        if isinstance(conv, ImageConv2d) and type(normalize) is Normalize and not has_hooks(normalize):
            out: Tensor = conv(x_BCHW, normalize.mean, normalize.std)
        else:
            out = conv(normalize(x_BCHW))
        return out

    def rest(self, x: Tensor) -> Tensor:
        """Logits (B, C) of what the stem gives, which stays as it is."""
        raise NotImplementedError

    @property
    def is_divisible(self) -> bool:
        """True if stem and rest may be run apart, and `stem_update` knows the stem: nobody's hook is left out."""
        conv = self.get_submodule(self.first)
        hooked = (self, conv, self.normalize)
        return (
            type(self).forward is StemNetwork.forward
            and type(conv) is ImageConv2d
            and conv.is_3x3
            and type(self.normalize) in (nn.Identity, Normalize)
            and not any(map(has_hooks, hooked))
            and not any(module._backward_hooks or module._backward_pre_hooks for module in hooked)
        )

    def stem_update(
        self,
        x_adv: Tensor,
        grad: Tensor,
        x_nat: Tensor,
        *,
        epsilon: float,
        step_size: float,
        counts: Tensor | None = None,
    ) -> None:
        """A step of an attack in L-inf, in place in x_adv, by the gradient of `stem`: `image_conv3x3_update`."""
        conv = self.get_submodule(self.first)
        assert isinstance(conv, ImageConv2d)
        std = self.normalize.std if isinstance(self.normalize, Normalize) else None
        image_conv3x3_update(
            x_adv, grad, x_nat, conv.weight, std, epsilon=epsilon, step_size=step_size, counts=counts
        )


class Classifier(nn.Linear):
    """The last layer, in full precision under autocast too: softmax and alpha would see rounded logits."""

    def forward(self, features: Tensor) -> Tensor:
        if not _autocasts(features):
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self.weight.dtype))


def head_of(network: nn.Module) -> str | None:
    """The name of the layer that gives a network's logits, a linear one; None where no single one is known to."""
    heads = [name for name, module in network.named_modules() if isinstance(module, Classifier)]
    return heads[0] if len(heads) == 1 else None


class Resize(nn.Module):
    """Images of another height and width, bilinear and antialiased.

    As two products of matrices: on a GPU the gradient of torch's own resizing has other bits in every run.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.shape[2:] == self.size:
            return images_BCHW
        sides = zip(images_BCHW.shape[2:], self.size, strict=True)
        rows, columns = (_resizing(old, new, images_BCHW) for old, new in sides)
        with torch.autocast(images_BCHW.device.type, enabled=False) if _autocasts(images_BCHW) else nullcontext():
            resized = rows @ images_BCHW @ columns.mT
        is_last = images_BCHW.is_contiguous(memory_format=torch.channels_last)
        return resized.contiguous(memory_format=torch.channels_last) if is_last else resized


def _resizing(old: int, new: int, like: Tensor) -> Tensor:
    """Matrix (new, old) that resizes one side of an image."""
    identity = torch.eye(old, device=like.device, dtype=like.dtype)[None, None]
    return F.interpolate(identity, (new, old), mode="bilinear", antialias=True)[0, 0]


def _autocasts(x: Tensor) -> bool:
    # Meta tensors have no autocast. torch.amp.is_autocast_available would say so, and break a graph of torch 2.11.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that does not count its batches unless its momentum is None: nothing else reads the count.

    On a GPU each layer's count is a launch in each pass. A state_dict has it, as published checkpoints do.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """[max(0, .)] of the normalised input [+ residual]; by statistics of the batch in one op."""
        uses_batch = self.training or self.running_mean is None
        if self.momentum is None or not uses_batch:
            return added(super().forward(input), residual, relu=relu)
        keeps = self.track_running_stats
        return batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            residual=residual,
            relu=relu,
            momentum=self.momentum,
            eps=self.eps,
        )


def norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, *, relu: bool = True, inplace: bool = True
) -> Tensor:
    """[max(0, .)] of norm(x) [+ residual]: in one op where norm is `BatchNorm2d`.

    Another module may be in its place: torch's synchronised one, or none, where it was folded into a convolution.
    inplace: False where x must stay.
    """
    if isinstance(norm, BatchNorm2d):
        out: Tensor = norm(x, residual=residual, relu=relu)
        return out
    return added(norm(x), residual, relu=relu, inplace=inplace)


def added(out: Tensor, residual: Tensor | None, *, relu: bool, inplace: bool = True) -> Tensor:
    """[max(0, .)] of out [+ residual], in the memory of `out` where there is no residual and it need not stay."""
    if residual is not None:
        out, inplace = out + residual, True
    return F.relu(out, inplace=inplace) if relu else out


def has_hooks(module: nn.Module) -> bool:
    """True where more happens than its forward, which is left out where another op takes its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_plain(norm: nn.Module) -> bool:
    """True for a BatchNorm that normalises and does nothing else, as one with an activation inside does."""
    return type(norm).forward in (BatchNorm2d.forward, _BatchNorm.forward, nn.SyncBatchNorm.forward)


class Stage(nn.Sequential):
    """Blocks in a row. recompute: keep a block's input alone, and run it again when its backward needs more."""

    recompute = False

    def forward(self, input: Tensor) -> Tensor:
        if not (self.recompute and torch.is_grad_enabled()):
            out: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
            return out
        for block in self:
            again = functools.partial(_recomputed, block)
            input = checkpoint(block, input, use_reentrant=False, preserve_rng_state=False, context_fn=again)
        return input


def _recomputed(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a block's forward, and of its second one, which must not move the running statistics again."""
    return nullcontext(), _without_momentum(block)


@contextmanager
def _without_momentum(block: nn.Module) -> Iterator[None]:
    # Not as below: autograd saves the running statistics, and a second forward has to save what the first one did.
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


@contextmanager
def running_statistics_stay(network: nn.Module) -> Iterator[None]:
    """In training mode too, BatchNorm's running statistics do not move inside."""
    norms = [
        module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def release_cached(network: nn.Module) -> None:
    """Let go of what modules compute from their weights once in evaluation mode, and keep until they are trained.

    Several networks of timm keep attention biases so, whose weights may change meanwhile.
    """
    caching = [module for module in network.modules() if type(module).train is not nn.Module.train]
    if not caching:
        return
    modes = [(module, module.training) for module in network.modules()]
    for module in caching:
        module.train()
    for module, training in modes:
        module.training = training


def recompute(network: nn.Module) -> None:
    """Trade time for memory: every stage of the network keeps the inputs of its blocks alone.

    Raises ValueError for a network without stages.
    """
    stages = [module for module in network.modules() if isinstance(module, Stage)]
    if not stages:
        raise ValueError("checkpoint_activations: this network is not made of blocks that can be run again")
    for module in stages:
        module.recompute = True


def stage(block: Block, in_channels: int, channels: int, num_blocks: int, stride: int) -> Stage:
    """Residual blocks in a row, of which the first changes channels and resolution."""
    rest = (block(channels, channels, 1) for _ in range(num_blocks - 1))
    return Stage(block(in_channels, channels, stride), *rest)
