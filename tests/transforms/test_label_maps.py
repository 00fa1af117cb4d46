"""Label maps on finer grids: the same labels, the same volumes, smooth borders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter, label

from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.data.io import read_volume
from miar_monai.data.volume import Volume
from miar_monai.errors import GeometryError
from miar_monai.transforms import labels as module
from miar_monai.transforms.labels import carry_labels, label_volumes

FACTORS = [(4, 4, 1), (1, 1, 5), (2.5, 2.5, 2.5), (1.7, 1, 1), (1.25, 1.25, 3.3)]
SIDE = 37
PLACES = np.stack(np.meshgrid(*[np.arange(SIDE) - SIDE / 2 + 0.3] * 3, indexing="ij"), -1)
RADII = np.linalg.norm(PLACES, axis=-1)


def helix(radius: float = 10) -> np.ndarray:
    """Return a curve one voxel thick."""
    t = np.linspace(0, 1, 2000)
    curve = np.zeros((SIDE,) * 3, np.int16)
    points = 18 + radius * np.cos(7 * t), 18 + radius * np.sin(7 * t), 4 + 30 * t
    curve[tuple(np.rint(part).astype(int) for part in points)] = 1
    return curve


def tissue(shape: Sequence[int], count: int, seed: int = 0) -> np.ndarray:
    """Return folded tissues in an ellipsoid, numbered from 1, like a segmentation of a brain."""
    rng = np.random.default_rng(seed)
    fields = [gaussian_filter(rng.standard_normal(shape), 2.5) for _ in range(count)]
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    return np.where((grid**2).sum(0) < 0.8, np.argmax(fields, 0) + 1, 0).astype(np.int16)


def parcels(count: int) -> np.ndarray:
    """Return a parcellation of the whole volume without background."""
    centers = np.random.default_rng(0).uniform(-SIDE / 2, SIDE / 2, (count, 3))
    return (1000 + np.argmin(((PLACES[..., None, :] - centers) ** 2).sum(-1), -1)).astype(np.int32)


MAPS = {
    "small sphere": (RADII < 4.3).astype(np.uint8),
    "sphere": (RADII < 9.2).astype(np.uint8),
    "shells": (RADII < 6).astype(np.int16) + 2 * (RADII < 12),
    "thin shell": 7 * ((RADII > 10) & (RADII < 11)).astype(np.float32),
    "vessel": helix(),
    "vessel and organ": helix() | (RADII < 7),
    "tissue": tissue((41, 37, 33), 5),
    "parcels": parcels(40),
}


def as_volume(array: np.ndarray, spacing: Sequence[float] = (1, 1, 1)) -> Volume:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -20, 30, 5
    return Volume(array, affine, array.dtype, Path("seg.nii.gz"))


def finer(labels: Volume, factors: Sequence[float]) -> Volume:
    return carry_labels(labels, labels.grid.resized([1 / factor for factor in factors]))


def check_volumes(before: Volume, after: Volume, tolerance: float = 0.01) -> None:
    assert set(np.unique(after.array)) == set(np.unique(before.array))
    assert after.array.dtype == before.array.dtype
    wanted = label_volumes(before)
    if before.array.all():  # without background, labels share what the field of view gains by rounding of its size
        gain = (
            np.prod(after.grid.shape) * np.linalg.det(after.affine) / np.linalg.det(before.affine) / before.array.size
        )
        assert gain == pytest.approx(1, abs=0.02)
        wanted = {value: volume * gain for value, volume in wanted.items()}
    assert label_volumes(after) == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.9, 1.1, 4)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_labels_and_volumes_stay(name: str, spacing: Sequence[float], factors: Sequence[float]) -> None:
    before = as_volume(MAPS[name], spacing)
    after = finer(before, factors)
    check_volumes(before, after)
    assert fov_corners(after.affine, after.array.shape) == pytest.approx(
        fov_corners(before.affine, before.array.shape), abs=0.26 * after.grid.spacing.max()
    )


@given(
    st.lists(st.sampled_from([1, 1.3, 1.5, 2, 2.75, 4]), min_size=3, max_size=3).filter(lambda f: max(f) > 1),
    st.floats(5, 12),
    st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_volumes_of_spheres_stay_wherever_they_are(factors: list[float], radius: float, center: list[float]) -> None:
    before = as_volume((np.linalg.norm(PLACES - center, axis=-1) < radius).astype(np.uint8))
    check_volumes(before, finer(before, factors))


@pytest.mark.parametrize("factors", [(4, 4, 4), (4, 4, 1)], ids=str)
def test_borders_are_smoother_than_those_of_the_nearest_voxels(factors: tuple[int, ...]) -> None:
    """The carried sphere is closer to the true one than blocks of voxels are."""
    radius, labels = 9.2, as_volume(MAPS["sphere"])
    after = finer(labels, factors)
    blocks = np.kron(labels.array, np.ones(factors, np.uint8))
    places = apply_affine(np.linalg.inv(labels.affine) @ after.affine, np.moveaxis(np.indices(blocks.shape), 0, -1))
    truth = np.linalg.norm(places - SIDE / 2 + 0.3, axis=-1) < radius
    wrong, wrong_blocks = (np.count_nonzero(array.astype(bool) != truth) for array in (after.array, blocks))
    assert wrong < 0.55 * wrong_blocks


def test_between_slices_the_outline_changes_gradually() -> None:
    """A cone in thick slices has no steps as high as the slices."""
    x, y, z = np.ogrid[:60, :60, :10]
    cone = ((x - 30) ** 2 + (y - 30) ** 2 < (5 + 1.5 * z) ** 2).astype(np.uint8)
    areas = finer(as_volume(cone, (1, 1, 5)), (1, 1, 5)).array.sum((0, 1)).astype(float)
    steps, nearest = np.diff(areas), np.diff(cone.sum((0, 1)).astype(float))
    assert steps.max() < 0.6 * nearest.max()
    assert np.count_nonzero(steps > 0) > 20  # of 49; 9 with the nearest slices


def test_thin_structures_stay_in_one_piece() -> None:
    after = finer(as_volume(helix()), (4, 4, 4)).array
    assert label(after, np.ones((3, 3, 3)))[1] == 1
    beside = finer(as_volume(helix() | (RADII < 7)), (4, 4, 1)).array.astype(bool)
    near = np.kron(gaussian_filter(helix().astype(float), 1, truncate=1) > 0, np.ones((4, 4, 1))) > 0
    assert np.count_nonzero(beside & near) > 0.85 * 16 * helix().sum()


def test_centers_of_voxels_keep_their_labels() -> None:
    """With an odd factor, the central one of the new voxels is at the center of the old one."""
    before = as_volume(MAPS["vessel and organ"])
    centers = finer(before, (3, 3, 3)).array[1::3, 1::3, 1::3]
    assert np.mean(centers == before.array) > 0.998
    assert np.mean(centers[before.array > 0] > 0) > 0.97


@pytest.mark.parametrize("degrees", [0, 20])
def test_a_label_map_on_another_grid_is_brought_over_by_the_affines(degrees: float) -> None:
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    swapped = turn @ np.array([[0, 0, -0.5, 22], [0.5, 0, 0, -20], [0, -0.6, 0, 24], [0, 0, 0, 1.0]])
    labels = as_volume(MAPS["shells"])._replace(affine=np.eye(4) - 18.2 * np.eye(4, 4, 3) * [[1], [1], [1], [0]])
    labels.affine[:3, 3] = -18.2
    after = carry_labels(labels, Grid((88, 90, 92), swapped))
    check_volumes(labels, after)
    places = apply_affine(after.affine, np.moveaxis(np.indices(after.array.shape), 0, -1))
    truth = (np.linalg.norm(places, axis=-1) < 6).astype(int) + 2 * (np.linalg.norm(places, axis=-1) < 12)
    assert np.mean(after.array == truth) > 0.985


def test_outside_of_the_label_map_is_background_and_nothing_in_common_is_refused() -> None:
    labels = as_volume(parcels(5))
    moved = labels.affine.copy()
    moved[0, 3] += SIDE - 10
    after = carry_labels(labels, Grid((40, SIDE, SIDE), moved)).array
    assert not after[10:].any()
    assert after[:10].all()
    moved[0, 3] += 11
    with pytest.raises(GeometryError, match=r"seg\.nii\.gz has no voxel in the field of view of the image"):
        carry_labels(labels, Grid((40, SIDE, SIDE), moved))


@pytest.mark.parametrize("degrees", [0, 15])
@pytest.mark.parametrize("slices", [1, 9])
def test_of_a_larger_label_map_the_volume_in_the_field_of_view_counts(slices: int, degrees: float) -> None:
    """An image shows a part of the labels, between their slices."""
    labels = as_volume(np.repeat(MAPS["shells"][:, :, ::3], 1, 2), (1, 1, 3))
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    affine[:2, :2] = 0.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine[:3, 3] = apply_affine(labels.affine, [18, 18, 6.1]) - affine[:3, :3] @ [30, 26, slices / 2]
    grid = Grid((60, 52, slices), affine)
    after = carry_labels(labels, grid)
    places = np.moveaxis(np.indices(grid.shape), 0, -1)
    nearest = np.rint(apply_affine(np.linalg.inv(labels.affine) @ affine, places)).astype(int)
    expected = labels._replace(array=labels.array[tuple(np.moveaxis(nearest, -1, 0))], affine=affine)
    assert label_volumes(after) == pytest.approx(label_volumes(expected), rel=0.03)


def test_a_label_map_within_one_voxel_needs_no_more_memory_than_others() -> None:
    tiny = Volume(MAPS["sphere"], np.diag([1e-5, 1e-5, 1, 1]), np.dtype("u1"), Path("tiny.nii"))
    assert carry_labels(tiny, Grid((9, 7, 5), np.eye(4))).array.shape == (9, 7, 5)


def test_the_same_grid_changes_nothing_and_a_coarser_one_is_possible() -> None:
    labels = as_volume(MAPS["tissue"])
    rounded = labels.grid._replace(affine=labels.affine + 1e-6 * np.eye(4, k=2))
    np.testing.assert_array_equal(carry_labels(labels, rounded).array, labels.array)
    check_volumes(labels, carry_labels(labels, labels.grid.resized((2, 1.5, 1))), 0.03)


def test_a_single_slice_and_one_label_are_carried() -> None:
    flat = as_volume((RADII[:, :, 18:19] < 9).astype(np.int16))
    after = finer(flat, (4, 4, 1))
    assert after.array.shape == (4 * SIDE, 4 * SIDE, 1)
    check_volumes(flat, after)
    empty = as_volume(np.zeros((9, 8, 7), np.uint8))
    assert not finer(empty, (2, 2, 2)).array.any()


def test_hundreds_of_labels_and_tiles_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = as_volume(parcels(300))
    whole = finer(labels, (2, 2, 3))
    check_volumes(labels, whole)
    monkeypatch.setattr(module, "_TILE", 23)
    np.testing.assert_array_equal(finer(labels, (2, 2, 3)).array, whole.array)


def test_numbers_of_any_size_stay_exact() -> None:
    large = np.array([0, 2**40 + 1, 2**53 + 1])[MAPS["shells"].clip(0, 2)]
    assert set(np.unique(finer(as_volume(large), (2, 2, 1)).array)) == {0, 2**53 + 1} | set(large.ravel())


@pytest.mark.parametrize("factors", [(1.7, 1, 1), (1, 1, 3.3)], ids=str)
@pytest.mark.parametrize("name", ["small sphere", "sphere"])
def test_labels_of_a_few_voxels_do_not_make_the_others_less_exact(name: str, factors: tuple[float, ...]) -> None:
    """Some are exact in no iteration, and so the greatest error of all labels must not choose the best one."""
    labels, rng = MAPS[name].astype(np.int16), np.random.default_rng(2)
    for number in range(2, 14):
        x, y, z = rng.integers(2, SIDE - 3, 3)
        labels[x : x + rng.integers(1, 3), y : y + rng.integers(1, 3), z] = number
    before, after = label_volumes(as_volume(labels)), label_volumes(finer(as_volume(labels), factors))
    assert after.keys() == before.keys()
    assert after[1] == pytest.approx(before[1], rel=0.004)


def segmented(brain: Path) -> dict[str, Volume]:
    """Return three tissues and the bright part of a tumor, and the bright spots one by one, of a T1 and its T2."""
    t1, t2 = (read_volume(brain / f"{brain.name}_{contrast}.nii.gz") for contrast in ("t1", "t2"))
    inside = t1.array > 0
    tissues = np.where(inside, 1 + np.digitize(t1.array, np.quantile(t1.array[inside], [0.15, 0.55])), 0)
    bright = gaussian_filter(t2.array, 1) > np.quantile(t2.array[inside], 0.97)
    parts, count = label(bright & inside)
    order = np.argsort(-np.bincount(parts.ravel(), minlength=count + 1)[1:])
    spots = np.r_[0, np.argsort(order) + 1][parts]
    tissues[spots == 1] = 4
    arrays = {"tissues": tissues.astype(np.uint8), "spots": np.where(spots <= 60, spots, 0).astype(np.int16)}
    return {name: Volume(array, t1.affine, array.dtype, t1.path) for name, array in arrays.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("coarser", "factors"),
    [((1, 1, 1), (2, 2, 2)), ((1, 1, 1), (1.5, 1.5, 1.5)), ((1, 1, 5), (1, 1, 5)), ((1, 1, 5), (1, 1, 3.3)),
     ((4, 4, 1), (4, 4, 1))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("patient", ["BraTS2021_01484", "BraTS2021_00006"])
def test_tissues_tumor_and_spots_of_a_brain_keep_their_volumes(
    patient: str, coarser: tuple[int, ...], factors: tuple[float, ...], real_data: Path
) -> None:
    """Twice and one and a half times as fine, isotropic from slices of 5 mm, and in the axial plane."""
    x, y, z = coarser
    errors: dict[str, list[tuple[int, float]]] = {}
    for name, labels in segmented(real_data / "brain" / patient).items():
        array = labels.array[30:210, 20:220, 20:130][x // 2 :: x, y // 2 :: y, z // 2 :: z]
        before = labels._replace(array=array, affine=labels.affine @ np.diag([*coarser, 1.0]))
        volumes, carried = label_volumes(before), label_volumes(finer(before, factors))
        errors[name] = [(np.sum(array == int(key)), abs(carried[key] / volumes[key] - 1)) for key in volumes]
        assert carried.keys() == volumes.keys()
    assert len(errors["tissues"]) == 4
    assert max(error for _, error in errors["tissues"]) < 0.003
    assert max(error for size, error in errors["spots"] if size >= 100) < 0.005
    assert max([error for size, error in errors["spots"] if 27 <= size < 100], default=0) < 0.015
    assert max(error for _, error in errors["spots"]) < 0.34  # new voxels are whole
