"""Choice of a textbook's step, and the networks and the state that it works on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from engine.common.lookup import look_up
from engine.models import layers

PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    layers.ImageConv2d: nn.Conv2d,
    layers.Conv3x3: nn.Conv2d,
    layers.Classifier: nn.Linear,
    layers.BatchNorm2d: nn.BatchNorm2d,
}


@dataclass(frozen=True)
class StepSetting:
    """Choice of a step, and the numbers of the methods, by default as their authors give them.

    semantics: "paper" or "official". bn: of the attack, "train", "eval" or "batch"; num_steps: of the attack; the
    method's own where they are None. epoch: from 1, of `epochs`; by default the last one.
    """

    method: str
    semantics: str = "paper"
    bn: str | None = None
    num_steps: int | None = None
    epoch: int = 200
    epochs: int = 200
    beta: float = 0.1  # of the trust in the teacher
    lam1: float = 0.25  # of AKD2 and IAD-II
    lam2: float = 0.5
    lam3: float = 0.25
    trades_lambda: float = 6.0
    rslad_clean: float = 1 / 6
    adaad_al: float = 1.0
    adaiad_al: float = 1.0
    adaiad_tau: float = 30.0
    adaiad_warmup: float = 60 / 200  # part of the epochs
    igdm_al: float = 1.0
    saad_lam: float = 1.0  # of the linear target of the attack
    saad_al: float = 1.0
    saad_b: float = 0.0
    saad_gamma: float = 1.0  # order of the entropy
    mart_beta: float = 5.0

    @property
    def official(self) -> bool:
        """True for the published code as it is."""
        return look_up("semantics", self.semantics, {"paper": False, "official": True})


@dataclass
class Balance:
    """MTARD's weights, which follow the run; zhaoshiji123/MTARD. natural: wn, of the standard teacher's term."""

    natural: float = 0.5
    rate: float = 0.025
    first: tuple[float, float] | None = None

    def follow(self, robust: float, natural: float) -> tuple[float, float]:
        """Weights wa and wn <- wn - g (wn - rn / (ra + rn)), r a term relative to the run's first."""
        self.first = self.first or (robust, natural)
        ra, rn = robust / self.first[0], natural / self.first[1]
        self.natural -= self.rate * (self.natural - rn / (ra + rn))
        return 1 - self.natural, self.natural


@dataclass(frozen=True)
class StepParts:
    """The student, what it learns from, and how it is updated."""

    setting: StepSetting
    student: nn.Module
    teacher: nn.Module
    standard_teacher: nn.Module
    optimizer: torch.optim.Optimizer
    balance: Balance = field(default_factory=Balance, kw_only=True)


def plain(network: nn.Module) -> nn.Module:
    """The network with torch's own layers in the place of the engine's, which differ from them under autocast."""
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network
