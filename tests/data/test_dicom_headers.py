"""Detection of DICOM files and of slices: files without preamble, DICOMDIR, reports and other objects."""

from __future__ import annotations

import gzip
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from helpers.phantoms import set_raw, write_dicom_object, write_dicom_series, write_nifti_phantom
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, uid
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from miar_monai.data.cases import find_cases, unpacked
from miar_monai.data.datasets import lidc_datalist
from miar_monai.data.dicom_headers import dicom_files, slice_files
from miar_monai.data.dicom_signature import is_dicom
from miar_monai.data.io import read_volume
from miar_monai.errors import ImageError, MiarError

SHAPE = (11, 9, 4)
DIRECTORY = "1.2.840.10008.1.3.10"
OTHERS = {
    "Basic Text SR Storage": "1.2.840.10008.5.1.4.1.1.88.11",
    "Grayscale Softcopy Presentation State Storage": "1.2.840.10008.5.1.4.1.1.11.1",
    "Key Object Selection Document Storage": "1.2.840.10008.5.1.4.1.1.88.59",
    "Encapsulated PDF Storage": "1.2.840.10008.5.1.4.1.1.104.1",
    "Raw Data Storage": "1.2.840.10008.5.1.4.1.1.66",
    "RT Structure Set Storage": "1.2.840.10008.5.1.4.1.1.481.3",
    "Spatial Registration Storage": "1.2.840.10008.5.1.4.1.1.66.1",
    "1.3.46.670589.11.0.0.12.2": "1.3.46.670589.11.0.0.12.2",  # a private one of Philips
}
WITH_PIXELS = {
    "Segmentation Storage": "1.2.840.10008.5.1.4.1.1.66.4",
    "RT Dose Storage": "1.2.840.10008.5.1.4.1.1.481.2",
}


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return write_dicom_series(tmp_path / "series", SHAPE)


# ------------------------------------------------------------------------------------------------ without preamble


def with_meta(path: Path) -> bytes:
    return path.read_bytes()[132:]


def data_set_only(implicit: bool, little: bool, group_length: bool = False, uids: bool = True) -> bytes:
    def content(path: Path) -> bytes:
        image = pydicom.dcmread(path)
        data, file = Dataset(), DicomBytesIO()
        data.update({tag: image[tag] for tag in image.keys()})  # noqa: SIM118
        for name in [] if uids else [name for name in image.dir("UID") if name in image]:
            delattr(data, name)
        if group_length:  # as in ACR-NEMA
            data.add_new(0x00080000, "UL", 300)
        data.add_new("PixelData", "OW", image.pixel_array.astype("<i2" if little else ">i2").tobytes())
        file.is_implicit_VR, file.is_little_endian = implicit, little
        write_dataset(file, data)
        return file.getvalue()

    return content


BARE = {
    "meta information": with_meta,
    "implicit": data_set_only(True, True),
    "explicit": data_set_only(False, True),
    "big endian": data_set_only(False, False),
    "ACR-NEMA": data_set_only(True, True, group_length=True, uids=False),
}


@pytest.mark.parametrize(
    ("how", "count"), [*((how, SHAPE[2]) for how in BARE), *((how, 1) for how in BARE if how != "ACR-NEMA")]
)
def test_files_without_preamble_are_slices(how: str, count: int, series: Path) -> None:
    expected = read_volume(series)
    for path in sorted(series.iterdir())[:count]:
        path.write_bytes(BARE[how](path))
        assert is_dicom(path)
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert [case.source for case in find_cases(series)] == [series]
    assert [case.source for case in find_cases(series.parent)] == [series]


def test_files_without_preamble_in_a_zip_file(series: Path, tmp_path: Path) -> None:
    for path in series.iterdir():
        path.write_bytes(with_meta(path))
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "series"))
    with unpacked(packed) as folder:
        assert read_volume(folder).array.shape == SHAPE


def test_a_single_file_without_preamble_is_recognized(series: Path) -> None:
    path = next(series.iterdir())
    path.write_bytes(with_meta(path))
    with pytest.raises(ImageError, match=rf"is a single DICOM file: the folder of its series is needed; give {series}"):
        read_volume(path)


def test_other_files_are_not_dicom(tmp_path: Path) -> None:
    png, npy = tmp_path / "a.png", tmp_path / "a.npy"
    import matplotlib.image

    matplotlib.image.imsave(png, np.eye(9))
    np.save(npy, np.eye(9))
    for name in ("a.nii", "a.nii.gz", "a.hdr"):
        write_nifti_phantom(tmp_path / name, SHAPE)
    (tmp_path / "text").write_text("(0008,0016) UI MRImageStorage 1.2.840.10008.5.1.4.1.1.4\n" * 20)
    (tmp_path / "gz").write_bytes(gzip.compress(bytes(1000)))
    (tmp_path / "counts").write_bytes(np.arange(8, 3000, dtype="<u4").tobytes())
    (tmp_path / "zeros").write_bytes(bytes(1000))
    (tmp_path / "empty").touch()
    assert dicom_files(tmp_path) == []


def begins_with(*parts: bytes) -> st.SearchStrategy[bytes]:
    return st.tuples(st.sampled_from(parts), st.binary(max_size=600)).map(b"".join)


@given(
    content=begins_with(
        b"", b"\2\0", b"\x08\0", b"\0\x08", b"\2\0\0\0UL\4\0", b"\x08\0\x05\0CS\x0a\0", b"\x08\0\x60\0CS\2\0"
    )
)
def test_arbitrary_bytes_are_not_dicom(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(content)
    assert not is_dicom(path)
    path.write_bytes(bytes(128) + b"DICM" + content)
    assert is_dicom(path)
    assert list(slice_files([path])) in ([], [path])  # without an error


def test_only_the_start_of_a_file_is_read(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = with_meta(next(series.iterdir()))
    read = []

    class Counting(BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda *_: Counting(content))
    assert is_dicom(Path("x"))
    assert read == [1024]


# ------------------------------------------------------------------------------------------------ other objects


@pytest.mark.parametrize("name", ["DICOMDIR", "DIRFILE", "000"])
def test_a_dicomdir_of_any_name_is_skipped(name: str, series: Path) -> None:
    expected = read_volume(series).array
    write_dicom_object(series / name, DIRECTORY, FileSetID="DISC")
    write_dicom_object(series.parent / name, DIRECTORY, FileSetID="DISC")
    np.testing.assert_array_equal(read_volume(series).array, expected)
    assert [case.source for case in find_cases(series.parent)] == [series]
    shutil.rmtree(series)
    (case,) = find_cases(series.parent)
    with pytest.raises(
        ImageError, match=r"contains no DICOM series, only other objects \(1 DICOMDIR\): give a folder with"
    ):
        read_volume(case.source)


def test_files_without_read_permission_are_reported(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert [case.source for case in find_cases(series)] == [series]
    with pytest.raises(ImageError, match="4 DICOM files cannot be read as images, the first is slice000"):
        read_volume(series)


@pytest.mark.parametrize("kind", [*OTHERS, *WITH_PIXELS])
def test_other_objects_are_skipped(kind: str, series: Path) -> None:
    expected = read_volume(series).array
    size = {"Rows": 9, "Columns": 11, "NumberOfFrames": 2} if kind in WITH_PIXELS else {}
    other = write_dicom_object(series / "000", (OTHERS | WITH_PIXELS)[kind], **size)
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, expected)
    assert volume.remarks == ()  # they do not change the result
    assert [item["image"] for item in lidc_datalist(series.parent)] == [str(series)]
    alone = series.parent / "alone"
    alone.mkdir()
    shutil.move(other, alone)
    assert [case.source for case in find_cases(series.parent)] == [series]
    (case,) = find_cases(alone)
    with pytest.raises(ImageError, match=rf"alone contains no DICOM series, only other objects \(1 {kind}\): give a"):
        read_volume(case.source)


def test_images_of_another_series_are_not_skipped(series: Path) -> None:
    capture = write_dicom_object(series / "000", uid.SecondaryCaptureImageStorage, Rows=4, Columns=5)
    assert len(list(slice_files(dicom_files(series)))) == SHAPE[2] + 1
    with pytest.raises(MiarError, match="contains 2 DICOM series"):
        read_volume(series)
    capture.unlink()


def test_a_slice_without_a_size_is_not_skipped(series: Path) -> None:
    write_dicom_object(series / "000", uid.CTImageStorage)
    with pytest.raises(ImageError, match="1 DICOM files cannot be read as images, the first is 000; complete slices"):
        read_volume(series)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("word", ["MOSAIC", "mosaic"])
def test_mosaics_are_refused(word: str, place: int, tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "series", (12, 12, 1))
    (path,) = folder.iterdir()
    image = pydicom.dcmread(path)
    kind = ["ORIGINAL", "PRIMARY", "M", "ND"]
    set_raw(image, "ImageType", "\\".join([*kind[:place], word, *kind[place:]]).encode())
    image.save_as(path)
    with pytest.raises(ImageError, match=r"\.dcm is a mosaic, with the slices of a volume as tiles"):
        read_volume(folder)


def test_mosaics_are_recognized_by_the_number_of_their_tiles(tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "series", (12, 12, 1))
    (path,) = folder.iterdir()
    image = pydicom.dcmread(path)
    block = image.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0A, "US", 1)
    image.save_as(path)
    assert read_volume(folder).array.shape == (12, 12, 1)
    block[0x0A].value = 20
    image.save_as(path)
    with pytest.raises(ImageError, match=r"\.dcm is a mosaic"):
        read_volume(folder)
