"""Formats of files are detected by content; unsupported ones are refused in one sentence."""

from __future__ import annotations

import bz2
import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers.phantoms import head, write_nifti_phantom
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.data.formats import OUTPUT_SUFFIXES
from miar_monai.data.geometry import corner_distance, fov_corners
from miar_monai.data.io import is_volume_file, read_volume, volume_stem, write_volume
from miar_monai.data.volume import Volume, as_stored
from miar_monai.errors import ExistsError, ImageError, SettingError

SHAPE = (19, 13, 5)
VOXELS = (1000 * head(SHAPE)).astype(np.int16)
AFFINE = np.array([[-1.7, 0.3, 0, 40], [0.3, 1.7, 0, -50], [0, 0, 5, -20], [0, 0, 0, 1.0]])


def nifti(folder: Path) -> bytes:
    nib.save(nib.Nifti1Image(VOXELS, AFFINE), folder / "plain.nii")
    return (folder / "plain.nii").read_bytes()


def check(volume: Volume, dtype: str = "int16") -> None:
    np.testing.assert_array_equal(volume.array, VOXELS)
    assert fov_corners(volume.affine, SHAPE) == pytest.approx(fov_corners(AFFINE, SHAPE), abs=1e-3)
    assert volume.dtype == np.dtype(dtype)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nii.bz2", "A.NII.GZ", "a", "a.dcm"])
@pytest.mark.parametrize(
    "pack", [bytes, gzip.compress, bz2.compress, lambda content: gzip.compress(content) + b"?" * 9]
)
def test_nifti_of_any_compression_and_name(name: str, pack: object, tmp_path: Path) -> None:
    assert callable(pack)
    (tmp_path / name).write_bytes(pack(nifti(tmp_path)))
    check(read_volume(tmp_path / name))


def test_nifti_in_two_parts_and_of_version_2(tmp_path: Path) -> None:
    content = nifti(tmp_path)
    (tmp_path / "two.nii.gz").write_bytes(gzip.compress(content[:900]) + gzip.compress(content[900:]))
    check(read_volume(tmp_path / "two.nii.gz"))
    nib.save(nib.Nifti2Image(VOXELS, AFFINE), tmp_path / "2.nii.gz")
    check(read_volume(tmp_path / "2.nii.gz"))
    nib.save(nib.Nifti2Pair(VOXELS, AFFINE), tmp_path / "2.img")
    check(read_volume(tmp_path / "2.hdr"))
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), tmp_path / "1.img.gz")
    check(read_volume(tmp_path / "1.hdr.gz"))
    check(read_volume(tmp_path / "1.img.gz"))


@pytest.mark.parametrize("dtype", ["i1", "u1", ">u2", "u4", "i8", "u8", "f8", ">f4"])
def test_voxels_of_any_type(dtype: str, tmp_path: Path) -> None:
    voxels = (100 * head(SHAPE)).astype(dtype)
    image = nib.Nifti1Image(voxels, AFFINE, dtype=np.dtype(dtype))
    image.header["scl_slope"] = 0
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").array, voxels.astype(np.float32))


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_mgh(name: str, tmp_path: Path) -> None:
    nib.save(nib.MGHImage(VOXELS.astype(np.int32), AFFINE), tmp_path / name)
    check(read_volume(tmp_path / name), "int32")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=rf"{name} (is truncated or damaged|cannot be read as MGH) \(.*\): .* copy"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_nrrd_and_metaimage(name: str, is_compressed: bool, tmp_path: Path) -> None:
    import itk

    lps = np.diag([-1, -1, 1, 1]) @ AFFINE
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    image = itk.image_from_array(np.ascontiguousarray(VOXELS.transpose(2, 1, 0)))
    image.SetSpacing(sizes)
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / sizes))
    image.SetOrigin(lps[:3, 3])
    itk.imwrite(image, str(tmp_path / name), compression=is_compressed)
    volume = read_volume(tmp_path / name)
    check(volume)
    assert volume.remarks == ()
    written = itk.imread(str(write_volume(tmp_path / "out.nii.gz", volume)))
    assert np.array(written.GetOrigin()) == pytest.approx(np.array(image.GetOrigin()), abs=1e-3)
    voxels = max(tmp_path.glob("a.*"), key=lambda path: path.stat().st_size)
    voxels.write_bytes(voxels.read_bytes()[:400])
    with pytest.raises(
        ImageError,
        match=rf"{name} cannot be read as (NRRD|MetaImage): complete files of the header and the voxels are needed",
    ):
        read_volume(tmp_path / name)


def test_nrrd_without_a_space_gets_a_remark(tmp_path: Path) -> None:
    header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 19 13 5\nspacings: 1 1 2\nencoding: raw\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + VOXELS.tobytes(order="F"))
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.array, VOXELS)
    assert "does not define the orientation of its voxels" in volume.remarks[0]


def test_several_values_per_voxel_are_refused(tmp_path: Path) -> None:
    header = "NRRD0004\ntype: short\ndimension: 4\nsizes: 3 19 13 5\nencoding: raw\nendian: little\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + 3 * VOXELS.tobytes(order="F"))
    with pytest.raises(ImageError, match=r"a\.nrrd has .* one 3D volume of gray values is needed"):
        read_volume(tmp_path / "a.nrrd")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.mnc", b"CDF\x01" + bytes(400), "is a MINC image, which is not supported: .* convert it"),
        ("a.mnc", b"\x89HDF\r\n\x1a\n" + bytes(400), "is a MINC image, which is not supported: .* convert it"),
        ("a.nii.xz", b"\xfd7zXZ\x00" + bytes(400), "is compressed by xz, which is not supported"),
        ("a.nii.zst", b"\x28\xb5\x2f\xfd" + bytes(400), "is compressed by Zstandard, which is not supported"),
        ("a.nii", b"", r"cannot be read as NIfTI \(its content"),
        ("a.mgz", b"no image", r"cannot be read as MGH \(its content"),
        ("a.img", b"no image", r"cannot be read as NIfTI \(a\.hdr is missing\)"),
    ],
)
def test_unsupported_formats_are_refused(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=rf"{name} {sentence}"):
        read_volume(tmp_path / name)
    assert is_volume_file(tmp_path / name)


def test_analyze_is_refused(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(VOXELS, np.eye(4)), tmp_path / "a.img")
    for name in ("a.hdr", "a.img"):
        with pytest.raises(ImageError, match=r"is an Analyze 7\.5 image, whose header does not define left and right"):
            read_volume(tmp_path / name)


def test_a_pair_counts_by_its_header(tmp_path: Path) -> None:
    for name in ("a.hdr", "a.img", "b.img"):
        (tmp_path / name).touch()
    assert [is_volume_file(tmp_path / name) for name in ("a.hdr", "a.img", "b.img")] == [True, False, True]
    assert [volume_stem(name) for name in ("x/a.HDR", "a.nii.BZ2", "a.1.nhdr", "a.raw")] == ["a", "a", "a.1", "a.raw"]


def test_a_damaged_checksum_is_found(tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "a.nii.gz", SHAPE)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.nii\.gz is truncated or damaged \(CRC"):
        read_volume(path)


@pytest.mark.parametrize(
    "content", [b"/annex/objects/MD5E-s1--0.nii.gz\n", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_pointers_to_missing_files_are_recognized(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(ImageError, match=r"a.nii.gz is a pointer of git-annex or Git LFS .*; fetch it"):
        read_volume(tmp_path / "a.nii.gz")


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Return an affine: any orientation, voxels of 0.2 to 9 mm, up to 0.3 of shear, and an origin."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    axes = np.linalg.qr(generator.standard_normal((3, 3)))[0]
    shear = np.eye(3)
    shear[1, 2] = draw(st.sampled_from([0, generator.uniform(-0.3, 0.3)]))
    affine = np.eye(4)
    affine[:3, :3] = axes @ shear * generator.uniform(0.2, 9, 3)
    affine[:3, 3] = generator.uniform(-900, 900, 3)
    return affine


@pytest.mark.parametrize("suffix", OUTPUT_SUFFIXES)
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("int16", -3024, 3071),
        ("uint16", 0, 65535),
        ("int32", -(2**23), 2**23),
        ("uint32", 0, 2**24),
        ("float32", -0.001, 0.002),
    ],
)
@given(affine=affines())
def test_each_format_keeps_millimeters_and_units(
    suffix: str, dtype: str, low: float, high: float, tmp_path_factory: pytest.TempPathFactory, affine: np.ndarray
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round{suffix}"
    array = (low + (high - low) * head((9, 7, 5))).astype(np.float32)
    array = array if dtype == "float32" else np.rint(array)
    volume = Volume(array, affine, np.dtype(dtype), path, description="miar-monai 1.0: super-resolved")
    back = read_volume(write_volume(path, volume, overwrite=True))
    np.testing.assert_array_equal(back.array, array)
    assert corner_distance(back.affine, affine, array.shape) < 0.01
    is_mgh = suffix in (".mgz", ".mgh")
    wider = {"uint16": "int32", "uint32": "int32"} if is_mgh else {}
    assert back.dtype == np.dtype(wider.get(dtype, dtype))
    assert back.is_miar_result is not is_mgh


def test_itk_and_nibabel_place_results_as_this_package(tmp_path: Path) -> None:
    import itk

    volume = Volume(VOXELS.astype(np.float32), AFFINE, np.dtype("int16"), tmp_path / "a")
    for name in ("a.nrrd", "a.mha", "a.nii"):  # AFFINE has no shear, which ITK does not read from NIfTI
        image = itk.imread(str(write_volume(tmp_path / name, volume)))
        corner = [size - 1 for size in SHAPE]
        lps = np.array(image.TransformIndexToPhysicalPoint(corner))
        assert lps * [-1, -1, 1] == pytest.approx((AFFINE @ [*corner, 1])[:3], abs=1e-3)
        assert itk.array_from_image(image).dtype == np.int16
    loaded = nib.load(write_volume(tmp_path / "a.mgz", volume))
    assert loaded.affine == pytest.approx(AFFINE, abs=1e-4)
    assert loaded.get_data_dtype() == np.dtype(">i2")


def test_nrrd_may_be_uncompressed(tmp_path: Path) -> None:
    volume = Volume(VOXELS.astype(np.float32), AFFINE, np.dtype("int16"), tmp_path / "a")
    for compress, encoding in ((True, b"gzip"), (False, b"raw")):
        content = write_volume(tmp_path / f"{compress}.nrrd", volume, compress=compress).read_bytes()
        assert b"\nencoding: " + encoding + b"\n" in content
    assert content.endswith(VOXELS.astype("<i2").tobytes(order="F"))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.nrrd", "a.mha"])
def test_voxels_are_written_without_a_copy_of_the_volume(name: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((128, 96, 160), np.float32)
    for dtype in ("int16", "float32"):
        volume = Volume(1000 * array, AFFINE, np.dtype(dtype), tmp_path / "a")
        tracemalloc.start()
        write_volume(tmp_path / name, volume, overwrite=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.2 * array.nbytes
        np.testing.assert_array_equal(read_volume(tmp_path / name).array, as_stored(volume.array, volume.dtype))


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_description_of_several_lines_stays_in_its_field(name: str, tmp_path: Path) -> None:
    volume = Volume(VOXELS.astype(np.float32), AFFINE, np.dtype("int16"), tmp_path / "a")
    found = read_volume(write_volume(tmp_path / name, volume._replace(description="one\ntype: x\n\ny")))
    assert found.description == "one type: x y"
    assert (found.array == volume.array).all()


def test_only_whole_files_of_known_formats_are_written(tmp_path: Path) -> None:
    volume = Volume(VOXELS.astype(np.float32), AFFINE, np.dtype("int16"), tmp_path / "a")
    for name in ("a.mhd", "a.nhdr", "a.png", "a"):
        with pytest.raises(SettingError, match=r"a.* is not the name of a volume that can be written: a \.nii\.gz, "):
            write_volume(tmp_path / name, volume)
    (tmp_path / "a.mha").touch()
    with pytest.raises(ExistsError):
        write_volume(tmp_path / "a.mha", volume)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mha"]
