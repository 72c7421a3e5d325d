"""Networks in the state dicts of a file: which architecture's tensors they are, and which of several are taken."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from engine.common.tensor_files import short_repr, tensor_fault
from engine.models import TABLE, build_to_fill, candidates, get, state_dicts
from engine.models.state_dicts import CLASS_COUNT, Match, Shapes, State, joined

BESIDE = "network."
"""Prefix of a library's network, whose own files have its names without it."""


@dataclass(frozen=True, eq=False)
class FoundNetwork:
    """A network that a file has.

    place: of its state dict in the file. name: of its architecture, None where none is known to fit.
    shapes: of the architecture's tensors by the names that they have after `match.prefix`.
    note: a sentence for the user, if any.
    """

    place: str
    state: State = field(repr=False)
    match: Match
    name: str | None
    shapes: Shapes = field(repr=False)
    note: str = ""

    @property
    def key(self) -> str:
        """Place and prefix, as --weights-key takes them."""
        return joined(self.place, self.match.prefix.removesuffix("."))

    @property
    def num_classes(self) -> int | None:
        """As its tensors have it; None where none of them tells."""
        for name, shape in self.shapes.items():
            tensor = self.state.get(self.match.prefix + name)
            if tensor is None or CLASS_COUNT not in shape or tensor_fault(tensor) or not tensor.numel():
                continue
            if tensor.dim() == len(shape):
                return tensor.shape[shape.index(CLASS_COUNT)]
        return None

    def tensors(self) -> State:
        """The network's tensors, counters and what else lies among them, under the architecture's names."""
        prefix = self.match.prefix
        layers = {f"{name.rpartition('.')[0]}.num_batches_tracked" for name in self.shapes}
        own = {*self.shapes, *layers, *(key.removeprefix(prefix) for key in self.match.inside)}
        back = "" if self.name is None else _of(self.name)[1]
        found = {key.removeprefix(prefix): key for key in self.state if key.startswith(prefix)}
        return {back + name: self.state[key] for name, key in found.items() if name in own}


def shapes_of(name: str) -> Shapes:
    """Shapes of an architecture's tensors, without normalisation and counters, with CLASS_COUNT classes.

    A library's network has them under the names of the library's files. Raises ValueError as `build_to_fill` does.
    """
    return _of(name)[0]


def _of(name: str) -> tuple[Shapes, str]:
    """Shapes of an architecture, and the prefix that was taken off its names."""
    entry = get(name)
    # A family makes an entry anew each time; another row of that name is another architecture.
    return _built(name, entry.version, entry.builder if name in TABLE else None)


@functools.lru_cache(maxsize=64)
def _built(name: str, version: str, builder: object) -> tuple[Shapes, str]:
    state = build_to_fill(name, CLASS_COUNT).state_dict()
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in state.items()
        if not key.startswith("normalize.") and not state_dicts.is_counter(key)
    }
    back = BESIDE if all(key.startswith(BESIDE) for key in shapes) else ""
    return {key.removeprefix(back): shape for key, shape in shapes.items()}, back


def class_rows(name: str) -> tuple[str, ...]:
    """Names of the tensors of the layer whose rows are classes; none where that is not one layer."""
    shapes, back = _of(name)
    rows = {back + key: shape for key, shape in shapes.items() if CLASS_COUNT in shape}
    layers = {key.rpartition(".")[0] for key in rows}
    first = all(shape[0] == CLASS_COUNT and CLASS_COUNT not in shape[1:] for shape in rows.values())
    return tuple(rows) if len(layers) == 1 and first else ()


def networks(found: Mapping[str, State], model: str | None) -> list[FoundNetwork]:
    """All whole networks in state dicts by their place: of that architecture, else of any that fits."""
    return [network for place, state in found.items() for network in _networks(place, state, model)]


def choose(found: Mapping[str, State], model: str | None) -> tuple[FoundNetwork, tuple[str, ...]]:
    """The network of a file, and notes on others that it has. found: at least one state dict, by place.

    model: its architecture, where that is known. Raises ValueError where several architectures fit one network,
    and where the file has several networks, of which none is known to be the one that is meant.
    """
    all_networks = networks(found, model)
    if not all_networks:
        return _nearest(found, model), ()
    first = min(state_dicts.rank(network.key) for network in all_networks)
    ranked = [network for network in all_networks if state_dicts.rank(network.key) == first]
    taken = ranked[0]
    differing = [other for other in ranked[1:] if not _same(taken, other)]
    if differing and (names := {n.name for n in ranked if n.key == taken.key} - {taken.name}):
        fit = ", ".join(sorted(str(name) for name in (taken.name, *names)))
        raise ValueError(f"model: its tensors fit several architectures: {fit}; name the one that is meant")
    if differing:
        listed = ", ".join(f"{short_repr(n.key)} ({n.name})" for n in (taken, *differing))
        raise ValueError(
            f"holds several networks: {listed}; name the one that is meant by --weights-key, or teacher.weights"
        )
    notes = [taken.note] if taken.note else []
    notes += [f"the same weights are under {short_repr(n.key)}, too" for n in ranked[1:] if n.key != taken.key]
    if others := [network for network in all_networks if network not in ranked]:
        places = [network.place for network in all_networks]
        # The prefix matters only where a state dict has several.
        keys = [short_repr(n.place if places.count(n.place) == 1 else n.key) for n in (taken, *others)]
        notes.append(
            f"the weights under {keys[0]} are taken, and the file also has {', '.join(keys[1:])} (--weights-key)"
        )
    return taken, tuple(notes)


def _networks(place: str, state: State, model: str | None) -> list[FoundNetwork]:
    """The whole networks of a state dict: of that architecture, else of all that may have such tensors."""
    if model is not None:
        found = [
            FoundNetwork(place, state, match, model, shapes_of(model)) for match in _whole(state, shapes_of(model))
        ]
        if all(network.match.inside for network in found) and (renamed := _renamed(place, state, model)):
            found = renamed
        fitting = [network for network in found if _fits(network)]
        return fitting or found
    sound = {key: tensor.shape for key, tensor in state.items() if not tensor_fault(tensor)}
    known = _buildable(candidates(sound), len(state))
    found = [
        FoundNetwork(place, state, match, name, shapes)
        for name, shapes in known.items()
        for match in _whole(state, shapes)
        if not match.inside
    ]
    fitting = [network for network in found if _fits(network)]
    return fitting or (found if len({network.name for network in found}) == 1 else [])


def _renamed(place: str, state: State, model: str) -> list[FoundNetwork]:
    """The whole networks of that architecture under names that an older version of its library gave.

    None where the library would change a tensor: only names are other ones.
    """
    convert, shapes = get(model).renamed, shapes_of(model)
    if convert is None:
        return []
    prefix = state_dicts.matches(state, shapes)[0].prefix
    own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    try:
        today = convert(build_to_fill(model, CLASS_COUNT), own)
    except Exception:  # of a library, for tensors that are none of this network
        return []
    kept = {id(tensor) for tensor in today.values()}
    if today.keys() == own.keys() or not kept <= {id(tensor) for tensor in own.values()}:
        return []
    gone = tuple(prefix + key for key, tensor in own.items() if id(tensor) not in kept)
    beside = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    state = beside | {prefix + key: tensor for key, tensor in today.items()}
    note = f"its names are of an older version: read as {get(model).version} reads such a file"
    return [
        FoundNetwork(place, state, replace(match, dropped=(*match.dropped, *gone)), model, shapes, note)
        for match in _whole(state, shapes)
    ]


def _buildable(names: Iterable[str], most: int) -> dict[str, Shapes]:
    """Shapes of those architectures that have no more tensors than there are."""
    found = {}
    for name in names:
        try:
            shapes = shapes_of(name)
        except ValueError:  # of a registered one that does not take so many classes
            continue
        if len(shapes) <= most:
            found[name] = shapes
    return found


def _whole(state: State, shapes: Shapes) -> list[Match]:
    if not shapes or len(shapes) > len(state):
        return []
    return [match for match in state_dicts.matches(state, shapes) if not match.missing]


def _fits(network: FoundNetwork) -> bool:
    return state_dicts.has_shapes(network.state, network.match.prefix, network.shapes)


def _same(one: FoundNetwork, other: FoundNetwork) -> bool:
    """True for two copies of one network, normalisation included."""
    if one.name != other.name or one.key == other.key:
        return False
    left, right = ([n.state[n.match.prefix + name] for name in n.shapes] for n in (one, other))
    left, right = (
        [*tensors, *(n.state[key] for key in (*n.match.means, *n.match.stds))]
        for tensors, n in ((left, one), (right, other))
    )
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor_fault(one) or tensor_fault(other) or one.dtype != other.dtype:
        return False
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _nearest(found: Mapping[str, State], model: str | None) -> FoundNetwork:
    """Tensors that are no whole network, to say what is wrong: the nearest, else the largest state dict."""
    shapes = shapes_of(model) if model is not None else {}
    nearest = [
        FoundNetwork(place, state, state_dicts.matches(state, shapes)[0], model, shapes)
        for place, state in found.items()
    ]
    return min(nearest, key=lambda network: (len(network.match.missing), -len(network.state)))
