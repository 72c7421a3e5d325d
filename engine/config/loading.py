"""Configurations from what users give: defaults, merging, checks across keys, files and arguments."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from engine.common import yaml_text
from engine.common.files import checkpoint_of, expand_user, regular_file
from engine.common.lookup import look_up, nearest
from engine.config import semantics
from engine.config.keys import Key
from engine.config.optimizers import OPTIMIZERS
from engine.config.sections import DEFAULTS, KEYS, LossConfig, OptimConfig, RunConfig, Section, Tree, flat
from engine.objectives import ATTACK_LOSSES, TERMS

AnySection = typing.TypeVar("AnySection", bound=Section)
_END = "...\n"  # of a YAML document that is a bare value
_RISES = ("one-cycle", "cyclic")  # schedules in which the rate rises
LIBRARIES = ("timm", "torchvision")
"""Values of `init` that are no paths: pretrained weights of that library."""
LABELLED_BY_TEACHER = "teacher"
"""Value of `extra_labels` that is no path."""


def part(tree: Mapping[str, Any], wanted: Callable[[Key], bool]) -> Tree:
    """The keys of a tree that are wanted by what is known of them."""
    return merge(*(nested(name, value) for name, value in flat(tree).items() if wanted(KEYS[name])))


def differences(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Both values of each key that differs, by its name; the place of a run is none of it."""
    old, new = flat(before.tree()), flat(as_begun(after, before).tree())
    return {name: (old[name], new[name]) for name in KEYS if name != "out" and old[name] != new[name]}


def changes(before: RunConfig, after: RunConfig) -> Tree:
    """The keys by which the one becomes the other, nested."""
    return merge(*(nested(name, value) for name, (_, value) in differences(before, after).items()))


def differing(before: RunConfig, after: RunConfig) -> list[str]:
    """Names of the keys that differ, but those that may differ when a run goes on in its place."""
    return [name for name in differences(before, after) if KEYS[name].resume not in ("free", "place")]


def epochs_of(part: float, epochs: int) -> int:
    """Epochs that a `PartOfRun` stands for: part * epochs below 1, halves rounded up, else part itself."""
    return int(part * epochs + 0.5) if part < 1 else int(part)


def load(given: Mapping[str, Any], *overrides: Mapping[str, Any]) -> RunConfig:
    """Complete what the user gave with the defaults of its method and semantics, and validate it.

    given: nested keys, e.g. of a config file. A resolved `config.yaml` states every key; a key that only repeats
    its own method's default gives way when an override changes the method.
    overrides: further nested keys, later ones winning.
    Raises ValueError, one line, naming the key, what was given, and the known choices.
    """
    for tree in (given, *overrides):
        _refuse_unknown_keys(tree, RunConfig)
    said = merge(explicit(given), *overrides)
    return checked(merge(_defaults(said), said))


def checked(tree: Mapping[str, Any]) -> RunConfig:
    """The configuration of a complete tree: `load` without a method's defaults. Raises ValueError as it does."""
    _refuse_unknown_keys(tree, RunConfig)
    config = validated(RunConfig, tree)
    _check_across(config)
    return config


def validated(section: type[AnySection], values: Mapping[str, Any]) -> AnySection:
    """Make a section of values. Raises ValueError in one line where pydantic would use several."""
    try:
        return section(**values)
    except ValidationError as error:
        raise ValueError(_one_line(error)) from None


def explicit(tree: Mapping[str, Any]) -> Tree:
    """The part of a configuration that differs from the defaults of its own method and semantics."""
    defaults = _defaults(tree)
    default = validated(RunConfig, defaults).tree()
    complete = validated(RunConfig, merge(defaults, tree)).tree()
    keep = {key: tree[key] for key in ("method", "semantics") if key in tree}
    return merge(_difference(complete, default), keep)


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Nested dicts merged, later ones winning; `loss.weights` merges term by term like any other group."""
    result: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                old = result.get(key)
                result[key] = merge(old if isinstance(old, Mapping) else {}, value)
            else:
                result[key] = value
    return result


def parse_assignment(text: str) -> Tree:
    """Nested form of a command-line "key.path=value"; the value is read as YAML.

    Raises ValueError where there is no "=" or the value is not YAML.
    """
    path, equals, raw = text.partition("=")
    if not equals or not path.strip():
        raise ValueError(f"--set: expected KEY=VALUE, got {text!r}")
    try:
        value = yaml_text.read(raw)
    except ValueError as error:
        raise ValueError(f"--set {path}: not a YAML value: {raw!r:.100} ({error})") from None
    if path.count(".") > 2:
        raise ValueError(f"--set: unknown key {path!r:.100}; no key has more than three parts")
    return nested(path.strip(), value)


def assignments(tree: Mapping[str, Any]) -> list[str]:
    """A tree as arguments of the command line, which `parse_assignment` reads."""
    written = {name: yaml_text.write(value) for name, value in flat(tree).items()}
    texts = (f"{name}={text.removesuffix(_END).strip()}" for name, text in written.items())
    return [word for text in texts for word in ("--set", text)]


def nested(path: str, value: object) -> Tree:
    """Nested form of one key, e.g. {"attack": {"bn": value}} of "attack.bn"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return typing.cast(Tree, value)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration wherever it is read again: paths of files no longer depend on the folder."""

    def absolute(argument: str, path: str | None) -> str | None:
        return None if path is None else str(expand_user(argument, path).absolute())

    def checkpoint(argument: str, path: str | None) -> str | None:
        place = absolute(argument, path)
        with suppress(ValueError):  # of what cannot be looked up the reader tells why
            return None if place is None else str(checkpoint_of(place))
        return place

    teachers = {
        section: teacher.model_copy(update={"checkpoint": checkpoint(f"{section}.checkpoint", teacher.checkpoint)})
        for section, teacher in (("teacher", config.teacher), ("teacher_st", config.teacher_st))
    }
    init = config.init if config.init in LIBRARIES else checkpoint("init", config.init)
    by = config.extra_labels
    paths = {
        "data": absolute("data", config.data),
        "init": init,
        "extra_data": absolute("extra_data", config.extra_data),
        "extra_labels": by if by == LABELLED_BY_TEACHER else checkpoint("extra_labels", by),
    }
    return config.model_copy(update=paths | teachers)


def as_begun(wanted: RunConfig, begun: RunConfig) -> RunConfig:
    """The wanted configuration, with what a run decided when it began where one leaves it open."""
    decided = {name: (getattr(wanted, name), getattr(begun, name)) for name in ("amp_dtype", "winograd")}
    return wanted.model_copy(update={name: pair[1] for name, pair in decided.items() if "auto" in pair})


def read_file(path: Path, argument: str = "") -> Tree:
    """Nested keys of a YAML file. argument: what named it, for messages.

    Raises ValueError where it is missing, no file, not YAML, or not a mapping.
    """
    named = f"{argument}: " if argument else ""
    try:
        tree = yaml_text.read(regular_file(path, yaml_text.MOST_BYTES).read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{named}cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{named}{path} is not a text file") from None
    except ValueError as error:
        raise ValueError(f"{named}{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{named}{path} must hold `key: value` lines, and it holds {type(tree).__name__}")
    return tree


def check_reading(reading: str, loss: LossConfig) -> None:
    """Refuse what the semantics does not have. Raises ValueError, one line."""
    look_up("semantics", reading, {"paper": lambda loss: None, "official": _check_official})(loss)


def _check_official(loss: LossConfig) -> None:
    if loss.tau_self != 1:
        raise ValueError(
            f"loss.tau_self: official semantics has no temperature in the self term, got {loss.tau_self:g}"
        )
    if loss.gamma is not None:
        raise ValueError(f"loss.gamma: a constant gamma (Table 9) needs semantics 'paper', got {loss.gamma:g}")


def _defaults(tree: Mapping[str, Any]) -> Tree:
    given = {key: tree[key] for key in ("method", "semantics", "epochs") if key in tree}
    chosen = validated(RunConfig, given)
    of_method = semantics.defaults(chosen.method, chosen.semantics, chosen.epochs)
    usual, wanted = (_optimizer(each) for each in (of_method, tree))
    return of_method if wanted == usual else merge(of_method, OPTIMIZERS[wanted].defaults)


def _optimizer(tree: Mapping[str, Any]) -> str:
    named = {key: value for key, value in tree.get("optim", {}).items() if key == "implementation"}
    return validated(RunConfig, {"optim": named}).optim.implementation


def _difference(tree: Tree, default: Tree) -> Tree:
    result: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            if inner := _difference(value, default[key]):
                result[key] = inner
        elif key not in default or value != default[key]:
            result[key] = value
    return result


def _refuse_unknown_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str = "") -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            raise ValueError(f"unknown key {prefix + str(key)!r}; {nearest(str(key), section.model_fields)}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{prefix}{key} is a group of keys ({', '.join(inner.model_fields)}), not the value {value!r}"
                )
            _refuse_unknown_keys(value, inner, f"{prefix}{key}.")


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "constrained-")))
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r:.200}"


def _check_across(config: RunConfig) -> None:
    """Refuse combinations that no single field can judge."""
    optim = config.optim
    if len(optim.milestones) != len(optim.lr_factors):
        raise ValueError(
            f"optim.milestones and optim.lr_factors must be of one length, "
            f"got {len(optim.milestones)} and {len(optim.lr_factors)}"
        )
    epochs = [epochs_of(part, config.epochs) for part in optim.milestones]
    if epochs != sorted(epochs):
        raise ValueError(f"optim.milestones must ascend, got {list(optim.milestones)}")
    _check_optimizer(optim)
    for term in config.loss.weights:
        if term not in TERMS:
            raise ValueError(f"unknown key 'loss.weights.{term}'; {nearest(term, TERMS)}")
    for section, teacher in (("teacher", config.teacher), ("teacher_st", config.teacher_st)):
        for key in ("weights", "normalize"):
            if getattr(teacher, key) is not None and teacher.checkpoint is None:
                raise ValueError(f"{section}.{key}: it is of a checkpoint, and {section}.checkpoint names none")
    check_reading(config.semantics, config.loss)
    if config.micro_batch == "auto" and config.sync_bn == "on":
        raise ValueError("micro_batch: 'auto' and sync_bn exclude each other; give micro_batch a number")
    if config.optim.schedule in _RISES and config.optim.lr_warmup:
        raise ValueError(f"optim.lr_warmup: the {config.optim.schedule} schedule has a warm-up of its own")
    if config.attack.start_epsilon is not None and config.attack.random_start != "uniform":
        raise ValueError(
            f"attack.start_epsilon: it is of a uniform start, and attack.random_start is "
            f"{config.attack.random_start!r}"
        )
    _check_augmentation(config)
    for key in ("extra_fraction", "extra_labels"):
        if getattr(config, key) != DEFAULTS[key] and config.extra_data is None:
            raise ValueError(f"{key}: it is of extra images, and extra_data names none")
    for key in ("mixup", "cutmix"):
        if getattr(config, key) and ATTACK_LOSSES[config.attack.loss].one_label:
            raise ValueError(
                f"{key}: attack.loss {config.attack.loss!r} is of one label, and mixed images have two"
            )
    if config.dtype == "float64" and config.amp:
        raise ValueError("amp: mixed precision and dtype=float64 exclude each other")
    if config.compile == "on" and config.checkpoint_activations:
        raise ValueError("compile: 'on' and checkpoint_activations exclude each other")


def _check_augmentation(config: RunConfig) -> None:
    names = config.augmentation
    if names and not config.augment:
        raise ValueError(f"augmentation: {', '.join(names)}, and augment is false")
    if len(set(names)) < len(names):
        raise ValueError(f"augmentation: each name may stand there once, got {', '.join(names)}")
    if "random-resized-crop" in names[1:]:
        raise ValueError(f"augmentation: random-resized-crop comes first, got {', '.join(names)}")


def _check_optimizer(optim: OptimConfig) -> None:
    """Refuse keys that the optimizer would ignore."""
    keys = look_up("optim.implementation", optim.implementation, OPTIMIZERS).keys
    given = flat({"optim": optim.model_dump(mode="json")})
    for other, optimizer in OPTIMIZERS.items():
        for name in (f"optim.{key}" for key in optimizer.keys if key not in keys):
            if given[name] != DEFAULTS[name]:
                raise ValueError(f"{name}: it is of {other}, and optim.implementation is {optim.implementation!r}")
