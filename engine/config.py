"""The configuration of a run: frozen, typed, validated. Imports no torch.

A configuration is always complete. What the user leaves out comes from the table of defaults of the method and
the semantics (`engine.semantics`), so no field means "to be decided later"; see `load`.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine import semantics

Tree = dict[str, Any]


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


def _switch(value: object) -> object:
    """YAML reads a bare on or off as a truth value."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


# Bounded, since what is no float32 fails deep inside torch.
Number = Annotated[float, BeforeValidator(_fraction), BeforeValidator(_no_truth_value), Field(ge=-1e30, le=1e30)]
Count = Annotated[int, BeforeValidator(_no_truth_value)]
# A point in training: below 1 a fraction of the epochs (so that it scales with them), else a number of epochs.
PartOfRun = Annotated[Number, Field(ge=0), AfterValidator(_part_of_run)]
Auto = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Switch = Annotated[Literal["on", "off"], BeforeValidator(_switch)]
TERMS = ("ce_nat", "ce_adv", "kl_self", "kl_at_nat", "kl_at_adv", "kl_st_adv")
"""The six terms of the loss, in the order of the paper's Table 1."""


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


AnySection = typing.TypeVar("AnySection", bound=Section)


class LossConfig(Section):
    """Hyper-parameters of the method's row of weights (paper: Eq. 3-4 and Section 5.1)."""

    tau: Annotated[Number, Field(gt=0)] = 1.0
    tau_self: Annotated[Number, Field(gt=0)] = 1.0
    beta: Annotated[Number, Field(ge=0)] = 0.1
    gamma: Annotated[Number, Field(ge=0)] | None = None  # None: 1 - alpha; a number: constant (Table 9)
    lam: Annotated[Number, Field(ge=0, le=1)] = 0.0
    lam1: Annotated[Number, Field(ge=0)] = 0.25
    lam2: Annotated[Number, Field(ge=0)] = 0.5
    lam3: Annotated[Number, Field(ge=0)] = 0.25
    trades_lambda: Annotated[Number, Field(ge=0)] = 6.0
    weights: dict[str, Number | tuple[Number, Number]] = Field(default_factory=dict)
    warmup: PartOfRun = 0.0
    detach_self: bool = False
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class AttackSpec(Section):
    """A projected-gradient attack on images in [0,1]; epsilon and step_size are in those units (Eq. 2)."""

    threat_model: Literal["Linf", "L2"] = "Linf"
    epsilon: Annotated[Number, Field(ge=0)] = 8 / 255
    step_size: Annotated[Number, Field(ge=0)] = 2 / 255
    num_steps: Annotated[Count, Field(ge=0)] = 10
    random_start: Literal["none", "uniform", "gaussian"] = "uniform"
    gaussian_std: Annotated[Number, Field(gt=0)] = 0.001
    clamp_start: bool = True
    loss: Literal["ce", "kl", "cw"] = "ce"
    kappa: Annotated[Number, Field(ge=0)] = 50.0
    bn: Literal["train", "eval", "batch"] = "eval"


class ForwardsConfig(Section):
    """Forwards whose output no term needs, kept because they move BatchNorm's running statistics.

    clean: S(x) where no term reads it. idle: the further S(x~) and S(x) of the published IAD-I after its warm-up.
    """

    clean: Literal["skip", "no_grad", "grad"] = "skip"
    idle: bool = False


class OptimConfig(Section):
    """SGD; with milestones, the learning rate is lr before the first and lr * lr_factors[i] from milestone i on.

    implementation: torch's fused SGD, or FusedSGD of NVIDIA's apex. lr_warmup: the rate rises linearly that long.
    clip_norm: largest norm of the gradient of all weights together.
    """

    implementation: Literal["torch", "apex"] = "torch"
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[Number, Field(ge=0)] = 2e-4
    schedule: Literal["milestones", "cosine", "one-cycle"] = "milestones"
    milestones: tuple[PartOfRun, ...] = (0.5, 0.75)
    lr_factors: tuple[Annotated[Number, Field(ge=0)], ...] = (0.1, 0.01)
    lr_warmup: PartOfRun = 0.0
    clip_norm: Annotated[Number, Field(gt=0)] | None = None


class AveragingConfig(Section):
    """Averages of the weights, which are evaluated and kept as the best in place of the weights themselves.

    ema: exponential, w <- decay * w + (1 - decay) * student after every step, running statistics alike.
    swa: the mean of the students at the end of each epoch from start on, with statistics measured for it.
    start: None is the first epoch for ema, and three quarters of the run for swa.
    """

    kind: Literal["none", "ema", "swa"] = "none"
    decay: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    start: PartOfRun | None = None


class AwpConfig(Section):
    """Adversarial weight perturbation (Wu et al., 2020): gamma is its size relative to the weights, 0 for none."""

    gamma: Annotated[Number, Field(ge=0)] = 0.0
    start: PartOfRun = 0.0


class TeacherConfig(Section):
    """Where a teacher comes from: a checkpoint, else the cache, else trained by `method` and cached.

    A value of None means: the same as the student's.
    """

    checkpoint: str | None = None
    method: str = "at"
    model: str | None = None
    epochs: Annotated[Count, Field(ge=1)] | None = None
    lr: Annotated[Number, Field(gt=0)] | None = None
    seed: Annotated[Count, Field(ge=0)] | None = None


class EvalConfig(Section):
    """What is measured during and after training.

    `attack` measures robust_accuracy after each epoch, `final` runs on the test images at the end.
    """

    attack: str = "pgd10"
    final: tuple[str, ...] = ("natural", "fgsm", "pgd20")
    batch_size: Annotated[Count, Field(ge=1)] = 250
    probe_size: Annotated[Count, Field(ge=1)] = 256


class RunConfig(Section):
    """Everything that decides a run's result."""

    method: str = "iad1"
    semantics: Literal["paper", "official"] = "paper"
    model: str = "resnet18"
    normalize: bool = False
    dataset: str = "cifar10"
    data: str | None = None
    limit_train: Annotated[Count, Field(ge=1)] | None = None
    limit_test: Annotated[Count, Field(ge=1)] | None = None
    validation: Annotated[Number, Field(ge=0, lt=1)] = 0.02
    augment: bool = True
    flip: bool | None = None  # None: where a mirrored image is still of its class, as the data set's entry says
    image_size: Annotated[Count, Field(ge=1)] | None = None  # None: all images are of one size
    on_bad_image: Literal["fail", "skip"] = "fail"
    pipeline: Literal["auto", "tensor", "ffcv", "dali"] = "auto"
    order: Literal["random", "quasi-random"] = "random"
    workers: Annotated[Count, Field(ge=1)] | None = None  # None: this process's share of the processors
    batches_ahead: Annotated[Count, Field(ge=1)] = 2
    epochs: Annotated[Count, Field(ge=1)] = 200
    batch_size: Annotated[Count, Field(ge=1)] = 128
    micro_batch: Annotated[Count, Field(ge=1)] | Literal["auto"] | None = None  # None: whole batches
    sync_bn: Switch = "off"
    lr: Annotated[Number, Field(gt=0)] = 0.1
    lr_scale: Literal["none", "linear"] = "none"
    dtype: Literal["float32", "float64"] = "float32"
    amp: bool = False
    compile: Auto = "auto"
    lanes: Switch = "on"
    graphs: Switch = "on"
    checkpoint_activations: bool = False
    masking_guard: Annotated[Literal["warn", "stop", "off"], BeforeValidator(_switch)] = "warn"
    device: str = "auto"
    seed: Annotated[Count, Field(ge=0, lt=2**63)] = 0
    out: str | None = None
    checkpoint_every: Annotated[Count, Field(ge=0)] = 0
    log_every: Annotated[Count, Field(ge=1)] = 50
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
    tree = merge(_defaults(said), said)
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
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        raise ValueError(f"--set {path}: not a YAML value: {raw!r}") from None
    return nested(path.strip(), value)


def nested(path: str, value: object) -> Tree:
    """Nested form of one key, e.g. {"attack": {"bn": value}} of "attack.bn"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return typing.cast(Tree, value)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration wherever it is read again: paths of files no longer depend on the folder."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).expanduser().absolute())

    teachers = {
        section: teacher.model_copy(update={"checkpoint": absolute(teacher.checkpoint)})
        for section, teacher in (("teacher", config.teacher), ("teacher_st", config.teacher_st))
    }
    return config.model_copy(update={"data": absolute(config.data), **teachers})


def read_file(path: Path) -> Tree:
    """Nested keys of a YAML file. Raises ValueError where it is missing, not YAML, or not a mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--config: {path} is not a text file") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"--config: {path} is not valid YAML{where}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"--config: {path} must hold `key: value` lines, and it holds {type(tree).__name__}")
    return tree


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Tail of an error message: the nearest known name if one is near, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def check_reading(reading: str, loss: LossConfig) -> None:
    """Refuse what the published code does not have. Raises ValueError, one line."""
    if reading == "official" and loss.tau_self != 1:
        raise ValueError(
            f"loss.tau_self: official semantics has no temperature in the self term, got {loss.tau_self:g}"
        )
    if reading == "official" and loss.gamma is not None:
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
    return f"{key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


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
    check_reading(config.semantics, config.loss)
    if config.micro_batch == "auto" and config.sync_bn == "on":
        raise ValueError("micro_batch: 'auto' and sync_bn exclude each other; give micro_batch a number")
    if config.optim.schedule == "one-cycle" and config.optim.lr_warmup:
        raise ValueError("optim.lr_warmup: the one-cycle schedule has a warm-up of its own")
    if config.dtype == "float64" and config.amp:
        raise ValueError("amp: mixed precision and dtype=float64 exclude each other")
    if config.compile == "on" and config.checkpoint_activations:
        raise ValueError("compile: 'on' and checkpoint_activations exclude each other")
