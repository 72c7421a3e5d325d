"""Device and number formats of a run, deterministic algorithms, IEEE float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.common.lookup import look_up
from engine.config import RunConfig

AMP_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Device and number formats of a run.

    dtype: of parameters, images, perturbations and losses. amp_dtype: of the network passes, None without AMP.
    note: one line for the user, "" where there is nothing to say.
    """

    device: torch.device
    dtype: torch.dtype
    amp_dtype: torch.dtype | None = None
    note: str = ""

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
    """Device and precision of a configuration: of `amp_dtype` where it says one, else by `format_of`.

    local_rank: "cuda" is the GPU of that number. Raises ValueError for a device that is not there.
    """
    place = device(config.device, local_rank)
    dtype = look_up("dtype", config.dtype, {"float32": torch.float32, "float64": torch.float64})
    if not config.amp:
        return Precision(place, dtype)
    named = format_of(place) if config.amp_dtype == "auto" else config.amp_dtype
    amp_dtype = look_up("amp_dtype", named, AMP_DTYPES)
    kept = "training stays in float32" if amp_dtype is None else f"passes in {named}"
    return Precision(place, dtype, amp_dtype, f"--amp: {kept}, as the run began")


def format_of(place: torch.device) -> str:
    """Name of the format of the passes on a device where nothing else is known: no timing is made."""
    if place.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


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
