"""Thickness and spacing of slices: from headers and settings, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.derived_series import change
from helpers.phantoms import set_raw, write_dicom_series, write_nifti_phantom
from pydicom import Dataset

from miar_monai.data.io import Volume, read_volume
from miar_monai.degradation import Degradation
from miar_monai.errors import SettingError
from miar_monai.inference.acquisition import Acquisition

SHAPE = (11, 9, 4)
UNKNOWN = "slices 2.5 mm apart, taken as 2.5 mm thick since the file states none, SLR profile assumed"


def with_thickness(folder: Path, value: bytes | None) -> Volume:
    def edit(image: Dataset) -> None:
        if value is None:
            del image.SliceThickness
        else:
            set_raw(image, "SliceThickness", value)

    return read_volume(change(folder, edit))


@pytest.mark.parametrize(
    ("value", "thickness", "sentence"),
    [
        (b"2.5", 2.5, "slices 2.5 mm thick, 2.5 mm apart, SLR profile assumed"),
        (b"2.499", 2.499, "slices 2.5 mm thick, 2.5 mm apart, SLR profile assumed"),
        (b"2", 2.0, "slices 2 mm thick, 2.5 mm apart (gap 0.5 mm), SLR profile assumed"),
        (b"5", 5.0, "slices 5 mm thick, 2.5 mm apart (overlap 2.5 mm), SLR profile assumed"),
        (b"7.5", 7.5, "slices 7.5 mm thick, 2.5 mm apart (overlap 5 mm), SLR profile assumed"),
        *((value, None, UNKNOWN) for value in (None, b"", b"0", b"-2", b"thick", b"1\\2", b"inf", b"nan")),
        (
            b"20",
            20.0,
            "slices 2.5 mm apart, taken as 2.5 mm thick since the 20 mm of the file are impossible,"
            " SLR profile assumed",
        ),
        (
            b"0.01",
            0.01,
            "slices 2.5 mm apart, taken as 2.5 mm thick since the 0.01 mm of the file are impossible,"
            " SLR profile assumed",
        ),
    ],
)
def test_the_thickness_of_a_series_is_read_and_said(
    value: bytes | None, thickness: float | None, sentence: str, tmp_path: Path
) -> None:
    volume = with_thickness(write_dicom_series(tmp_path / "ct", SHAPE), value)
    assert volume.slice_thickness == thickness
    acquisition = Acquisition.of(volume)
    assert str(acquisition) == sentence
    assert acquisition.spacing == pytest.approx(2.5)
    known = thickness if thickness and not acquisition.doubt else 2.5
    assert acquisition.widths == pytest.approx((1, 1, known / 2.5))
    assert Degradation(scale=(5, 1), sigma=0, profile="gaussian", thickness=acquisition.widths[1:][::-1])


def test_slices_of_several_thicknesses_have_none(tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "ct", SHAPE)
    change(folder, lambda image: setattr(image, "SliceThickness", 2 + 0.01 * int(image.InstanceNumber)))
    assert read_volume(folder).slice_thickness == pytest.approx(2.025)
    change(folder, lambda image: setattr(image, "SliceThickness", 2 + image.InstanceNumber))
    assert read_volume(folder).slice_thickness is None


@pytest.mark.parametrize(
    ("orientation", "axis"), [((0, 1, 0, 0, 0, -1), 0), ((1, 0, 0, 0, 0, -1), 1), ((1, 0, 0, 0, 1, 0), 2)]
)
def test_the_axis_is_that_of_the_patient_even_where_pixels_are_larger(
    orientation: tuple[float, ...], axis: int, tmp_path: Path
) -> None:
    folder = write_dicom_series(tmp_path / "mr", SHAPE, spacing=(0.8, 0.9, 0.6), orientation=orientation)
    acquisition = Acquisition.of(with_thickness(folder, b"1.2"))
    assert acquisition.axis == axis
    assert acquisition.widths == pytest.approx([2 if i == axis else 1 for i in range(3)])


def test_the_spacing_of_a_tilted_gantry_is_measured_along_the_normal(tmp_path: Path) -> None:
    volume = read_volume(write_dicom_series(tmp_path / "ct", SHAPE, step=(0, 1.8, 2.4), spacing=(0.8, 0.9, 2)))
    assert str(Acquisition.of(volume)) == ("slices 2 mm thick, 2.4 mm apart (gap 0.4 mm), SLR profile assumed")


@pytest.mark.parametrize(("spacing", "axis"), [((1, 1, 5), 2), ((1, 5, 1), 1), ((4, 1, 1), 0), ((1, 1, 1), 2)])
def test_other_formats_have_their_slices_across_the_coarsest_axis(
    spacing: tuple[float, float, float], axis: int, tmp_path: Path
) -> None:
    for order in ((0, 1, 2), (2, 0, 1)):
        affine = np.eye(4)
        affine[:3, :3] = np.diag(spacing)[:, list(order)]
        volume = read_volume(write_nifti_phantom(tmp_path / f"{order}.nii", (14, 15, 16), affine))
        assert "Gaussian profile assumed" in str(Acquisition.of(volume, profile="gaussian"))
        acquisition = Acquisition.of(volume, profile="box")
        assert (acquisition.axis, acquisition.spacing) == (axis, pytest.approx(max(spacing)))
        assert "box profile assumed" in str(acquisition)
        assert acquisition.doubt == "the file states none"


def test_a_given_thickness_replaces_that_of_the_file(tmp_path: Path) -> None:
    volume = read_volume(write_dicom_series(tmp_path / "ct", SHAPE))
    acquisition = Acquisition.of(volume, thickness=2)
    assert (acquisition.thickness, acquisition.gap, acquisition.doubt) == (2, pytest.approx(0.5), "")
    for thickness in (0, -1, 0.1, 7.7, float("nan"), float("inf")):
        with pytest.raises(
            SettingError, match=r"for slices 2\.5 mm apart it must lie between 0\.125 and 7\.5 mm; correct it\."
        ):
            Acquisition.of(volume, thickness=thickness)
