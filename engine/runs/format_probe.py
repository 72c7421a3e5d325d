"""Format and algorithm of the passes where the configuration leaves them open: on a CPU the fastest, as timed.

What is timed is what a step runs: passes of the attack, of the training and of the teachers, each as often as in a
step, over a few images: in bfloat16, and in float32 without and with Winograd's algorithm. The result is kept in
the cache folder: the next run on this machine does not measure again.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import methods, models
from engine.attacks.twin import Twin
from engine.common.files import cache_dir, code_hash, regular_file, write_json
from engine.config import RunConfig
from engine.kernels import dispatch
from engine.pipelines.datasets import DATASETS
from engine.system import precision
from engine.system.precision import Precision
from engine.training import plan
from engine.training.performance.speed import forward_flops

# Least gain over the best of float32 for which a run takes half precision.
MIN_GAIN = 1.1
# The same of Winograd's algorithm, whose rounding is nearly float32's: what the timing repeats within.
MIN_WINOGRAD_GAIN = 1.05
# No round begins after so many seconds, and so many are enough.
_SECONDS, _ROUNDS = 2.0, 24
# Of a forward pass over one image: with fewer nobody waits for the network.
_LEAST_OPERATIONS = 2e7
# Images of a pass: so many at most, and no more than a forward pass of so many operations takes.
_MOST_IMAGES, _OPERATIONS = 32, 8e9
_MOST_BYTES = 2**16
# Variables of the environment that change how torch computes on a CPU.
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ENGINE_KERNELS")


class _Pass(NamedTuple):
    """A pass of a network, and how many of it a step has."""

    call: Callable[[], object]
    number: int


class _Way(NamedTuple):
    """A way to run the passes."""

    amp_dtype: torch.dtype | None
    winograd: bool


WAYS = {
    "float32": _Way(None, winograd=False),
    "winograd": _Way(None, winograd=True),
    "bfloat16": _Way(torch.bfloat16, winograd=False),
}


def resolve(config: RunConfig, local_rank: int = 0, say: Callable[[str], None] = lambda line: None) -> RunConfig:
    """The configuration with `amp_dtype` and `winograd` decided where they are "auto".

    On a CPU by a timing. A run decides once, and keeps its decision in config.yaml.
    say: called with a line about each timing, and about float16 on a CPU.
    """
    place = precision.device(config.device, local_rank)
    if config.amp and config.amp_dtype == "float16" and place.type == "cpu":
        say("--amp-dtype float16: taken on this CPU as asked for, and not timed; `auto` never takes it there")
    asks_format = config.amp and config.amp_dtype == "auto"
    if place.type != "cpu":
        found = {"amp_dtype": precision.format_of(place)} if asks_format else {}
        return config.model_copy(update=_winograd(config, wanted=False) | found)
    asks_winograd = _may_gain_by_winograd(config, place)
    if not asks_format and not asks_winograd:
        return config.model_copy(update=_winograd(config, wanted=False))
    gains = gains_of(config)
    found = {}
    if asks_format:
        say(f"--amp: {describe_gain(gains)}")
        found["amp_dtype"] = faster(gains)
    in_float32 = not config.amp or found.get("amp_dtype", config.amp_dtype) == "float32"
    is_used = asks_winograd and in_float32 and gains["winograd"] >= MIN_WINOGRAD_GAIN
    if is_used:
        gain = f"a step with Winograd's algorithm is {gains['winograd']:.2f}x as fast on this processor"
        say(f"--winograd: {gain}: it is used")
    return config.model_copy(update=found | _winograd(config, wanted=is_used))


def _winograd(config: RunConfig, *, wanted: bool) -> dict[str, str]:
    """The decision where the configuration leaves it open."""
    return {"winograd": "on" if wanted else "off"} if config.winograd == "auto" else {}


def _may_gain_by_winograd(config: RunConfig, place: torch.device) -> bool:
    """True if the question is open and worth a timing: not for a small network, whose steps are soon done."""
    if config.winograd != "auto" or config.dtype != "float32" or dispatch.choose("conv3x3", place) != "native":
        return False
    try:
        network = models.build_to_fill(config.model, _classes(config))
        return forward_flops(network, (3, *_image(config)))[0] >= _LEAST_OPERATIONS
    except (
        Exception
    ):  # a network that is not of this package may fail in any way, and that is told in its training
        return False


def faster(gains: Mapping[str, float]) -> str:
    """Name of the format that a CPU with such gains takes."""
    return "bfloat16" if _over_float32(gains) >= MIN_GAIN else "float32"


def describe_gain(gains: Mapping[str, float]) -> str:
    """The gain of bfloat16, and what follows from it, in words."""
    return f"bfloat16 is {_over_float32(gains):.2f}x of float32 on this processor: {faster(gains)} is used"


def _over_float32(gains: Mapping[str, float]) -> float:
    """Gain of bfloat16 over the best of float32."""
    return gains["bfloat16"] / max(1.0, gains["winograd"])


def gains_of(config: RunConfig) -> dict[str, float]:
    """Seconds of a step's passes in float32 / those of each of the `WAYS`, measured once on a machine.

    0, so that float32 is used, where the network cannot be run: what is wrong is told when it is trained.
    """
    key = _key(config)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "formats" / f"{digest[:16]}.json"
    if (kept := _kept(path, key)) is not None:
        return kept
    try:
        seconds = measure(config)
    except Exception:  # a network that is not of this package may fail in any way
        return dict.fromkeys(WAYS, 0.0)
    gains = {way: seconds["float32"] / taken for way, taken in seconds.items()}
    with contextlib.suppress(OSError):  # without a cache it is measured again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "gains": gains})
    return gains


def _kept(path: Path, key: dict[str, Any]) -> dict[str, float] | None:
    """The gains in a file of the cache; None where there is none, or the file is damaged."""
    try:
        found = json.loads(regular_file(path, _MOST_BYTES).read_bytes())
        gains = {way: float(found["gains"][way]) for way in WAYS}
        are_right = found["key"] == key and all(0 < gain < math.inf for gain in gains.values())
        return gains if are_right else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _key(config: RunConfig) -> dict[str, Any]:
    """Whatever changes the result, as JSON has it."""
    return {
        "processor": _processor(),
        "torch": torch.__version__,
        "engine": code_hash(),
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
        "threads": torch.get_num_threads(),
        "model": config.model,
        "image": list(_image(config)),
        "batch": _batch(config),
        "bn": config.attack.bn,
        "passes": list(_passes(config)),
    }


def _processor() -> list[str]:
    """Model and flags of the processor, as Linux tells them; empty elsewhere."""
    wanted: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "model", "stepping", "CPU part", "flags", "Features"):
                wanted.setdefault(name.strip(), value.strip())
    return [f"{name}: {value}" for name, value in wanted.items()]


def _image(config: RunConfig) -> tuple[int, int]:
    """Height and width of the run's images as far as they are known before the data are read."""
    known = config.image_size or DATASETS[config.dataset].image_size
    side = known or min(models.get(config.model).input_sizes)
    return side, side


def _batch(config: RunConfig) -> int:
    """Images that a process runs at a time, as far as that is known before the run."""
    return config.micro_batch if isinstance(config.micro_batch, int) else config.batch_size


def _passes(config: RunConfig) -> plan.Passes:
    method = methods.get(config.method, semantics=config.semantics, loss=config.loss)
    return plan.passes(method, config.attack, config.forwards)


def _classes(config: RunConfig) -> int:
    """Classes of the run's data, as far as they are known before the data are read."""
    return DATASETS[config.dataset].num_classes or 10


def measure(config: RunConfig) -> dict[str, float]:
    """Seconds of the passes of a step over a few images, by format.

    Of each pass the least of the rounds, in which formats take turns, without the first one if there are others.
    One thread over its share of a batch, timed by its own clock, so that other work of the machine does not count.
    """
    with torch.random.fork_rng(devices=[]), one_thread() as threads:
        network = models.build(config.model, _classes(config))
        shape = (3, *_image(config))
        fits = _OPERATIONS / max(forward_flops(network, shape)[0], 1.0)
        images = max(1, min(_MOST_IMAGES, _batch(config) // threads, int(fits)))
        given = torch.rand(images, *shape)
        steps = {name: _step(copy.deepcopy(network), given, config, way) for name, way in WAYS.items()}
        return _least(steps)


def _least(steps: dict[str, list[_Pass]]) -> dict[str, float]:
    rounds: list[dict[str, list[float]]] = []
    end = time.monotonic() + _SECONDS
    while not rounds or (len(rounds) < _ROUNDS and time.monotonic() < end):
        rounds.append({name: [_seconds(one.call) for one in step] for name, step in steps.items()})
    counted = rounds[1:] or rounds
    return {
        name: sum(one.number * min(taken[name][index] for taken in counted) for index, one in enumerate(step))
        for name, step in steps.items()
    }


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _step(network: nn.Module, images: Tensor, config: RunConfig, way: _Way) -> list[_Pass]:
    """The kinds of passes that a step has, each over the images, as the engine runs them."""
    at = Precision(torch.device("cpu"), torch.float32, way.amp_dtype, winograd=way.winograd)
    student = at.place(network)
    images = images.contiguous(memory_format=torch.channels_last)
    attacked, teacher = Twin(student, config.attack.bn, at), Twin(student, "eval", at)

    def attack() -> None:
        x_adv = images.clone().requires_grad_()
        torch.autograd.grad(attacked(x_adv).sum(), x_adv)

    def train() -> None:
        with at.autocast():
            logits = student(images)
        torch.autograd.grad(logits.float().sum(), list(student.parameters()), allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            teacher(images)

    passes = zip((attack, train, forward), _passes(config), strict=True)
    return [_Pass(call, count) for call, count in passes if count]


@contextmanager
def one_thread() -> Iterator[int]:
    """Compute with one thread inside; gives the number of threads outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
