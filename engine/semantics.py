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
"""Methods that train without a teacher: the published code trains its teachers with its own schedule."""

_ARD_FAMILY = ("ard", "iad1", "iad1-down")

# The warm-up of Section 5.1 on CIFAR-10 with ResNet-18, as fractions of 200 epochs.
_WARMUP = {"iad1": 60 / 200, "iad1-down": 60 / 200, "iad2": 40 / 200}

_ATTACK: dict[str, dict[str, Any]] = {
    "at": {"bn": "eval"},
    "trades": {"bn": "eval", "loss": "kl", "random_start": "gaussian", "clamp_start": False},
}
_DISTILLATION_ATTACK = {"bn": "train"}


def defaults(method: str, semantics: str, epochs: int) -> dict[str, Any]:
    """Nested configuration keys that the method and the semantics set where the user does not."""
    return look_up("semantics", semantics, _READINGS)(method, epochs)


def _paper(method: str, epochs: int) -> dict[str, Any]:
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
NAMES = tuple(_READINGS)
