"""Derived series with other slices than their source: positions, thickness, numbers and references."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from helpers.derived_series import (
    assert_read_back,
    by_height,
    change,
    complaints,
    complete,
    on_grid,
    to_mr,
)
from helpers.phantoms import set_raw, write_dicom_series
from hypothesis import given
from hypothesis import strategies as st
from nibabel.eulerangles import euler2mat
from pydicom import Dataset

from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.dicom_slices import derived_slices
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import write_series
from miar_monai.data.grid import Grid
from miar_monai.data.io import Volume, read_volume

SHAPE = (11, 9, 4)
COLUMNS, ROWS = euler2mat(0.3, -0.2, 0.4)[:, :2].T.tolist()
ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "oblique": (*COLUMNS, *ROWS),
}
FACTORS = {"thin": (1, 1, 0.2), "broken": (0.37, 0.37, 0.31), "fewer": (0.8, 1, 1.7)}  # of (0.8, 0.9, 2.5) mm


def resized(folder: Path, factors: tuple[float, float, float]) -> tuple[Volume, Path, list[Dataset]]:
    """Write a derived series on another grid; return its volume, its folder, and its images sorted by name."""
    source = read_volume(folder)
    sr = on_grid(source, source.grid.resized(factors))
    written = write_series(folder.with_name("sr"), sr, source_headers(source), "Interpolated.")
    return sr, written, [pydicom.dcmread(path) for path in sorted(written.iterdir())]


def corners(image: Dataset) -> np.ndarray:
    """Return the centers of the corner voxels of a slice in RAS+ by the elements of its header alone, (4, 3)."""
    along_row, along_column = np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float)
    rows_apart, columns_apart = map(float, image.PixelSpacing)
    origin = np.array(image.ImagePositionPatient, dtype=float)
    return np.array(
        [
            (origin + column * columns_apart * along_row + row * rows_apart * along_column) @ LPS_TO_RAS[:3, :3]
            for column in (0, image.Columns - 1)
            for row in (0, image.Rows - 1)
        ]
    )


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_every_slice_is_where_the_grid_says(
    orientation: tuple[float, ...], factors: tuple[float, float, float], tmp_path: Path
) -> None:
    source = write_dicom_series(tmp_path / "ct", SHAPE, orientation=orientation)
    sr, written, images = resized(source, factors)
    assert_read_back(sr, written, 0.5)
    assert len(images) == sr.array.shape[2] != SHAPE[2]
    width, height, _ = sr.array.shape
    for k, image in enumerate(images):
        voxels = [(x, y, k, 1) for x in (0, width - 1) for y in (0, height - 1)]
        assert np.abs(corners(image) - (sr.affine @ np.array(voxels).T).T[:, :3]).max() < 1e-6
        assert float(image.SliceThickness) == pytest.approx(2.5 * factors[2])
        assert float(image.SpacingBetweenSlices) == pytest.approx(2.5 * factors[2])


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_the_thickness_of_sheared_slices_is_measured_along_their_normal(
    factors: tuple[float, float, float], tmp_path: Path
) -> None:
    source = write_dicom_series(tmp_path / "ct", SHAPE, step=(0, 0.9, 2.4))
    sr, written, images = resized(source, factors)
    assert_read_back(sr, written, 0.5)
    assert float(images[0].SpacingBetweenSlices) == pytest.approx(2.4 * factors[2])


def number_slices(folder: Path) -> Path:
    """Give the slices of a series what differs between slices, in order of their heights."""
    for k, image in enumerate(by_height(folder)):
        image.SliceLocation, image.AcquisitionTime = 50 - 2.5 * k, f"12000{k}"
        image.WindowCenter, image.WindowWidth, image.ImagesInAcquisition = 40 + k, 400, SHAPE[2]
        image.save_as(image.filename)
    return folder


def test_slices_have_the_attributes_of_the_nearest_and_refer_to_their_neighbors(tmp_path: Path) -> None:
    source = number_slices(write_dicom_series(tmp_path / "ct", SHAPE))
    uids = {image.SOPInstanceUID: k for k, image in enumerate(by_height(source))}
    _, _, images = resized(source, (1, 1, 0.2))
    references = [[uids[one.ReferencedSOPInstanceUID] for one in image.SourceImageSequence] for image in images]
    middle = [[0], *[[0, 1]] * 4, [1], *[[1, 2]] * 4, [2], *[[2, 3]] * 4, [3]]
    assert references == [[0], [0], *middle, [3], [3]]
    assert [int(image.AcquisitionTime[-1]) for image in images] == [*[0] * 5, *[1] * 5, *[2] * 5, *[3] * 5]
    assert [image.WindowCenter for image in images[::5]] == [40, 41, 42, 43]
    assert [float(image.SliceLocation) for image in images] == pytest.approx([51 - 0.5 * k for k in range(20)])
    assert [image.InstanceNumber for image in images] == list(range(20, 0, -1))  # as those of the source
    assert len({image.SOPInstanceUID for image in images}) == 20
    for image in images:
        assert image.SeriesDescription == "SR 0.8x0.9x0.5 mm"
        assert image.DerivationDescription.endswith(
            "Interpolated. SliceThickness: 0.5 mm after super-resolution, 2.5 mm in the source."
        )
        assert "ImagesInAcquisition" not in image


def test_kept_slices_keep_their_thickness_and_numbers(tmp_path: Path) -> None:
    source = number_slices(write_dicom_series(tmp_path / "ct", SHAPE))
    change(source, lambda image: setattr(image, "SliceThickness", 3))
    _, _, images = resized(source, (0.4, 0.4, 1))
    for image, before in zip(images, by_height(source), strict=True):
        for name in ("SliceThickness", "SliceLocation", "InstanceNumber", "ImagesInAcquisition"):
            assert image[name] == before[name]
        assert len(image.SourceImageSequence) == 1
        assert "SpacingBetweenSlices" not in image
        assert image.SeriesDescription == "SR 0.32x0.36x2.5 mm"


@pytest.mark.parametrize("keyword", ["SliceLocation", "SliceThickness", "InstanceNumber"])
@pytest.mark.parametrize("value", [None, b"", b"many", b"1\\2"])
def test_invalid_elements_of_the_source_do_not_reach_new_slices(
    keyword: str, value: bytes | None, tmp_path: Path
) -> None:
    def edit(image: Dataset) -> None:
        if value is None:
            image.pop(keyword, None)
        else:
            set_raw(image, keyword, value)

    source = number_slices(write_dicom_series(tmp_path / "ct", SHAPE))
    _, _, images = resized(change(source, edit), (1, 1, 0.5))
    expected = [0.0] * 8 if keyword == "SliceLocation" else [50.625 - 1.25 * k for k in range(8)]
    assert [float(image.get("SliceLocation") or 0) for image in images] == pytest.approx(expected)
    numbers = range(1, 9) if keyword == "InstanceNumber" else range(8, 0, -1)
    assert [image.InstanceNumber for image in images] == list(numbers)
    assert {float(image.SliceThickness) for image in images} == {1.25}


def test_one_slice_becomes_several(tmp_path: Path) -> None:
    sr, written, images = resized(write_dicom_series(tmp_path / "ct", (11, 9, 1)), (0.5, 0.5, 0.2))
    assert_read_back(sr, written, 0.5)
    assert len(images) == 5
    assert len({image.SourceImageSequence[0].ReferencedSOPInstanceUID for image in images}) == 1


@given(
    angles=st.tuples(*[st.floats(-1, 1)] * 3),
    shear=st.floats(-1, 1),
    count=st.integers(2, 30),
    factor=st.floats(0.1, 4),
)
def test_references_are_the_slices_around(
    angles: tuple[float, float, float], shear: float, count: int, factor: float
) -> None:
    axes = euler2mat(*angles) * [0.8, 0.9, 2.5]
    axes[:, 2] += shear * axes[:, 1]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (3, -7, 100)
    headers = []
    for k in range(count):
        header = Dataset()
        header.ImageOrientationPatient = (axes[:, :2] / [0.8, 0.9]).T.ravel().tolist()
        header.ImagePositionPatient = (affine @ [0, 0, k, 1])[:3].tolist()
        headers.append(header)
    source = Grid((8, 8, count), LPS_TO_RAS @ affine)
    grid = source.resized((1, 1, factor))
    slices = derived_slices(grid, headers)
    index = (np.linalg.inv(source.affine) @ grid.affine @ [0, 0, 1, 0])[2] * np.arange(len(slices))
    index += (np.linalg.inv(source.affine) @ grid.affine @ [0, 0, 0, 1])[2]
    assert len(slices) == grid.shape[2]
    for k, one in enumerate(slices):
        apart = np.abs(np.arange(count) - index[k])
        assert apart[one.nearest] == pytest.approx(apart.min(), abs=1e-6)
        assert one.nearest in one.sources
        if len(one.sources) == 2:
            assert one.sources[0] < index[k] < one.sources[1] == one.sources[0] + 1
        else:
            assert apart.min() <= 0.0101 or not 0 < index[k] < count - 1
    if slices[0].is_new:
        assert [one.number for one in slices] == list(range(1, len(slices) + 1))
    else:
        assert abs(factor - 1) <= 0.0101


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy here (Debian's package dicom3tools)")
@pytest.mark.parametrize("orientation", ["axial", "sagittal"])
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_an_independent_validator_finds_no_errors_in_new_slices(
    modality: str, orientation: str, tmp_path: Path
) -> None:
    source = number_slices(write_dicom_series(tmp_path / "ct", SHAPE, orientation=ORIENTATIONS[orientation]))
    for edit in (to_mr, complete) if modality == "MR" else (complete,):
        change(source, edit)
    expected = complaints(source)
    _, written, _ = resized(source, (0.4, 0.4, 0.37))
    assert complaints(written) <= expected
    change(written, lambda image: image.pop("ImagePositionPatient"))
    assert any("ImagePositionPatient" in line for line in complaints(written))  # it does find errors


@pytest.mark.parametrize(
    ("name", "pattern"), [("LIDC-IDRI-0006", "006[0-3].dcm"), ("tilted_gantry", "I??0")], ids=["chest", "tilted"]
)
def test_real_series_with_slices_of_one_millimeter(name: str, pattern: str, tmp_path: Path, real_data: Path) -> None:
    (tmp_path / "ct").mkdir()
    for path in (real_data / "dicom" / name).glob(pattern):
        shutil.copy(path, tmp_path / "ct")
    sr, written, images = resized(tmp_path / "ct", (1, 1, 0.4))
    assert len(images) == sr.array.shape[2] == round(2.5 * len(by_height(tmp_path / "ct")))
    assert_read_back(sr, written, 0.5)
    if shutil.which("dciodvfy"):
        assert complaints(written) <= complaints(tmp_path / "ct")
