"""The ops of a training step. Imports torch, triton where one of its kernels runs, and nothing else of engine."""

from engine.kernels.batch_norm import batch_norm
from engine.kernels.contract import DistillLoss, Term
from engine.kernels.conv3x3 import conv3x3
from engine.kernels.crop_flip import crop_flip
from engine.kernels.distill_loss import distill_loss
from engine.kernels.pgd_update import pgd_update
from engine.kernels.random_start import random_start
from engine.kernels.reference import trust

__all__ = [
    "DistillLoss",
    "Term",
    "batch_norm",
    "conv3x3",
    "crop_flip",
    "distill_loss",
    "pgd_update",
    "random_start",
    "trust",
]
