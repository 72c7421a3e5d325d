"""State dicts in checkpoint files of any origin: where they are, and which of their tensors a network has."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.common.lookup import look_up
from engine.common.tensor_files import short_repr, tensor_fault

AVERAGES = frozenset(("averaged", "average", "avg", "ema", "swa"))
"""Words in the names of averages, as state_dict_ema, of weights that lie beside them and are taken first."""
UNAVERAGED = "unaveraged"
"""A word in the names of weights before averaging, where the usual name has the average, which is published."""
MEANS, STDS = ("mean", "mu", "new_mean"), ("std", "sigma", "new_std")
"""Last parts of the names that normalisation buffers go by."""
UNUSED = ("sub_block1", "model_preact_hl1")
"""Parts of published networks that no forward uses: a further first group (TRADES; it also breaks DDP), a second
name of the first layers (Andriushchenko and Flammarion, 2020)."""
TRAINING = frozenset(("criterion", "loss", "loss_fn", "loss_function", "metrics", "n_averaged"))
"""What a training keeps beside a network, under the name of a part of a class: nothing of it leads to logits."""

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a network's tensors, CLASS_COUNT standing for the number of classes."""
CLASS_COUNT = 7919
"""A number of classes that no layer has as its width."""

_MOST_DEPTH, _MOST_STATES = 8, 10_000


def find(payload: Mapping[Any, Any] | Sequence[Any]) -> dict[str, State]:
    """The tensors of every mapping in which some could be weights, by place: "" is the file itself, then "a.b".

    Raises ValueError where there are too many.
    """
    found: dict[str, State] = {}
    left: list[tuple[str, Any, int]] = [("", payload, 0)]
    for place, value, depth in left:
        items = list(value.items()) if isinstance(value, Mapping) else [(str(i), v) for i, v in enumerate(value)]
        tensors = {key: inner for key, inner in items if isinstance(key, str) and isinstance(inner, Tensor)}
        if isinstance(value, Mapping) and any(tensor.dim() >= 2 for tensor in tensors.values()):
            found[place] = tensors
        if len(found) > _MOST_STATES:
            raise ValueError(f"holds more than {_MOST_STATES:,} state dicts")
        if depth < _MOST_DEPTH:
            left += [
                (joined(place, key), inner, depth + 1)
                for key, inner in items
                if isinstance(key, str) and isinstance(inner, Mapping | list | tuple)
            ]
    return found


def under(found: Mapping[str, State], wanted: str) -> State:
    """The state dict of that place, or the part of one whose names begin so. Raises ValueError where none is."""
    if wanted in found:
        return found[wanted]
    for place, state in found.items():
        prefix = f"{wanted}." if not place else f"{wanted.removeprefix(f'{place}.')}."
        if not place or wanted.startswith(f"{place}."):
            part = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            if part:
                return part
    if set(found) == {""}:
        raise ValueError(f"weights: {wanted!r} is not there, as it holds one unnamed state dict")
    return look_up("weights", wanted, found)


def rank(key: str) -> int:
    """0 for weights, 1 for an average of weights, 2 for the weights before a published average."""
    words = set(re.split(r"[._-]", key))
    return 2 if UNAVERAGED in words else int(not AVERAGES.isdisjoint(words))


@dataclass(frozen=True)
class Match:
    """A network's tensors in a state dict.

    prefix: of their names there, "" or ending in a dot. missing: names that are not there.
    mean, std: names of its normalisation. rest: names that belong to no network, and not to a training alone.
    dropped: names of what is not read.
    """

    prefix: str
    missing: tuple[str, ...]
    means: tuple[str, ...]
    stds: tuple[str, ...]
    rest: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def inside(self) -> tuple[str, ...]:
        """Names of `rest` among the network's tensors."""
        return tuple(key for key in self.rest if key.startswith(self.prefix))

    @property
    def outside(self) -> tuple[str, ...]:
        """Names of `rest` beside the network."""
        return tuple(key for key in self.rest if not key.startswith(self.prefix))


def matches(state: State, names: Iterable[str]) -> list[Match]:
    """The networks with those names in a state, the outermost first; where none is whole, what comes nearest."""
    names = set(names)
    votes: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for count in range(len(parts)):
            if ".".join(parts[count:]) in names:
                votes[".".join((*parts[:count], ""))] += 1
    most = max(votes.values(), default=0)
    prefixes = sorted((prefix for prefix, count in votes.items() if count == most), key=lambda p: (len(p), p))
    if most < len(names) or not prefixes:
        prefixes = prefixes[:1] or [""]
    owned = {prefix: _own(state, prefix, names) for prefix in prefixes}
    networks = set().union(*owned.values())
    means, stds = (_nearest(state, networks, prefixes, last) for last in (MEANS, STDS))
    others = networks.union(*means.values(), *stds.values())
    unread = {key for key in state if key not in others and _is_unread(key)}
    return [
        Match(
            prefix,
            missing=tuple(name for name in names if prefix + name not in state),
            means=means[prefix],
            stds=stds[prefix],
            rest=tuple(key for key in state if key not in others and key not in unread),
            dropped=tuple(k for k in state if k not in (owned[prefix] | {*means[prefix], *stds[prefix]})),
        )
        for prefix in prefixes
    ]


def _own(state: State, prefix: str, names: set[str]) -> set[str]:
    """Names of the network under a prefix, BatchNorm's counters included."""
    layers = {name.rpartition(".")[0] for name in names if name.endswith(".running_var")}
    own = {prefix + name for name in (*names, *(f"{layer}.num_batches_tracked" for layer in layers))}
    return {key for key in state if key in own}


def _nearest(
    state: State, networks: set[str], prefixes: Sequence[str], last: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Normalisation buffers of each network: of the one with whose names that of the buffer begins the longest."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(prefixes, ())
    for key in state:
        if key not in networks and key.rpartition(".")[2] in last:
            # Of equally near ones the outermost, as `prefixes` are sorted.
            prefix = max(prefixes, key=lambda each: _shared(each, key))
            found[prefix] += (key,)
    return found


def _shared(prefix: str, key: str) -> int:
    """Parts of two names that are the same at their beginning."""
    pairs = zip(prefix.split(".")[:-1], key.split("."), strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), prefix.count("."))


def _is_unread(key: str) -> bool:
    parts = key.split(".")
    return is_counter(key) or any(part in UNUSED or part in TRAINING for part in parts)


def is_counter(key: str) -> bool:
    """True for BatchNorm's count of batches, which no default network reads; old checkpoints lack it."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def has_shapes(state: State, prefix: str, shapes: Shapes) -> bool:
    """True where all sound tensors of the network have its shapes, with one number of classes."""
    counts = set()
    for name, expected in shapes.items():
        tensor = state.get(prefix + name)
        if tensor is None or tensor_fault(tensor):
            continue
        if tensor.dim() != len(expected):
            return False
        for size, wanted in zip(tensor.shape, expected, strict=True):
            if wanted == CLASS_COUNT:
                counts.add(size)
            elif size != wanted:
                return False
    return len(counts) <= 1


def normalisation(state: State, match: Match) -> State:
    """The normalisation of a network under this project's names. Raises ValueError where it is not plain."""
    found = (*match.means, *match.stds)
    if not found:
        return {}
    if len(match.means) != 1 or len(match.stds) != 1:
        raise ValueError(f"one mean and one std are expected for normalisation, got {short_repr(list(found))}")
    for key in found:
        if fault := tensor_fault(state[key]):
            raise ValueError(f"{short_repr(key)} is {fault}")
        if tuple(state[key].shape) not in ((3,), (3, 1, 1), (1, 3, 1, 1)):
            raise ValueError(
                f"normalisation needs 3 channels, {short_repr(key)} has shape {tuple(state[key].shape)}"
            )
    return {
        f"normalize.{part}": state[key].reshape(3, 1, 1) for part, key in zip(("mean", "std"), found, strict=True)
    }


def joined(*parts: str) -> str:
    """Parts of a name, of which some may be empty, joined by dots."""
    return ".".join(part for part in parts if part)
