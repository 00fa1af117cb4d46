"""Derived DICOM series: geometry, intensities, repeated and new elements, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner, Result
from helpers.derived_series import (
    assert_read_back,
    by_height,
    change,
    complaints,
    complete,
    contents,
    derive,
    to_mr,
    upsampled,
)
from helpers.phantoms import set_raw, write_dicom_object, write_dicom_series, write_nifti_phantom
from pydicom import Dataset
from pydicom.dataset import FileDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

import miar_monai
from miar_monai.cli.main import main
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import is_miar_result, write_series
from miar_monai.data.io import read_volume
from miar_monai.errors import ImageError, OutputError

SHAPE = (11, 9, 4)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    return write_dicom_series(tmp_path / "ct", SHAPE)


def test_hu_and_millimeters_survive_the_round_trip(series: Path) -> None:
    before = contents(series)
    sr, written, images = derive(series)
    assert sorted(contents(written)) == ["0001.dcm", "0002.dcm", "0003.dcm", "0004.dcm"]
    assert_read_back(sr, written, 0)
    assert read_volume(written).dtype == np.int16
    hu = images[2].pixel_array * images[2].RescaleSlope + images[2].RescaleIntercept
    assert np.array_equal(hu, sr.array[:, :, 2].T)
    assert contents(series) == before


def test_fractions_of_hu_are_rounded(series: Path) -> None:
    noise = np.random.default_rng(0).uniform(-300, 300, (44, 36, 4)).astype(np.float32)
    sr, written, _ = derive(series, array=noise)
    assert_read_back(sr, written, 0.5)


def test_the_first_voxel_moves_by_half_the_difference_of_the_voxels(series: Path) -> None:
    _, _, images = derive(series)
    for image, source in zip(images, by_height(series), strict=True):
        assert image.PixelSpacing == [0.9 / 4, 0.8 / 4]
        shift = np.subtract(image.ImagePositionPatient, source.ImagePositionPatient)
        assert shift == pytest.approx([-0.375 * 0.8, -0.375 * 0.9, 0])
        assert (image.Columns, image.Rows) == (44, 36)
        assert image.ImageOrientationPatient == source.ImageOrientationPatient
        assert image.SliceThickness == source.SliceThickness


@pytest.mark.parametrize(
    ("orientation", "step"),
    [
        ((1, 0, 0, 0, 1, 0), (0, 0.6, 2.4)),
        ((1, 0, 0, 0, np.cos(0.3), -np.sin(0.3)), (0, 0, 2.5)),
        ((-1, 0, 0, 0, -1, 0), None),
        ((np.cos(0.2), np.sin(0.2), 0, -np.sin(0.2), np.cos(0.2), 0), None),
    ],
    ids=["sheared", "tilted gantry", "upside down", "turned"],
)
def test_tilted_and_rotated_series_keep_their_position(
    orientation: tuple[float, ...], step: tuple[float, ...] | None, tmp_path: Path
) -> None:
    sr, written, _ = derive(write_dicom_series(tmp_path / "ct", SHAPE, orientation=orientation, step=step))
    assert_read_back(sr, written, 0)


def test_the_series_is_new_in_the_same_study(series: Path) -> None:
    _, _, images = derive(series)
    sources = by_height(series)
    assert len({image.SeriesInstanceUID for image in images}) == 1
    assert len({image.SOPInstanceUID for image in images}) == len(images)
    for image, source in zip(images, sources, strict=True):
        assert image.SeriesInstanceUID != source.SeriesInstanceUID
        assert image.SOPInstanceUID not in {one.SOPInstanceUID for one in sources}
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "SOPClassUID"):
            assert image[name] == source[name]
        assert image.SeriesNumber == source.SeriesNumber + 1000
        assert image.InstanceNumber == source.InstanceNumber
        assert image.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert image.file_meta.MediaStorageSOPClassUID == image.SOPClassUID
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID


def test_an_image_declares_its_source_derivation_and_equipment(series: Path) -> None:
    def describe(image: Dataset) -> None:
        image.ImageType, image.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL", "STD"], "Lung " * 12
        image.Manufacturer, image.DerivationDescription = "Maker", "Denoised"
        image.WindowCenter, image.WindowWidth, image.LossyImageCompression = -600, 1600, "00"
        image.SourceImageSequence = [Dataset(), Dataset()]

    change(series, describe)
    _, _, images = derive(series)
    for image, source in zip(images, by_height(series), strict=True):
        assert image.ImageType == ["DERIVED", "SECONDARY", "AXIAL", "STD"]
        assert image.DerivationDescription == "Denoised; upsampled"
        assert image.DerivationCodeSequence[0].CodeValue == "113085"
        (origin,) = image.SourceImageSequence
        assert origin.ReferencedSOPClassUID == CTImageStorage
        assert origin.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert origin.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        (equipment,) = image.ContributingEquipmentSequence
        assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
        assert equipment.SoftwareVersions == miar_monai.__version__
        assert (is_miar_result(image), is_miar_result(source)) == (True, False)
        assert image.Manufacturer == "Maker"
        assert len(image.SeriesDescription) == 64
        assert image.SeriesDescription.endswith(" SR 4x")
        assert (image.WindowCenter, image.WindowWidth, image.LossyImageCompression) == (-600, 1600, "00")
        assert image.ContentDate == image.InstanceCreationDate >= "20240101"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy here (Debian's package dicom3tools)")
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_an_independent_validator_finds_no_errors(modality: str, series: Path, tmp_path: Path) -> None:
    for edit in (to_mr, complete) if modality == "MR" else (complete,):
        change(series, edit)
    assert complaints(series) == set()
    source = read_volume(series)
    sr, headers = upsampled(source), source_headers(source)
    for name, volume, quantity in (("sr", sr, ""), ("map", sr._replace(dtype=np.dtype("f4")), "expected error")):
        written = write_series(tmp_path / name, volume, headers, "upsampled", quantity=quantity)
        found = complaints(written)
        if modality == "MR" and quantity:  # fractions need rescaling, which is not part of standard MR images
            found = {line for line in found if not line.startswith("Warning - </Rescale")}
        assert found == set()
    change(written, lambda image: image.pop("StudyInstanceUID"))
    assert any("StudyInstanceUID" in line for line in complaints(written))  # it does find errors


def test_invalid_elements_are_omitted(series: Path) -> None:
    def burden(image: Dataset) -> None:
        image.private_block(0x0013, "CTP", create=True).add_new(0x10, "LO", "LIDC-IDRI")
        item = Dataset()
        item.private_block(0x0013, "CTP", create=True).add_new(0x10, "LO", "deep")
        item.StudyDescription = "kept"
        image.RequestAttributesSequence = [item]
        image.IconImageSequence = [Dataset()]
        for tag, value in ((0x00280120, -2000), (0x00280106, 0), (0x00280107, 2024), (0x60000010, 9), (0x50000005, 1)):
            image.add_new(tag, "SS", value)
        image.BurnedInAnnotation = "NO"

    change(series, burden)
    _, _, images = derive(series)
    for image in images:
        elements = list(image.iterall())
        assert not [element for element in elements if element.tag.is_private]
        assert not [element for element in elements if element.tag.group in (0x5000, 0x6000)]
        for name in ("IconImageSequence", "PixelPaddingValue", "SmallestImagePixelValue", "LargestImagePixelValue"):
            assert name not in image
        assert image.RequestAttributesSequence[0].StudyDescription == "kept"
        assert image.BurnedInAnnotation == "NO"


def test_implicit_types_of_elements_become_explicit(series: Path) -> None:
    for path in series.iterdir():
        image = pydicom.dcmread(path)
        lut = Dataset()
        lut.LUTDescriptor, lut.LUTData = [2, 0, 16], b"\0\0\1\0"
        image.VOILUTSequence = [lut]
        image.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        FileDataset(path, image, bytes(128), image.file_meta, is_implicit_VR=True).save_as(path)
    sr, written, images = derive(series)
    assert_read_back(sr, written, 0)
    assert images[0].VOILUTSequence[0].LUTDescriptor == [2, 0, 16]


def test_mr_integers_stay_integers(series: Path) -> None:
    def plain(image: Dataset) -> None:
        to_mr(image)
        del image.RescaleSlope, image.RescaleIntercept, image.RescaleType

    sr, written, images = derive(change(series, plain))
    assert_read_back(sr, written, 0)
    assert images[0].ImageType == ["DERIVED", "SECONDARY", "OTHER"]
    assert "RescaleSlope" not in images[0]


@pytest.mark.parametrize("slope", [0.0123, 3e-7])
def test_mr_with_fractions_is_rounded_to_a_fraction_of_its_range(slope: float, tmp_path: Path) -> None:
    folder = change(write_dicom_series(tmp_path / "mr", SHAPE, slope=slope), to_mr)
    change(folder, lambda image: setattr(image, "RescaleIntercept", 0))
    sr, written, images = derive(folder)
    assert sr.dtype == np.float32
    assert_read_back(sr, written, 1e-4 * np.ptp(sr.array))
    assert all(len(str(image.RescaleSlope)) <= 16 for image in images)


@pytest.mark.parametrize(
    ("value", "plane", "rest"),
    [
        (None, "OTHER", []),
        (b"", "OTHER", []),
        (b"DERIVED", "OTHER", []),
        (b"ORIGINAL\\PRIMARY", "OTHER", []),
        (b"ORIGINAL\\PRIMARY\\", "OTHER", []),
        (b"ORIGINAL\\PRIMARY\\M_FFE", "M_FFE", []),
        (b"ORIGINAL\\PRIMARY\\M\\ND\\NORM", "M", ["ND", "NORM"]),
    ],
)
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_image_types_of_any_number_of_values(
    modality: str, value: bytes | None, plane: str, rest: list[str], series: Path
) -> None:
    def edit(image: Dataset) -> None:
        if modality == "MR":
            to_mr(image)
        if value is not None:
            set_raw(image, "ImageType", value)

    _, _, images = derive(change(series, edit))
    plane = "AXIAL" if modality == "CT" else plane  # CT images are AXIAL or LOCALIZER
    assert {tuple(image.ImageType) for image in images} == {("DERIVED", "SECONDARY", plane, *rest)}


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (b"4", 1004),
        (b"-3", 997),
        (b"2147482647", 2147483647),
        (b"2147482648", 2147481648),
        (b"2147483647", 2147482647),
        (b"-2147483648", -2147482648),
        (b"999999999999", 1000),
        (b"20230101123456", 1000),
        (b"4\\5", 1000),
        (b"four", 1000),
        (b"1.5", 1000),
        (b"", 1000),
        (None, 1000),
    ],
)
def test_series_numbers_fit_into_their_element(value: bytes | None, number: int, series: Path) -> None:
    edit = (lambda image: image.pop("SeriesNumber")) if value is None else lambda i: set_raw(i, "SeriesNumber", value)
    _, written, _ = derive(change(series, edit))
    for path in written.iterdir():
        element = pydicom.dcmread(path).get_item("SeriesNumber")
        assert int(element.value) == number
        assert len(element.value.strip()) <= 12


@pytest.mark.parametrize("value", [b"", b"1\\2", b"one", b"999999999999", None])
def test_instances_have_a_number(value: bytes | None, series: Path) -> None:
    edit = (
        (lambda image: image.pop("InstanceNumber")) if value is None else lambda i: set_raw(i, "InstanceNumber", value)
    )
    _, _, images = derive(change(series, edit))
    assert [image.InstanceNumber for image in images] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "description"),
    [
        (b"T1\\T2", "T1 T2 SR 4x"),
        (b"x" * 100, "x" * 58 + " SR 4x"),
        (b"", "SR 4x"),
        (b"t2 tse", "t2 tse SR 4x"),
    ],
)
def test_descriptions_fit_into_their_element(value: bytes, description: str, series: Path) -> None:
    def edit(image: Dataset) -> None:
        set_raw(image, "SeriesDescription", value)
        set_raw(image, "DerivationDescription", b"before " * 200)

    _, _, images = derive(change(series, edit))
    for image in images:
        assert image.SeriesDescription == description
        assert len(image.DerivationDescription) <= 1024
        assert image.DerivationDescription.endswith("before; upsampled")


def test_nonstandard_values_are_repeated_without_warnings(series: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(series, lambda image: set_raw(image, "ImageType", b"original\\primary\\lower case of more than 16"))
    change(series, lambda image: set_raw(image, "StudyDescription", b"x" * 70))
    change(series, lambda image: set_raw(image, "WindowCenter", b"40\\50"))
    source = read_volume(series)
    write_series(series.with_name("sr"), upsampled(source), source_headers(source), "upsampled")
    assert caplog.messages == []
    image = pydicom.dcmread(next(series.with_name("sr").iterdir()))
    assert image.WindowCenter == [40, 50]


def test_padding_is_an_ordinary_value_of_the_result(series: Path) -> None:
    """PixelPaddingValue refers to stored values, which may differ from those of the source."""

    def edit(image: Dataset) -> None:
        pixels = image.pixel_array.copy()
        pixels[:3] = -2000
        image.add_new("PixelPaddingValue", "SS", -2000)
        image.add_new("PixelPaddingRangeLimit", "SS", -1990)
        image.PixelData = pixels.tobytes()

    sr, written, images = derive(change(series, edit))
    assert_read_back(sr, written, 0)
    assert sr.array.min() == -3024
    assert not [image for image in images if "PixelPaddingValue" in image or "PixelPaddingRangeLimit" in image]


def to_unsigned(image: Dataset) -> None:
    image.PixelRepresentation = 0


def test_an_unsigned_source_stays_unsigned_if_the_values_fit(series: Path) -> None:
    sr, written, images = derive(change(series, to_unsigned))
    assert (images[0].PixelRepresentation, images[0].RescaleIntercept) == (0, -1024)
    assert_read_back(sr, written, 0)


@pytest.mark.parametrize(("low", "high"), [(-1030, 900), (-3000, 40000), (-20000, 200000)])
def test_values_that_do_not_fit_the_source_are_not_clipped(low: float, high: float, series: Path) -> None:
    values = np.linspace(low, high, 44 * 36 * 4, dtype=np.float32).round().reshape(44, 36, 4)
    sr, written, images = derive(change(series, to_unsigned), array=values)
    assert_read_back(sr, written, 0 if high - low < 2**16 else 1e-4 * (high - low))
    assert (images[0].BitsAllocated, images[0].BitsStored, images[0].HighBit) == (16, 16, 15)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda image: setattr(image, "SOPClassUID", SecondaryCaptureImageStorage), "from CT or MR Image Storage"),
        (lambda image: setattr(image, "PhotometricInterpretation", "MONOCHROME1"), "in MONOCHROME2 only: write NIfTI"),
        (lambda image: image.pop("StudyInstanceUID"), "has no StudyInstanceUID, which a derived image must have"),
    ],
)
def test_sources_of_another_kind_are_refused(edit: Callable[[Dataset], None], sentence: str, series: Path) -> None:
    volume = read_volume(series)
    change(series, edit)
    with pytest.raises(ImageError, match=sentence):
        source_headers(volume)


def test_a_failure_leaves_no_files_and_keeps_the_old_series(series: Path, tmp_path: Path) -> None:
    source = read_volume(series)
    headers, sr = source_headers(source), upsampled(source)
    broken = deepcopy(headers)
    del broken[2].SOPInstanceUID  # the third slice fails after two were written
    with pytest.raises(AttributeError):
        write_series(tmp_path / "sr", sr, broken, "")
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]
    write_series(tmp_path / "sr", sr, headers, "")
    before = contents(tmp_path)
    with pytest.raises(AttributeError):
        write_series(tmp_path / "sr", sr, broken, "", overwrite=True)
    with pytest.raises(OutputError, match=r"sr exists already and is left as it is"):
        write_series(tmp_path / "sr", sr, headers, "")
    assert contents(tmp_path) == before
    write_series(tmp_path / "sr", sr._replace(array=sr.array[:, :, :2]), headers, "", overwrite=True)
    assert sorted(contents(tmp_path / "sr")) == ["0001.dcm", "0002.dcm"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ct", "sr"]


def test_only_folders_of_slices_are_replaced(series: Path, tmp_path: Path) -> None:
    source = read_volume(series)
    headers, sr = source_headers(source), upsampled(source)
    before = contents(series)
    with pytest.raises(OutputError, match="is the input, which is never changed"):
        write_series(series, sr, headers, "", overwrite=True)
    with pytest.raises(OutputError, match="is not a folder of DICOM files only"):
        write_series(tmp_path, sr, headers, "", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a folder of DICOM files only"):
        write_series(tmp_path / "file", sr, headers, "", overwrite=True)
    assert contents(series) == before


def miar_sr(bundle: Path, *parts: object) -> Result:
    options = ["sr", "--out-format", "dicom", "--model", bundle, "--device", "cpu", "--quiet", *parts]
    return CliRunner().invoke(main, [str(option) for option in options])


def names(folder: Path) -> list[str]:
    return sorted(contents(folder))


@pytest.mark.usefixtures("elsewhere")
class TestCommand:
    def test_it_writes_the_same_voxels_as_nifti(self, bundle: Path, series: Path) -> None:
        done = miar_sr(bundle, series, "-o", "out", "--fidelity", 0.75, "--preview", "--report", "run.json")
        assert done.exit_code == 0, done.output
        assert names(Path()) == ["out/ct_sr.png", *(f"out/ct_sr/000{k}.dcm" for k in range(1, 5)), "run.json"]
        assert json.loads(Path("run.json").read_text())["cases"][0]["output"] == "out/ct_sr"
        assert miar_sr(bundle, series, "-o", "out", "--fidelity", 0.75, "--out-format", "nifti").exit_code == 0
        assert_read_back(read_volume("out/ct_sr.nii.gz"), Path("out/ct_sr"), 0)
        derivation = pydicom.dcmread("out/ct_sr/0001.dcm").DerivationDescription
        assert f"miar-monai {miar_monai.__version__}, bundle " in derivation
        assert "fidelity 0.75" in derivation

    def test_nifti_of_the_series_has_the_same_result(self, bundle: Path, series: Path) -> None:
        source = read_volume(series)
        image = nib.Nifti1Image(source.array.astype(np.int16), source.affine)
        rows_up = np.array([[0, 1], [1, -1], [2, 1]])  # as written by dcm2niix
        nib.save(image, "same.nii.gz")
        nib.save(nib.as_closest_canonical(image), "ras.nii.gz")
        nib.save(image.as_reoriented(rows_up), "up.nii.gz")
        options = ("--out-format", "nifti", "-o", "out")
        expected = None
        for given in (series, "same.nii.gz", "ras.nii.gz", "up.nii.gz"):
            assert miar_sr(bundle, given, *options).exit_code == 0
            result = nib.as_closest_canonical(nib.load(f"out/{Path(given).name.removesuffix('.nii.gz')}_sr.nii.gz"))
            expected = expected or result
            assert np.array_equal(result.dataobj, expected.dataobj)
            assert np.allclose(result.affine, expected.affine, atol=1e-5)

    def test_one_of_several_series_in_a_folder_can_be_selected(self, bundle: Path, series: Path) -> None:
        assert miar_sr(bundle, series, "-o", "alone").exit_code == 0
        uid = pydicom.dcmread(next(series.iterdir())).SeriesInstanceUID
        write_dicom_series(series, (10, 8, 3), series="another", prefix="another")
        refused = miar_sr(bundle, series, "-o", "out")
        assert refused.exit_code == 1
        assert f"{uid} (" in refused.stderr
        assert "choose it (--series UID" in refused.stderr
        assert miar_sr(bundle, series, "-o", "out", "--series", uid).exit_code == 0
        assert_read_back(read_volume("out/ct_sr"), Path("alone/ct_sr"), 0)
        sources = {
            pydicom.dcmread(file).SourceImageSequence[0].ReferencedSOPInstanceUID
            for file in Path("out/ct_sr").iterdir()
        }
        wanted = {pydicom.dcmread(file).SOPInstanceUID for file in series.glob("slice*")}
        assert sources == wanted
        assert miar_sr(bundle, series.parent, "-o", "x", "--series", uid).exit_code == 2

    def test_one_of_several_echoes_can_be_selected(self, bundle: Path, series: Path) -> None:
        assert miar_sr(bundle, series, "-o", "alone").exit_code == 0
        change(series, lambda image: setattr(image, "EchoTime", 10))
        first = sorted(series.iterdir())
        write_dicom_series(series, SHAPE, prefix="late", seed=1)
        for path in series.glob("late*"):
            image = pydicom.dcmread(path)
            image.EchoTime = 80
            image.save_as(path)
        refused = miar_sr(bundle, series, "-o", "out")
        assert refused.exit_code == 1
        assert "2 echoes (EchoTime 10 and 80 ms)" in refused.stderr
        assert "--select EchoTime=10" in refused.stderr
        done = miar_sr(bundle, series, "-o", "out", "--select", "EchoTime=10")
        assert done.exit_code == 0, done.output
        assert_read_back(read_volume("out/ct_sr"), Path("alone/ct_sr"), 0)
        sources = {
            pydicom.dcmread(file).SourceImageSequence[0].ReferencedSOPInstanceUID
            for file in Path("out/ct_sr").iterdir()
        }
        assert sources == {pydicom.dcmread(file).SOPInstanceUID for file in first}
        assert miar_sr(bundle, series, "-o", "x", "--select", "EchoTime=30").exit_code == 2
        options = ("--select", "EchoTime=80", "--report", "run.json")
        shutil.copytree(series, "cases/a/mr")
        shutil.copytree(series, "cases/b/mr")
        assert miar_sr(bundle, "cases", "-o", "all", *options).exit_code == 0
        for case in json.loads(Path("run.json").read_text())["cases"]:
            assert (case["series"], case["select"]) == (None, ["EchoTime=80"])

    def test_other_objects_do_not_change_the_result(self, bundle: Path, series: Path) -> None:
        assert miar_sr(bundle, series, "-o", "alone").exit_code == 0
        write_dicom_object(series / "DIRFILE", "1.2.840.10008.1.3.10", FileSetID="DISC")
        write_dicom_object(series / "report", "1.2.840.10008.5.1.4.1.1.88.11")
        assert miar_sr(bundle, series, "-o", "out").exit_code == 0
        assert names(Path("out")) == names(Path("alone"))
        assert_read_back(read_volume("out/ct_sr"), Path("alone/ct_sr"), 0)

    def test_a_long_name_is_replaced_too(self, bundle: Path, series: Path) -> None:
        series = series.rename(series.with_name("n" * 240))
        for options in ((), ("--overwrite",)):
            done = miar_sr(bundle, series, "--uncertainty", *options)
            assert done.exit_code == 0, done.output
        assert {Path(name).parent.name for name in names(Path())} == {"n" * 240 + "_sr", "n" * 240 + "_sr_uncertainty"}

    def test_it_replaces_a_series_only_if_allowed(self, bundle: Path, series: Path) -> None:
        assert miar_sr(bundle, series).exit_code == 0
        before = contents(Path())
        refused = miar_sr(bundle, series)
        assert (refused.exit_code, contents(Path())) == (1, before)
        assert "ct_sr exists already and is left as it is" in refused.stderr
        assert refused.stderr.endswith("or allow overwriting (--overwrite).\n")
        assert miar_sr(bundle, series, "--overwrite").exit_code == 0
        assert names(Path()) == sorted(before)
        assert contents(Path()) != before
        Path("ct_sr/notes.txt").touch()
        refused = miar_sr(bundle, series, "--overwrite")
        assert "ct_sr is not a folder of DICOM files only" in refused.stderr

    def test_it_reads_zip_files_and_refuses_nifti_one_by_one(self, bundle: Path, series: Path, tmp_path: Path) -> None:
        root = tmp_path / "cases"
        shutil.copytree(series, root / "a" / "ct")
        shutil.make_archive(str(root / "packed"), "zip", tmp_path, "ct")
        scan = write_nifti_phantom(root / "scan.nii.gz", SHAPE)
        done = miar_sr(bundle, root, "-o", "out")
        assert done.exit_code == 3
        assert done.stderr.splitlines()[-1] == f"1 of 3 cases failed: {scan}"
        assert f"error: {scan} is not a DICOM series" in done.stderr
        assert {Path(name).parent.as_posix() for name in names(Path())} == {"out/a/ct_sr", "out/packed_sr"}
        assert miar_sr(bundle, root / "packed.zip", "-o", "out", "--overwrite").exit_code == 0
        single = miar_sr(bundle, scan)
        assert single.exit_code == 1
        assert single.stderr.splitlines()[-1].startswith(f"error: {scan} is not a DICOM series, but a derived series")

    def test_a_series_cannot_be_written_to_a_nifti_file(self, bundle: Path, series: Path) -> None:
        refused = miar_sr(bundle, series, "-o", "x.nii.gz")
        assert refused.exit_code == 2
        assert "a DICOM series is written to a folder, not to x.nii.gz" in refused.stderr


@pytest.mark.parametrize(
    ("name", "pattern"), [("LIDC-IDRI-0006", "006[0-3].dcm"), ("tilted_gantry", "I??0")], ids=["chest", "tilted"]
)
def test_real_series_survive_the_round_trip(name: str, pattern: str, tmp_path: Path, real_data: Path) -> None:
    (tmp_path / "ct").mkdir()
    for path in (real_data / "dicom" / name).glob(pattern):
        shutil.copy(path, tmp_path / "ct")
    sr, written, _ = derive(tmp_path / "ct")
    assert sr.array.shape[2] > 3
    assert_read_back(sr, written, 0)
