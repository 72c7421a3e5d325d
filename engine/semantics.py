"""The defaults of each method, and where the paper and its published code differ, as data. Imports nothing.

`--semantics paper` follows the paper, `--semantics official` the authors' published code. Each difference is one
named key of the configuration, so that any mixture of the two can be asked for. The two readings of the loss are
in `engine.methods`; docs/semantics.md lists every difference.
"""

from __future__ import annotations

from typing import Any

NAMES = ("paper", "official")

TEACHER_METHODS = ("st", "at", "trades")
"""Methods that train without a teacher: the published code trains its teachers with its own schedule."""

_ARD_FAMILY = ("ard", "iad1", "iad1-down")

# The warm-up of Section 5.1 on CIFAR-10 with ResNet-18, as fractions of 200 epochs.
_WARMUP = {"iad1": 60 / 200, "iad1-down": 60 / 200, "iad2": 40 / 200}

_ATTACK: dict[str, dict[str, Any]] = {
    "at": {"bn": "eval"},
    "trades": {"bn": "eval", "loss": "kl", "random_start": "gaussian"},
}
_DISTILLATION_ATTACK = {"bn": "train"}


def defaults(method: str, semantics: str, epochs: int) -> dict[str, Any]:
    """Nested configuration keys that the method and the semantics set where the user does not."""
    distils = method not in TEACHER_METHODS
    tree: dict[str, Any] = {
        "loss": {"warmup": _WARMUP.get(method, 0.0)},
        "attack": dict(_DISTILLATION_ATTACK if distils else _ATTACK.get(method, {})),
        # With lam = 0 no term of ARD reads S(x), yet without that forward BatchNorm never sees a clean batch.
        "forwards": {"clean": "no_grad" if method in _ARD_FAMILY else "skip", "idle": False},
        "teacher": {"method": "at"},
        "teacher_st": {"method": "st"},
    }
    if semantics == "official":
        tree["validation"] = 0.0  # the full train set; the best checkpoint is chosen on the test set
        tree["eval"] = {"final": ["natural", "fgsm-rs", "pgd20"]}
        tree["teacher_st"]["model"] = "resnet18"
        if distils:
            tree["attack"]["clamp_start"] = False
            # The second drop applies its factor to the initial rate, as the first did: 0.01 until the end.
            tree["optim"] = {"lr_factors": [0.1, 0.1]}
            tree["forwards"] = {
                "clean": "grad" if method in _ARD_FAMILY else "skip",
                "idle": method in ("iad1", "iad1-down"),
            }
        elif epochs < 110:
            tree["optim"] = {"milestones": [0.3, 0.6]}
        else:
            tree["optim"] = {"milestones": [99 / 200, 149 / 200]}
    return tree
