"""Checks of a guide against its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.phantoms import head, write_dicom_series

from miar_monai.data.io import Volume, read_volume, result_description
from miar_monai.errors import GeometryError, ImageError
from miar_monai.inference.guide_checks import check_guide, guide_detail_warnings


def volume(
    shape: tuple[int, int, int] = (40, 42, 44),
    spacing: tuple[float, float, float] = (1, 1, 1),
    shift: float = 0,
    contrast: float = 1,
    name: str = "t1.nii",
) -> Volume:
    affine = np.diag([*spacing, 1.0])
    affine[2, 3] = shift
    array = (head(shape) ** contrast).astype(np.float32)
    return Volume(array, affine, np.dtype("float32"), Path(name))


IMAGE = volume(name="t2.nii", contrast=0.5)


def test_a_guide_that_fits_causes_no_warning() -> None:
    assert check_guide(volume(), IMAGE) == []
    assert check_guide(volume((80, 84, 88), (0.5, 0.5, 0.5)), IMAGE) == []
    turned = volume((60, 60, 60), shift=-8)
    affine = turned.affine.copy()
    angle = np.deg2rad(10)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:2, 3] = -8
    assert check_guide(turned._replace(affine=affine), IMAGE) == []


def test_the_image_itself_is_no_guide() -> None:
    with pytest.raises(ImageError, match=r"t2\.nii is the image itself: as a guide, another contrast of the same"):
        check_guide(IMAGE, IMAGE)
    with pytest.raises(ImageError, match="is the image itself"):
        check_guide(IMAGE._replace(array=IMAGE.array.copy(), path=Path("copy.nii")), IMAGE)


def test_coverage_of_the_tissue() -> None:
    with pytest.raises(GeometryError, match=r"t1\.nii shows none of the tissue in t2\.nii, by the positions in their"):
        check_guide(volume(shift=45), IMAGE)
    (sentence,) = check_guide(volume(shift=22), IMAGE)
    assert sentence == "the guide covers 50 % of the image: the rest is super-resolved without it."
    assert check_guide(volume((40, 42, 40), shift=2), IMAGE) == [], "air need not be covered"


def test_a_coarser_guide() -> None:
    (sentence,) = check_guide(volume((40, 42, 9), (1, 1, 5)), IMAGE)
    assert sentence == (
        "the guide is coarser than the image along inferior-superior (5 mm, the image 1 mm): it has no detail to add"
        " there."
    )
    assert check_guide(volume((40, 42, 9), (1, 1, 5)), volume((40, 42, 9), (1, 1, 5), contrast=2)) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (1, 4, "the coordinates of the guide are MNI's, and those of the image those of the scanner: it helps only"),
        (4, 2, "the coordinates of the guide are those of another image, and those of the image MNI's: it helps only"),
        (1, 0, "the file of the guide does not state the orientation of its voxels: it helps only where both show"),
        (1, 2, ""),
        (4, 4, ""),
        (0, 1, ""),
    ],
)
def test_other_coordinates(ours: int, theirs: int, expected: str) -> None:
    sentences = check_guide(volume()._replace(space=theirs), IMAGE._replace(space=ours))
    assert len(sentences) == bool(expected)
    assert not expected or sentences[0].startswith(expected)


def test_frames_of_reference_of_dicom(tmp_path: Path) -> None:
    shape = (20, 18, 6)
    image, guide, other = (
        read_volume(write_dicom_series(tmp_path / name, shape, modality="MR", patient_id=patient, series=name, seed=i))
        for i, (name, patient) in enumerate([("t2", "a"), ("t1", "a"), ("other", "b")])
    )
    assert image.frame_of_reference == guide.frame_of_reference != ""
    assert check_guide(guide, image) == []
    (sentence,) = check_guide(other, image)
    assert sentence.startswith("guide and image have different frames of reference (DICOM), as from two visits: it")


def test_remarks_and_results() -> None:
    guide = volume()._replace(remarks=("the slices are few.",), description=result_description())
    assert check_guide(guide, IMAGE) == [
        "the guide: the slices are few.",
        "the guide is a super-resolved image, whose invented detail affects the result: give the original.",
    ]


def test_a_guide_interpolated_from_thick_slices_is_named_if_that_axis_becomes_finer() -> None:
    noise = np.random.default_rng(0).uniform(1, 2, (40, 42, 44)).astype(np.float32)
    blurred = (noise + np.roll(noise, 1, 2) + np.roll(noise, 2, 2)) / 3
    affine = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # the third voxel axis is left-right
    sharp, thick = (Volume(array, affine, np.dtype("int16"), Path("x")) for array in (noise, blurred))
    assert guide_detail_warnings(sharp, (5, 1, 1)) == guide_detail_warnings(thick, (1, 4, 4)) == []
    (sentence,) = guide_detail_warnings(thick, (5, 1, 4))
    assert sentence.startswith("the guide has no detail along left-right, as if interpolated from thick slices:")
