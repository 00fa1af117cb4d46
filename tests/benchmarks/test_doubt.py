from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundle_runs import config
from helpers.tiny_bundle import write_bundle_with_data
from torch import Tensor

from benchmarks import doubt
from benchmarks.doubt import SIDE, extremes, surroundings
from miar_monai.cli.workflow import SlicePairs
from miar_monai.degradation import Degradation, SeparableOperator
from miar_monai.errors import ConfigurationError, SettingError
from miar_monai.evaluation import SuperResolutionEvaluation
from miar_monai.networks import Estimator
from miar_monai.networks.results import Estimate


class KnownSamples(Estimator):
    """An estimator with a flat result, and samples that are the flat result plus noise of a known size."""

    noise = 0.2

    def super_resolve(self, lr: Tensor, *_: Any, operator: SeparableOperator, **settings: Any) -> Estimate:
        image = torch.full((len(lr), 1, 4 * lr.shape[2], 4 * lr.shape[3]), 0.5)
        return Estimate(image, image, image, torch.ones(len(lr), 1, 1, 1))

    def posterior_samples(self, lr: Tensor, noise: Tensor, operator: SeparableOperator) -> Tensor:
        return 0.5 + self.noise * noise[:, :, 0]


@pytest.fixture
def network() -> KnownSamples:
    return KnownSamples(channels=(8, 16), blocks=(1, 1), noise_channels=1, degradation=Degradation())


def search(network: Estimator, hr: Tensor, margin: int = 2) -> tuple[doubt.Doubt, doubt.Doubt]:
    evaluation = SuperResolutionEvaluation(Degradation(), ["PSNR"], device="cpu")
    pairs = SlicePairs("p", "t2", Degradation()(hr), hr)
    return extremes([pairs], network, evaluation, count=64, fidelity=0.25, factor=1.0, margin=margin)


def test_the_largest_errors_inside_and_outside_of_the_interval_are_found(network: KnownSamples) -> None:
    hr = torch.full((2, 1, 48, 40), 0.5)
    hr[1, 0, 20, 11] = 0.72  # within 1.1 standard deviations
    hr[0, 0, 30, 25] = 1.7
    hr[0, 0, 1, 1] = 1.9  # at the outline
    announced, missed = search(network, hr)
    assert announced.title == missed.title == "p t2"
    middle = (SIDE // 2, SIDE // 2)
    assert announced.panels["truth"][middle] == pytest.approx(0.72)
    assert announced.size == pytest.approx(0.22, abs=1e-5)
    assert announced.interval[0] <= 0.72 <= announced.interval[1]
    assert missed.panels["truth"][middle] == pytest.approx(1.7)
    assert missed.size == pytest.approx(1.7 - missed.interval[1], abs=1e-5)
    for one in (announced, missed):
        assert one.panels["lowest sample"][middle] == pytest.approx(one.samples.min())
        assert one.panels["highest sample"][middle] == pytest.approx(one.samples.max())
        assert one.panels["standard deviation"][middle] == pytest.approx(0.2, rel=0.4)
        assert one.samples.shape == (64,)


def test_a_body_without_interior_is_refused(network: KnownSamples) -> None:
    with pytest.raises(ConfigurationError, match="no voxel is more than 30 voxels inside of the body"):
        search(network, torch.full((1, 1, 40, 40), 0.5), margin=30)


def test_surroundings_are_around_the_voxel_and_end_with_the_image() -> None:
    image = np.arange(1.0, 31 * 29 + 1).reshape(31, 29)
    part = surroundings(image, 3, 28)
    assert part.shape == (SIDE, SIDE)
    assert part[SIDE // 2, SIDE // 2] == image[3, 28]
    assert (part[: SIDE // 2 - 3] == 0).all()
    assert (part[:, SIDE // 2 + 1 :] == 0).all()


def test_the_command_draws_both_voxels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle_with_data(tmp_path)
    shutil.copy(config("miar_brats", "inference"), bundle / "configs")
    options = {"dataset_dir": str(tmp_path / "data"), "split_file": str(tmp_path / "split.json"), "device": "cpu"}
    options |= {"bundle": str(bundle), "output_dir": str(tmp_path / "out")}
    doubt.main(**options, num_slices=2, every=2, samples=4)
    assert (tmp_path / "out" / "doubt.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("interval") == 2
    with pytest.raises(SettingError, match="samples is 1"):
        doubt.main(**options, samples=1)
