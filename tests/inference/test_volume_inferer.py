"""Any finer grid: geometry, data consistency, planes, guides and expected errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.phantoms import head
from helpers.tiny import started, tiny_miar
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch import Tensor

from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, SettingError
from miar_monai.inference.acquisition import SLICE_PROFILES, Acquisition
from miar_monai.inference.error_model import ErrorModel
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.inference.passes import plan_passes
from miar_monai.inference.volume_inferer import VolumeInferer
from miar_monai.networks import Estimator, SuperResolutionNetwork
from miar_monai.networks.linear import NoiseModel

EXACT = NoiseModel(1e-6, 1e9, 1e9)
FLAT = ErrorModel(offset=0.0, disagreement=0.0, edges=0.0, entropy=0.0)


def tiny_estimator(**options: Any) -> Estimator:
    return started(Estimator(**{"channels": (8, 16), "blocks": (1, 1)} | options)).eval()


NETWORKS = {
    "MIAR": started(tiny_miar(noise_model=EXACT)).double().eval(),
    "Estimator": tiny_estimator(noise_model=EXACT).double(),
}


def inferer(uncertainty: bool = False, **request: Any) -> VolumeInferer:
    slices = BeamSearchInferer(lookahead_tokens=0, uncertainty=uncertainty, error_model=FLAT)
    return VolumeInferer(slices, **request)


def volume(fine: tuple[int, int, int], factors: tuple[float, ...], spacing: tuple[float, ...]) -> MetaTensor:
    """Return a head, degraded as assumed to the given spacing, as a batch of one volume in float64."""
    axis = int(np.argmax(spacing))
    plan = plan_passes(factors, spacing, lambda plane: Degradation(), Acquisition(axis, spacing[axis], spacing[axis]))
    coarse = Grid(fine, np.diag([*np.divide(spacing, factors), 1.0])).resized(factors)
    lr = plan.degraded(torch.from_numpy(head(fine)), plan.grids(coarse))
    return MetaTensor(lr[None, None], affine=torch.from_numpy(coarse.affine))


# fine shape, factors, spacing of the input; the tiny MIAR pads slices of less than 40 HR voxels, which changes borders
CASES = {
    "axial": ((40, 44, 3), (4, 4, 1), (2, 2, 3)),
    "thick axial": ((14, 12, 40), (1, 1, 5), (1, 1, 5)),
    "thick sagittal": ((40, 12, 14), (5, 1, 1), (4, 1, 1)),
    "thick coronal, broken": ((13, 48, 12), (1, 3.2, 1), (1, 4, 1)),
    "in-plane of sagittal": ((5, 40, 45), (1, 2, 2.5), (3, 1, 1)),
    "all": ((40, 42, 40), (2, 1.5, 4), (1, 0.9, 4)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("unbounded")
def test_the_degraded_result_is_the_input(case: str, network: str) -> None:
    lr = volume(*CASES[case])
    resolve = inferer(factor=CASES[case][1])
    plan = resolve.plan(lr[0], NETWORKS[network])
    result = resolve(lr, NETWORKS[network])
    assert isinstance(result, MetaTensor)
    assert result.dtype == torch.float64
    grids = plan.grids(Grid(tuple(lr.shape[2:]), lr.affine.numpy()))  # type: ignore[arg-type]
    again = plan.degraded(result.as_tensor()[0, 0], grids)
    assert (again - lr.as_tensor()[0, 0]).abs().max() < 1e-3 * (lr.max() - lr.min())
    plain = torch.nn.functional.interpolate(lr.as_tensor(), result.shape[2:], mode="trilinear")
    assert (result.as_tensor() - plain).abs().max() > 0.01


@given(
    factors=st.tuples(*[st.sampled_from([1, 1.5, 2, 16 / 3])] * 3).filter(lambda triple: max(triple) > 1),
    turn=st.lists(st.floats(-0.5, 0.5), min_size=9, max_size=9),
)
@settings(max_examples=8)
def test_the_affine_is_that_of_the_resized_grid(factors: tuple[float, ...], turn: list[float]) -> None:
    affine = np.diag([0.8, 1.1, 3, 1])
    affine[:3, :3] += 0.2 * np.reshape(turn, (3, 3))
    affine[:3, 3] = 7, -30, 12
    x = MetaTensor(torch.rand(1, 1, 5, 6, 4), affine=torch.from_numpy(affine))
    result = inferer(factor=factors)(x, tiny_estimator())
    expected = Grid((5, 6, 4), affine).resized([1 / factor for factor in factors])
    assert tuple(result.shape[2:]) == expected.shape
    np.testing.assert_allclose(result.affine.numpy(), expected.affine, atol=1e-9)
    centers = [fov_corners(a, n).mean(0) for a, n in ((affine, (5, 6, 4)), (result.affine.numpy(), result.shape[2:]))]
    np.testing.assert_allclose(*centers, atol=1e-9)


def test_a_spacing_is_met_exactly_and_patient_axes_are_found_in_any_orientation() -> None:
    affine = np.array([[0, 0, -3.0, 0], [0.8, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # A, I, L
    x = MetaTensor(torch.rand(1, 1, 6, 5, 4), affine=torch.from_numpy(affine))
    result = inferer(spacing="1,0.8,0.7")(x, tiny_estimator())
    assert result.shape[2:] == (6, 7, 12)
    grid = Grid(tuple(result.shape[2:]), result.affine.numpy())  # type: ignore[arg-type]
    np.testing.assert_allclose(grid.patient_spacing, (1, 0.8, 0.7), atol=1e-9)
    isotropic = inferer(isotropic=True)(x, tiny_estimator())
    np.testing.assert_allclose(Grid((1, 1, 1), isotropic.affine.numpy()).spacing, 0.8, atol=1e-9)


def test_without_a_request_the_axial_plane_becomes_finer_as_by_the_inferer_of_slices() -> None:
    x = MetaTensor(torch.rand(1, 1, 11, 9, 3), affine=torch.diag(torch.tensor([1.0, 1, 1.2, 1])))
    network = started(tiny_miar()).eval()
    result, expected = inferer()(x, network), inferer().inferer(x, network)
    assert torch.equal(result.as_tensor(), expected.as_tensor())
    assert torch.equal(result.affine, expected.affine)


def test_two_planes_are_averaged() -> None:
    lr, network = volume(*CASES["thick axial"]), NETWORKS["Estimator"]
    resolve = inferer(factor=(1, 1, 5))
    ((first, second),) = resolve.plan(lr[0], network).stages
    parts = [
        resolve.inferer(lr.as_tensor().movedim(axes, (2, 3)), network, assumed=one.degradation).movedim((2, 3), axes)
        for one, axes in ((one, [2 + axis for axis in one.plane]) for one in (first, second))
    ]
    assert not torch.allclose(parts[0], parts[1], atol=1e-3)
    torch.testing.assert_close(resolve(lr, network).as_tensor(), (parts[0] + parts[1]) / 2)


def test_constant_and_single_slices_and_thin_volumes() -> None:
    x = torch.rand(1, 1, 9, 8, 4)
    x[:, :, :3] = 0.25
    result = inferer(factor=(1, 1, 3))(x, tiny_estimator())
    assert result.shape == (1, 1, 9, 8, 12)
    flat = inferer(factor=2)(torch.full((1, 1, 5, 4, 3), 0.7), tiny_estimator())
    torch.testing.assert_close(flat, torch.full((1, 1, 10, 8, 6), 0.7))
    for shape in ((1, 1, 9, 8, 1), (1, 1, 1, 8, 5)):
        assert inferer(factor=2)(torch.rand(shape), tiny_estimator()).shape[2:] == tuple(2 * n for n in shape[2:])


def test_expected_errors_of_planes_are_averaged_and_of_stages_added_in_quadrature() -> None:
    network, x = (
        tiny_estimator(),
        MetaTensor(torch.rand(1, 1, 9, 8, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1]))),
    )
    one = inferer(uncertainty=True, factor=(1, 1, 5))(x, network)
    assert one["error"].shape == one["image"].shape == (1, 1, 9, 8, 20)
    torch.testing.assert_close(one["error"].as_tensor(), torch.ones(1, 1, 9, 8, 20))  # the model predicts 1
    two = inferer(uncertainty=True, factor=(2, 2, 5))(x, network)
    torch.testing.assert_close(two["error"].as_tensor(), torch.full((1, 1, 18, 16, 20), 2**0.5))
    np.testing.assert_array_equal(two["error"].affine, two["image"].affine)


class Copying(Estimator):
    """Return the guide as both maps."""

    def maps(self, images: Tensor, condition: Tensor) -> Tensor:
        return images[:, 1:].expand(-1, 2, -1, -1)


@pytest.mark.parametrize("factor", [(1, 1, 3), (2, 2, 1), (2, 2.5, 3)])
@pytest.mark.usefixtures("unbounded")
def test_a_guide_is_passed_for_every_slice_of_every_plane(factor: tuple[float, ...]) -> None:
    network = Copying(channels=(8, 16), blocks=(1, 1), guide_channels=1, back_end=lambda maps, _: maps).eval()
    x = MetaTensor(torch.rand(1, 1, 9, 8, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    asked: dict[tuple[int, ...], Tensor] = {}

    def guide(grid: Grid) -> Tensor:
        return asked.setdefault(grid.shape, torch.rand(1, *grid.shape))

    result = inferer(factor=factor)(x, network, guide=guide)
    torch.testing.assert_close(result.as_tensor()[0], asked[tuple(result.shape[2:])])
    assert len(asked) == (2 if min(factor) > 1 else 1)
    assert torch.equal(inferer(factor=factor)(x, network).as_tensor(), torch.zeros(result.shape))  # none is zero


@pytest.mark.parametrize("factor", [(1, 1, 3), (2, 2.5, 3)])
@pytest.mark.usefixtures("unbounded")
def test_a_guide_on_another_grid_is_resampled_for_every_stage(factor: tuple[float, ...]) -> None:
    """A guide whose intensity is the position in centimeters has that of each voxel in the result."""
    network = Copying(channels=(8, 16), blocks=(1, 1), guide_channels=1, back_end=lambda maps, _: maps).eval()
    x = MetaTensor(torch.rand(1, 1, 9, 8, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    guide_grid = Grid((20, 21, 30), np.array([[0, 0, 1, -9.0], [0, 1.1, 0, -8], [2, 0, 0, -11], [0, 0, 0, 1]]))

    def position(grid: Grid) -> Tensor:
        i, j, k = (torch.arange(size) for size in grid.shape)
        a, b, c, d = torch.from_numpy(np.array([0.1, 0.2, 0.3, 1]) @ grid.affine).float()
        return (a * i[:, None, None] + b * j[:, None] + c * k + d + 5) / 10

    guide = MetaTensor(position(guide_grid)[None, None], affine=torch.from_numpy(guide_grid.affine))
    result = inferer(factor=factor)(x, network, guide=guide)
    expected = position(Grid(tuple(result.shape[2:]), result.affine.reshape(4, 4).numpy()))
    torch.testing.assert_close(result.as_tensor()[0, 0], expected, atol=2e-3, rtol=0)


def test_a_network_without_guide_refuses_one() -> None:
    x = MetaTensor(torch.rand(1, 1, 9, 8, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    with pytest.raises(SettingError, match="a guide is given, but this model was trained without one; leave it out"):
        inferer()(x, tiny_estimator(), guide=x)


def test_noise_causes_one_warning_for_all_passes(caplog: pytest.LogCaptureFixture) -> None:
    x = MetaTensor(torch.rand(1, 1, 16, 16, 12), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    inferer(factor=(2, 2, 4))(x, tiny_estimator())
    assert len(caplog.messages) == 1
    assert "the input is noisier than the training data" in caplog.messages[0]


def test_memory_on_the_device_does_not_grow_with_the_number_of_slices() -> None:
    sizes = []

    class Watched(Estimator):
        def maps(self, images: Tensor, condition: Tensor) -> Tensor:
            sizes.append(len(images))
            return super().maps(images, condition)

    network = Watched(channels=(8, 16), blocks=(1, 1)).eval()
    x = MetaTensor(torch.rand(1, 1, 9, 8, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    VolumeInferer(BeamSearchInferer(sw_batch_size=3), factor=(1, 1, 5))(x, network)
    assert sizes == [3, 3, 3, 3, 3, 2]  # 9 sagittal and 8 coronal slices


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"factor": 2, "spacing": 1}, "factor and spacing are given, but only one of factor, spacing and isotropic"),
        ({"factor": 9}, "factor is 9, but it must lie between 1 and 8"),
        ({"factor": "a"}, "factor 'a' must be one positive number, or three with commas, such as 1,1,5"),
    ],
)
def test_wrong_requests_are_one_sentence(request_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        inferer(**request_)


def test_an_impossible_slice_thickness_is_refused() -> None:
    x = MetaTensor(torch.rand(1, 1, 5, 4, 3), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    with pytest.raises(SettingError, match="a slice thickness of 50 mm is given, but for slices 5 mm apart it"):
        inferer(factor=2, slice_thickness=50)(x, tiny_estimator())
    with pytest.raises(SettingError, match="slice_thickness is 'thin', but it must lie between"):
        inferer(factor=2, slice_thickness="thin")(x, tiny_estimator())


@pytest.mark.parametrize("profile", SLICE_PROFILES)
def test_the_profile_that_is_asked_for_is_that_of_the_operator(profile: str) -> None:
    x = MetaTensor(torch.rand(1, 9, 8, 4), affine=torch.diag(torch.tensor([1.0, 1, 5, 1])))
    plan = inferer(factor=(1, 1, 5), slice_profile=profile).plan(x, tiny_estimator())
    assert [one.degradation.profiles for one in plan.stages[0]] == [("bicubic", profile)] * 2
    assert str(plan.acquisition).endswith(f"{profile} profile assumed".replace("slr", "SLR").replace("gau", "Gau"))


@pytest.mark.parametrize("profile", ["bell", "SLR", "bicubic", None, 1, ["slr"]])
def test_an_unknown_slice_profile_is_refused(profile: Any) -> None:
    with pytest.raises(
        SettingError, match=r"slice_profile is .*, but it must be one of slr, gaussian, box; correct the"
    ):
        inferer(slice_profile=profile)


def test_other_shapes_are_refused() -> None:
    network: SuperResolutionNetwork = tiny_estimator()
    for shape in ((2, 1, 4, 4, 4), (1, 1, 4, 4), (1, 2, 4, 4, 4)):
        with pytest.raises(
            ConfigurationError, match=r"but one volume \(1, 1, X, Y, Z\) is needed; pass volumes one by"
        ):
            inferer()(torch.rand(shape), network)
