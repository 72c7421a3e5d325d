"""Device and number formats of a run, deterministic algorithms, IEEE float32."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.common.lookup import is_on, look_up
from engine.config import RunConfig
from engine.kernels import conv3x3, dispatch
from engine.models.layers import use_winograd

# Least gain on a CPU of bfloat16 over float32, and of Winograd's algorithm over torch's convolutions: an equal
# speed does not justify their rounding.
MIN_GAIN = 1.1
AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Convolutions that are timed, 3x3 on a few images: channels, and height and width of their maps, as in a ResNet.
_TIMED = ((64, 32), (256, 8))
_IMAGES, _ROUNDS, _SECONDS = 4, 8, 0.5
_WINOGRAD_IMAGES = 32  # by Winograd's algorithm the weights are transformed once for all images

Timed = TypeVar("Timed")


@dataclass(frozen=True)
class Precision:
    """Device and number formats of a run.

    dtype: of parameters, images, perturbations and losses. amp_dtype: of the network passes, None without AMP.
    note: one line for the user, "" where there is nothing to say.
    winograd: 3x3 convolutions in float32 by `engine.kernels.conv3x3`.
    """

    device: torch.device
    dtype: torch.dtype
    amp_dtype: torch.dtype | None = None
    note: str = ""
    winograd: bool = False

    @property
    def fused(self) -> bool:
        """True where the fused kernels know the dtype of images and losses."""
        return self.dtype == torch.float32

    def autocast(self, *, cached: bool = True) -> AbstractContextManager[object]:
        """Mixed precision for the network passes inside, if the run uses it.

        cached: a weight that needs a gradient is converted once for all passes inside. Not within a CUDA graph.
        """
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype, cache_enabled=cached)

    @property
    def attack_loss_scale(self) -> float:
        """Static factor on the attack's loss: half precision gradients of the image would underflow to zero.

        The attack uses a gradient's sign or direction alone, so nothing has to be unscaled.
        """
        return 1024.0 if self.amp_dtype == torch.float16 else 1.0

    def scaler(self) -> torch.amp.GradScaler:
        """Gradient scaler of the training loss; it does nothing unless the passes run in float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)

    def place(self, network: nn.Module) -> nn.Module:
        """Move a network to the device, in the dtype and in channels-last, the layout of fast convolutions."""
        network.to(self.device, self.dtype)
        if self.winograd:
            use_winograd(network)
        return network.to(memory_format=torch.channels_last)

    def describe(self) -> str:
        """Name of the formats, for the record."""
        name = str(self.dtype).removeprefix("torch.")
        if self.amp_dtype is None and self.device.type == "cuda" and self.dtype == torch.float32:
            return f"{name}, convolutions in {torch.backends.cudnn.conv.fp32_precision}"  # type: ignore[attr-defined]
        return (
            name if self.amp_dtype is None else f"{name}, passes in {str(self.amp_dtype).removeprefix('torch.')}"
        )


def choose(config: RunConfig, local_rank: int = 0) -> Precision:
    """Device and precision of a configuration: of `amp_dtype` where it says one, else by `resolve_amp`.

    local_rank: "cuda" is the GPU of that number. Raises ValueError for a device that is not there.
    """
    place = device(config.device, local_rank)
    dtype = look_up("dtype", config.dtype, {"float32": torch.float32, "float64": torch.float64})
    config = resolve_winograd(resolve_amp(config, local_rank), local_rank)
    winograd = is_on("winograd", config.winograd)
    if not config.amp:
        return Precision(place, dtype, winograd=winograd)
    amp_dtype = look_up("amp_dtype", config.amp_dtype, AMP_DTYPES)
    kept = "training stays in float32" if amp_dtype is None else f"passes in {config.amp_dtype}"
    return Precision(place, dtype, amp_dtype, f"--amp: {kept}, as the run began", winograd)


def resolve_amp(
    config: RunConfig, local_rank: int = 0, say: Callable[[str], None] = lambda line: None
) -> RunConfig:
    """The configuration with the format of its passes decided where `amp_dtype` is "auto".

    On a CPU the faster of bfloat16 and float32, by a timing of some convolutions. A run decides once, and keeps
    its decision in config.yaml. say: called with a line about the timing.
    """
    if not config.amp or config.amp_dtype != "auto":
        return config
    if device(config.device, local_rank).type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return config.model_copy(update={"amp_dtype": "bfloat16" if has_bfloat16 else "float16"})
    gain = bfloat16_gain()
    chosen = "bfloat16" if gain >= MIN_GAIN else "float32"
    what = "passes in bfloat16" if chosen == "bfloat16" else "training stays in float32"
    say(f"--amp: {describe_gain(gain)}: {what}")
    return config.model_copy(update={"amp_dtype": chosen})


def resolve_winograd(
    config: RunConfig, local_rank: int = 0, say: Callable[[str], None] = lambda line: None
) -> RunConfig:
    """The configuration with the algorithm of 3x3 convolutions decided where `winograd` is "auto".

    On a CPU, for passes in float32, by a timing. A run decides once, and keeps its decision in config.yaml.
    config: its `amp_dtype` is decided. say: called with a line about the timing.
    """
    if config.winograd != "auto":
        return config
    place = device(config.device, local_rank)
    in_float32 = config.dtype == "float32" and (not config.amp or config.amp_dtype == "float32")
    if not in_float32 or dispatch.choose("conv3x3", place) != "native":
        return config.model_copy(update={"winograd": "off"})
    gain = winograd_gain()
    chosen = "on" if gain >= MIN_GAIN else "off"
    say(f"--winograd: on this processor 3x3 convolutions run at {gain:.2f}x of torch's: {chosen}")
    return config.model_copy(update={"winograd": chosen})


def describe_gain(gain: float) -> str:
    """The value of `bfloat16_gain` in words."""
    return f"on this processor convolutions in bfloat16 run at {gain:.2f}x of float32"


@functools.cache
def bfloat16_gain() -> float:
    """Rate of convolutions in bfloat16 by that in float32 on this processor, timed once in a process."""
    seconds = _time_convolutions()
    return seconds[torch.float32] / seconds[torch.bfloat16]


@functools.cache
def winograd_gain() -> float:
    """Rate of `engine.kernels.conv3x3` by that of torch's convolution, timed once in a process."""
    calls: dict[bool, list[Callable[[], object]]] = {True: [], False: []}
    for size in _TIMED:
        given = _images_and_weight(torch.float32, _WINOGRAD_IMAGES, *size)
        calls[True].append(functools.partial(conv3x3, *given))
        calls[False].append(functools.partial(nn.functional.conv2d, *given, padding=1))
    seconds = _least_seconds(calls)
    return seconds[False] / seconds[True]


def _time_convolutions() -> dict[torch.dtype, float]:
    """Seconds of forward and backward in each format."""
    dtypes = (torch.float32, torch.bfloat16)
    return _least_seconds({dtype: [_convolution(dtype, *size) for size in _TIMED] for dtype in dtypes})


def _least_seconds(calls: Mapping[Timed, Sequence[Callable[[], object]]]) -> dict[Timed, float]:
    """Seconds of each group of calls: the least of some rounds in which the groups take turns.

    One thread, timed by its own clock, so that other work of the machine does not count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = dict.fromkeys(calls, float("inf"))
        end = time.monotonic() + _SECONDS
        for number in range(_ROUNDS):
            if number > 1 and time.monotonic() > end:
                break
            for name, group in calls.items():
                start = time.thread_time()
                for call in group:
                    call()
                if number > 0:  # the first warms up
                    best[name] = min(best[name], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best


def _convolution(dtype: torch.dtype, channels: int, side: int) -> Callable[[], object]:
    """Forward and backward of a 3x3 convolution, channels-last."""
    images, weight = _images_and_weight(dtype, _IMAGES, channels, side)
    setting: tuple[Any, ...] = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)

    def call() -> None:
        out = torch.ops.aten.convolution(images, weight, None, *setting)
        torch.ops.aten.convolution_backward(out, images, weight, None, *setting, [True, True, False])

    return call


def _images_and_weight(dtype: torch.dtype, images: int, channels: int, side: int) -> tuple[Tensor, Tensor]:
    def values(*shape: int) -> Tensor:
        some = torch.linspace(-1, 1, shape[0] * channels * shape[2] * shape[3]).view(shape)
        return some.to(dtype).contiguous(memory_format=torch.channels_last)

    return values(images, channels, side, side), values(channels, channels, 3, 3)


def count_gpus() -> int:
    """CUDA GPUs that this machine has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names. Raises ValueError where it is not known, or not there."""
    gpus = count_gpus()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    try:
        found = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r} is not known; known: auto, cpu, cuda, cuda:N")
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ValueError(f"--device {name}: this machine has {gpus} CUDA GPU{'s' * (gpus != 1)}")
    return found


def cpu_has_bfloat16() -> bool:
    """True where this processor has arithmetic in bfloat16, fast or not."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def on_device(network: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Move a network to the device inside, and to the host's memory afterwards: one that is seldom used."""
    if network is not None:
        network.to(device)
    yield
    if network is not None:
        network.to("cpu")


# Backends that compute in float32; `fp32_precision` of each is "ieee", "tf32", "bf16", or "none" where not set.
_FLOAT32: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 as IEEE float32 inside, on every device: no TF32, no bfloat16.

    The flags' older names (`allow_tf32`, `set_float32_matmul_precision`) say the same: torch refuses to read them
    where the two disagree.
    """
    before = [backend.fp32_precision for backend in _FLOAT32]
    matmul, allow_tf32 = torch.get_float32_matmul_precision(), _cudnn_allows_tf32()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for backend in _FLOAT32:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = allow_tf32
        for backend, precision in zip(_FLOAT32, before, strict=True):
            backend.fp32_precision = precision


def _cudnn_allows_tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the new names alone were set
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


@contextmanager
def deterministic(*, amp: bool = False) -> Iterator[None]:
    """Same seed, same machine, same bits inside: cuDNN neither times its algorithms nor picks an atomic one.

    torch's default dtype is float32, whatever the caller of a training had set.
    amp: what a training with AMP leaves in float32, the first and the last layer, is IEEE float32 inside.
    """
    cudnn = torch.backends.cudnn
    before, dtype = (cudnn.deterministic, cudnn.benchmark), torch.get_default_dtype()
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.set_default_dtype(torch.float32)
    try:
        with full_precision() if amp else nullcontext():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
        torch.set_default_dtype(dtype)
