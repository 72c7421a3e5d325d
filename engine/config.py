"""The configuration of a run: frozen, typed, validated. Imports no torch.

A configuration is always complete. What the user leaves out comes from the table of defaults of the method and
the semantics (`engine.semantics`), so no field means "to be decided later"; see `load`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
)

from engine import semantics
from engine.common import yaml_text
from engine.common.files import expanded, regular
from engine.common.lookup import look_up, nearest

Tree = dict[str, Any]
_END = "...\n"  # of a YAML document that is a bare value


def _fraction(value: object) -> object:
    """Accept "8/255" where a number is expected: the paper writes epsilon and warm-up periods that way."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ArithmeticError):
            raise ValueError(f"not a fraction: {value!r}") from None
    return value


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected")
    return value


def _part_of_run(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("give a fraction of the epochs below 1, or a whole number of epochs")
    return value


def _path(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("a path is expected")
    return value


def _utf8(value: str) -> str:
    """TensorBoard writes to no other path."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("a path of UTF-8 text is expected") from None
    return value


def _switch(value: object) -> object:
    """YAML reads a bare on or off as a truth value."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


# Bounded, since what is no float32 fails deep inside torch.
Number = Annotated[float, BeforeValidator(_fraction), BeforeValidator(_no_truth_value), Field(ge=-1e30, le=1e30)]
# Bounded, since torch overflows at what is no int64, and a thread each is started for what is a number of threads.
Count = Annotated[int, BeforeValidator(_no_truth_value), Field(lt=2**31)]
Few = Annotated[Count, Field(ge=1, le=1024)]
Seed = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=2**63 - 1)]
PathText = Annotated[str, AfterValidator(_path)]
# A point in training: below 1 a fraction of the epochs (so that it scales with them), else a number of epochs.
PartOfRun = Annotated[Number, Field(ge=0), AfterValidator(_part_of_run)]
Auto = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
LARGEST_IMAGE = 8192
"""Side of the largest views that are cut from images of any size."""
TERMS = ("ce_nat", "ce_adv", "kl_self", "kl_at_nat", "kl_at_adv", "kl_st_adv")
"""The six terms of the loss, in the order of the paper's Table 1."""


@dataclass(frozen=True)
class Key:
    """What a key means to other runs than its own, and to its own when that goes on.

    teacher: one that is trained on the way takes it over from its student.
    decides: with another value it is another network: a part of a trained teacher's place in the cache.
    resume: how it may differ when a run goes on: "fixed", not at all; "free"; "place", another path to the same
    content; "longer", a larger number.
    later: the key is younger than the first teachers in caches: it is a part of their place only where it is not
    the default.
    """

    teacher: bool = False
    decides: bool = False
    later: bool = False
    resume: Literal["fixed", "free", "place", "longer"] = "fixed"


OWN = Key(decides=True)
"""Of a run and its method alone."""
SHARED = Key(teacher=True, decides=True)
HOW = Key(teacher=True, resume="free")
"""Where, how fast and how visibly a network is trained, but not which."""
ASIDE = Key()
"""Of the student's teachers, and of what is measured."""


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


AnySection = typing.TypeVar("AnySection", bound=Section)


class LossConfig(Section):
    """Hyper-parameters of the method's row of weights (paper: Eq. 3-4 and Section 5.1)."""

    tau: Annotated[Number, Field(gt=0), OWN] = 1.0
    tau_self: Annotated[Number, Field(gt=0), OWN] = 1.0
    beta: Annotated[Number, Field(ge=0), OWN] = 0.1
    # None: 1 - alpha; a number: constant (Table 9)
    gamma: Annotated[Annotated[Number, Field(ge=0)] | None, OWN] = None
    lam: Annotated[Number, Field(ge=0, le=1), OWN] = 0.0
    lam1: Annotated[Number, Field(ge=0), OWN] = 0.25
    lam2: Annotated[Number, Field(ge=0), OWN] = 0.5
    lam3: Annotated[Number, Field(ge=0), OWN] = 0.25
    trades_lambda: Annotated[Number, Field(ge=0), OWN] = 6.0
    weights: Annotated[dict[str, Number | tuple[Number, Number]], OWN] = Field(default_factory=dict)
    warmup: Annotated[PartOfRun, OWN] = 0.0
    kl_mean: Annotated[Literal["batch", "elements"], Key(decides=True, later=True)] = "batch"
    detach_self: Annotated[bool, OWN] = False
    label_smoothing: Annotated[Number, Field(ge=0, lt=1), OWN] = 0.0


def _length(value: float, info: ValidationInfo) -> float:
    """In L-inf no two images in [0,1] are more than 1 apart: a larger number was meant in steps of 255."""
    if value > 1 and info.data.get("threat_model") == "Linf":
        hint = f"; {value:g}/255 may be meant" if value <= 255 else ""
        raise ValueError(f"an L-inf length is at most 1, since images are in [0, 1]{hint}")
    return value


Length = Annotated[Number, Field(ge=0), AfterValidator(_length)]


class AttackSpec(Section):
    """A projected-gradient attack on images in [0,1]; epsilon and step_size are in those units (Eq. 2)."""

    threat_model: Annotated[Literal["Linf", "L2"], SHARED] = "Linf"
    epsilon: Annotated[Length, SHARED] = 8 / 255
    step_size: Annotated[Length, SHARED] = 2 / 255
    num_steps: Annotated[Count, Field(ge=0), SHARED] = 10
    random_start: Annotated[Literal["none", "uniform", "gaussian"], OWN] = "uniform"
    gaussian_std: Annotated[Number, Field(gt=0), OWN] = 0.001
    clamp_start: Annotated[bool, OWN] = True
    loss: Annotated[Literal["ce", "kl", "cw", "dlr"], OWN] = "ce"
    kappa: Annotated[Number, Field(ge=0), OWN] = 50.0
    bn: Annotated[Literal["train", "eval", "batch"], OWN] = "eval"


class ForwardsConfig(Section):
    """Forwards whose output no term needs, kept because they move BatchNorm's running statistics.

    clean: S(x) where no term reads it. idle: more; "iad1": S(x~) after the other, and S(x) from the end of the
    warm-up on, "trades": S(x) before S(x~), each as published; true: S(x~) and S(x) from the end of it.
    """

    clean: Annotated[Literal["skip", "no_grad", "grad"], OWN] = "skip"
    idle: Annotated[Literal[False, True, "iad1", "trades"], OWN] = False


class OptimConfig(Section):
    """SGD; with milestones, the learning rate is lr before the first and lr * lr_factors[i] from milestone i on.

    implementation: torch's fused SGD, or FusedSGD of NVIDIA's apex. lr_warmup: the rate rises linearly that long.
    clip_norm: largest norm of the gradient of all weights together.
    """

    implementation: Annotated[Literal["torch", "apex"], SHARED] = "torch"
    momentum: Annotated[Number, Field(ge=0, lt=1), SHARED] = 0.9
    nesterov: Annotated[bool, SHARED] = False
    weight_decay: Annotated[Number, Field(ge=0), SHARED] = 2e-4
    schedule: Annotated[Literal["milestones", "cosine", "one-cycle"], SHARED] = "milestones"
    milestones: Annotated[tuple[PartOfRun, ...], SHARED] = (0.5, 0.75)
    lr_factors: Annotated[tuple[Annotated[Number, Field(ge=0)], ...], SHARED] = (0.1, 0.01)
    lr_warmup: Annotated[PartOfRun, SHARED] = 0.0
    clip_norm: Annotated[Annotated[Number, Field(gt=0)] | None, SHARED] = None


class AveragingConfig(Section):
    """Averages of the weights, which are evaluated and kept as the best in place of the weights themselves.

    ema: exponential, w <- decay * w + (1 - decay) * student after every step, running statistics alike.
    swa: the mean of the students at the end of each epoch from start on, with statistics measured for it.
    start: None is the first epoch for ema, and three quarters of the run for swa.
    """

    kind: Annotated[Literal["none", "ema", "swa"], OWN] = "none"
    decay: Annotated[Number, Field(ge=0, lt=1), OWN] = 0.999
    start: Annotated[PartOfRun | None, OWN] = None


class AwpConfig(Section):
    """Adversarial weight perturbation (Wu et al., 2020): gamma is its size relative to the weights, 0 for none."""

    gamma: Annotated[Number, Field(ge=0), OWN] = 0.0
    start: Annotated[PartOfRun, OWN] = 0.0


Triple = tuple[Number, Number, Number]
"""Of red, green and blue."""


class TeacherConfig(Section):
    """Where a teacher comes from: a checkpoint, else the cache, else trained by `method` and cached.

    A value of None means: the same as the student's. weights and normalize are of a checkpoint: see `load_model`.
    """

    checkpoint: Annotated[PathText | None, Key(resume="place")] = None
    method: Annotated[str, ASIDE] = "at"
    model: Annotated[str | None, ASIDE] = None
    epochs: Annotated[Annotated[Count, Field(ge=1)] | None, ASIDE] = None
    lr: Annotated[Annotated[Number, Field(gt=0)] | None, ASIDE] = None
    seed: Annotated[Seed | None, ASIDE] = None
    weights: Annotated[str | None, ASIDE] = None  # None: the usual ones of the checkpoint
    normalize: Annotated[str | tuple[Triple, Triple] | None, ASIDE] = None  # None: as the checkpoint does


class EvalConfig(Section):
    """What is measured during and after training.

    `attack` measures robust_accuracy after each epoch, `final` runs on the test images at the end.
    """

    attack: Annotated[str, ASIDE] = "pgd10"
    final: Annotated[tuple[str, ...], ASIDE] = ("natural", "fgsm", "pgd20")
    batch_size: Annotated[Count, Field(ge=1), Key(teacher=True)] = 250
    probe_size: Annotated[Count, Field(ge=1), Key(teacher=True)] = 256


class RunConfig(Section):
    """Everything that decides a run's result."""

    method: Annotated[str, OWN] = "iad1"
    semantics: Annotated[Literal["paper", "official"], SHARED] = "paper"
    model: Annotated[str, SHARED] = "resnet18"
    normalize: Annotated[bool, SHARED] = False
    # a checkpoint with the student's first weights; None: they are drawn from the seed
    init: Annotated[PathText | None, Key(decides=True, later=True)] = None
    dataset: Annotated[str, SHARED] = "cifar10"
    data: Annotated[PathText | None, Key(teacher=True, resume="place")] = None
    limit_train: Annotated[Annotated[Count, Field(ge=1)] | None, SHARED] = None
    limit_test: Annotated[Annotated[Count, Field(ge=1)] | None, SHARED] = None
    validation: Annotated[Number, Field(ge=0, lt=1), SHARED] = 0.02
    augment: Annotated[bool, SHARED] = True
    # None: where a mirrored image is still of its class, as the data set's entry says
    flip: Annotated[bool | None, SHARED] = None
    # None: all images are of one size
    image_size: Annotated[Annotated[Count, Field(ge=1, le=LARGEST_IMAGE)] | None, SHARED] = None
    on_bad_image: Annotated[Literal["fail", "skip"], SHARED] = "fail"
    pipeline: Annotated[Literal["auto", "tensor", "ffcv", "dali"], Key(teacher=True)] = "auto"
    order: Annotated[Literal["random", "quasi-random"], SHARED] = "random"
    workers: Annotated[Few | None, HOW] = None  # None: this process's share of the processors
    batches_ahead: Annotated[Few, HOW] = 2
    epochs: Annotated[Count, Field(ge=1), Key(teacher=True, decides=True, resume="longer")] = 200
    batch_size: Annotated[Count, Field(ge=1), SHARED] = 128
    # None: whole batches
    micro_batch: Annotated[Annotated[Count, Field(ge=1)] | Literal["auto"] | None, SHARED] = None
    sync_bn: Annotated[Switch, SHARED] = "off"
    lr: Annotated[Number, Field(gt=0), SHARED] = 0.1
    lr_scale: Annotated[Literal["none", "linear"], SHARED] = "none"
    dtype: Annotated[Literal["float32", "float64"], SHARED] = "float32"
    amp: Annotated[bool, SHARED] = False
    # auto: decided when a run begins; in a teacher's place in the cache it is part of amp
    amp_dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], Key(teacher=True)] = "auto"
    compile: Annotated[Auto, Key(teacher=True)] = "auto"
    lanes: Annotated[Switch, HOW] = "on"
    graphs: Annotated[Switch, HOW] = "on"
    checkpoint_activations: Annotated[bool, HOW] = False
    masking_guard: Annotated[Literal["warn", "stop", "off"], BeforeValidator(_switch), HOW] = "warn"
    device: Annotated[str, HOW] = "auto"
    seed: Annotated[Seed, OWN] = 0
    out: Annotated[Annotated[PathText, AfterValidator(_utf8)] | None, Key(resume="free")] = None
    checkpoint_every: Annotated[Count, Field(ge=0), HOW] = 0
    # steps between files of the weights in snapshots/; 0: none
    snapshot_every: Annotated[Count, Field(ge=0), Key(resume="free")] = 0
    log_every: Annotated[Count, Field(ge=1), HOW] = 50
    loss: LossConfig = LossConfig()
    attack: AttackSpec = AttackSpec()
    forwards: ForwardsConfig = ForwardsConfig()
    optim: OptimConfig = OptimConfig()
    averaging: AveragingConfig = AveragingConfig()
    awp: AwpConfig = AwpConfig()
    teacher: TeacherConfig = TeacherConfig()
    teacher_st: TeacherConfig = TeacherConfig(method="st")
    eval: EvalConfig = EvalConfig()

    def tree(self) -> Tree:
        """Return plain nested dicts, lists and numbers, as `config.yaml` holds them."""
        return self.model_dump(mode="json")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Key]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            facts = [fact for fact in field.metadata if isinstance(fact, Key)]
            assert len(facts) == 1, f"{section.__name__}.{name}: annotate it with one Key"
            yield prefix + name, facts[0]


KEYS = dict(_keys(RunConfig))
"""What is known of every key, by its name, e.g. "attack.bn"."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """The values of a tree by the names of `KEYS`."""
    result: Tree = {}
    for name, value in tree.items():
        result |= {prefix + name: value} if prefix + name in KEYS else flat(value, f"{prefix}{name}.")
    return result


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
    """That section with those values. Raises ValueError in one line where pydantic would use several."""
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
        return None if path is None else str(expanded(argument, path).absolute())

    teachers = {
        section: teacher.model_copy(update={"checkpoint": absolute(f"{section}.checkpoint", teacher.checkpoint)})
        for section, teacher in (("teacher", config.teacher), ("teacher_st", config.teacher_st))
    }
    paths = {"data": absolute("data", config.data), "init": absolute("init", config.init)}
    return config.model_copy(update=paths | teachers)


def as_begun(wanted: RunConfig, begun: RunConfig) -> RunConfig:
    """The wanted configuration, with the format that a run decided when it began where one leaves it open."""
    if "auto" in (wanted.amp_dtype, begun.amp_dtype):
        return wanted.model_copy(update={"amp_dtype": begun.amp_dtype})
    return wanted


def read_file(path: Path) -> Tree:
    """Nested keys of a YAML file. Raises ValueError where it is missing, no file, not YAML, or not a mapping."""
    try:
        tree = yaml_text.read(regular(path, yaml_text.MOST_BYTES).read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config: {path} is not a text file") from None
    except ValueError as error:
        raise ValueError(f"--config: {path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"--config: {path} must hold `key: value` lines, and it holds {type(tree).__name__}")
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
    return semantics.defaults(chosen.method, chosen.semantics, chosen.epochs)


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
    if config.optim.schedule == "one-cycle" and config.optim.lr_warmup:
        raise ValueError("optim.lr_warmup: the one-cycle schedule has a warm-up of its own")
    if config.dtype == "float64" and config.amp:
        raise ValueError("amp: mixed precision and dtype=float64 exclude each other")
    if config.compile == "on" and config.checkpoint_activations:
        raise ValueError("compile: 'on' and checkpoint_activations exclude each other")
