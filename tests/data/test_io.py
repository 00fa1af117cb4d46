from __future__ import annotations

import os
import re
import shutil
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from helpers.affines import upscaled_affine
from helpers.phantoms import head, write_dicom_series, write_nifti_phantom

from miar_monai.data.dicom_headers import dicom_files, header_text
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import (
    Volume,
    as_stored,
    read_labels,
    read_volume,
    result_description,
    volume_stem,
    write_nifti,
    write_volume,
)
from miar_monai.errors import GeometryError, ImageError, OutputError, SettingError

SHAPE = (37, 31, 7)


def oblique(shear: float = 0) -> np.ndarray:
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:3, :3] = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, -1]]
    affine[:3, :3] = affine[:3, [2, 0, 1]] @ (np.eye(3) + shear * np.eye(3, k=1)) @ np.diag([2.0, 0.7, 0.9])
    affine[:3, 3] = [10, -20, 30.5]
    return affine


# ------------------------------------------------------------------------------------------------ NIfTI in


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_survives_the_round_trip(tmp_path: Path, suffix: str) -> None:
    path = write_nifti_phantom(tmp_path / f"a b.ü{suffix}", SHAPE, oblique())
    volume = read_volume(str(path))
    np.testing.assert_array_equal(volume.array, np.floor(1000 * head(SHAPE)))
    np.testing.assert_allclose(volume.affine, oblique(), atol=1e-5)
    assert (volume.array.dtype, volume.affine.dtype, volume.dtype) == (np.float32, np.float64, np.int16)
    assert volume.path == path
    assert volume_stem(path) == "a b.ü"


@pytest.mark.parametrize(
    ("stored", "result"),
    [("uint8", "float32"), ("int16", "int16"), (">i2", "int16"), ("uint16", "uint16"), ("float64", "float32")],
)
def test_dtype_of_results(tmp_path: Path, stored: str, result: str) -> None:
    path = write_nifti_phantom(tmp_path / "a.nii", SHAPE, dtype=stored, high=250)
    assert read_volume(path).dtype == np.dtype(result)


def test_a_pair_of_files(tmp_path: Path) -> None:
    array = (1000 * head(SHAPE)).astype(np.int16)
    nib.save(nib.Nifti1Pair(array, oblique()), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, oblique(), atol=1e-5)
        assert volume_stem(tmp_path / name) == "a"
    with (tmp_path / "a.img").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ImageError, match=r"a\.hdr is truncated or damaged \(it contains 100 bytes, but its header"):
        read_volume(tmp_path / "a.hdr")
    (tmp_path / "a.img").unlink()
    with pytest.raises(ImageError, match=r"a\.img"):
        read_volume(tmp_path / "a.hdr")


def test_scaling_is_applied_and_makes_results_float(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    unscaled = nib.load(tmp_path / "a.nii").dataobj.get_unscaled()
    np.testing.assert_allclose(volume.array, unscaled * 0.5 - 3)
    assert volume.dtype == np.float32


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1000), ("micron", 0.001)])
def test_units_become_millimeters(tmp_path: Path, unit: str, factor: float) -> None:
    image = nib.Nifti1Image(head(SHAPE).astype(np.float32), np.diag([2.0, 3, 4, 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, np.diag([2 * factor, 3 * factor, 4 * factor, 1]))


def test_trailing_axes_of_size_1_are_dropped(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(head(SHAPE).astype(np.float32)[..., None, None], np.eye(4)), tmp_path / "a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").array, head(SHAPE).astype(np.float32))


def refused(tmp_path: Path, array: np.ndarray) -> Path:
    path = tmp_path / "bad.nii.gz"
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent\.nii does not exist: a volume, or a folder with a DICOM series, is"):
        read_volume(tmp_path / "absent.nii")


def test_other_files(tmp_path: Path) -> None:
    text = tmp_path / "text.nii.gz"
    text.write_text("not an image")
    with pytest.raises(ImageError, match=r"text\.nii\.gz cannot be read as NIfTI \(.*\): a complete .* is needed"):
        read_volume(text)
    write_dicom_series(tmp_path / "series", SHAPE)
    with pytest.raises(ImageError, match=r"000\.dcm is a single DICOM file: .*; give .*series\.$"):
        read_volume(tmp_path / "series" / "slice000.dcm")


@pytest.mark.parametrize("kept", [0, 30, 2000, -3000])
def test_truncated_gz(tmp_path: Path, kept: int) -> None:
    path = write_nifti_phantom(tmp_path / "cut.nii.gz", SHAPE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ImageError, match=r"cut\.nii\.gz .*(truncated or damaged|cannot be read as NIfTI) \(.*copy"):
        read_volume(path)


def test_truncated_and_damaged(tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "cut.nii", SHAPE)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.nii is truncated or damaged"):
        read_volume(path)
    path = write_nifti_phantom(tmp_path / "bits.nii.gz", SHAPE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"bits\.nii\.gz is truncated or damaged"):
        read_volume(path)


def test_wrong_dimensions(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"bad\.nii\.gz has 4 dimensions \(4 x 5 x 6 x 2\): one 3D volume is needed"):
        read_volume(refused(tmp_path, np.ones((4, 5, 6, 2), np.float32)))
    with pytest.raises(ImageError, match=r"has 1 dimensions \(5\)"):
        read_volume(refused(tmp_path, np.ones(5, np.float32)))


def test_colors_and_complex_numbers(tmp_path: Path) -> None:
    rgb = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ImageError, match=r"bad\.nii\.gz: the voxels are RGB colors, but gray values"):
        read_volume(refused(tmp_path, rgb))
    with pytest.raises(ImageError, match="the voxels are complex64 numbers, but gray values"):
        read_volume(refused(tmp_path, np.ones((4, 5, 6), np.complex64)))


def test_voxels_that_are_not_finite(tmp_path: Path) -> None:
    array = head(SHAPE).astype(np.float32)
    array[3, 4, 5], array[0, 0, 0], array[1, 0, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(ImageError, match=r"bad\.nii\.gz: 1 voxels are NaN and 2 infinite, of 8029; finite intensities"):
        read_volume(refused(tmp_path, array))


def test_constant_volume(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"bad\.nii\.gz: all 120 voxels are 3; an image with contrast is needed"):
        read_volume(refused(tmp_path, np.full((4, 5, 6), 3, np.float32)))


@pytest.mark.parametrize("size", [2e-7, 5e6])
def test_a_voxel_of_an_impossible_size_is_refused(size: float, tmp_path: Path) -> None:
    array = (100 * head(SHAPE)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([1, size, 1, 1])), tmp_path / "odd.nii")
    with pytest.raises(
        GeometryError,
        match=rf"odd\.nii: its voxels have 1 x {re.escape(f'{size:.3g}')} x 1 mm, but sizes from 1e-06 to",
    ):
        read_volume(tmp_path / "odd.nii")


def test_singular_affine(tmp_path: Path) -> None:
    image = nib.Nifti1Image(head(SHAPE).astype(np.float32), np.eye(4))
    image.header.set_sform(np.diag([1.0, 1, 0, 1]), 1)
    nib.save(nib.Nifti1Image(image.dataobj, None, image.header), tmp_path / "flat.nii")
    with pytest.raises(
        GeometryError, match=r"flat\.nii: the affine .* is singular, .* an invertible affine, from a valid sform"
    ):
        read_volume(tmp_path / "flat.nii")


# ------------------------------------------------------------------------------------------------ NIfTI out


def test_other_readers_agree_on_a_written_file(tmp_path: Path) -> None:
    import itk

    array = head(SHAPE).astype(np.float32)
    path = write_nifti(tmp_path / "new" / "a.nii.gz", array, oblique())
    image = nib.load(path)
    np.testing.assert_allclose(image.get_sform(), oblique(), atol=1e-5)
    np.testing.assert_allclose(image.get_qform(), oblique(), atol=1e-5)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(image.header.get_zooms(), [2, 0.7, 0.9], atol=1e-6)
    np.testing.assert_array_equal(image.get_fdata(), array)
    read = itk.imread(str(path))
    np.testing.assert_allclose(np.array(read.GetOrigin()) * [-1, -1, 1], oblique()[:3, 3], atol=1e-4)
    assert os.listdir(tmp_path / "new") == ["a.nii.gz"]


@pytest.mark.parametrize(("sform", "qform", "space"), [(4, 1, 4), (0, 1, 1), (0, 3, 3), (2, 0, 2), (0, 0, 0)])
def test_the_space_of_the_millimeters_is_kept(sform: int, qform: int, space: int, tmp_path: Path) -> None:
    image = nib.Nifti1Image((1000 * head(SHAPE)).astype(np.int16), oblique())
    image.set_sform(oblique(), sform)
    image.set_qform(oblique(), qform)
    nib.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    assert volume.space == space
    finer = upscaled_affine(volume.affine, (4, 4, 1))
    sr = volume._replace(array=np.zeros([4 * SHAPE[0], 4 * SHAPE[1], SHAPE[2]]), affine=finer)
    written = nib.load(write_volume(tmp_path / "out.nii", sr))
    codes = (sform, qform) if sform and qform else (space, space)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == codes
    corners = fov_corners(nib.load(tmp_path / "in.nii").affine, SHAPE)  # the default of nibabel
    np.testing.assert_allclose(fov_corners(written.affine, sr.array.shape), corners, atol=1e-4)


def test_a_file_has_a_description(tmp_path: Path) -> None:
    image = nib.Nifti1Image(head(SHAPE).astype(np.float32), np.eye(4))
    image.header["descrip"] = "Größe".encode("latin-1")
    nib.save(image, tmp_path / "in.nii")
    volume = read_volume(tmp_path / "in.nii")
    assert (volume.description, volume.is_miar_result) == ("Größe", False)
    result = read_volume(write_volume(tmp_path / "out.nii", volume._replace(description=result_description())))
    assert (result.description, result.is_miar_result) == (result_description(), True)
    long = volume._replace(description=100 * "x")
    assert read_volume(write_volume(tmp_path / "long.nii", long)).description == 79 * "x"


def test_integers_are_rounded_and_saturated(tmp_path: Path) -> None:
    array = np.array([-40000.0, -1.6, -0.4, 0.6, 2.5001, 40000]).reshape(1, 2, 3)
    path = write_nifti(tmp_path / "a.nii", array, np.eye(4), "int16")
    stored = np.asarray(nib.load(path).dataobj)
    assert stored.dtype == np.int16
    assert stored.ravel().tolist() == [-32768, -2, 0, 1, 3, 32767]


@pytest.mark.parametrize(
    ("dtype", "ending"),
    [
        *product(["uint8", "int16", "int32", "float32"], [".nii", ".nii.gz", ".mgz", ".nrrd", ".mha"]),
        *product(["uint16", "uint32"], [".nii", ".nii.gz", ".nrrd", ".mha"]),  # MGH has neither
    ],
)
def test_voxels_are_stored_alike_whatever_their_order_in_memory(dtype: str, ending: str, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(scale=4e4, size=(5, 7, 3)).astype(np.float32)
    voxels[0, :3, 0] = -0.5, 1.5, 2.5
    if "32" in dtype:
        voxels[1:3, 0, 0] = -3e9, 5e9  # beyond the range, which floats do not reach exactly
    volume = Volume(voxels, np.eye(4), np.dtype(dtype), tmp_path)
    wanted = as_stored(voxels, np.dtype(dtype))
    for k, order in enumerate([(0, 1, 2), (2, 0, 1), (1, 0, 2)]):
        array = np.ascontiguousarray(voxels.transpose(order)).transpose(np.argsort(order))
        path = write_volume(tmp_path / f"{k}{ending}", volume._replace(array=array))
        found = read_labels(path).array if volume.dtype.kind in "iu" else read_volume(path).array
        np.testing.assert_array_equal(found, wanted)


def test_existing_file_is_kept(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", head(SHAPE), np.eye(4))
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"a\.nii exists already and is left as it is: give another output, "):
        write_nifti(path, 2 * head(SHAPE), np.eye(4))
    assert path.read_bytes() == before
    write_nifti(path, 2 * head(SHAPE), np.eye(4), overwrite=True)
    assert path.read_bytes() != before


def test_no_file_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OutputError, match=r"a\.nii\.gz cannot be written \(No space left on device\): a folder with"):
        write_nifti(tmp_path / "a.nii.gz", head(SHAPE), np.eye(4))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"a\.nii cannot be written \(.*\): a folder with write permission"):
        write_nifti(tmp_path / "file" / "a.nii", head(SHAPE), np.eye(4))


# ------------------------------------------------------------------------------------------------ DICOM


def expected_hu(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.round(24 + 2000 * head(shape)) - 1024


def test_series_is_sorted_positioned_and_in_hu(tmp_path: Path) -> None:
    volume = read_volume(write_dicom_series(tmp_path / "series", SHAPE, spacing=(0.8, 0.9, 2.5)))
    np.testing.assert_array_equal(volume.array, expected_hu())
    affine = np.array([[-0.8, 0, 0, 15], [0, -0.9, 0, 14], [0, 0, 2.5, 100], [0, 0, 0, 1]])
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert volume.dtype == np.int16


@pytest.mark.parametrize(("slope", "dtype"), [(1, "int16"), (20, "int32"), (0.5, "float32")])
def test_dtype_of_results_of_a_series(tmp_path: Path, slope: float, dtype: str) -> None:
    volume = read_volume(write_dicom_series(tmp_path, SHAPE, slope=slope))
    np.testing.assert_array_equal(volume.array, (expected_hu() + 1024) * slope - 1024)
    assert volume.dtype == np.dtype(dtype)


def test_sagittal_series(tmp_path: Path) -> None:
    orientation = (0, 1, 0, 0, 0, -1)
    volume = read_volume(write_dicom_series(tmp_path, SHAPE, spacing=(0.8, 0.9, 2), orientation=orientation))
    np.testing.assert_array_equal(volume.array, expected_hu())
    np.testing.assert_allclose(volume.affine[:3, :3], [[0, 0, 2], [-0.8, 0, 0], [0, -0.9, 0]], atol=1e-5)


def test_tilted_gantry_gives_a_sheared_affine(tmp_path: Path) -> None:
    angle = np.deg2rad(16.5)
    orientation = (1, 0, 0, 0, np.cos(angle), np.sin(angle))
    volume = read_volume(write_dicom_series(tmp_path, SHAPE, orientation=orientation, step=(0, 0, 2.5)))
    np.testing.assert_array_equal(volume.array, expected_hu())
    np.testing.assert_allclose(volume.affine[:3, 2], [0, 0, 2.5], atol=1e-5)
    np.testing.assert_allclose(volume.affine[:3, 1], [0, -0.9 * np.cos(angle), 0.9 * np.sin(angle)], atol=1e-5)


def test_slices_against_the_normal_are_sorted(tmp_path: Path) -> None:
    volume = read_volume(write_dicom_series(tmp_path, SHAPE, step=(0, 0, -2.5)))
    np.testing.assert_array_equal(volume.array, expected_hu()[:, :, ::-1])
    np.testing.assert_allclose(volume.affine[:3, 2:], [[0, 15], [0, 14], [2.5, 100 - 6 * 2.5]], atol=1e-5)


def test_one_slice_has_the_thickness_of_its_header(tmp_path: Path) -> None:
    volume = read_volume(write_dicom_series(tmp_path, (37, 31, 1), spacing=(0.8, 0.9, 2.5)))
    np.testing.assert_allclose(np.diag(volume.affine), [-0.8, -0.9, 2.5, 1], atol=1e-5)


def test_tags(tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path, SHAPE, patient_id="P 7")
    (folder / "readme.txt").write_text("no DICOM")
    assert len(dicom_files(folder)) == 7
    assert header_text(dicom_files(folder)[0], "PatientID") == "P 7"
    assert header_text(dicom_files(folder)[0], "PatientComments") == ""
    assert header_text(folder / "readme.txt", "PatientID") == ""


def test_folder_without_dicom(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("empty")
    with pytest.raises(ImageError, match="contains no DICOM series: give a folder with the slices of one series"):
        read_volume(tmp_path)


def test_several_series_are_listed(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, SHAPE)
    write_dicom_series(tmp_path, (37, 31, 3), series="2", prefix="other")
    for path in tmp_path.glob("other*"):
        image = pydicom.dcmread(path)
        image.SeriesDescription = "T2 ax"
        image.save_as(path)
    with pytest.raises(GeometryError, match=r"contains 2 DICOM series: .*; one is needed: choose it") as caught:
        read_volume(tmp_path)
    assert re.search(r" [\d.]+ \(no description, 7 files\)", str(caught.value))
    assert re.search(r" [\d.]+ \(T2 ax, 3 files\)", str(caught.value))


def test_one_of_several_series_can_be_selected(tmp_path: Path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    write_dicom_series(both, SHAPE)
    write_dicom_series(both, (37, 31, 3), series="2", prefix="other", modality="MR", seed=4)
    write_dicom_series(alone, (37, 31, 3), series="2", prefix="other", modality="MR", seed=4)
    uid = str(pydicom.dcmread(next(alone.iterdir())).SeriesInstanceUID)
    chosen, wanted = read_volume(both, uid), read_volume(alone)
    np.testing.assert_array_equal(chosen.array, wanted.array)
    np.testing.assert_array_equal(chosen.affine, wanted.affine)
    assert (chosen.modality, chosen.series) == ("MR", uid)
    with pytest.raises(GeometryError, match=r"both contains 2 DICOM series, but not 1\.2\.3: .*; one is needed"):
        read_volume(both, "1.2.3")
    with pytest.raises(GeometryError, match=r"alone contains 1 DICOM series, but not 1\.2\.3: "):
        read_volume(alone, "1.2.3")
    with pytest.raises(SettingError, match="is a file, so the series"):
        read_volume(next(alone.iterdir()), uid)


def test_missing_slices(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, SHAPE)
    for k in (3, 4):
        (tmp_path / f"slice{5 * k:03d}.dcm").unlink()
    sentence = r"2 slices are missing, the widest gap is 7\.50 mm between \[.*, 105\.0\] and \[.*, 112\.5\] \(5 slices"
    with pytest.raises(GeometryError, match=sentence):
        read_volume(tmp_path)


def test_duplicate_slices(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, SHAPE)
    write_dicom_series(tmp_path, (37, 31, 2), prefix="again")
    with pytest.raises(GeometryError, match=r"2 slices share a position with another one \(9 slices"):
        read_volume(tmp_path)


def test_uneven_slices(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, (37, 31, 5))
    write_dicom_series(tmp_path, (37, 31, 2), origin=(-15, -14, 113.2), prefix="late")
    with pytest.raises(GeometryError, match=r"the slices are 2\.500 to 3\.200 mm apart \(7 slices, usually 2\.500 mm"):
        read_volume(tmp_path)


def test_slices_of_different_kinds(tmp_path: Path) -> None:
    write_dicom_series(tmp_path / "size", SHAPE)
    write_dicom_series(tmp_path / "size", (20, 31, 2), origin=(-15, -14, 200), prefix="small")
    with pytest.raises(
        ImageError, match=r"size: the images have the sizes \[\(1, 31, 20\), \(1, 31, 37\)\]; gray-value"
    ):
        read_volume(tmp_path / "size")
    write_dicom_series(tmp_path / "turned", SHAPE)
    write_dicom_series(tmp_path / "turned", SHAPE, orientation=(0, 1, 0, 0, 0, -1), prefix="sagittal")
    with pytest.raises(GeometryError, match=r"turned: the series has 2 stacks of slices \(ImageOrientationPatient="):
        read_volume(tmp_path / "turned")


@pytest.mark.parametrize("k", [0, 3, 6])
def test_truncated_slice(tmp_path: Path, k: int) -> None:
    write_dicom_series(tmp_path, SHAPE)
    path = tmp_path / f"slice{5 * k:03d}.dcm"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ImageError, match=rf"1 DICOM files cannot be read as images, the first is {path.name}; complete"
    ):
        read_volume(tmp_path)


def test_slice_whose_pixels_cannot_be_decoded(tmp_path: Path) -> None:
    write_dicom_series(tmp_path, SHAPE)
    path = tmp_path / "slice010.dcm"
    image = pydicom.dcmread(path)
    image.compress(pydicom.uid.RLELossless)
    image.PixelData = image.PixelData[:200] + bytes(len(image.PixelData) - 200)
    image.save_as(path)
    with pytest.raises(ImageError, match=r"slice010\.dcm cannot be read \(.*\): a complete DICOM image is needed"):
        read_volume(tmp_path)


# ------------------------------------------------------------------------------------------------ real data


def test_real_tilted_gantry(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "dicom" / "tilted_gantry"
    with pytest.raises(GeometryError, match=r"tilted_gantry: 23 slices are missing, the widest gap is 60\.00 mm"):
        read_volume(folder)
    for file in folder.iterdir():
        if file.name != "I30":
            shutil.copy(file, tmp_path)
    affine = read_volume(tmp_path).affine
    np.testing.assert_allclose(affine[:3, 2], [0, 0, 2.5], atol=1e-6)
    np.testing.assert_allclose(affine[:3, 1], 0.40625 * np.array([0, -0.9588197, 0.2840153]), atol=1e-6)


def test_real_chest_ct(real_data: Path) -> None:
    volume = read_volume(real_data / "dicom" / "LIDC-IDRI-0006")
    assert volume.array.shape == (512, 512, 40)
    assert volume.dtype == np.int16
    assert -2048 <= volume.array.min() < -1000 < np.median(volume.array) < 100
    np.testing.assert_allclose(np.diag(volume.affine), [-0.625, -0.625, 2.5, 1], atol=1e-6)
