"""Positions of results of NIfTI files, for readers of the sform and for ITK, which does not support shear."""

from __future__ import annotations

import bz2
import gzip
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.affines import upscaled_affine
from helpers.phantoms import head
from monai.data import MetaTensor, decollate_batch, list_data_collate
from scipy.spatial.transform import Rotation

from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import Volume, read_volume, uncertainty_of, write_volume
from miar_monai.data.nifti import nifti_to_volume, volume_to_nifti
from miar_monai.errors import GeometryError, ImageError
from miar_monai.inference.input_checks import volume_warnings
from miar_monai.transforms import LoadVolume, SaveVolume

SHAPE = (23, 19, 5)
VOXELS = (1000 * head(SHAPE)).astype(np.int16)


def placed(
    angles: tuple[float, float, float] = (0, 0, 0),
    sizes: tuple[float, float, float] = (1.8, 1.7, 5.0),
    flip: bool = False,
    shear: float = 0,
    decimals: int | None = None,
    at: tuple[float, float, float] = (40, -50, -20),
) -> np.ndarray:
    """Return the affine of a rotated, optionally left-handed, sheared and rounded grid."""
    affine = np.eye(4)
    turn = Rotation.from_euler("zyx", angles, degrees=True).as_matrix() @ np.diag([-1.0 if flip else 1.0, 1, 1])
    affine[:3, :3] = turn @ (np.eye(3) + shear * np.eye(3, k=1)) * sizes
    affine[:3, 3] = at
    return affine if decimals is None else affine.round(decimals)


def write(path: Path, sform: np.ndarray | None, s: int, qform: np.ndarray | None, q: int, **fields: Any) -> Path:
    """Write an image with two transforms and their codes, and other fields of the header."""
    image = nib.Nifti1Image(VOXELS, np.eye(4))
    image.header.set_xyzt_units("mm")
    image.set_qform(np.eye(4) if qform is None else qform, q)
    image.set_sform(np.eye(4) if sform is None else sform, s)
    for name, value in fields.items():
        image.header[name] = value
    path.write_bytes(image.header.binaryblock + b"\0\0\0\0" + VOXELS.tobytes(order="F"))
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(352).tobytes()
    path.write_bytes(content)
    return path


def finer(volume: Volume) -> Volume:
    """Return a volume on the grid of its result."""
    array = volume.array.repeat(4, axis=0).repeat(4, axis=1)
    return volume._replace(array=array, affine=upscaled_affine(volume.affine, (4, 4, 1)))


def itk_corners(path: Path) -> np.ndarray:
    """Return the corners of the field of view as read by ITK, LPS."""
    import itk

    image = itk.imread(str(path))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return fov_corners(affine, itk.size(image))


TURNED = ((12, 0, 0), (25, -17, 8), (179.99, 0.02, 0), (180, 0, 0), (-90, 45, 3))


@pytest.mark.parametrize("codes", [(1, 1), (4, 2)])
@pytest.mark.parametrize("shear", [0, 1e-7, 1e-4, 1e-3, 0.02, 0.2])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("decimals", [None, 3])
@pytest.mark.parametrize("angles", TURNED)
def test_itk_places_a_result_as_its_input(
    codes: tuple[int, int], shear: float, flip: bool, decimals: int | None, angles: Any, tmp_path: Path
) -> None:
    sform, qform = placed(angles, flip=flip, shear=shear, decimals=decimals), placed(angles, flip=flip)
    source = write(tmp_path / "in.nii", sform, codes[0], qform, codes[1])
    volume = read_volume(source)
    result = write_volume(tmp_path / "out.nii", finer(volume))
    assert itk_corners(result) == pytest.approx(itk_corners(source), abs=0.01)
    header = nib.load(result).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == codes
    shape = header.get_data_shape()
    assert fov_corners(header.get_sform(), shape) == pytest.approx(fov_corners(sform, SHAPE), abs=1e-3)
    held = nib.load(source).header.get_qform()
    assert fov_corners(header.get_qform(), shape) == pytest.approx(fov_corners(held, SHAPE), abs=0.01)


@pytest.mark.parametrize("shear", [1e-7, 0.02, 0.3])
def test_without_a_qform_the_nearest_rotation_about_the_center_is_written(shear: float, tmp_path: Path) -> None:
    sform = placed((20, 5, -8), flip=True, shear=shear)
    volume = read_volume(write(tmp_path / "in.nii", sform, 2, sform, 0))
    result = write_volume(tmp_path / "out.nii", finer(volume))
    header = nib.load(result).header
    shape = np.array(header.get_data_shape())
    assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 2)
    middle = [*(shape - 1) / 2, 1]
    assert header.get_qform() @ middle == pytest.approx(header.get_sform() @ middle, abs=1e-3)
    # maximum displacement of the corners by a shear, relative to the size of the volume
    size = np.linalg.norm(np.ptp(fov_corners(sform, SHAPE), axis=0))
    moved = itk_corners(result) * [-1, -1, 1] - fov_corners(sform, SHAPE)
    assert np.linalg.norm(moved, axis=1).max() < shear * size / 2 + 1e-3


def test_an_sform_with_three_decimals_keeps_the_sizes_in_pixdim(tmp_path: Path) -> None:
    exact = placed((0, 0, 0), sizes=(0.97656, 0.97656, 3), at=(1, 2, 3))
    source = write(tmp_path / "in.nii", exact.round(3), 1, exact, 0)
    volume = read_volume(source)
    result = write_volume(tmp_path / "out.nii", finer(volume))
    assert itk_corners(result) == pytest.approx(itk_corners(source), abs=1e-3)
    assert volume.remarks == ()


def test_bundle_and_call_keep_both_transforms(tmp_path: Path) -> None:
    sform, qform = placed((0, 0, 0), shear=0.02), placed((7, 0, 0), at=(30, -40, -10))
    source = write(tmp_path / "in.nii", sform, 2, qform, 1)
    image = LoadVolume()(source)
    volume = finer(read_volume(source))
    finer_image = image.as_tensor().repeat_interleave(4, 1).repeat_interleave(4, 2)
    saved = MetaTensor(finer_image).copy_meta_from(image)
    saved.affine = torch.from_numpy(volume.affine)
    SaveVolume(tmp_path)(decollate_batch(list_data_collate([saved]))[0])
    error = uncertainty_of(volume._replace(uncertainty=volume.array))
    files = [tmp_path / "in_sr.nii.gz", write_volume(tmp_path / "error.nii", error)]
    for header in [nib.load(file).header for file in files] + [volume_to_nifti(volume).header]:
        assert (int(header["sform_code"]), int(header["qform_code"])) == (2, 1)
        shape = header.get_data_shape()
        assert fov_corners(header.get_sform(), shape) == pytest.approx(fov_corners(sform, SHAPE), abs=1e-3)
        assert fov_corners(header.get_qform(), shape) == pytest.approx(fov_corners(qform, SHAPE), abs=1e-3)


@pytest.mark.parametrize(
    ("sform", "s", "qform", "q", "sentence"),
    [
        (placed(), 1, placed(at=(55, -54, -13)), 1, "sform and qform disagree: .* up to 17.03 mm apart; the sform is"),
        (placed(), 4, placed((90, 0, 0)), 1, "sform and qform disagree: .* mm apart; the sform is used"),
        (
            placed(sizes=(2, 2, 6)),
            1,
            placed(sizes=(1, 1, 3)),
            0,
            r"pixdim disagree \(voxels of 2 x 2 x 6 mm and of 1 x",
        ),
        (placed(sizes=(2, 2, 6)), 1, placed(sizes=(1, 1, 3)), 1, r"qform disagree \(voxels of 2 x 2 x 6 mm and of"),
        (np.diag([1.0, 1, 0, 1]), 1, placed(), 1, "the sform is singular: the qform is used"),
        (placed(), 1, placed(at=(40.01, -50, -20)), 1, ""),
        (placed(), 1, placed(), 1, ""),
        (placed(), 1, placed(), 0, ""),
        (None, 0, placed((30, 0, 0)), 1, ""),
        (None, 0, placed(), 0, ""),
    ],
)
def test_a_disagreement_is_reported_with_the_distance(
    sform: Any, s: int, qform: Any, q: int, sentence: str, tmp_path: Path
) -> None:
    volume = read_volume(write(tmp_path / "in.nii", sform, s, qform, q))
    remarks = [text for text in volume_warnings(volume) if "form" in text and "qform_code and sform_code" not in text]
    assert len(remarks) == bool(sentence)
    assert not sentence or re.search(sentence, remarks[0])
    takes_qform = "the qform is used" in sentence or not s
    if s or q:
        assert volume.affine == pytest.approx(qform if takes_qform else sform, abs=1e-4)


def test_the_distance_is_that_of_the_corners(tmp_path: Path) -> None:
    sform, qform = placed(), placed((10, 0, 0))
    (remark,) = read_volume(write(tmp_path / "in.nii", sform, 1, qform, 1)).remarks
    distances = np.linalg.norm(fov_corners(sform, SHAPE) - fov_corners(qform, SHAPE), axis=1)
    assert f"up to {distances.max():.2f} mm apart" in remark


def test_an_invalid_qform_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "in.nii", placed(), 1, placed(), 1, quatern_b=np.nan)
    volume = read_volume(path)
    assert volume.affine == pytest.approx(placed(), abs=1e-5)
    result = nib.load(write_volume(tmp_path / "out.nii", finer(volume)))
    assert result.header.get_qform() == pytest.approx(result.affine, abs=1e-4)
    with pytest.raises(ImageError, match=r"only\.nii cannot be read as NIfTI-1 \(.*\): a complete file is needed"):
        read_volume(write(tmp_path / "only.nii", None, 0, placed(), 1, quatern_b=3))


def test_rotations_by_180_degrees_are_those_of_itk(tmp_path: Path) -> None:
    import itk

    vector = np.array([0.6, 0.48, 0.64], dtype=np.float32)  # its norm is 1 up to rounding
    source = write(
        tmp_path / "in.nii", placed(shear=0.1), 2, np.eye(4), 1,
        **{f"quatern_{axis}": value for axis, value in zip("bcd", vector * np.float32(1 - 4e-8), strict=True)},
    )  # fmt: skip
    volume = read_volume(source)
    assert volume.qform is not None
    directions = itk.array_from_matrix(itk.imread(str(source)).GetDirection()) * np.array([[-1], [-1], [1]])
    held = (volume.qform[0] @ volume.affine)[:3, :3]
    assert held / np.linalg.norm(held, axis=0) == pytest.approx(directions, abs=1e-6)


@pytest.mark.parametrize("unit", [7, 4, 2 + 128, 0])
def test_undefined_units_are_millimeters(unit: int, tmp_path: Path) -> None:
    volume = read_volume(write(tmp_path / "in.nii", placed(), 1, placed(), 1, xyzt_units=unit))
    assert volume.affine == pytest.approx(placed(), abs=1e-5)
    assert bool(volume.remarks) == (unit in (7, 4))
    assert all("millimeters are assumed" in remark for remark in volume.remarks)


# ------------------------------------------------------------------------------------------------ one slice


@pytest.mark.parametrize("shape", [(23, 19), (23, 19, 1), (23, 19, 1, 1)])
def test_one_slice_is_a_volume(shape: tuple[int, ...], tmp_path: Path) -> None:
    slice_ = VOXELS[..., 2].reshape(shape)
    nib.save(nib.Nifti1Image(slice_, placed()), tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    np.testing.assert_array_equal(volume.array[..., 0], VOXELS[..., 2])
    assert volume.affine == pytest.approx(placed(), abs=1e-5)
    assert volume.remarks == ()


@pytest.mark.parametrize("size", [np.inf, np.nan])
def test_an_impossible_size_in_pixdim_is_not_written(size: float, tmp_path: Path) -> None:
    sform = placed()
    nib.save(nib.Nifti1Image(VOXELS, sform), tmp_path / "in.nii")
    content = bytearray((tmp_path / "in.nii").read_bytes())
    content[80:84] = np.float32(size).tobytes()  # pixdim[1]
    (tmp_path / "in.nii").write_bytes(content)
    write_volume(tmp_path / "out.nii", read_volume(tmp_path / "in.nii"))
    header = nib.load(tmp_path / "out.nii").header
    np.testing.assert_allclose(header.get_sform(), sform, atol=1e-4)
    np.testing.assert_allclose(header.get_zooms(), np.linalg.norm(sform[:3, :3], axis=0), rtol=1e-5)


def test_one_slice_without_a_thickness_is_1_mm_thick(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VOXELS[..., 2], np.eye(4))
    image.set_qform(placed((15, 0, 0)), 1)
    image.set_sform(None, 0)
    flat = placed((15, 0, 0))
    flat[:3, 2] = 0
    both = nib.Nifti1Image(VOXELS[..., 2], None, image.header)
    both.header["pixdim"][3] = 0
    both.header["sform_code"] = 2
    for i, axis in enumerate("xyz"):
        both.header[f"srow_{axis}"] = flat[i]
    nib.save(nib.Nifti1Image(VOXELS[..., 2], None, both.header), tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    assert np.linalg.norm(volume.affine[:3, :3], axis=0) == pytest.approx([1.8, 1.7, 1])


def test_a_line_across_the_axial_plane_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(VOXELS[:, 9:10, 2:3], np.eye(4)[[1, 2, 0, 3]]), tmp_path / "in.nii")
    with pytest.raises(GeometryError, match=r"in\.nii \(23 x 1 x 1 voxels\) is a line across the axial plane, but a"):
        read_volume(tmp_path / "in.nii")


def test_slices_that_are_too_large_are_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.arange(8200 * 4, dtype=np.int32).reshape(8200, 4, 1), np.eye(4)), tmp_path / "in.nii")
    with pytest.raises(ImageError, match=r"in\.nii: the axial slices have 8200 x 4 voxels, but sides of at most 2048"):
        read_volume(tmp_path / "in.nii")
    sagittal = np.arange(8200 * 4, dtype=np.int32).reshape(1, 4, 8200)
    nib.save(nib.Nifti1Image(sagittal, np.eye(4)), tmp_path / "sagittal.nii")
    with pytest.raises(ImageError, match="the sagittal slices have 4 x 8200 voxels"):
        read_volume(tmp_path / "sagittal.nii")
    long_body = np.random.default_rng(0).integers(0, 1000, (3, 4, 3000))
    nib.save(nib.Nifti1Image(long_body.astype(np.int16), np.eye(4)), tmp_path / "long.nii")
    assert read_volume(tmp_path / "long.nii").array.shape == (3, 4, 3000)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nii.bz2"])
@pytest.mark.parametrize("dtype", ["<i2", ">u2", ">i4", ">f4", "<f8"])
@pytest.mark.parametrize("scaling", [(1.0, 0.0), (0.37, -3.1)])
def test_voxels_are_those_of_nibabel_bit_by_bit(
    scaling: tuple[float, float], dtype: str, ending: str, tmp_path: Path
) -> None:
    stored = np.random.default_rng(0).integers(0, 5000, (7, 5, 3, 1)).astype(dtype)
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_shape(stored.shape)
    header.set_data_dtype(dtype)
    header.set_slope_inter(*scaling)
    header["vox_offset"] = 352
    path = tmp_path / f"a{ending}"
    with (gzip.open if "gz" in ending else bz2.open if "bz2" in ending else open)(path, "wb") as file:
        file.write(header.binaryblock + bytes(4) + stored.tobytes(order="F"))
    expected = nib.load(path).get_fdata(dtype=np.float32)[..., 0]
    np.testing.assert_allclose(expected, stored[..., 0] * scaling[0] + scaling[1], rtol=1e-5)
    np.testing.assert_array_equal(read_volume(path).array, expected, strict=True)


def test_a_loaded_image_is_not_opened_for_each_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = np.random.default_rng(0).integers(0, 1000, (7, 5, 9)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    image, opened = nib.load(tmp_path / "a.nii.gz"), []
    original = gzip.GzipFile.__init__

    def counted(self: gzip.GzipFile, *args: Any, **options: Any) -> None:
        opened.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(gzip.GzipFile, "__init__", counted)
    np.testing.assert_array_equal(nifti_to_volume(image, tmp_path / "a.nii.gz").array, voxels)
    assert len(opened) == 1
