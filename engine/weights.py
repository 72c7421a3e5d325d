"""Trained networks from checkpoint files, this project's own or anybody's.

A file is only ever read as tensors and plain containers (`weights_only`), so no code in it can run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.models import TABLE, build

FORMAT = 1
CONTAINERS = ("student", "state_dict", "net", "model", "model_state_dict")
"""Where a checkpoint keeps its state dict, if not bare; the first is this project's own."""
WRAPPERS = ("module.", "model.", "_orig_mod.", "basic_net.")
"""Prefixes left by DataParallel, torch.compile and classes that hold the network as an attribute."""
MEANS, STDS = ("mean", "mu"), ("std", "sigma")
"""Last parts of the names that normalisation buffers go by."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of one network under this project's names, and what the file says of it.

    state: normalisation, where there is one, is under normalize.mean and normalize.std, of shape (3, 1, 1).
    model: the recorded architecture, or the one that the names of the tensors reveal; None if neither is known.
    num_classes: the rows of the head; None without one linear layer. config: the configuration of an own
    checkpoint's training.
    notes: sentences on what was changed or found, for the user to read.
    """

    state: State
    model: str | None
    num_classes: int | None
    dataset: str | None = None
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def normalize(self) -> bool:
        """The network normalises its images itself."""
        return "normalize.mean" in self.state


@dataclass(frozen=True)
class LoadedModel:
    """A network with its weights, in eval mode, and its architecture's name; the rest is as in `Weights`."""

    module: nn.Module
    name: str
    num_classes: int
    dataset: str | None
    config: dict[str, Any] | None
    notes: tuple[str, ...]


def read_weights(path: str | Path) -> Weights:
    """The weights in a checkpoint file: a state dict, bare or in a container, with or without wrappers' prefixes.

    Raises ValueError, one line with the path, where the file cannot be read as such.
    """
    payload = _read(path)
    own = "student" in payload
    if own and payload.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a checkpoint of format {payload.get('format')!r}, and this version reads {FORMAT}"
        )
    state, normalisation = _split_normalisation(path, _state_dict(path, payload))
    state = _unwrapped(state, sequential=bool(normalisation))
    state, notes = _without_sub_block1(state)
    if normalisation:
        mean, std = ([round(value, 4) for value in buffer.flatten().tolist()] for buffer in normalisation.values())
        notes += (f"normalises its images by mean {mean} and std {std}",)
    record = payload.get("model") if own else None
    dataset, config = (payload.get("dataset"), payload.get("config")) if own else (None, None)
    return Weights(
        state=state | normalisation,
        model=str(record["name"]) if isinstance(record, Mapping) and "name" in record else architecture_of(state),
        num_classes=_head_rows(state),
        dataset=dataset if isinstance(dataset, str) else None,
        config=config if isinstance(config, dict) else None,
        notes=notes,
    )


def load_model(path: str | Path, *, model: str | None = None, num_classes: int | None = None) -> LoadedModel:
    """The network in a checkpoint file, on the CPU; float64 where its weights are, else float32.

    model: its architecture, where the file does not tell. num_classes: what the data set needs.
    Leaves torch's global generator alone. Raises ValueError, one line with the path, where anything does not fit.
    """
    weights = read_weights(path)
    name = model or weights.model
    if name is None:
        raise ValueError(
            f"{path}: its {len(weights.state)} tensors (first {next(iter(weights.state), None)!r}) fit no known "
            f"architecture; name one to be told what differs; known: {', '.join(sorted(TABLE))}"
        )
    if num_classes is not None and weights.num_classes not in (None, num_classes):
        raise ValueError(
            f"{path}: the checkpoint's head has {weights.num_classes} classes, the data set has {num_classes}"
        )
    classes = weights.num_classes or num_classes or 2  # without a head, any number leads to the error below
    try:
        with torch.device("meta"):  # neither memory nor random numbers for values that are replaced at once
            module = build(name, classes, normalize=weights.normalize)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if bad := [key for key, tensor in weights.state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: {len(bad)} tensors hold values that are not finite, the first {bad[0]!r}")
    expected = module.state_dict()
    if differences := _differences(weights.state, expected):
        raise ValueError(f"{path}: these are no weights of {name}: {differences}")
    # Normalisation is often written down in float64 beside a network in float32; it does not count.
    if any(weights.state[key].dtype == torch.float64 for key, _ in module.named_parameters()):
        module.to(torch.float64)
    counters = {key: torch.zeros((), dtype=torch.int64) for key in expected if _is_counter(key)}
    module.to_empty(device="cpu").load_state_dict(counters | weights.state)
    return LoadedModel(module.eval(), name, classes, weights.dataset, weights.config, weights.notes)


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """The architecture whose tensors have exactly these names, normalisation aside; None if there is none."""

    def names(tensors: Mapping[str, Tensor]) -> set[str]:
        return {key for key in tensors if not _is_counter(key) and not key.startswith("normalize.")}

    with torch.device("meta"):
        return next((name for name in TABLE if names(build(name, 2).state_dict()) == names(state)), None)


def _read(path: str | Path) -> Mapping[str, Any]:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may make torch's reader stumble anywhere
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: holds the Python object {refused[1]}, and loading it could run code; "
                "save the network's state_dict() alone"
            ) from None
        raise ValueError(f"{path}: is no checkpoint, or a damaged one") from None
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path}: holds {type(payload).__name__} where a dict of tensors is expected")
    return payload


def _state_dict(path: str | Path, payload: Mapping[str, Any]) -> State:
    state = next((payload[key] for key in CONTAINERS if isinstance(payload.get(key), Mapping)), payload)
    if not state:
        raise ValueError(f"{path}: holds no weights, its state dict is empty")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: holds {type(value).__name__} under {key!r}, and not a state dict, "
                f"neither bare nor under one of: {', '.join(CONTAINERS)}"
            )
    return dict(state)


def _split_normalisation(path: str | Path, state: State) -> tuple[State, State]:
    """The network's own tensors, and its normalisation under this project's names, empty where there is none."""
    means, stds = ([key for key in state if key.rpartition(".")[2] in names] for names in (MEANS, STDS))
    network = {key: tensor for key, tensor in state.items() if key not in (*means, *stds)}
    if not means and not stds:
        return network, {}
    if len(means) != 1 or len(stds) != 1:
        raise ValueError(f"{path}: one mean and one std are expected for normalisation, got {means + stds}")
    for key in (means[0], stds[0]):
        if tuple(state[key].shape) not in ((3,), (3, 1, 1), (1, 3, 1, 1)):
            raise ValueError(
                f"{path}: normalisation needs 3 channels, {key!r} has shape {tuple(state[key].shape)}"
            )
    mean, std = (state[key].reshape(3, 1, 1) for key in (means[0], stds[0]))
    return network, {"normalize.mean": mean, "normalize.std": std}


def _unwrapped(state: State, *, sequential: bool) -> State:
    """The state without the prefixes that all its keys share.

    sequential: nn.Sequential(normalize, network), whose network is "1.", is a wrapper too. Where a normalisation
    without buffers may stand before the network, that prefix stays, and the key is later refused.
    """
    wrappers = (*WRAPPERS, "1.") if sequential else WRAPPERS
    while prefix := next((p for p in wrappers if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _without_sub_block1(state: State) -> tuple[State, tuple[str, ...]]:
    """Published TRADES Wide ResNets hold a further first group that no forward uses; it also breaks DDP."""
    unused = {key: tensor for key, tensor in state.items() if key.startswith("sub_block1.")}
    if not unused:
        return state, ()
    parameters = sum(tensor.numel() for key, tensor in unused.items() if key.endswith((".weight", ".bias")))
    note = f"dropped {len(unused)} unused sub_block1 tensors ({parameters / 1e6:.1f} M parameters no forward uses)"
    return {key: tensor for key, tensor in state.items() if key not in unused}, (note,)


def _head_rows(state: State) -> int | None:
    matrices = [
        tensor for tensor in state.values() if tensor.ndim == 2
    ]  # all else in these networks is 4-D or 1-D
    return matrices[0].shape[0] if len(matrices) == 1 else None


def _is_counter(key: str) -> bool:
    # BatchNorm's count of batches, which no default network reads; old checkpoints lack it.
    return key.endswith(".num_batches_tracked")


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What keeps the state from being loaded, in words; empty if nothing does."""
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key!r} of shape {tuple(state[key].shape)} and not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    parts = [
        f"{len(missing)} keys missing, the first {missing[0]!r}" if missing else "",
        f"{len(extra)} unknown keys, the first {extra[0]!r}" if extra else "",
        f"{len(shapes)} of another shape, the first {shapes[0]}" if shapes else "",
    ]
    return "; ".join(part for part in parts if part)
