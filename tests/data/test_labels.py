"""Label maps are refused as images and read as label maps; images with few gray values are images."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers.phantoms import head

from miar_monai.data.io import read_labels, read_volume, write_volume
from miar_monai.data.labels import label_evidence
from miar_monai.data.volume import Volume
from miar_monai.errors import GeometryError, ImageError, MiarError
from miar_monai.inference.images import image_volume

SHAPE = (45, 41, 9)


def parcels(numbers: np.ndarray) -> np.ndarray:
    """Return a body of numbered regions around random centers."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    centers = rng.uniform(0, SHAPE, (len(numbers), 3))
    nearest = ((grid[..., None, :] - centers) ** 2).sum(-1).argmin(-1)
    return np.where(head(SHAPE) > 0, numbers[nearest], 0)


TISSUE = np.digitize(head(SHAPE), [0.1, 0.45, 0.6])
LABELS = {
    "tissue": TISSUE,
    "BraTS": np.array([0, 1, 2, 4])[TISSUE],
    "mask": TISSUE > 1,
    "8-bit mask": 255 * (TISSUE > 1),
    "voxels of lesions": np.random.default_rng(0).random(SHAPE) > 0.99,
    "8 regions": parcels(np.arange(1, 9)),
    "FreeSurfer": parcels(np.random.default_rng(1).choice(np.r_[1000:1036, 2000:2036], 40, replace=False)),
    "atlas": parcels(np.random.default_rng(1).permutation(25) + 1),
}
NOISE = np.random.default_rng(0).normal(0, 0.02, SHAPE)
IMAGES = {
    "8-bit": np.rint(250 * head(SHAPE)),
    "32 gray values": np.rint(31 * np.clip(head(SHAPE) + NOISE, 0, 1)),
    "a ramp": np.rint(20 * head(SHAPE)),
    "every voxel thrice": np.rint(200 * np.clip(head(SHAPE) + NOISE, 0, 1)).repeat(3, 0).repeat(3, 1),
    "probabilities": head(SHAPE),
    "HU": np.rint(2000 * head(SHAPE) - 1000),
    "noise": np.random.default_rng(0).integers(0, 12, SHAPE),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_label_maps_are_refused(name: str, dtype: type, tmp_path: Path) -> None:
    if name == "FreeSurfer" and dtype is np.uint8:
        pytest.skip("no such numbers")
    image = nib.Nifti1Image(LABELS[name].astype(dtype), np.eye(4))
    nib.save(image, tmp_path / "seg.nii.gz")
    sentence = (
        r"seg\.nii\.gz is a label map \(its values are 0, .*\), and .*as --labels .*"
        r"multiply its values by 1000"
    )
    with pytest.raises(ImageError, match=sentence):
        read_volume(tmp_path / "seg.nii.gz")
    with pytest.raises(ImageError, match="the image is a label map"):
        image_volume(image)
    with pytest.raises(ImageError, match="the image is a label map"):
        image_volume(LABELS[name].astype(np.int32))
    nib.save(nib.Nifti1Image(1000 * LABELS[name].astype(np.float32), np.eye(4)), tmp_path / "times_1000.nii.gz")
    read_volume(tmp_path / "times_1000.nii.gz")


@pytest.mark.parametrize("code", [1002, 1003])
def test_a_file_with_the_intent_code_of_labels_is_refused(code: int, tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.rint(1000 * head(SHAPE)).astype(np.int16), np.eye(4))
    image.header["intent_code"] = code
    nib.save(image, tmp_path / "a.nii")
    with pytest.raises(
        ImageError, match=rf"a\.nii is a label map \(its intent code is {code}\), .* set this code to 0"
    ):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_few_gray_values_are_images(name: str) -> None:
    assert label_evidence(IMAGES[name].astype(np.float32)) is None


@pytest.mark.parametrize("values", [(0, 500, 800), (0, 50, 200), (0, 1000), (10, 20, 30, 40)])
def test_phantoms_without_noise_are_read_with_a_remark(values: tuple[int, ...], tmp_path: Path) -> None:
    array = np.array(values, dtype=np.int16)[TISSUE.clip(0, len(values) - 1)]
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii")
    (remark,) = read_volume(tmp_path / "a.nii").remarks
    assert remark.startswith(f"the voxels have only {len(values)} values ({values[0]}, {values[1]}")
    assert (
        "if they are labels, values between two labels are not labels: give its image, and the label map as --labels"
        in remark
    )


def test_small_arrays_of_floating_point_numbers_are_accepted() -> None:
    assert image_volume((TISSUE > 1).astype(np.float32)).remarks == ()


def test_real_scans_are_images(real_data: Path) -> None:
    for path in sorted((real_data / "native").glob("*.nii.gz")):
        assert label_evidence(np.asarray(nib.load(path).dataobj, dtype=np.float32)) is None


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mgz", ".nrrd", ".mha"])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_label_maps_are_read_with_exact_numbers(suffix: str, dtype: str, tmp_path: Path) -> None:
    top = 2**53 - 1 if dtype == "float64" else 2**24 if dtype == "float32" else np.iinfo(dtype).max
    top = min(top, 2**31 - 1) if suffix in (".mgz", ".nrrd", ".mha") and dtype != "uint32" else top
    top = 2**24 if suffix == ".mgz" and dtype == "float64" else top  # which MGH stores as float32
    array = np.array([0, 1, 3, top], dtype)[TISSUE]
    affine = np.array([[0, -0.4, 0, 3], [0, 0, 0.9, -7], [1.1, 0, 0, 12], [0, 0, 0, 1.0]])
    write_volume(tmp_path / f"seg{suffix}", Volume(array, affine, array.dtype, Path("seg")))
    labels = read_labels(tmp_path / f"seg{suffix}")
    if suffix == ".mgz" and dtype == "uint32":  # float32 holds multiples of 256 there
        assert labels.array.max() == 2**32
        return
    assert labels.array.tolist() == array.tolist()
    assert labels.affine == pytest.approx(affine, abs=1e-4)
    assert labels.array.dtype == labels.dtype
    if suffix in (".nii", ".nii.gz"):
        assert labels.dtype == np.dtype(dtype)


def test_intent_codes_and_segments_are_those_of_label_maps(tmp_path: Path) -> None:
    image = nib.Nifti1Image(TISSUE.astype(np.int16), np.eye(4))
    image.header["intent_code"] = 1002
    nib.save(image, tmp_path / "a.nii")
    assert np.array_equal(read_labels(tmp_path / "a.nii").array, TISSUE)
    path = write_volume(
        tmp_path / "a.seg.nrrd",
        Volume(TISSUE.astype(np.uint8), np.eye(4), np.dtype("uint8"), Path("a")),
        compress=False,
    )
    path.write_bytes(path.read_bytes().replace(b"\n\n", b"\nSegment0_ID:=Segment_1\n\n", 1))
    assert np.array_equal(read_labels(path).array, TISSUE)
    with pytest.raises(ImageError, match=r"a\.seg\.nrrd is a label map \(it has segments\)"):
        read_volume(path)


def test_what_is_no_label_map_is_refused_in_one_sentence(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(head(SHAPE).astype(np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ImageError, match=r"a\.nii is not a label map, as [0-9]+ of 16605 voxels are not whole"):
        read_labels(tmp_path / "a.nii")
    with pytest.raises(ImageError, match="is a folder: a label map in a file, such as"):
        read_labels(tmp_path)
    with pytest.raises(ImageError, match=r"b\.nii does not exist: a label map in a file, such as"):
        read_labels(tmp_path / "b.nii")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "4d.nii")
    with pytest.raises(ImageError, match=r"4d\.nii has 4 dimensions"):
        read_labels(tmp_path / "4d.nii")
    image = nib.Nifti1Image(TISSUE.astype(np.int16), None)
    image.header["sform_code"], image.header["srow_x"] = 1, [1, 0, 0, 0]
    nib.save(image, tmp_path / "flat.nii")
    with pytest.raises(GeometryError, match="is singular"):
        read_labels(tmp_path / "flat.nii")


@pytest.mark.parametrize("suffix", [".nii.gz", ".mgz", ".nrrd", ".mha"])
def test_a_damaged_label_map_is_refused_in_one_sentence(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tissue = Volume(TISSUE.astype(np.int16), np.eye(4), np.dtype("int16"), Path("a"))
    path = write_volume(tmp_path / f"a{suffix}", tissue)
    whole, refused = path.read_bytes(), 0
    for i in range(30):
        content = bytearray(whole[: rng.integers(len(whole))] if i % 3 == 0 else whole)
        for position in rng.integers(0, max(min(len(content), 600), 1), 3 if len(content) else 0):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        message = "."
        try:
            read_labels(path)
        except MiarError as error:
            message, refused = str(error), refused + 1
        assert message.endswith(".")
        assert "\n" not in message
    assert refused > 10
