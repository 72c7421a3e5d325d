"""The ops that a training step calls. Imports torch, and nothing of engine."""

from engine.kernels.distill_loss import DistillLoss, distill_loss, trust
from engine.kernels.pgd_update import pgd_update, random_start

__all__ = ["DistillLoss", "distill_loss", "pgd_update", "random_start", "trust"]
