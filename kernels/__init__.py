"""The ops of a training step. Imports torch, triton where one of its kernels runs, and nothing else of engine."""

from engine.kernels.contract import (
    ALPHA_BINS,
    MEASURED_LOGITS,
    BatchSums,
    DistillLoss,
    MeasuredBatch,
    SgdNumbers,
    SgdTensors,
    Term,
    WeightTransforms,
)
from engine.kernels.crop_flip import crop_flip
from engine.kernels.distill_loss import distill_loss
from engine.kernels.fab_step import fab_step
from engine.kernels.layers.batch_norm import batch_norm
from engine.kernels.layers.conv3x3 import conv3x3
from engine.kernels.layers.image_conv3x3 import image_conv3x3, image_conv3x3_update
from engine.kernels.pgd_update import pgd_update
from engine.kernels.random_start import random_start
from engine.kernels.reference import count_cases, histogram, trust
from engine.kernels.training.batch_sums import batch_sums
from engine.kernels.training.sgd_update import sgd_update

__all__ = [
    "ALPHA_BINS",
    "MEASURED_LOGITS",
    "BatchSums",
    "DistillLoss",
    "MeasuredBatch",
    "SgdNumbers",
    "SgdTensors",
    "Term",
    "WeightTransforms",
    "batch_norm",
    "batch_sums",
    "conv3x3",
    "count_cases",
    "crop_flip",
    "distill_loss",
    "fab_step",
    "histogram",
    "image_conv3x3",
    "image_conv3x3_update",
    "pgd_update",
    "random_start",
    "sgd_update",
    "trust",
]
