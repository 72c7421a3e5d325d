"""Trained networks from checkpoint files, this project's own or anybody's.

A file is only ever read as tensors and plain containers (`weights_only`), so no code in it can run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn

from engine import __version__
from engine.common.errors import printable
from engine.common.files import code_hash
from engine.common.tensor_files import Content, read_tensors, short_repr, tensor_fault
from engine.models import (
    FAMILIES,
    TABLE,
    build_to_fill,
    get,
    head_of,
    is_registered,
    matching,
    robustbench,
    safetensors_files,
    state_dicts,
)
from engine.models import class_names as names_of_classes
from engine.models.normalize import RGB, normalisation
from engine.models.state_dicts import State
from engine.pipelines.base import check_images, unit_images

FORMAT = 2
"""Of this project's own checkpoints: 1 had no checksum of the file, 2 counts only with one."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Part(BaseModel):
    """A part of a file that this project wrote: a key that is missing or of another type is an error."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class RecordedModel(Part):
    """Name and shape of the network in an own checkpoint."""

    name: str
    num_classes: Annotated[int, Field(ge=2)]
    normalize: bool


class Record(Part):
    """Keys of every own checkpoint; see docs/run-directory.md."""

    format: Literal[1, 2]
    model: RecordedModel
    dataset: str
    class_names: list[str]
    config: dict[str, JsonValue]
    made_by: dict[str, str] = {}
    student: dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """The tensors of one network under this project's names, and what the file says of it.

    state: normalisation, where there is one, is under normalize.mean and normalize.std, of shape (3, 1, 1).
    taken: where in the file they were, "" in a bare state dict. prefix: of their names there.
    dropped: names there of what was not read.
    model: the recorded architecture, or the one that the names of the tensors reveal; None if neither is known.
    num_classes: the rows of the head, or as recorded; None if neither is known. class_names: of its outputs.
    config: the configuration of an own checkpoint's training. sha256: of the file.
    notes: sentences on what was changed or found, for the user to read.
    """

    state: State
    taken: str
    model: str | None
    num_classes: int | None
    class_names: tuple[str, ...] | None
    sha256: str
    dataset: str | None = None
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    prefix: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def normalize(self) -> bool:
        """The network normalises its images itself."""
        return "normalize.mean" in self.state


class Ranked(NamedTuple):
    """A class as an answer, and its probability."""

    label: int
    name: str
    probability: float


@dataclass(frozen=True, eq=False)
class Predictions:
    """Answers of a network. logits: (N, C), finite; class_names: of its outputs, in order. notes: for the user."""

    logits: Tensor
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 N: the largest logit, of equal ones the first."""
        return self.logits.argmax(dim=1)

    @property
    def names(self) -> list[str]:
        """Name of each image's class."""
        return [self.class_names[label] for label in self.labels.tolist()]

    @property
    def probabilities(self) -> Tensor:
        """softmax(logits), float64 (N, C)."""
        return self.logits.double().softmax(dim=1)

    def top(self, count: int) -> list[tuple[Ranked, ...]]:
        """The likeliest classes of each image, at most so many, the likeliest first."""
        order_NC = self.logits.argsort(dim=1, descending=True, stable=True)[:, :count]
        rows = zip(order_NC.tolist(), self.probabilities.gather(1, order_NC).tolist(), strict=True)
        return [
            tuple(Ranked(label, self.class_names[label], share) for label, share in zip(*row, strict=True))
            for row in rows
        ]


@dataclass(frozen=True)
class LoadedModel:
    """A network with its weights, in eval mode, and its architecture's name; the rest is as in `Weights`.

    path: of the file. normalize: mean and standard deviation by which the network normalises images, if it does.
    exported: the format of an exported file, of which the network is a black box; "" for a checkpoint.
    has_gradients: of the logits with respect to images.
    """

    path: str | Path
    module: nn.Module
    name: str
    num_classes: int
    class_names: tuple[str, ...] | None
    taken: str
    normalize: tuple[RGB, RGB] | None
    dataset: str | None
    config: dict[str, Any] | None
    sha256: str
    notes: tuple[str, ...]
    prefix: str = ""
    dropped: tuple[str, ...] = ()
    exported: str = ""
    has_gradients: bool = True

    def for_classes(self, names: Sequence[str]) -> LoadedModel:
        """The same network with its outputs in the order of these classes; it is changed in place.

        Raises ValueError, one line with the path, where it knows other classes, or another number of them.
        """
        try:
            order, note = _order(self.class_names, self.num_classes, names)
            if order:
                self.reorder(order)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return replace(self, class_names=tuple(names), notes=(*self.notes, *note))

    def reorder(self, order: list[int]) -> None:
        """Put the network's outputs into another order, in place. Raises ValueError where its head is unknown."""
        rows = _class_rows(self.name, self.module)
        state = self.module.state_dict()
        self.module.load_state_dict(state | {key: state[key][order] for key in rows})

    @torch.no_grad()
    def predict(self, images_N: Tensor) -> Predictions:
        """Answers to images, uint8 NHWC or float NCHW in [0, 1], on the network's device, in one batch.

        In the precision that torch is set to; `engine.deployment.predicting.predict` computes in full, in batches,
        and takes files. Raises ValueError for other images, and FloatingPointError where a logit is not finite.
        """
        check_images("images", images_N)
        if (channels := images_N.shape[3 if images_N.dtype == torch.uint8 else 1]) != 3:
            raise ValueError(f"images: expected three channels, got {channels} in {tuple(images_N.shape)}")
        parameter = next(self.module.parameters(), torch.empty(0))
        logits_NC = self.module(unit_images(images_N, parameter.device, parameter.dtype))
        if lost := int((~logits_NC.isfinite().all(dim=1)).sum()):
            raise FloatingPointError(f"the logits of {lost:,} of {len(images_N):,} images are NaN or infinite")
        return Predictions(logits_NC.cpu(), self.class_names or tuple(map(str, range(self.num_classes))))


def _order(
    known: Sequence[str] | None, count: int | None, names: Sequence[str]
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Row of a network's head for each of the data's classes, None where it is in their order, and a note on it.

    Raises ValueError where the network has other classes.
    """
    order: list[int] | None = None
    note: tuple[str, ...] = ()
    if known is None:
        note = (f"the file names no classes: its outputs are taken as {names_of_classes.summary(names)}",)
    elif order := names_of_classes.order(known, names):
        note = ("its classes are in another order than the data's: its outputs are put into that",)
    if count != len(names):
        raise ValueError(f"the checkpoint's head has {count} classes, the data set has {len(names)}")
    return order, note


def _class_rows(name: str, network: nn.Module) -> tuple[str, ...]:
    """Names of the tensors whose rows are classes. Raises ValueError where they are not known."""
    if head := head_of(network):
        return tuple(key for key in (f"{head}.weight", f"{head}.bias") if key in network.state_dict())
    if not is_registered(name) and (rows := matching.class_rows(name)):
        return rows
    raise ValueError(f"its classes are in another order than the data's, and the head of {name} is not known")


def checked(kind: type[Part], content: Mapping[Any, Any]) -> None:
    """Raise ValueError, naming the first key, where what was read is no such part."""
    try:
        kind.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = short_repr(".".join(str(part) for part in first["loc"]))
        if first["type"] == "missing":
            raise ValueError(f"the key {key} is missing") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"the key {key} holds {short_repr(first['input'])}: {message}") from None


def check_own(path: str | Path, content: Content, kind: type[Part] = Record) -> None:
    """Raise ValueError, one line with the path, where a file of this project does not hold what it should."""
    found = content.value.get("format")
    if type(found) is not int or found not in (1, FORMAT):
        raise ValueError(
            f"{path}: the key 'format' holds {short_repr(found)}, and this version reads 1 and {FORMAT}"
        )
    if found >= FORMAT and not content.sealed:
        raise ValueError(f"{path}: is damaged: its checksum is missing")
    try:
        checked(kind, content.value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names, count = content.value["class_names"], content.value["model"]["num_classes"]
    if len(names) != count or len(set(names)) != count:
        raise ValueError(
            f"{path}: the key 'class_names' holds {short_repr(names)}, and the model has {count} classes"
        )


def made_by() -> dict[str, str]:
    """Writer of checkpoints: versions, and a hash of this project's files."""
    return {"engine": __version__, "code": code_hash()[:12], "torch": str(torch.__version__)}


def origin(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes for the user on how an own checkpoint was written."""
    if content["format"] < FORMAT:
        return ("a checkpoint from before they had a checksum of the whole file",)
    theirs, ours = content.get("made_by", {}), made_by()
    if theirs == ours:
        return ()
    written, read = (", ".join(f"{key} {name}" for key, name in made.items()) for made in (theirs, ours))
    return (f"written by {written or 'an unknown version'}, and read by {read}",)


def read_weights(path: str | Path, weights: str | None = None, *, model: str | None = None) -> Weights:
    """The weights of a network in a checkpoint file, wherever in it they are, with or without wrappers' prefixes.

    weights: where they are, where a file holds several: a place, or the beginning of their names. model: their
    architecture, where the file does not tell. Raises ValueError, one line with the path, where the file cannot be
    read as such.
    """
    content = read_tensors(path)
    payload = content.value
    if not isinstance(payload, Mapping | list | tuple):
        raise ValueError(f"{path}: holds {type(payload).__name__} where a dict of tensors is expected")
    try:
        own = _own(path, content)
        found = _found(payload, weights, model or own.model, own)
        names = names_of_classes.found_in(payload) if isinstance(payload, Mapping) else None
        names = own.class_names or names
        count = own.num_classes if found.num_classes is None else found.num_classes
        if names is not None and len(names) != (count or len(names)):
            if own.model is not None:
                raise ValueError(f"its head has {count} classes, and it names {len(names)}")
            names = None  # of something else
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from None
    return replace(
        found,
        num_classes=count,
        class_names=names,
        sha256=content.sha256,
        dataset=own.dataset,
        config=own.config,
        notes=(*own.notes, *found.notes),
    )


@dataclass(frozen=True)
class _Own:
    """Facts that a file of this project tells, none of which one from elsewhere does. place: of its weights."""

    notes: tuple[str, ...]
    place: str | None = None
    model: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    dataset: str | None = None
    config: dict[str, Any] | None = None


def _own(path: str | Path, content: Content) -> _Own:
    payload = content.value
    if content.kind == "safetensors" and (facts := safetensors_files.facts_in(payload, content.metadata)):
        names = None if facts.class_names is None else tuple(facts.class_names)
        notes = origin({"format": FORMAT, "made_by": facts.made_by})
        return _Own(notes, "", facts.model, facts.num_classes, names, facts.dataset, facts.config)
    notes = (content.note,) if content.note else ()
    if not (isinstance(payload, Mapping) and "student" in payload and "format" in payload):
        return _Own(notes)
    check_own(path, content)
    model, names = payload["model"], tuple(payload["class_names"])
    return _Own(
        notes=(*notes, *origin(payload)),
        place="student",
        model=model["name"],
        num_classes=model["num_classes"],
        class_names=names,
        dataset=payload["dataset"],
        config=payload["config"],
    )


def _found(
    payload: Mapping[Any, Any] | Sequence[Any], weights: str | None, model: str | None, own: _Own
) -> Weights:
    """The tensors of the network that is taken, with notes on it."""
    places = state_dicts.find(payload)
    if not places:
        raise ValueError(_nothing(payload))
    wanted = own.place if weights is None else weights
    if wanted is not None:
        places = {wanted: state_dicts.under(places, wanted)}
    if wanted is not None and own.model is not None and is_registered(own.model):
        # Its names are its own, whatever they look like.
        return Weights(_sound(places[wanted]), wanted, own.model, None, None, "")
    network, notes = matching.choose(places, model)
    match = network.match
    if match.outside and not match.missing:
        raise ValueError(
            f"beside the network under {short_repr(network.key)} there are {len(match.outside)} tensors that its "
            f"forward may read, the first {short_repr(match.outside[0])}; --weights-key {network.key} takes the "
            "network without them"
        )
    state = network.tensors() | state_dicts.normalisation(network.state, match)
    return Weights(
        state=_sound(state),
        taken=network.place,
        model=network.name,
        num_classes=network.num_classes,
        class_names=None,
        sha256="",
        prefix=match.prefix,
        dropped=match.dropped,
        notes=(*notes, *_about_dropped(network), *_about_dtypes(state)),
    )


def _sound(state: State) -> State:
    for key, value in state.items():
        if fault := tensor_fault(value):
            raise ValueError(f"{short_repr(key)} is {fault}")
    return state


def _nothing(payload: Mapping[Any, Any] | Sequence[Any]) -> str:
    """Words for a file without a state dict."""
    inner = payload.values() if isinstance(payload, Mapping) else payload
    if not payload or any(isinstance(value, Mapping) and not value for value in inner):
        return "holds no weights, its state dict is empty"
    first = next(iter(payload.items() if isinstance(payload, Mapping) else enumerate(payload)))
    return (
        f"holds no weights: nothing in it is a mapping of names to tensors; the first is {short_repr(first[0])}, "
        f"{short_repr(first[1])}"
    )


def _about_dropped(network: matching.FoundNetwork) -> tuple[str, ...]:
    """Notes on tensors that are no part of any network, or of which no forward makes use."""
    notes = []
    parts = {key: key.split(".") for key in network.match.dropped}
    for name in state_dicts.UNUSED:
        unused = {key: network.state[key] for key, within in parts.items() if name in within}
        parameters = sum(tensor.numel() for key, tensor in unused.items() if key.endswith((".weight", ".bias")))
        if unused:
            notes.append(
                f"dropped {len(unused)} unused {name} tensors ({parameters / 1e6:.1f} M parameters no forward "
                "uses)"
            )
    if training := [key for key, within in parts.items() if not state_dicts.TRAINING.isdisjoint(within)]:
        notes.append(f"not read, as no logits come of them: {short_repr(training)[1:-1]}")
    return tuple(notes)


def _about_dtypes(state: State) -> tuple[str, ...]:
    halves = {tensor.dtype for tensor in state.values()} & {torch.float16, torch.bfloat16}
    named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in halves))
    return (f"its weights are {named}, loaded as float32",) if halves else ()


def load_model(
    path: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    weights: str | None = None,
    normalize: str | tuple[Sequence[float], Sequence[float]] | None = None,
) -> LoadedModel:
    """The network in a checkpoint file, on the CPU; float64 where its weights are, else float32.

    model: its architecture, where the file does not tell. num_classes: what the data set needs.
    class_names: the classes of the data, in order; its outputs are put into that order, and other classes refused.
    weights: which state dict to take, where the file holds several, e.g. "state_dict_ema".
    normalize: mean and standard deviation that its loader subtracted and divided by, of red, green and blue in
    [0, 1], or a name of `engine.models.normalize.CONSTANTS`; for a network that does not do so itself.
    Leaves torch's global generator alone. Raises ValueError, one line with the path, where anything does not fit.
    """
    found = read_weights(path, weights, model=model)
    name = found.model
    if name is None:
        raise ValueError(f"{path}: {_unknown(found.state)}{_hint_at_parts(path)}")
    if num_classes is not None and found.num_classes not in (None, num_classes):
        raise ValueError(
            f"{path}: the checkpoint's head has {found.num_classes} classes, the data set has {num_classes}"
        )
    # Without a head, any number leads to the error below.
    classes = found.num_classes or num_classes or len(class_names or ()) or 2
    try:
        robustbench.check_classes(name, classes)
        constants = get(name, _imports(found.config)).normalization
        state, told, of_normalisation = _normalised(found, normalize, constants)
        module = build_to_fill(name, classes, normalize=told is not None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = module.state_dict()
    try:
        if differences := _differences(state, expected):
            raise ValueError(f"these are no weights of {name}: {differences}{_hint_at_parts(path)}")
        _check_values(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    _fill(module, state)
    loaded = LoadedModel(
        path=path,
        module=module.eval(),
        name=name,
        num_classes=classes,
        class_names=found.class_names,
        taken=found.taken,
        normalize=told,
        dataset=found.dataset,
        config=found.config,
        sha256=found.sha256,
        notes=(*found.notes, *of_normalisation, *_constant(state)),
        prefix=found.prefix,
        dropped=found.dropped,
    )
    return loaded if class_names is None else loaded.for_classes(class_names)


def _unknown(state: State) -> str:
    """Words for tensors of no known architecture."""
    first, known = short_repr(next(iter(state), None)), ", ".join(sorted((*TABLE, *FAMILIES)))
    return (
        f"its {len(state)} tensors (first {first}) fit no known architecture; name one to be told what differs; "
        f"known: {known}"
    )


def _hint_at_parts(path: str | Path) -> str:
    """Words for a file that is called as one of several with the tensors of one network."""
    if not re.search(r"-\d{5}-of-\d{5}\.", Path(path).name):
        return ""
    return "; it is called as a part of a checkpoint in several files: write their tensors into one"


def fill(
    network: nn.Module, found: Weights, class_names: Sequence[str], *, new_head: bool = False
) -> tuple[str, ...]:
    """Give a network for those classes the weights of a file, in place; returns notes for the user.

    The network is of `found.model`, on any device and in any floating type. new_head: it keeps the layer of its
    logits, as it is, where the file has other classes, or another number of them. A library's network keeps its
    normalisation where the file has none. Raises ValueError where anything does not fit.
    """
    name, own = str(found.model), network.state_dict()
    if get(name).normalization is not None:
        own_normalisation = {key: tensor for key, tensor in own.items() if key.startswith("normalize.")}
    else:
        own_normalisation = {}
    state = own_normalisation | found.state
    try:
        order, notes = _order(found.class_names, found.num_classes, class_names)
        if order:
            state = state | {key: state[key][order] for key in _class_rows(name, network)}
    except ValueError as error:
        if not new_head:
            raise
        state = state | {key: own[key] for key in _class_rows(name, network)}
        notes = (f"the head is a new one: {error}",)
    if differences := _differences(state, own):
        raise ValueError(f"these are no weights of {name}: {differences}")
    _check_values(state)
    counters = {key: tensor for key, tensor in own.items() if state_dicts.is_counter(key)}
    network.load_state_dict(counters | state)
    return (*found.notes, *notes, *_constant(state))


def _fill(module: nn.Module, state: State) -> None:
    """Give a network of `build_to_fill` its weights, on the CPU."""
    # Normalisation is often written down in float64 beside a network in float32; it does not count.
    if any(state[key].dtype == torch.float64 for key, _ in module.named_parameters()):
        module.to(torch.float64)
    counters = {
        key: torch.zeros((), dtype=torch.int64) for key in module.state_dict() if state_dicts.is_counter(key)
    }
    if next(module.parameters()).is_meta:
        module.to_empty(device="cpu")
    module.load_state_dict(counters | state)


def _imports(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Files and modules by which the training of an own checkpoint knew its names."""
    imports = (config or {}).get("imports")
    return tuple(printable(name) for name in imports) if isinstance(imports, list) else ()


def save_safetensors(loaded: LoadedModel, path: str | Path) -> None:
    """Write a network as a safetensors file, which `load_model` reads back with all that it knows of it."""
    facts = safetensors_files.NetworkFacts(
        model=loaded.name,
        num_classes=loaded.num_classes,
        class_names=None if loaded.class_names is None else list(loaded.class_names),
        normalize=None if loaded.normalize is None else [list(numbers) for numbers in loaded.normalize],
        weights_sha256=weights_sha256(loaded.module),
        dataset=loaded.dataset,
        config=loaded.config,
        made_by=made_by(),
    )
    safetensors_files.write(Path(path), loaded.module.state_dict(), facts)


def weights_sha256(network: nn.Module) -> str:
    """Hash of names and values alone: two files of one network differ in paths and times."""
    return state_sha256(network.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names and values, in their order."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def _normalised(
    found: Weights, given: str | tuple[Sequence[float], Sequence[float]] | None, constants: tuple[RGB, RGB] | None
) -> tuple[State, tuple[RGB, RGB] | None, tuple[str, ...]]:
    """The tensors with normalisation where the network has it or is given it, its numbers, and a note on them.

    constants: by which networks of this architecture always normalise. Raises ValueError for what cannot be.
    """
    state = found.state
    if found.normalize:
        if given is not None:
            raise ValueError("normalize: the network does so itself; drop it")
        buffers = [state.get(f"normalize.{part}") for part in ("mean", "std")]
        told = normalisation(tuple(buffer.flatten().tolist() for buffer in buffers if buffer is not None))
    elif given is not None and found.config is not None:
        raise ValueError("normalize: the checkpoint records that it was trained without; drop it")
    elif (wanted := constants if given is None else normalisation(given)) is None:
        if any(part.isdecimal() and int(part) > 0 for part in found.prefix.split(".")):
            raise ValueError(
                f"normalize: the network is {found.prefix!r} of a sequence, and what stands before it has no "
                "tensors: tell by what it normalises"
            )
        return state, None, _hint(found)
    else:
        told = wanted
        values = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in told)
        state = state | dict(zip(("normalize.mean", "normalize.std"), values, strict=True))
    mean, std = ([round(value, 4) for value in numbers] for numbers in told)
    return state, told, (f"normalises its images by mean {mean} and std {std}",)


def _hint(found: Weights) -> tuple[str, ...]:
    """Note on networks from elsewhere whose published code normalises by numbers that are in no file."""
    if found.config is not None or not str(found.model).endswith("-silu"):
        return ()
    return ("the file holds no normalisation, and the published code of such networks has it inside (normalize)",)


def _check_values(state: State) -> None:
    """Refuse numbers with which no network computes. The shapes are known to be right."""
    for key, tensor in state.items():
        if tensor.dtype not in _FLOATS and not state_dicts.is_counter(key):
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise ValueError(f"{key!r} is of {tensor.dtype}, and weights are of {known}")
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(bad)} tensors hold values that are not finite, the first {bad[0]!r}")
    for key, tensor in state.items():
        if key.endswith(".running_var") and (tensor < 0).any():
            raise ValueError(f"{key!r} holds negative variances")


def _constant(state: State) -> tuple[str, ...]:
    """Note for the user on a network whose weights are zeros, or all alike."""
    weights = [tensor for tensor in state.values() if tensor.dim() in (2, 4) and tensor.numel() > 1]
    if any((tensor != tensor.flatten()[0]).any() for tensor in weights):
        return ()
    return ("each of its weight matrices holds one value only: this is no trained network",)


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """The architecture of these tensors; None if they are of none. Raises ValueError where several fit."""
    return matching.choose({"": dict(state)}, None)[0].name


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Reasons against loading the state, in words; empty if there are none."""
    missing = [key for key in expected if key not in state and not state_dicts.is_counter(key)]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key!r} of shape {tuple(state[key].shape)} and not {tuple(expected[key].shape)}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    parts = [
        f"{len(missing)} keys missing, the first {short_repr(missing[0])}" if missing else "",
        f"{len(extra)} unknown keys, the first {short_repr(extra[0])}" if extra else "",
        f"{len(shapes)} of another shape, the first {shapes[0]}" if shapes else "",
    ]
    return "; ".join(part for part in parts if part)
