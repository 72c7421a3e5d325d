"""The benchmark of scaling: its model against closed forms, and a small run of it."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import predict, scaling
from bench.lib import roofline
from bench.lib.output.csv_rows import PredictedScalingRow, ScalingRow
from bench.lib.pass_ops import PassOps
from bench.scaling import FABRIC, NVLINK
from engine import config
from tests.bench.readme import documented

RUN = config.load({"method": "iad1", "model": "resnet18", "amp": True, "loss": {"warmup": 0}})


def test_gradients_of_two_gpus_cross_the_link_once_each_way() -> None:
    assert scaling.travel(1e9, 2) == pytest.approx(1e9 / NVLINK.bandwidth + 2 * NVLINK.latency)


def test_between_nodes_travels_an_eighth() -> None:
    inside = scaling.travel(8e9, 8)
    assert scaling.travel(8e9, 16) - inside == pytest.approx(1e9 / FABRIC.bandwidth + 2 * FABRIC.latency)


def test_gradients_of_resnet18_in_bytes() -> None:
    assert scaling.gradient_bytes("resnet18") == 4 * 11_173_962


def test_a_gpu_by_itself_waits_for_nobody_and_more_of_them_do() -> None:
    alone, nothing = scaling.predicted_step(RUN, "h100", 128, 1, sync_bn=False)
    assert nothing == 0
    step, exposed = scaling.predicted_step(RUN, "h100", 128, 8, sync_bn=False)
    assert step - exposed == pytest.approx(alone)
    assert exposed == pytest.approx(scaling.travel(4 * 11_173_962, 8))  # one message, beside nothing
    # Synchronised, 20 layers, 10 attacked and 2 trained passes, forward and backward, two latencies each, and the
    # last bucket; the host launches each kernel.
    synchronised, waiting = scaling.predicted_step(RUN, "h100", 128, 8, sync_bn=True)
    bucket = scaling.travel(scaling.LAST_BUCKET, 8)
    assert waiting == pytest.approx(20 * 12 * 2 * 2 * NVLINK.latency + bucket)
    assert synchronised - waiting > alone


def test_few_images_are_bound_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels without work: 1.6 us each in the graph, and six launches; where nothing is captured, all are."""
    ops = [roofline.Op("tiny", 0.0, 0.0, torch.float32)]
    passes = PassOps(ops * 143, ops * 200, ops * 32, 0, 0, (1,), 0)
    monkeypatch.setattr(predict, "gpu_passes", lambda *_: predict.GpuPasses(passes, passes))
    kernels = 10 * (143 + 1) + 2 * 200 + 2 * 32 + 4
    step, _ = scaling.predicted_step(RUN, "h100", 16, 1, sync_bn=False)
    assert step == pytest.approx(kernels * 1.6e-6 + 6 * 5e-6)
    step, exposed = scaling.predicted_step(RUN, "h100", 16, 8, sync_bn=True)
    assert step - exposed == pytest.approx(kernels * 5e-6 + 6 * 5e-6)


def test_eight_gpus_of_16_images_are_about_twice_as_fast_as_one_of_128() -> None:
    alone, _ = scaling.predicted_step(RUN, "h100", 128, 1, sync_bn=False)
    shared, _ = scaling.predicted_step(RUN, "h100", 16, 8, sync_bn=False)
    assert 1.5 < alone / shared < 2.5


@pytest.mark.parametrize(
    ("heading", "kind"), [("scaling.csv", ScalingRow), ("scaling-predicted.csv", PredictedScalingRow)]
)
def test_the_columns_are_documented(heading: str, kind: type) -> None:
    own = [field.name for field in fields(kind)]
    assert own[-len(documented(heading)) :] == documented(heading)


def test_a_small_run_counts_what_travels(tmp_path: Path) -> None:
    arguments = ["--model", "resnet8", "--batch-size", "4", "--rounds", "2", "--steps", "2", "--device", "cpu"]
    outcome = CliRunner().invoke(scaling.main, [*arguments, "--procs", "2", "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    plain, synchronised = csv.DictReader((tmp_path / "scaling.csv").open())
    assert (plain["sync_bn"], synchronised["sync_bn"]) == ("False", "True")
    ring = float(plain["ring_bytes"])
    assert ring == 2 * scaling.gradient_bytes("resnet8")
    # Headers, statistics, and agreements travel too; small gradients are the smaller part of little.
    assert ring < float(plain["sent_bytes"]) < 5 * ring
    assert float(synchronised["sent_bytes"]) > float(plain["sent_bytes"])
    assert "PREDICTED" in outcome.output
    assert len(list(csv.DictReader((tmp_path / "scaling-predicted.csv").open()))) == 7
