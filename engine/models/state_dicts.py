"""State dicts in checkpoint files of any origin: their places, prefixes and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.common.lookup import look_up
from engine.common.tensor_files import short_repr, tensor_fault

CONTAINERS = ("student", "state_dict", "net", "model", "model_state_dict", "network", "weights", "params")
"""Where a checkpoint keeps its state dict, if not bare; the first is this project's own."""
AVERAGES = (
    "averaged",
    "ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "swa_state_dict",
    "swa",
)
"""Where it keeps averages of the same weights: they are taken where nothing else is there, or on demand."""
WRAPPERS = ("module.", "model.", "_orig_mod.", "basic_net.")
"""Prefixes left by DataParallel, torch.compile and classes that hold the network as an attribute."""
MEANS, STDS = ("mean", "mu"), ("std", "sigma")
"""Last parts of the names that normalisation buffers go by."""

State = dict[str, Tensor]


def choose(path: str | Path, payload: Mapping[Any, Any], wanted: str | None) -> tuple[str, State, tuple[str, ...]]:
    """The state dict of that name, else the usual one; its name, "" for a bare one; notes for the user.

    Raises ValueError, one line with the path, where there is none, or it holds what is no plain tensor.
    """
    found = _candidates(payload)
    if wanted is not None:
        if not found or "" in found:
            raise ValueError(f"{path}: weights: {wanted!r} is not there, as it holds one unnamed state dict")
        try:
            name, state = wanted, look_up("weights", wanted, found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    else:
        name, state = min(found.items(), key=lambda item: _rank(item[0])) if found else ("", _only(path, payload))
    for key, value in state.items():
        if wrong := tensor_fault(value):
            raise ValueError(f"{path}: {short_repr(key)} is {wrong}")
    others = [short_repr(other) for other in found if other != name]
    if not others:
        return name, dict(state), ()
    note = f"the weights under {short_repr(name)} are taken, and the file also has {', '.join(others)} (weights)"
    return name, dict(state), (note,)


def _candidates(payload: Mapping[Any, Any]) -> dict[str, State]:
    """All state dicts of networks by their place: "" for the file itself, else "a" or "a.b"."""
    if _is_state(payload):
        return {"": dict(payload)}
    found = {}
    for key, value in payload.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            inside = {"": value} if _is_state(value) else value
            for inner, state in inside.items():
                if isinstance(inner, str) and isinstance(state, Mapping) and _is_state(state):
                    found[f"{key}.{inner}" if inner else key] = dict(state)
    return found


def _is_state(value: Mapping[Any, Any]) -> bool:
    """True if these are named tensors of a network, and not a normalisation alone."""
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()):
        return False
    return any(tensor.dim() >= 2 and _last(key) not in (*MEANS, *STDS) for key, tensor in value.items())


def _rank(place: str) -> int:
    """Usual names before others, weights before their averages."""
    known = (*CONTAINERS, *AVERAGES)
    first = place.partition(".")[0]
    return known.index(first) if first in known else len(known)


def _only(path: str | Path, payload: Mapping[Any, Any]) -> State:
    """The tensors of a file in which nothing looks like a network. Raises ValueError unless they are named."""
    state = next((payload[key] for key in CONTAINERS if isinstance(payload.get(key), Mapping)), payload)
    if not state:
        raise ValueError(f"{path}: holds no weights, its state dict is empty")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: holds {type(value).__name__} under {short_repr(key)}, and not a state dict, "
                f"neither bare nor under one of: {', '.join((*CONTAINERS, *AVERAGES))}"
            )
    return dict(state)


def split_normalisation(path: str | Path, state: State) -> tuple[State, State]:
    """The network's own tensors, and its normalisation under this project's names, empty where there is none."""
    means, stds = ([key for key in state if _last(key) in names] for names in (MEANS, STDS))
    network = {key: tensor for key, tensor in state.items() if key not in (*means, *stds)}
    if not means and not stds:
        return network, {}
    if len(means) != 1 or len(stds) != 1:
        found = short_repr(means + stds)
        raise ValueError(f"{path}: one mean and one std are expected for normalisation, got {found}")
    for key in (means[0], stds[0]):
        if tuple(state[key].shape) not in ((3,), (3, 1, 1), (1, 3, 1, 1)):
            raise ValueError(
                f"{path}: normalisation needs 3 channels, {short_repr(key)} has shape {tuple(state[key].shape)}"
            )
    mean, std = (state[key].reshape(3, 1, 1) for key in (means[0], stds[0]))
    return network, {"normalize.mean": mean, "normalize.std": std}


def unwrapped(state: State, *, sequential: bool) -> State:
    """The state without the prefixes that all its keys share, and without torch's count of averaged models.

    sequential: nn.Sequential(normalize, network), whose network is "1.", is a wrapper too. Where a normalisation
    without buffers may stand before the network, that prefix stays, and the key is later refused.
    """
    state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}
    wrappers = (*WRAPPERS, "1.") if sequential else WRAPPERS
    while prefix := next((p for p in wrappers if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def without_sub_block1(state: State) -> tuple[State, tuple[str, ...]]:
    """Published TRADES Wide ResNets hold a further first group that no forward uses; it also breaks DDP."""
    unused = {key: tensor for key, tensor in state.items() if key.startswith("sub_block1.")}
    if not unused:
        return state, ()
    parameters = sum(tensor.numel() for key, tensor in unused.items() if key.endswith((".weight", ".bias")))
    note = f"dropped {len(unused)} unused sub_block1 tensors ({parameters / 1e6:.1f} M parameters no forward uses)"
    return {key: tensor for key, tensor in state.items() if key not in unused}, (note,)


def head(state: State) -> str | None:
    """The name of the last linear layer, before ".weight": of the only matrix; None if there is not one alone."""
    # All else in these networks is 4-D or 1-D.
    matrices = [key for key, tensor in state.items() if tensor.dim() == 2 and tensor.numel()]
    return matrices[0].removesuffix(".weight") if len(matrices) == 1 else None


def in_order(state: State, order: list[int]) -> State:
    """The state of the network whose output i is output order[i] of this one.

    Raises ValueError where it has not one linear layer.
    """
    name = head(state)
    if name is None:
        raise ValueError(
            "its classes are in another order than the data's, and which layer is its head is not known"
        )
    rows = {key: state[key][order] for key in (f"{name}.weight", f"{name}.bias") if key in state}
    return state | rows


def _last(key: str) -> str:
    return key.rpartition(".")[2]
