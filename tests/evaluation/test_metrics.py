from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.weights import need
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import PSNRMetric, SSIMMetric
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from miar_monai.errors import ConfigurationError
from miar_monai.evaluation import metrics
from miar_monai.evaluation.metrics import METRICS, body_mask, create_metrics, psnr, ssim

FIDELITY = ["PSNR", "SSIM", "PSNR body", "SSIM body"]


@pytest.fixture
def slices(phantom: Tensor) -> Tensor:
    return phantom.movedim(-1, 0)


def body(hr: Tensor) -> Tensor:
    return body_mask(hr, 0.1)


@given(st.floats(0.01, 0.9), st.floats(0.0, 0.1))
def test_psnr_of_a_constant_error_has_a_closed_form(error: float, base: float) -> None:
    hr = torch.full((1, 1, 37, 31), base, dtype=torch.float64)
    assert psnr(hr + error, hr).item() == pytest.approx(-20 * math.log10(error), abs=1e-9)


def test_ssim_of_two_constants_has_a_closed_form() -> None:
    a, b, c1 = 0.3, 0.7, 0.01**2
    images = [torch.full((1, 1, 37, 31), value) for value in (a, b)]
    # float32 rounding in the variances (1e-8) stands against c2 = 9e-4
    assert ssim(*images).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-3)


def test_psnr_and_ssim_equal_those_of_monai(slices: Tensor) -> None:
    sr = (slices + 0.1 * torch.randn_like(slices)).clamp(0, 1)
    torch.testing.assert_close(psnr(sr, slices), PSNRMetric(max_val=1.0)(sr, slices)[:, 0])
    torch.testing.assert_close(ssim(sr, slices), SSIMMetric(spatial_dims=2, data_range=1.0)(sr, slices)[:, 0])


def test_ssim_keeps_its_precision_under_autocast() -> None:
    hr = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    sr = (hr + 0.05).clamp(0, 1)
    expected = ssim(sr, hr)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(sr, hr), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ssim_keeps_its_precision_on_a_gpu() -> None:
    hr = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    sr = (hr + 0.05).clamp(0, 1)
    torch.testing.assert_close(ssim(sr.cuda(), hr.cuda()).cpu(), ssim(sr, hr), atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_full_mask_changes_nothing(metric: metrics.Score, slices: Tensor) -> None:
    sr = slices.flip(0)
    torch.testing.assert_close(metric(sr, slices, torch.ones_like(slices, dtype=torch.bool)), metric(sr, slices))


def test_voxels_outside_the_mask_do_not_count(slices: Tensor) -> None:
    far = ~(torch.nn.functional.max_pool2d(body(slices).float(), 11, 1, 5) > 0)
    sr = slices + 0.05
    disturbed = torch.where(far, 1.0, sr)
    assert far.any()
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(disturbed, slices, body(slices)), metric(sr, slices, body(slices)))
        assert (metric(disturbed, slices) < metric(sr, slices)).all()


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_an_empty_mask_gives_nan(metric: metrics.Score, slices: Tensor) -> None:
    assert metric(slices, slices, torch.zeros_like(slices, dtype=torch.bool)).isnan().all()


def test_body_is_the_largest_component_with_its_holes_filled() -> None:
    image = torch.zeros(2, 1, 37, 31)
    image[0, 0, 5:20, 4:25] = 1
    image[0, 0, 9:12, 9:12] = 0  # a ventricle
    image[0, 0, 30:33, 2:6] = 1  # a table
    wanted = torch.zeros_like(image, dtype=torch.bool)
    wanted[0, 0, 5:20, 4:25] = True
    assert body_mask(image, 0.5).equal(wanted)


@pytest.mark.parametrize("name", FIDELITY)
def test_identical_slices_get_the_best_value(name: str, slices: Tensor) -> None:
    (score,) = create_metrics([name])[0].values()
    best = score(slices, slices, body(slices))
    assert (best == math.inf).all() if "PSNR" in name else torch.allclose(best, torch.ones(7))


def assert_worse_when_the_image_is_worse(name: str, hr: Tensor) -> None:
    (score,) = create_metrics([name])[0].values()
    sign = 1 if METRICS[name].higher_is_better else -1
    noise = torch.randn_like(hr)
    for worse in (
        [(hr + sigma * noise).clamp(0, 1) for sigma in (0.01, 0.05, 0.2)],
        [gaussian_blur(hr, [13, 13], [sigma, sigma]) for sigma in (0.5, 1.0, 3.0)],
    ):
        values = torch.stack([sign * score(sr, hr, body(hr)) for sr in (hr, *worse)])
        assert (values.diff(dim=0) < 0).all()


def assert_batch_is_not_reduced(name: str, hr: Tensor) -> None:
    (score,) = create_metrics([name])[0].values()
    sr = (hr + torch.linspace(0.01, 0.1, len(hr)).view(-1, 1, 1, 1) * torch.randn_like(hr)).clamp(0, 1)
    together = score(sr, hr, body(hr))
    alone = torch.cat([score(sr[i : i + 1], hr[i : i + 1], body(hr[i : i + 1])) for i in range(len(hr))])
    assert together.shape == (len(hr),)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FIDELITY)
def test_noise_and_blur_make_it_worse(name: str, slices: Tensor) -> None:
    assert_worse_when_the_image_is_worse(name, slices)


@pytest.mark.parametrize("name", FIDELITY)
def test_each_slice_has_its_own_value(name: str, slices: Tensor) -> None:
    assert_batch_is_not_reduced(name, slices)


@pytest.fixture
def large(slices: Tensor) -> Tensor:
    """Return two slices that are large enough for AlexNet."""
    return torch.nn.functional.interpolate(slices[:2], size=(93, 77), mode="bilinear", antialias=False)


@pytest.mark.weights
@pytest.mark.usefixtures("lpips_weights")
def test_lpips_is_zero_for_equal_slices_and_worse_when_the_image_is_worse(large: Tensor) -> None:
    (score,) = create_metrics(["LPIPS"])[0].values()
    assert score(large, large, body(large)).tolist() == [0, 0]
    assert_worse_when_the_image_is_worse("LPIPS", large)
    assert_batch_is_not_reduced("LPIPS", large)


@pytest.mark.weights
@pytest.mark.usefixtures("lpips_weights")
def test_lpips_equals_that_of_pyiqa(large: Tensor, weights_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results measured with pyiqa remain valid."""
    pyiqa = pytest.importorskip("pyiqa")
    monkeypatch.setattr("pyiqa.utils.download_util.DEFAULT_CACHE_DIR", str(weights_home / "hub" / "pyiqa"))
    need(weights_home, "pyiqa/LPIPS_v0.1_alex-df73285e.pth")
    (score,) = create_metrics(["LPIPS"])[0].values()
    noisy = (large + 0.1 * torch.randn_like(large)).clamp(0, 1)
    values = score(noisy, large, body(large))
    with torch.no_grad():
        wanted = pyiqa.create_metric("lpips")(*(image.expand(-1, 3, -1, -1) for image in (noisy, large))).flatten()
    assert (wanted > 0.05).all()
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-6)
    assert not values.requires_grad


@pytest.mark.weights
@pytest.mark.usefixtures("lpips_weights")
def test_lpips_needs_no_pyiqa(large: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # an import of it fails
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if name == "pyiqa" else find_spec(name))
    scores, (sentence,) = create_metrics(["LPIPS", "DISTS"])
    assert list(scores) == ["LPIPS"]
    assert sentence.startswith("DISTS is left out: pyiqa is not installed; install it with pip install miar-monai[met")


def test_a_metric_without_weights_is_reported_and_the_others_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyiqa")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    scores, missing = create_metrics(list(METRICS))
    assert list(scores) == FIDELITY
    assert [sentence.split()[0] for sentence in missing] == ["LPIPS", "ST-LPIPS", "DISTS", "MUSIQ", "MANIQA"]
    assert str(tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth") in missing[0]
    assert "alex_shift_tolerant.pth" in missing[1]
    assert "vgg16" in missing[2]
    assert "musiq_koniq" in missing[3]
    assert "ckpt_koniq10k.pt" in missing[4]
    assert "timm/vit_base_patch8_224" in missing[4]
    assert all("set TORCH_HOME" in sentence for sentence in missing)


def test_damaged_weights_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for file in METRICS["LPIPS"].weights:
        path = tmp_path / "hub" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not weights")
    scores, (sentence,) = create_metrics(["PSNR", "LPIPS"])
    assert list(scores) == ["PSNR"]
    assert sentence.startswith(f"LPIPS is left out: its weights in {tmp_path}")
    assert sentence.endswith("get the files again.")


def test_without_lpips_and_pyiqa_the_message_tells_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    scores, missing = create_metrics(["LPIPS", "DISTS", "SSIM"])
    assert list(scores) == ["SSIM"]
    assert missing == [
        "LPIPS is left out: lpips is not installed; install it with pip install lpips.",
        "DISTS is left out: pyiqa is not installed; install it with pip install miar-monai[metrics] (its license is "
        "non-commercial).",
    ]


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown metrics \['FID'\]: the known ones are \['PSNR'"):
        create_metrics(["PSNR", "FID"])


def test_the_registry_lists_the_metrics_with_weights() -> None:
    wanted = ["LPIPS", "ST-LPIPS", "DISTS", "MUSIQ", "MANIQA"]
    assert [name for name, metric in METRICS.items() if metric.needs_weights] == wanted
