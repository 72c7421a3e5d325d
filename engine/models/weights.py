"""Trained networks from checkpoint files, this project's own or anybody's.

A file is only ever read as tensors and plain containers (`weights_only`), so no code in it can run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, nn

from engine import __version__
from engine.common.errors import printable
from engine.common.files import code_hash
from engine.common.lookup import check_registered
from engine.common.tensor_files import Content, read_tensors, short_repr
from engine.models import TABLE, build_to_fill, is_registered, state_dicts
from engine.models import class_names as names_of_classes
from engine.models.normalize import RGB, normalisation
from engine.models.state_dicts import State

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
    taken: where in the file they were, "" in a bare state dict.
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

    @property
    def normalize(self) -> bool:
        """The network normalises its images itself."""
        return "normalize.mean" in self.state


@dataclass(frozen=True)
class LoadedModel:
    """A network with its weights, in eval mode, and its architecture's name; the rest is as in `Weights`.

    path: of the file. normalize: mean and standard deviation by which the network normalises images, if it does.
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

    def for_classes(self, names: Sequence[str]) -> LoadedModel:
        """The same network with its outputs in the order of these classes; it is changed in place.

        Raises ValueError, one line with the path, where it knows other classes, or another number of them.
        """
        order, note = None, ""
        try:
            if self.class_names is None:
                note = f"the file names no classes: its outputs are taken as {names_of_classes.summary(names)}"
            elif order := names_of_classes.order(self.class_names, names):
                note = "its classes are in another order than the data's: the rows of its head are put into that"
            if self.num_classes != len(names):
                raise ValueError(
                    f"the checkpoint's head has {self.num_classes} classes, the data set has {len(names)}"
                )
            if order and is_registered(self.name):
                raise ValueError(
                    f"its classes are in another order than the data's, and the head of {self.name} is not known"
                )
            if order:
                self.module.load_state_dict(state_dicts.in_order(self.module.state_dict(), order))
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return replace(self, class_names=tuple(names), notes=(*self.notes, *([note] if note else [])))


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


def read_weights(path: str | Path, weights: str | None = None) -> Weights:
    """The weights in a checkpoint file: a state dict, bare or in a container, with or without wrappers' prefixes.

    weights: which state dict to take, where a file holds several. Raises ValueError, one line with the path, where
    the file cannot be read as such.
    """
    content = read_tensors(path)
    payload = content.value
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path}: holds {type(payload).__name__} where a dict of tensors is expected")
    own = "student" in payload and "format" in payload
    notes: tuple[str, ...] = (content.note,) if content.note else ()
    if own:
        check_own(path, content)
        notes += origin(payload)
    taken, state, of_choice = state_dicts.choose(path, payload, weights)
    normalisation: State = {}
    dropped: tuple[str, ...] = ()
    head = None
    if not (own and is_registered(payload["model"]["name"])):  # whose names are its own, whatever they look like
        state, normalisation = state_dicts.split_normalisation(path, state)
        state = state_dicts.unwrapped(state, sequential=bool(normalisation))
        state, dropped = state_dicts.without_sub_block1(state)
        head = state_dicts.head(state)
    recorded = payload["model"]["num_classes"] if own else None
    count = recorded if head is None else state[f"{head}.weight"].shape[0]
    names = names_of_classes.found_in(payload)
    if names is not None and len(names) != (count or len(names)):
        if own:
            raise ValueError(f"{path}: its head has {count} classes, and it names {len(names)}")
        names = None  # of something else
    return Weights(
        state=state | normalisation,
        taken=taken,
        model=payload["model"]["name"] if own else architecture_of(state),
        num_classes=count,
        class_names=names,
        sha256=content.sha256,
        dataset=payload["dataset"] if own else None,
        config=payload["config"] if own else None,
        notes=(*notes, *of_choice, *dropped),
    )


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
    found = read_weights(path, weights)
    name = model or found.model
    if name is None:
        raise ValueError(
            f"{path}: its {len(found.state)} tensors (first {short_repr(next(iter(found.state), None))}) fit no "
            f"known architecture; name one to be told what differs; known: {', '.join(sorted(TABLE))}"
        )
    if num_classes is not None and found.num_classes not in (None, num_classes):
        raise ValueError(
            f"{path}: the checkpoint's head has {found.num_classes} classes, the data set has {num_classes}"
        )
    state, told, of_normalisation = _normalised(path, found, normalize)
    # Without a head, any number leads to the error below.
    classes = found.num_classes or num_classes or len(class_names or ()) or 2
    try:
        check_registered("model", name, TABLE, _imports(found.config))
        module = build_to_fill(name, classes, normalize=told is not None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = module.state_dict()
    if differences := _differences(state, expected):
        raise ValueError(f"{path}: these are no weights of {name}: {differences}")
    _check_values(path, state)
    _fill(name, module, state)
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
    )
    return loaded if class_names is None else loaded.for_classes(class_names)


def _fill(name: str, module: nn.Module, state: State) -> None:
    """Give a network of `build_to_fill` its weights, on the CPU."""
    # Normalisation is often written down in float64 beside a network in float32; it does not count.
    if any(state[key].dtype == torch.float64 for key, _ in module.named_parameters()):
        module.to(torch.float64)
    counters = {key: torch.zeros((), dtype=torch.int64) for key in module.state_dict() if _is_counter(key)}
    if not is_registered(name):
        module.to_empty(device="cpu")
    module.load_state_dict(counters | state)


def _imports(config: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Files and modules by which the training of an own checkpoint knew its names."""
    imports = (config or {}).get("imports")
    return tuple(printable(name) for name in imports) if isinstance(imports, list) else ()


def weights_sha256(network: nn.Module) -> str:
    """Hash of names and values alone: two files of one network differ in paths and times."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def _normalised(
    path: str | Path, found: Weights, given: str | tuple[Sequence[float], Sequence[float]] | None
) -> tuple[State, tuple[RGB, RGB] | None, tuple[str, ...]]:
    """The tensors with normalisation where the network has it or is given it, its numbers, and a note on them."""
    state = found.state
    if given is None and not found.normalize:
        return state, None, ()
    buffers = [state.get(f"normalize.{part}") for part in ("mean", "std")]
    try:
        if given is None:
            told = normalisation(tuple(buffer.flatten().tolist() for buffer in buffers if buffer is not None))
        elif found.normalize:
            raise ValueError("normalize: the network does so itself; drop it")
        elif found.config is not None:
            raise ValueError("normalize: the checkpoint records that it was trained without; drop it")
        else:
            told = normalisation(given)
            values = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in told)
            state = state | dict(zip(("normalize.mean", "normalize.std"), values, strict=True))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    mean, std = ([round(value, 4) for value in numbers] for numbers in told)
    return state, told, (f"normalises its images by mean {mean} and std {std}",)


def _check_values(path: str | Path, state: State) -> None:
    """Refuse numbers with which no network computes. The shapes are known to be right."""
    for key, tensor in state.items():
        if tensor.dtype not in _FLOATS and not _is_counter(key):
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
            raise ValueError(f"{path}: {key!r} is of {tensor.dtype}, and weights are of {known}")
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: {len(bad)} tensors hold values that are not finite, the first {bad[0]!r}")
    for key, tensor in state.items():
        if key.endswith(".running_var") and (tensor < 0).any():
            raise ValueError(f"{path}: {key!r} holds negative variances")


def _constant(state: State) -> tuple[str, ...]:
    """Note for the user on a network whose weights are zeros, or all alike."""
    weights = [tensor for tensor in state.values() if tensor.dim() in (2, 4) and tensor.numel() > 1]
    if any((tensor != tensor.flatten()[0]).any() for tensor in weights):
        return ()
    return ("each of its weight matrices holds one value only: this is no trained network",)


def architecture_of(state: Mapping[str, Tensor]) -> str | None:
    """The architecture whose tensors have exactly these names, normalisation aside; None if there is none."""

    def names(tensors: Mapping[str, Tensor]) -> set[str]:
        return {key for key in tensors if not _is_counter(key) and not key.startswith("normalize.")}

    def fits(name: str) -> bool:
        try:
            return names(build_to_fill(name, 2).state_dict()) == names(state)
        except ValueError:  # of a registered one that does not take two classes
            return False

    return next((name for name in TABLE if fits(name)), None)


def _is_counter(key: str) -> bool:
    # BatchNorm's count of batches, which no default network reads; old checkpoints lack it.
    return key.endswith(".num_batches_tracked")


def _differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Reasons against loading the state, in words; empty if there are none."""
    missing = [key for key in expected if key not in state and not _is_counter(key)]
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
