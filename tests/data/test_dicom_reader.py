"""DICOM series as produced by scanners, archives and anonymizers: read correctly, or refused in one sentence."""

from __future__ import annotations

import base64
import locale
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from helpers.phantoms import head, set_raw, write_dicom_series
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)

from miar_monai.data.dicom_source import source_headers
from miar_monai.data.io import read_volume
from miar_monai.errors import GeometryError, ImageError, MiarError

SHAPE = (37, 31, 5)
STORED = np.round(24 + 2000 * head(SHAPE))
HU = STORED - 1024


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return write_dicom_series(tmp_path / "series", SHAPE)


def change(folder: Path, edit: Callable[[Dataset, int], None]) -> None:
    for i, path in enumerate(sorted(folder.iterdir())):
        image = pydicom.dcmread(path)
        edit(image, i)
        image.save_as(path)


def sentence(folder: Path, kind: type[MiarError]) -> str:
    with pytest.raises(kind) as caught:
        read_volume(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ encodings


def as_big_endian(path: Path) -> None:
    image = pydicom.dcmread(path)
    image.PixelData = image.pixel_array.astype(">i2").tobytes()
    image.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    pydicom.dcmwrite(path, image, little_endian=False, implicit_vr=False, force_encoding=True)


def by_pydicom(syntax: UID) -> Callable[[Path], None]:
    def encode(path: Path) -> None:
        image = pydicom.dcmread(path)
        if syntax.is_compressed and syntax != DeflatedExplicitVRLittleEndian:
            image.compress(syntax)
        image.file_meta.TransferSyntaxUID = syntax
        image.save_as(path)

    return encode


def by_itk(compression: str) -> Callable[[Path], None]:
    def encode(path: Path) -> None:
        import itk

        reader, writer = itk.GDCMImageIO.New(), itk.GDCMImageIO.New()
        image = itk.imread(str(path), itk.SS, imageio=reader)
        writer.KeepOriginalUIDOn()
        writer.SetCompressionType(getattr(itk.GDCMImageIOEnums, f"Compression_{compression}"))
        writer.SetMetaDataDictionary(reader.GetMetaDataDictionary())
        before = locale.setlocale(locale.LC_ALL)
        itk.imwrite(image, str(path), imageio=writer, compression=True)
        locale.setlocale(locale.LC_ALL, before)  # the JPEG writer sets it to "C" for the whole process

    return encode


ENCODINGS = {
    "1.2.840.10008.1.2": by_pydicom(ImplicitVRLittleEndian),
    "1.2.840.10008.1.2.2": as_big_endian,
    "1.2.840.10008.1.2.1.99": by_pydicom(DeflatedExplicitVRLittleEndian),
    "1.2.840.10008.1.2.5": by_pydicom(RLELossless),
    "1.2.840.10008.1.2.4.70": by_itk("JPEG"),
    "1.2.840.10008.1.2.4.90": by_itk("JPEG2000"),
}


@pytest.mark.parametrize("syntax", ENCODINGS)
def test_lossless_transfer_syntaxes_are_read_exactly(syntax: str, series: Path) -> None:
    affine = read_volume(series).affine
    for path in series.iterdir():
        ENCODINGS[syntax](path)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, HU)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.dtype == np.int16


def test_jpeg_ls(tmp_path: Path) -> None:
    """The slice was encoded by CharLS (pyjpegls 1.5.1)."""
    folder = write_dicom_series(tmp_path / "series", (8, 6, 1))
    stream = (
        "/9j/9wALEAAGAAgBAREA//gADQH//wASAEMBFABA/9oACAEBAAAAAEL4AOvmnY/dxzEBQAREm1YbIFo26Q+aAOcrLXkytQ2ZmQoA/cvlN7fp"
        "ZwevZAMiJek7QuK1MIAQCDJWa4XQtiIFiQAA/9k="
    )

    def edit(image: Dataset, _: int) -> None:
        image.PixelData = encapsulate([base64.b64decode(stream)])
        image["PixelData"].VR, image.file_meta.TransferSyntaxUID = "OB", JPEGLSLossless

    change(folder, edit)
    np.testing.assert_array_equal(read_volume(folder).array, np.round(24 + 2000 * head((8, 6, 1))) - 1024)


def test_a_video_is_refused(series: Path) -> None:
    for path in series.iterdir():
        by_pydicom(RLELossless)(path)
    change(series, lambda image, _: setattr(image.file_meta, "TransferSyntaxUID", UID("1.2.840.10008.1.2.4.102")))
    assert "cannot be read" in sentence(series, ImageError)


# ------------------------------------------------------------------------------------------------ pixels


def test_each_slice_is_rescaled_by_its_own_slope(series: Path) -> None:
    slopes, intercepts = [1, 2, 0.5, 1.25, 3], [-1024, -1000, 0, 7.5, -3]

    def edit(image: Dataset, i: int) -> None:
        image.RescaleSlope, image.RescaleIntercept = slopes[i], intercepts[i]

    change(series, edit)
    volume = read_volume(series)
    np.testing.assert_allclose(volume.array, STORED * slopes + intercepts)  # files are in the order of the slices
    assert volume.dtype == np.float32


def test_signed_and_unsigned_slices_may_be_mixed(series: Path) -> None:
    change(series, lambda image, i: setattr(image, "PixelRepresentation", i % 2))
    np.testing.assert_array_equal(read_volume(series).array, HU)


def test_signed_twelve_bits_are_extended(series: Path) -> None:
    def edit(image: Dataset, _: int) -> None:
        hu = image.pixel_array.astype(np.int32) - 1024
        image.RescaleIntercept, image.BitsStored, image.HighBit = 0, 12, 11
        image.PixelData = (hu & 0xFFF).astype(np.uint16).tobytes()

    change(series, edit)
    np.testing.assert_array_equal(read_volume(series).array, HU)


def test_bits_above_the_stored_ones_are_ignored(series: Path) -> None:
    def edit(image: Dataset, _: int) -> None:
        pixels = image.pixel_array.astype(np.uint16)
        pixels[::2] |= 0x8000  # an embedded overlay, as in images of old scanners
        image.PixelRepresentation, image.BitsStored, image.HighBit = 0, 12, 11
        image.PixelData = pixels.tobytes()

    change(series, edit)
    np.testing.assert_array_equal(read_volume(series).array, HU)


@pytest.mark.parametrize(("dtype", "bits", "divisor"), [(np.uint8, 8, 16), (np.int32, 32, 1)])
def test_other_widths(dtype: type, bits: int, divisor: int, tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "series", (36, 31, 3))  # an even number of bytes

    def edit(image: Dataset, _: int) -> None:
        image.PixelData = (image.pixel_array // divisor).astype(dtype).tobytes()
        image.BitsAllocated, image.BitsStored, image.HighBit = bits, bits, bits - 1
        image.PixelRepresentation, image.RescaleIntercept = int(bits == 32), 0

    change(folder, edit)
    np.testing.assert_array_equal(read_volume(folder).array, np.round(24 + 2000 * head((36, 31, 3))) // divisor)


def test_padding_is_read_as_an_ordinary_value(series: Path) -> None:
    """The network does not use the padding value; the bundle for CT maps all values below -1024 HU to air."""

    def edit(image: Dataset, _: int) -> None:
        pixels = image.pixel_array.copy()
        pixels[0] = -2000
        image.add_new("PixelPaddingValue", "SS", -2000)
        image.PixelData = pixels.tobytes()

    change(series, edit)
    expected = HU.copy()
    expected[:, 0] = -2000 - 1024
    np.testing.assert_array_equal(read_volume(series).array, expected)


def test_slope_and_intercept_of_mr(series: Path) -> None:
    def edit(image: Dataset, _: int) -> None:
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = MRImageStorage
        image.Modality, image.RescaleSlope, image.RescaleIntercept = "MR", 0.5, 3

    change(series, edit)
    np.testing.assert_allclose(read_volume(series).array, 0.5 * STORED + 3)


def inverted(image: Dataset, _: int) -> None:
    image.PhotometricInterpretation = "MONOCHROME1"


def colors(image: Dataset, _: int) -> None:
    image.PhotometricInterpretation, image.SamplesPerPixel, image.PlanarConfiguration = "RGB", 3, 0
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 8, 8, 7, 0
    image.PixelData = bytes(37 * 31 * 3 + 1)


def palette(image: Dataset, _: int) -> None:
    image.PhotometricInterpretation, image.PixelRepresentation = "PALETTE COLOR", 0
    for color in ("Red", "Green", "Blue"):
        image.add_new(f"{color}PaletteColorLookupTableDescriptor", "US", [4096, 0, 16])
        setattr(image, f"{color}PaletteColorLookupTableData", np.arange(4096, dtype=np.uint16).tobytes())


def table(image: Dataset, _: int) -> None:
    lookup = Dataset()
    lookup.add_new("LUTDescriptor", "US", [4096, 0, 16])
    lookup.ModalityLUTType = "HU"
    lookup.add_new("LUTData", "OW", np.arange(4096, dtype=np.uint16)[::-1].tobytes())
    del image.RescaleSlope, image.RescaleIntercept
    image.ModalityLUTSequence = [lookup]


def several_frames(image: Dataset, _: int) -> None:
    image.NumberOfFrames, image.PixelData = 3, 3 * image.PixelData


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (inverted, "contains inverted gray values (MONOCHROME1)"),
        (colors, "contains colors (RGB)"),
        (palette, "contains colors (PALETTE COLOR)"),
        (table, "defines its units by a table (Modality LUT)"),
        (several_frames, "multi-frame and color DICOM are not supported"),
    ],
)
def test_unsupported_images_are_refused(edit: Callable[[Dataset, int], None], found: str, series: Path) -> None:
    change(series, edit)
    assert found in sentence(series, ImageError)


def padded(value: int, signed: bool) -> Callable[[Dataset, int], None]:
    """Return an edit that fills a corner with padding, as outside of the circle of a scanner."""

    def edit(image: Dataset, _: int) -> None:
        pixels = image.pixel_array.astype(np.int32)
        pixels[:3, :5] = value
        image.PixelRepresentation = int(signed)
        image.add_new("PixelPaddingValue", "SS" if signed else "US", value)
        image.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", value + 3)
        image.PixelData = pixels.astype("<i2" if signed else "<u2").tobytes()

    return edit


@pytest.mark.parametrize(("value", "signed"), [(-2000, True), (-32768, True), (0, False), (63536, False)])
def test_padding_is_rescaled(value: int, signed: bool, series: Path) -> None:
    change(series, padded(value, signed))
    expected = HU.copy()
    expected[:5, :3] = value - 1024
    np.testing.assert_array_equal(read_volume(series).array, expected)


@pytest.mark.parametrize("name", ["RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("value", [b"0", b"  ", b"one", b"1\\2", b"nan", b"inf", b"1,5"])
def test_undefined_units_are_refused(value: bytes, name: str, series: Path) -> None:
    """ITK reads blanks as 0, and numbers up to the first invalid character."""
    change(series, lambda image, i: set_raw(image, name, value) if i == 1 else None)
    if (name, value) == ("RescaleIntercept", b"0"):
        read_volume(series)
    else:
        found = sentence(series, ImageError)
        assert f"slice005.dcm has the {name} " in found
        assert "so its voxels have no units" in found


def test_empty_slopes_and_intercepts_are_ignored(series: Path) -> None:
    change(series, lambda image, _: (set_raw(image, "RescaleSlope", b""), set_raw(image, "RescaleIntercept", b""))[0])
    np.testing.assert_array_equal(read_volume(series).array, STORED)


def test_transfer_syntaxes_may_be_mixed(series: Path) -> None:
    encode = [by_pydicom(RLELossless), as_big_endian, by_pydicom(DeflatedExplicitVRLittleEndian)]
    for edit, path in zip(encode, sorted(series.iterdir()), strict=False):
        edit(path)
    np.testing.assert_array_equal(read_volume(series).array, HU)


# ------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
@pytest.mark.parametrize("empty", [True, False])
def test_voxels_without_a_position_are_refused(name: str, empty: bool, series: Path) -> None:
    """ITK would assume position 0 and voxels of 1 mm."""

    def edit(image: Dataset, i: int) -> None:
        if i == 3 and empty:
            setattr(image, name, None)
        elif i == 3:
            delattr(image, name)

    change(series, edit)
    assert f"slice015.dcm has no {name}, so its voxels have no position in millimeters" in sentence(
        series, GeometryError
    )


def test_a_single_slice_needs_a_thickness(tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "one", (37, 31, 1))
    change(folder, lambda image, _: delattr(image, "SliceThickness"))
    assert "has no SliceThickness" in sentence(folder, GeometryError)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        (
            "PixelSpacing",
            b"0.5",
            "0.5, so its voxels have no position in millimeters: 2 numbers are needed, greater than 0",
        ),
        ("PixelSpacing", b"0,5\\0,5", "0,5\\0,5, so its voxels"),
        ("PixelSpacing", b"0.5\\0", "0.5\\0, so its voxels"),
        ("PixelSpacing", b"0.5\\-1", "0.5\\-1, so its voxels"),
        ("ImagePositionPatient", b"1\\2", "1\\2, so its voxels have no position in millimeters: 3 numbers are needed;"),
        ("ImagePositionPatient", b"1\\2\\nan", "1\\2\\nan, so its voxels"),
        ("ImagePositionPatient", b"5", "5, so its voxels"),
        (
            "ImageOrientationPatient",
            b"1\\0\\0\\0\\1",
            "1\\0\\0\\0\\1, so its voxels have no position in millimeters: 6",
        ),
        ("ImageOrientationPatient", b"1", "1, so its voxels"),
    ],
)
def test_damaged_positions_are_refused(name: str, value: bytes, found: str, series: Path) -> None:
    change(series, lambda image, i: set_raw(image, name, value) if i == 2 else None)
    assert f"slice010.dcm has the {name} {found}" in sentence(series, GeometryError)


def test_the_spacing_at_the_detector_is_not_used(series: Path) -> None:
    def edit(image: Dataset, _: int) -> None:
        image.ImagerPixelSpacing = image.PixelSpacing
        del image.PixelSpacing

    change(series, edit)
    assert "has no PixelSpacing" in sentence(series, GeometryError)


@pytest.mark.parametrize("name", ["InstanceNumber", "SeriesNumber", "SeriesInstanceUID", "Modality", "SOPInstanceUID"])
def test_optional_elements_may_be_missing(name: str, series: Path) -> None:
    change(series, lambda image, _: delattr(image, name))
    np.testing.assert_array_equal(read_volume(series).array, HU)


@pytest.mark.parametrize("value", [b"0", b"1", b"", b"one"])
def test_an_invalid_number_of_frames_is_1(value: bytes, series: Path) -> None:
    change(series, lambda image, _: set_raw(image, "NumberOfFrames", value))
    np.testing.assert_array_equal(read_volume(series).array, HU)


def test_frames_of_reference_are_not_mixed(series: Path) -> None:
    other = generate_uid()
    change(series, lambda image, i: setattr(image, "FrameOfReferenceUID", other) if i > 2 else None)
    assert "the slices have 2 frames of reference" in sentence(series, GeometryError)


def test_slices_of_another_voxel_size_are_reported(series: Path) -> None:
    change(series, lambda image, i: setattr(image, "PixelSpacing", [1.1, 1.1]) if i == 3 else None)
    found = sentence(series, GeometryError)
    assert "1 of 5 slices differ from the others in orientation or voxel size, the first is slice015.dcm;" in found


@pytest.mark.parametrize("shape", [(37, 31, 1), (20, 64, 1)])
@pytest.mark.parametrize("named", [True, False])
def test_a_localizer_is_left_aside_and_named(named: bool, shape: tuple[int, int, int], series: Path) -> None:
    write_dicom_series(series, shape, orientation=(0, 1, 0, 0, 0, -1), prefix="loc")
    if named:
        image = pydicom.dcmread(series / "loc000.dcm")
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        del image.ImageOrientationPatient, image.ImagePositionPatient
        image.save_as(series / "loc000.dcm")
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, HU)
    assert volume.remarks == ("a localizer is left aside: loc000.dcm.",)
    assert len(source_headers(volume)) == 5


def test_localizers_by_themselves_are_a_series(series: Path) -> None:
    change(series, lambda image, _: setattr(image, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    volume = read_volume(series)
    np.testing.assert_array_equal(volume.array, HU)
    assert volume.remarks == ()


def test_stacks_in_other_planes_are_listed_and_chosen(series: Path) -> None:
    write_dicom_series(series, (11, 9, 4), orientation=(0, 1, 0, 0, 0, -1), prefix="sagittal")
    found = sentence(series, GeometryError)
    assert "the series has 2 stacks of slices (" in found
    assert "5 axial slices" in found
    assert "4 sagittal slices" in found
    assert "choose it, for example by --select 'ImageOrientationPatient=" in found
    chosen = read_volume(series, select=[r"ImageOrientationPatient=0\1\0\0\0\-1"])
    np.testing.assert_array_equal(chosen.array, np.round(24 + 2000 * head((11, 9, 4))) - 1024)
    assert chosen.remarks == ()
    np.testing.assert_array_equal(read_volume(series, select=[r"ImageOrientationPatient=1\0\0\0\1\0"]).array, HU)


def test_a_damaged_header_is_refused_in_one_sentence(series: Path) -> None:
    rng = np.random.default_rng(0)
    for path in series.iterdir():
        whole = path.read_bytes()
        for _ in range(20):
            content = bytearray(whole)
            for position in rng.integers(132, 900, 8):
                content[position] = rng.integers(256)
            path.write_bytes(content)
            message = ""
            try:
                read_volume(series)
            except MiarError as error:
                message = str(error)
            assert "\n" not in message
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({"AcquisitionMatrix": [0, 128, 96, 0]}, 1.0),  # 256 rows of 0.5 mm; frequency along columns
        ({"AcquisitionMatrix": [0, 128, 96, 0], "InPlanePhaseEncodingDirection": "ROW"}, 1.0),
        ({"AcquisitionMatrix": [100, 0, 0, 128], "InPlanePhaseEncodingDirection": "COL"}, 1.2),  # 200 columns of 0.6 mm
        ({"AcquisitionMatrix": [200, 0, 0, 96], "PercentSampling": 37.5}, 0.6),  # fewer lines alone
        ({"AcquisitionMatrix": [0, 128, 96, 0], "ReconstructionDiameter": 96}, 0.75),  # the image was padded
        ({"AcquisitionMatrix": [0, 128, 96, 0], "ReconstructionDiameter": 240}, 1.0),
        ({"AcquisitionMatrix": [0, 128, 96, 0], "ReconstructionDiameter": ""}, 1.0),
        ({"AcquisitionMatrix": [0, 128, 96, 0], "InPlanePhaseEncodingDirection": "COL"}, None),
        ({"AcquisitionMatrix": [128, 128, 0, 0]}, None),
        ({"AcquisitionMatrix": [0, 0, 0, 0]}, None),
        ({"AcquisitionMatrix": [128, 96]}, None),
        ({}, None),
        ({"AcquisitionMatrix": [0, 128, 96, 0], "Modality": "CT"}, None),
    ],
)
def test_the_acquired_spacing_is_that_of_the_frequency_direction(
    elements: dict[str, Any], expected: float | None, tmp_path: Path
) -> None:
    folder = write_dicom_series(tmp_path / "mr", (200, 256, 2), (0.6, 0.5, 3), modality="MR")

    def edit(image: Dataset, _: int) -> None:
        for name, value in elements.items():
            setattr(image, name, value)

    change(folder, edit)
    assert read_volume(folder).acquired_spacing == (expected and pytest.approx(expected))
