"""Mixed images: the pixels against torchvision's, the draws against their distribution, the stream of batches."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torchvision.transforms import v2

from engine.config import load
from engine.pipelines import mixing
from engine.pipelines.base import Batch, Mixture
from engine.pipelines.mixing import Mixing, MixingPipeline, PairSampling
from engine.pipelines.sampling import Sampling, Shard
from engine.pipelines.splits import Split
from engine.pipelines.tensor import TensorPipeline
from engine.runs.assemble import build_pipeline
from engine.system.precision import Precision

COUNT, CLASSES, SIDE = 60, 5, 12
IMAGES = torch.randint(
    0, 256, (COUNT, SIDE, SIDE + 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
DATA = Split(IMAGES, torch.arange(COUNT) % CLASSES, tuple("abcde"))
KINDS = (Mixing(mixup=0.4), Mixing(cutmix=1.0), Mixing(mixup=1.0, cutmix=2.0))


def mixed(chosen: Mixing, batch_size: int = 16, start_step: int = 0, **options: Any) -> list[Batch]:
    """The batches of epoch 3."""
    sampling = Sampling(COUNT, batch_size, seed=7, **options)
    pairs = TensorPipeline(
        DATA, PairSampling(**vars(sampling)), augment=True, flip=True, device="cpu", dtype=torch.float64
    )
    pipeline = MixingPipeline(pairs, sampling, chosen, num_classes=CLASSES, shape=DATA.shape)
    assert (pipeline.num_samples, pipeline.steps_per_epoch) == (COUNT, sampling.steps_per_epoch)
    return list(pipeline.epoch(3, start_step))


def views() -> Tensor:
    """Every image as epoch 3 shows it without mixing, (COUNT, 3, H, W)."""
    sampling = Sampling(COUNT, COUNT, seed=7, order="sequential")
    whole = TensorPipeline(DATA, sampling, augment=True, flip=True, device="cpu", dtype=torch.float64)
    return next(iter(whole.epoch(3))).x_nat


def mixture(batch: Batch) -> Mixture:
    assert batch.mixture is not None
    return batch.mixture


@pytest.mark.parametrize("chosen", KINDS)
def test_pixels_and_labels_are_torchvisions_of_the_same_draws(chosen: Mixing) -> None:
    seen = views()
    boxes = 0
    for own_B, batch in zip(Sampling(COUNT, 16, seed=7).batches(3), mixed(chosen), strict=True):
        partner_B = partners(own_B)
        draws_B5 = mixing._draws(chosen, 7, 3, own_B, DATA.shape)
        for i, (share, *box) in enumerate(draws_B5.tolist()):
            pair = torch.stack((partner_B[i], own_B[i]))  # torchvision mixes an image with the one before it
            labels = DATA.labels[pair]
            top, bottom, left, right = map(int, box)
            if bottom:
                boxes += 1
                transform: Any = v2.CutMix(num_classes=CLASSES)
                parameters = {"box": (left, top, right, bottom), "lam_adjusted": share}
            else:
                transform, parameters = v2.MixUp(num_classes=CLASSES), {"lam": share}
            parameters |= {"labels": labels, "batch_size": 2}
            expected = transform.transform(seen[pair], parameters)[1]
            torch.testing.assert_close(batch.x_nat[i], expected, rtol=0, atol=1e-15)
            probabilities = transform._mixup_label(labels, lam=share)[1]
            torch.testing.assert_close(batch.targets[i], probabilities.double(), rtol=0, atol=1e-7)
            assert batch.main_labels[i] == probabilities.argmax() or share == 0.5
    assert (boxes > 0) == (chosen.cutmix > 0)
    assert (boxes < COUNT) == (chosen.mixup > 0)


def partners(own_B: Tensor) -> Tensor:
    """The partner of each sample in epoch 3, found in batches of any size."""
    whole = PairSampling(COUNT, COUNT, seed=7).batches(3)[0]
    partner = dict(zip(whole[:COUNT].tolist(), whole[COUNT:].tolist(), strict=True))
    return torch.tensor([partner[sample] for sample in own_B.tolist()])


def test_the_share_of_mixup_is_of_the_beta_distribution() -> None:
    share = mixing._draws(Mixing(mixup=0.4), 1, 2, torch.arange(4000), (8, 8))[:, 0]
    assert scipy.stats.kstest(share.numpy(), scipy.stats.beta(0.4, 0.4).cdf).pvalue > 0.01
    assert scipy.stats.kstest(share.numpy(), scipy.stats.beta(0.6, 0.6).cdf).pvalue < 0.01


def test_the_box_of_cutmix_has_its_area_around_an_even_centre() -> None:
    """It has the image's shape where no edge cuts it; the share is the part that is left, exactly."""
    height, width = 40, 60
    draws = mixing._draws(Mixing(cutmix=1.0), 1, 2, torch.arange(4000), (height, width))
    share, top, bottom, left, right = draws.unbind(1)
    assert torch.equal(share, 1 - (bottom - top) * (right - left) / (height * width))
    assert 0 <= top.min() <= bottom.max() <= height
    assert 0 <= left.min() <= right.max() <= width
    inside = (top > 0) & (bottom < height) & (left > 0) & (right < width)
    sides = ((bottom - top) / height, (right - left) / width)
    assert inside.sum() > 500
    assert (sides[0] - sides[1])[inside].abs().max() <= 2 / height
    assert (top[inside] + bottom[inside]).mean() / 2 == pytest.approx(height / 2, abs=1)
    assert (left[inside] + right[inside]).mean() / 2 == pytest.approx(width / 2, abs=1.5)


def test_each_of_both_is_drawn_as_often() -> None:
    draws = mixing._draws(Mixing(mixup=1.0, cutmix=1.0), 1, 2, torch.arange(4000), (32, 32))
    assert scipy.stats.binomtest(int((draws[:, 2] > 0).sum()), 4000).pvalue > 0.001


@pytest.mark.parametrize("chosen", KINDS)
def test_an_image_is_mixed_alike_in_every_batch_and_on_every_rank(chosen: Mixing) -> None:
    whole = torch.cat([batch.x_nat for batch in mixed(chosen)])
    order = torch.cat([batch.sample for batch in mixed(chosen)])
    assert order.sort().values.tolist() == list(range(COUNT))
    for other in (
        mixed(chosen, batch_size=7),
        [
            part
            for step in zip(*(mixed(chosen, shard=Shard(rank, 2)) for rank in range(2)), strict=True)
            for part in step
        ],
    ):
        assert torch.equal(torch.cat([batch.sample for batch in other]), order)
        assert torch.equal(torch.cat([batch.x_nat for batch in other]), whole)
    for start_step in range(1, 5):
        tail = mixed(chosen, start_step=start_step)
        assert torch.equal(torch.cat([*(b.x_nat for b in tail), whole[:0]]), whole[16 * start_step :])


def test_partners_differ_between_epochs_and_are_of_all_the_data() -> None:
    sampling = PairSampling(1000, 1000, seed=1)
    first, second = (sampling.batches(epoch)[0][1000:] for epoch in (0, 1))
    assert 550 < len(first.unique()) < 710  # 1000 (1 - 1/e) = 632
    assert (first == second).sum() < 20


def test_a_batch_keeps_its_mixture_in_parts() -> None:
    (batch, *_) = mixed(Mixing(mixup=1.0))
    parts = batch.split(3)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(batch.split([5])[0].main_labels, batch.main_labels[:5])


def test_a_configuration_mixes_by_every_pipeline_of_one_rank_and_several() -> None:
    at = Precision(torch.device("cpu"), torch.float32)
    config = load({"batch_size": 8, "mixup": 0.5, "method": "at"})
    pipeline = build_pipeline(config, DATA, at, kind="tensor")
    batch = next(iter(pipeline.epoch(0)))
    assert batch.x_nat.shape == (8, 3, SIDE, SIDE + 4)
    assert batch.x_nat.is_contiguous(memory_format=torch.channels_last)
    assert mixture(batch).num_classes == CLASSES


@pytest.mark.parametrize("loss", ["cw", "dlr", "kl-teacher-linear"])
def test_an_attack_of_one_label_refuses_mixed_images(loss: str) -> None:
    with pytest.raises(ValueError, match="^cutmix: attack.loss '.*' is of one label, and mixed images have two$"):
        load({"method": "at", "cutmix": 1, "attack": {"loss": loss}})
