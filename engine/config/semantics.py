"""The defaults of each method, and where the paper and its published code differ, as data.

`--semantics paper` follows the paper, `--semantics official` the authors' published code. Each difference is one
named key of the configuration, so that any mixture of the two can be asked for. The two readings of the loss are
in `engine.methods`; docs/semantics.md lists every difference.
"""

from __future__ import annotations

import math
from typing import Any

from engine.common.lookup import look_up

TEACHER_METHODS = ("st", "at", "trades")
"""Methods that train teachers: the published code trains its teachers without one, with its own schedule."""

_ARD_FAMILY = ("ard", "iad1", "iad1-down")
_OF_THE_PAPER = (*TEACHER_METHODS, *_ARD_FAMILY, "akd2", "iad2")
"""Methods of the IAD paper and its code; the others follow their own authors, see `_OTHERS`."""

# The warm-up of Section 5.1 on CIFAR-10 with ResNet-18, as fractions of 200 epochs.
_WARMUP = {"iad1": 60 / 200, "iad1-down": 60 / 200, "iad2": 40 / 200}

_ATTACK: dict[str, dict[str, Any]] = {
    "at": {"bn": "eval"},
    "trades": {"bn": "eval", "loss": "kl", "random_start": "gaussian", "clamp_start": False},
}
_DISTILLATION_ATTACK = {"bn": "train"}

# The usual attack of the newer methods: ten steps from x + 0.001 N(0, 1), in evaluation mode.
_USUAL_ATTACK = {"bn": "eval", "random_start": "gaussian", "clamp_start": False}
_ONE_STEP: dict[str, Any] = {
    "loss": {},
    "attack": {"bn": "train", "num_steps": 1},
    "normalize": True,
    "lr": 0.2,
    "optim": {"schedule": "cyclic", "weight_decay": 5e-4},
}
_LONG = {"milestones": [215 / 300, 260 / 300, 285 / 300], "lr_factors": [0.1, 0.01, 0.001]}

_OTHERS: dict[str, dict[str, Any]] = {
    "mart": {
        "loss": {"trades_lambda": 5.0},
        "attack": {**_USUAL_ATTACK, "loss": "ce"},
        "forwards": {"first": "nat"},
        "epochs": 120,
        "lr": 0.01,
        "optim": {
            "weight_decay": 3.5e-3,
            "milestones": [74 / 120, 89 / 120, 99 / 120],
            "lr_factors": [0.1, 0.01, 0.001],
        },
    },
    "fgsm-rs": _ONE_STEP | {"attack": {**_ONE_STEP["attack"], "step_size": 10 / 255}, "epochs": 15},
    "n-fgsm": _ONE_STEP
    | {
        "attack": {**_ONE_STEP["attack"], "step_size": 8 / 255, "start_epsilon": 16 / 255, "project": False},
        "epochs": 30,
    },
    "rslad": {
        "loss": {"lam": 1 / 6},
        "attack": {**_USUAL_ATTACK, "loss": "kl-teacher"},
        "epochs": 300,
        "optim": _LONG,
        "teacher": {"method": "trades"},
    },
    "adaad": {
        "attack": {**_USUAL_ATTACK, "loss": "kl-teacher-moving"},
        "forwards": {"first": "nat", "clean": "no_grad"},
        "optim": {"weight_decay": 5e-4},
    },
    "adaiad": {
        "loss": {"tau": 30.0, "warmup": 60 / 200},
        "attack": {**_USUAL_ATTACK, "loss": "kl-teacher-moving"},
        "forwards": {"clean": "no_grad", "idle": "trades"},
        "optim": {"weight_decay": 5e-4},
    },
    "mtard": {
        "attack": {**_USUAL_ATTACK, "loss": "ce"},
        "epochs": 300,
        "optim": _LONG,
        "teacher": {"method": "trades"},
    },
    "saad": {
        "attack": {**_USUAL_ATTACK, "loss": "kl-teacher-linear"},
        "forwards": {"clean": "no_grad"},
        "averaging": {"kind": "swa", "start": 95 / 200},
    },
}
"""Defaults by the methods' own authors. Schedules are fractions of the epochs, which are theirs, too."""

_OTHERS_AS_CODED: dict[str, dict[str, Any]] = {
    "mart": {"attack": {"epsilon": 0.031, "step_size": 0.007}},
    "rslad": {"loss": {"kl_mean": "elements"}},
    "adaad": {"loss": {"kl_mean": "elements"}},
    "adaiad": {"forwards": {"idle": "adaiad"}},
    "mtard": {"loss": {"kl_mean": "elements", "balance_floor": 1e-5}},
}
"""Where the published code differs from the formula: its divergences are averaged over the classes, too, and
MTARD's weights follow values that log(target + 1e-5) has moved.
"""


def defaults(method: str, semantics: str, epochs: int) -> dict[str, Any]:
    """Nested configuration keys that the method and the semantics set where the user does not.

    method: may have additions in its name, as "ard+igdm".
    """
    base, *additions = method.split("+")
    tree = look_up("semantics", semantics, _READINGS)(base, epochs)
    for addition in additions:
        tree["loss"] |= look_up("semantics", semantics, _ADDED).get(addition, {})
    return tree


def set_defaults(method: str, tree: dict[str, Any]) -> None:
    """Give a method of a user's own its defaults, in both readings."""
    _OTHERS[method] = tree


def _paper(method: str, epochs: int) -> dict[str, Any]:
    if method not in _OF_THE_PAPER:
        return _complete(_OTHERS.get(method, {}))
    distils = method not in TEACHER_METHODS
    return {
        "loss": {"warmup": _WARMUP.get(method, 0.0)},
        "attack": dict(_DISTILLATION_ATTACK if distils else _ATTACK.get(method, {})),
        # With lam = 0 no term of ARD reads S(x), yet without that forward BatchNorm never sees a clean batch.
        "forwards": {
            "clean": "no_grad" if method in _ARD_FAMILY else "skip",
            "idle": "trades" if method == "trades" else False,  # as its authors published it
        },
        "teacher": {"method": "at"},
        "teacher_st": {"method": "st"},
    }


def _official(method: str, epochs: int) -> dict[str, Any]:
    tree = _paper(method, epochs)
    tree["validation"] = 0.0  # the full train set; the best checkpoint is chosen on the test set
    if method not in _OF_THE_PAPER:
        for section, keys in _OTHERS_AS_CODED.get(method, {}).items():
            tree[section] = tree.get(section, {}) | keys
        return tree
    tree["eval"] = {"final": ["natural", "fgsm-rs", "pgd20"]}
    tree["teacher_st"]["model"] = "resnet18"
    if method not in TEACHER_METHODS:
        tree["attack"]["clamp_start"] = False
        # The second drop applies its factor to the initial rate, as the first did: 0.01 until the end.
        tree["optim"] = {"lr_factors": [0.1, 0.1]}
        if method in _ARD_FAMILY:
            tree["forwards"] = {"clean": "grad", "idle": "iad1" if method != "ard" else False}
    else:
        tree["optim"] = {"milestones": _teachers_milestones(epochs)}
    return tree


def _complete(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of a method's own defaults with the groups that every method has."""
    groups: dict[str, Any] = {"loss": {}, "attack": {}, "forwards": {}, "teacher": {"method": "at"}}
    groups["teacher_st"] = {"method": "st"}
    return groups | {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}


def earlier(method: str, semantics: str, epochs: int) -> dict[str, Any]:
    """Defaults that earlier versions had in place of those: a teacher that was trained with them remains one."""
    tree: dict[str, Any] = {}
    if method == "trades":
        tree |= {"attack": {"clamp_start": True}, "forwards": {"idle": False}}
    if semantics == "official" and method in TEACHER_METHODS and epochs < 110:
        tree |= {"optim": {"milestones": [0.3, 0.6]}}
    return tree


def _teachers_milestones(epochs: int) -> list[float]:
    """As fractions: the published script counts its epochs from 1 where it compares them with 100 and 150, or with
    30 % and 60 % of fewer than 110 epochs, and so drops the rate an epoch earlier.
    """
    if epochs >= 110:
        return [99 / 200, 149 / 200]
    return [(math.ceil(part * epochs) - 1) / epochs for part in (0.3, 0.6)]


_READINGS = {"paper": _paper, "official": _official}
# Keys of `loss` by addition: the published weight grows as e / 200 whatever the number of epochs, and its base's
# divergences are averaged over the batch.
_ADDED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "official": {"igdm": {"growth_epochs": 200, "kl_mean": "batch"}},
}
NAMES = tuple(_READINGS)
