"""The expected error: its predictors, its units, its files, and that it leaves the image unchanged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.bundle_runs import EACH_NETWORK, TOKENS, workflow
from helpers.commands import miar
from helpers.phantoms import LPS_AFFINE, head, write_dicom_series, write_nifti_phantom
from helpers.tiny import started, tiny_miar
from helpers.tiny_bundle import write_tiny_bundle
from monai.data import MetaTensor
from test_inferer import TILE, Nearest, inferer
from torch import Tensor

from miar_monai.data.io import Volume, read_volume
from miar_monai.errors import ConfigurationError, find_miar_error
from miar_monai.inference.error_model import ErrorModel, error_predictors
from miar_monai.inference.resolver import SuperResolver
from miar_monai.networks import MIAR
from miar_monai.networks.decoding import Decoding, decode_tokens, token_entropy
from miar_monai.networks.results import Estimate

pytestmark = pytest.mark.usefixtures("elsewhere")

MODEL = ErrorModel(offset=-0.5, disagreement=0.6, edges=0.3, entropy=1.5, noise=0.1)
NO_NOISE = torch.zeros(1, 1, 1, 1)


def estimate(sr: Tensor, estimates: Tensor, weight: Tensor | None = None) -> Estimate:
    """Return an estimate with a network weight of 1 by default."""
    return Estimate(sr, *estimates.split(1, dim=1), torch.ones(1, 1, 1, 1) if weight is None else weight)


SAGITTAL = np.array([[0.0, 0, 2, -20], [1, 0, 0, -30], [0, -1, 0, 10], [0, 0, 0, 1]])
SHAPE = (19, 13, 3)


@pytest.fixture(scope="module")
def network() -> MIAR:
    torch.manual_seed(0)
    return started(tiny_miar()).eval()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return {name: write_tiny_bundle(folder / name, name) for name in EACH_NETWORK}


# Entropy


def test_token_entropy_follows_its_definition() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25, 0], [1, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0]])
    result = token_entropy(p.log().clamp(min=-99)[None], 2)  # two positions, two codebooks
    torch.testing.assert_close(result, torch.tensor([[(0.75 + 0) / 2, (1 + 0.5) / 2]]))


def test_requesting_the_entropy_does_not_change_the_tokens(network: MIAR) -> None:
    observed = network.observe(torch.rand(2, 1, TILE, TILE))
    context = network.transformer.context(network.features(observed.linear, observed.condition).f_lr)
    for decoding in (Decoding(), Decoding("beam", 2), Decoding("top_p", seed=3)):
        parts = network.transformer, network.quantizer, context, decoding
        plain, requested = decode_tokens(*parts), decode_tokens(*parts, with_entropy=True)
        assert plain.entropy is None
        assert torch.equal(plain.tokens, requested.tokens)
        assert torch.equal(plain.f_hat, requested.f_hat)
        assert requested.entropy is not None
        assert requested.entropy.shape == (2, 1, 5, 5)
        assert (
            -0.1 < requested.entropy.min() <= requested.entropy.max() < 1.1
        )  # bicubic interpolation overshoots [0, 1]


def test_entropy_of_certain_and_uniform_predictions_is_0_and_1(network: MIAR) -> None:
    certain = started(tiny_miar()).eval()
    certain.transformer.head.weight.data.mul_(1e6)
    observed = certain.observe(torch.rand(1, 1, TILE, TILE))
    entropy = certain.predict(observed.linear, observed.condition, Decoding(), with_entropy=True).entropy
    assert entropy.shape == (1, 1, 4 * TILE, 4 * TILE)
    assert entropy.abs().max() < 0.05
    certain.transformer.head.weight.data.zero_()
    torch.nn.init.zeros_(certain.transformer.head.bias)
    entropy = certain.predict(observed.linear, observed.condition, Decoding(), with_entropy=True).entropy
    torch.testing.assert_close(entropy, torch.ones_like(entropy))


# Error model


@pytest.mark.parametrize("name", ["disagreement", "edges", "entropy"])
def test_the_expected_error_increases_with_each_predictor(name: str) -> None:
    sr, entropy = torch.full((1, 1, 33, 29), 0.5), torch.zeros(1, 1, 33, 29)
    estimates = sr.expand(-1, 2, -1, -1).clone()
    region = (..., slice(10, 14), slice(8, 12))
    if name == "disagreement":
        estimates[:, :1][region] += 0.2
    elif name == "edges":
        sr[region] += 0.2
    else:
        entropy[region] += 0.5
    weights = {"disagreement": 0.0, "edges": 0.0, "entropy": 0.0, name: 0.7}
    error = ErrorModel(offset=-2.0, **weights)(estimate(sr, estimates), entropy, NO_NOISE)
    assert error[region].min() > 1.2 * error[..., 25:, 20:].max()
    assert error.min() > 0
    assert torch.isfinite(error).all()
    constant = ErrorModel(-2.0, 0.0, 0.0, 0.0)(estimate(sr, estimates), entropy, NO_NOISE)
    assert torch.equal(constant, torch.full_like(sr, -2.0).exp())


def test_the_expected_error_is_equivariant_to_flips_and_transposition() -> None:
    sr, estimates, entropy = torch.rand(2, 1, 21, 17), torch.rand(2, 2, 21, 17), torch.rand(2, 1, 21, 17)
    error = MODEL(estimate(sr, estimates), entropy, NO_NOISE)
    for turn in (lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.mT):
        turned = MODEL(estimate(turn(sr), turn(estimates)), turn(entropy), NO_NOISE)
        torch.testing.assert_close(turned, turn(error))


def test_the_network_weight_does_not_change_the_disagreement() -> None:
    sr, linear, entropy = torch.rand(2, 1, 21, 17), torch.rand(2, 1, 21, 17), torch.rand(2, 1, 21, 17)
    estimates, weight = torch.rand(2, 2, 21, 17), torch.tensor([1.0, 0.05])[:, None, None, None]
    mixed = estimate(sr, torch.lerp(linear, estimates, weight), weight)
    error = MODEL(mixed, entropy, NO_NOISE)
    torch.testing.assert_close(error, MODEL(estimate(sr, estimates), entropy, NO_NOISE), rtol=1e-4, atol=0)
    noisier = MODEL(mixed, entropy, NO_NOISE + 2)
    torch.testing.assert_close(noisier, error * np.exp(2 * MODEL.noise), rtol=1e-4, atol=0)


def test_the_expected_error_increases_with_the_noise(network: MIAR) -> None:
    lr = network.degradation(torch.rand(2, 1, 4 * TILE, 4 * TILE))
    with_error = inferer(uncertainty=True, error_model=MODEL, strategy="greedy")
    means = []
    for level in (0.0, 0.01, 0.03):  # from 0.02 on, the network weight decreases
        noisy = lr + level * torch.randn(lr.shape, generator=torch.Generator().manual_seed(0), dtype=lr.dtype)
        means.append(with_error(noisy, network)["error"].mean())
    assert means[0] < min(means[1:])


# Inferer


@pytest.mark.parametrize("shape", [(1, 1, 7, 5, 3), (2, 1, 10, 10), (1, 1, 23, 16, 2)])
@pytest.mark.parametrize("options", [{"strategy": "greedy"}, {"lookahead_tokens": 2}, {"strategy": "top_k", "seed": 3}])
def test_the_image_is_the_same_with_and_without_uncertainty(
    shape: tuple[int, ...], options: dict[str, Any], network: MIAR
) -> None:
    x = torch.rand(shape)
    both = inferer(uncertainty=True, error_model=MODEL, **options)(x, network)
    assert list(both) == ["image", "error"]
    assert torch.equal(both["image"], inferer(**options)(x, network))
    assert both["error"].shape == both["image"].shape
    assert all(torch.isfinite(values).all() for values in both.values())
    assert both["error"].min() > 0
    assert both["error"].std() > 0


def test_the_expected_error_of_one_tile_is_that_of_its_estimates(network: MIAR) -> None:
    lr = network.degradation(torch.rand(2, 1, 4 * TILE, 4 * TILE))
    both = inferer(uncertainty=True, error_model=MODEL, strategy="greedy", fidelity=0.5)(lr, network)
    observed = network.observe(lr)
    prediction = network.predict(observed.linear, observed.condition, with_entropy=True)
    image = network.finish(prediction, observed, fidelity=0.5)
    lowest = torch.full_like(observed.damping, network.noise_model.min_damping)
    noise = observed.operator.suppressed_fraction(observed.damping) - observed.operator.suppressed_fraction(lowest)
    assert prediction.entropy is not None
    expected = MODEL(image, prediction.entropy, noise)
    torch.testing.assert_close(both["error"], expected)


def test_the_error_does_not_depend_on_the_batch_and_is_0_in_constant_slices(network: MIAR) -> None:
    x = torch.rand(1, 1, 13, 11, 5)
    x[..., 2] = 0.25
    one, many = (inferer(uncertainty=True, error_model=MODEL, sw_batch_size=n)(x, network) for n in (1, 7))
    torch.testing.assert_close(one, many, rtol=1e-3, atol=1e-5)  # batch sizes differ in rounding
    assert (many["image"][..., 2] == 0.25).all()
    assert (many["error"][..., 2] == 0).all()


def test_data_consistency_does_not_change_the_expected_error(network: MIAR) -> None:
    x = torch.rand(1, 1, 12, 10)
    options: dict[str, Any] = {"uncertainty": True, "error_model": MODEL}
    plain = inferer(**options)(x, network)
    consistent = inferer(degradation=replace(network.degradation, sigma=0.5), **options)(x, network)
    assert torch.equal(consistent["error"], plain["error"])
    assert not torch.equal(consistent["image"], plain["image"])


def test_uncertainty_without_an_error_model_or_a_miar_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^uncertainty is on but there is no error_model"):
        inferer(uncertainty=True)
    with pytest.raises(ConfigurationError, match=r"^uncertainty is on for a Nearest, but only a MIAR or an"):
        inferer(uncertainty=True, error_model=MODEL)(torch.rand(1, 1, 10, 10), Nearest())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recording_has_the_expected_error_if_requested() -> None:
    on_gpu, x = started(tiny_miar()).float().cuda().eval(), torch.rand(1, 1, 13, 11, 2)
    with_error = inferer(uncertainty=True, error_model=MODEL, lookahead_tokens=1)
    plain = inferer(lookahead_tokens=1)
    expected = with_error(x, on_gpu.cpu())
    on_gpu.cuda()
    for _ in range(5):  # launched three times, recorded, replayed
        both = with_error(x, on_gpu)
        torch.testing.assert_close(both, expected, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(both["image"], plain(x, on_gpu), rtol=1e-3, atol=1e-4)
    with_error.uncertainty = False
    assert isinstance(with_error(x, on_gpu), Tensor)


# Units and geometry


def volume(array: np.ndarray, affine: np.ndarray = LPS_AFFINE) -> Volume:
    return Volume(array.astype(np.float32), affine, np.dtype(np.float32), Path("the image"))


def test_the_expected_error_is_in_the_units_of_the_input(bundles: dict[str, Path]) -> None:
    array = 800 * head(SHAPE)
    resolver = SuperResolver(bundles["miar_brats"], "cpu", uncertainty=True)
    one, ten, shifted = (resolver.volume(volume(x)).uncertainty for x in (array, 10 * array, array + 5))
    assert one is not None
    assert ten is not None
    assert shifted is not None
    np.testing.assert_allclose(ten, 10 * one, rtol=1e-3)
    np.testing.assert_allclose(shifted, one, rtol=1e-2, atol=1)  # an offset does not change the error


def test_errors_in_hounsfield_units_have_no_offset(bundles: dict[str, Path]) -> None:
    resolver = SuperResolver(bundles[TOKENS], "cpu", uncertainty=True)
    sr = resolver.volume(volume(1500 * head(SHAPE) - 1000))
    scaled = resolver.preprocessing({"image": volume(1500 * head(SHAPE) - 1000)})["image"]
    with torch.inference_mode():
        direct = resolver.inferer(scaled[None], resolver.network)["error"][0, 0]  # (X, Y, Z) in RAS+
    assert sr.uncertainty is not None
    expected = 2048 * direct.as_subclass(torch.Tensor).numpy()[::-1, ::-1]  # of a volume in LPS+
    np.testing.assert_allclose(sr.uncertainty, expected, rtol=1e-3)


@pytest.mark.parametrize("affine", [LPS_AFFINE, SAGITTAL], ids=["axial", "sagittal"])
def test_the_error_map_has_the_type_of_the_input(affine: np.ndarray, bundles: dict[str, Path], tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "scan.nii", SHAPE, affine, np.int16)
    resolver, plain = (SuperResolver(bundles["miar_brats"], "cpu", **s) for s in ({"uncertainty": True}, {}))
    sr, error = resolver(path)
    assert np.array_equal(np.asarray(sr.dataobj), np.asarray(plain(path).dataobj))
    assert np.array_equal(error.affine, sr.affine)
    assert (sr.get_data_dtype(), error.get_data_dtype()) == (np.int16, np.float32)
    array = read_volume(path).array
    tensor = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(affine))
    sr_tensor, error_tensor = resolver(tensor)
    assert np.array_equal(error_tensor.numpy()[0], np.asarray(error.dataobj))
    assert torch.equal(error_tensor.affine, sr_tensor.affine)
    sr_slice, error_slice = resolver(array[..., 1])
    assert sr_slice.shape == error_slice.shape == (76, 52)


# Command and bundle


def test_command_and_bundle_write_the_same_map(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = bundles["miar_brats"]
    scan = write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE)
    options = ("sr", scan, "--model", bundle, "--device", "cpu", "--quiet")
    assert miar(*options, "-o", "plain").exit_code == 0
    result = miar(*options, "-o", "both", "--uncertainty", "--report", "run.json")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("both").iterdir()) == ["scan_sr.nii.gz", "scan_sr_uncertainty.nii.gz"]
    assert [path.name for path in Path("plain").iterdir()] == ["scan_sr.nii.gz"]
    both = [nib.load(Path("both", name)) for name in ("scan_sr.nii.gz", "scan_sr_uncertainty.nii.gz")]
    assert np.array_equal(np.asarray(both[0].dataobj), np.asarray(nib.load("plain/scan_sr.nii.gz").dataobj))
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    assert case["expected_absolute_error"]["mean"] == pytest.approx(np.asarray(both[1].dataobj).mean(), rel=1e-5)
    assert case["expected_absolute_error"]["maximum"] == pytest.approx(np.asarray(both[1].dataobj).max(), rel=1e-5)

    settings = {"checkpoint": str(bundle / "models" / "model.pt"), "dataset_dir": str(scan), "uncertainty": True}
    run = workflow("miar_brats", "inference", output_dir=str(tmp_path / "out"), **settings)
    run.run()
    by_bundle = nib.load(tmp_path / "out" / "scan_sr_uncertainty.nii.gz")
    assert np.array_equal(np.asarray(by_bundle.dataobj), np.asarray(both[1].dataobj))
    assert np.array_equal(by_bundle.affine, both[0].affine)
    assert by_bundle.get_data_dtype() == np.float32


def test_existing_maps_are_not_overwritten(bundles: dict[str, Path], tmp_path: Path) -> None:
    scan = write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE)
    Path("scan_sr_uncertainty.nii.gz").write_text("mine")
    options = ("sr", scan, "--model", bundles["miar_brats"], "--device", "cpu", "--quiet", "--uncertainty")
    refused = miar(*options)
    assert refused.exit_code == 1
    assert "scan_sr_uncertainty.nii.gz exists already and is left as it is" in refused.stderr
    assert not Path("scan_sr.nii.gz").exists()
    assert miar(*options, "--overwrite").exit_code == 0
    assert nib.load("scan_sr_uncertainty.nii.gz").shape == (76, 52, 3)


def test_maps_in_the_input_folder_are_not_cases(bundles: dict[str, Path], tmp_path: Path) -> None:
    scans = [write_nifti_phantom(tmp_path / "in" / f"{name}.nii.gz", SHAPE) for name in "ab"]
    options = ("--model", bundles["miar_brats"], "--device", "cpu", "--quiet", "--uncertainty", "--skip-existing")
    for _ in range(2):
        assert miar("sr", tmp_path / "in", "-o", tmp_path / "in", *options).exit_code == 0
        results = [f"{name}_sr{end}.nii.gz" for name in "ab" for end in ("", "_uncertainty")]
        assert sorted(path.name for path in (tmp_path / "in").iterdir()) == sorted([*results, "a.nii.gz", "b.nii.gz"])
    scans[0].with_name("a_sr.nii.gz").unlink()  # a map without a result, as left by an interrupted run
    assert miar("sr", tmp_path / "in", "-o", tmp_path / "in", *options).exit_code == 0
    assert scans[0].with_name("a_sr.nii.gz").is_file()


def test_the_bundle_does_not_overwrite_existing_maps(bundles: dict[str, Path], tmp_path: Path) -> None:
    scan, out = write_nifti_phantom(tmp_path / "scan.nii.gz", SHAPE), tmp_path / "out"
    out.mkdir()
    (out / "scan_sr_uncertainty.nii.gz").write_text("mine")
    checkpoint = str(bundles["miar_brats"] / "models" / "model.pt")
    settings = {"checkpoint": checkpoint, "dataset_dir": str(scan), "output_dir": str(out)}
    with pytest.raises(Exception, match="check_results") as caught:
        workflow("miar_brats", "inference", uncertainty=True, **settings).run()
    assert "scan_sr_uncertainty.nii.gz exists already" in str(find_miar_error(caught.value))
    assert [path.name for path in out.iterdir()] == ["scan_sr_uncertainty.nii.gz"]
    workflow("miar_brats", "inference", **settings).run()
    assert (out / "scan_sr.nii.gz").is_file()


def test_a_dicom_map_is_a_separate_series(bundles: dict[str, Path], tmp_path: Path) -> None:
    import pydicom

    series = write_dicom_series(tmp_path / "scan", (11, 9, 3))
    options = ("--model", bundles[TOKENS], "--device", "cpu", "--quiet", "--uncertainty")
    result = miar("sr", series, "--out-format", "dicom", *options)
    assert result.exit_code == 0, result.output
    sr, error = (read_volume(name) for name in ("scan_sr", "scan_sr_uncertainty"))
    np.testing.assert_allclose(error.affine, sr.affine, atol=1e-6)
    expected = SuperResolver(bundles[TOKENS], "cpu", uncertainty=True).volume(read_volume(series)).uncertainty
    assert expected is not None
    np.testing.assert_allclose(error.array, expected, atol=np.ptp(expected) / 65535)
    first, other = (pydicom.dcmread(Path(name, "0001.dcm")) for name in ("scan_sr", "scan_sr_uncertainty"))
    assert other.SeriesInstanceUID != first.SeriesInstanceUID
    assert (first.SeriesNumber, other.SeriesNumber) == (1001, 2001)
    assert other.SeriesDescription == "SR 4x expected error"
    assert other.DerivationDescription.startswith("expected error of MIAR super-resolution")
    assert float(other.WindowWidth) == pytest.approx(expected.max(), rel=1e-3)
    assert other.StudyInstanceUID == first.StudyInstanceUID


def test_predictors_are_finite_for_zero_images() -> None:
    flat = torch.zeros(1, 1, 9, 9)
    for weight in (torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)):
        same = estimate(flat, flat.expand(-1, 2, -1, -1), weight)
        assert torch.isfinite(error_predictors(same, flat, NO_NOISE)).all()
