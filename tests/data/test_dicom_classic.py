"""Classic series of one slice per file that are derived from enhanced (multi-frame) MR and CT images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import sr
from helpers.derived_series import assert_read_back, complaints, on_grid, upsampled
from helpers.enhanced import (
    ORIGIN,
    SHAPE,
    SPACING,
    frames,
    item,
    of_ct,
    of_mr,
    orientation,
    stored,
    write_enhanced,
)
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    EnhancedPETImageStorage,
    LegacyConvertedEnhancedMRImageStorage,
    MRImageStorage,
)

from miar_monai.data.dicom_classic import classic_header
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import write_series
from miar_monai.data.io import Volume, read_volume
from miar_monai.errors import ImageError

GADOLINIUM = item(CodeValue="C-B03CA", CodingSchemeDesignator="SRT", CodeMeaning="Gadolinium")


def complete(image: FileDataset) -> None:
    """Add the elements of both kinds of images that the phantoms lack, and some of enhanced ones alone."""
    for name in ("AccessionNumber", "PatientBirthDate", "PatientSex", "PositionReferenceIndicator"):
        setattr(image, name, "")
    image.PatientName, image.PatientPosition, image.ReferringPhysicianName = "Phantom^A", "HFS", ""
    image.StudyDate, image.StudyTime, image.StudyID, image.Manufacturer = "20200101", "120000", "1", "Maker"
    image.DimensionOrganizationSequence, image.AcquisitionContextSequence = [Dataset()], []
    image.ContentQualification, image.PresentationLUTShape = "PRODUCT", "IDENTITY"
    image.ContrastBolusAgentSequence = [GADOLINIUM]
    image.private_block(0x0019, "MAKER", create=True).add_new(0x10, "LO", "private")
    if image.Modality == "MR":
        image.EchoPulseSequence, image.EchoPlanarPulseSequence, image.SteadyStatePulseSequence = "SPIN", "NO", "NONE"
        image.SegmentedKSpaceTraversal, image.OversamplingPhase, image.MRAcquisitionType = "PARTIAL", "2D", "2D"
        image.ResonantNucleus, image.MagneticFieldStrength = "1H", 1.5


def source(
    folder: Path, modality: str, edit: Callable[[FileDataset], None] = complete, angle: float = 20, **more: Any
) -> Volume:
    """Write an enhanced image as scanners do, and read it."""
    of = of_mr if modality == "MR" else of_ct
    image = write_enhanced(folder / "a.dcm", frames(1, orientation(angle), edit=of), modality, **more)
    edit(image)
    image.save_as(folder / "a.dcm")
    return read_volume(folder)


def derive(volume: Volume, folder: Path, finer: Volume | None = None) -> tuple[Volume, list[Dataset]]:
    finer = finer or upsampled(volume)
    write_series(folder, finer, source_headers(volume), "upsampled")
    return finer, [dcmread(path) for path in sorted(folder.iterdir())]


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="no dciodvfy here (Debian's package dicom3tools)")
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_an_independent_validator_finds_no_errors(modality: str, tmp_path: Path) -> None:
    volume = source(tmp_path / "in", modality)
    thinner = on_grid(volume, volume.grid.resized((0.5, 0.5, 0.4)))
    for name, finer in (("sr", upsampled(volume)), ("thin", thinner)):
        derive(volume, tmp_path / name, finer)
        assert complaints(tmp_path / name) == set()


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("angle", [0, 35])
def test_intensities_and_positions_survive_the_round_trip(modality: str, angle: float, tmp_path: Path) -> None:
    volume = source(tmp_path / "in", modality, angle=angle)
    finer, images = derive(volume, tmp_path / "sr")
    assert_read_back(finer, tmp_path / "sr", 0)
    kind = {"CT": CTImageStorage, "MR": MRImageStorage}[modality]
    assert {image.SOPClassUID for image in images} == {kind}
    thinner = on_grid(volume, volume.grid.resized((0.5, 0.5, 0.4)))
    _, images = derive(volume, tmp_path / "thin", thinner)
    assert_read_back(thinner, tmp_path / "thin", 0.5)
    assert [image.InstanceNumber for image in images] == list(range(1, len(images) + 1))
    assert [float(image.SliceThickness) for image in images] == pytest.approx([0.4 * SPACING[2]] * len(images))


def test_each_image_refers_to_its_frame(tmp_path: Path) -> None:
    volume = source(tmp_path / "in", "MR")
    (path,) = (tmp_path / "in").iterdir()
    whole = dcmread(path)
    _, images = derive(volume, tmp_path / "sr")
    assert len(images) == SHAPE[2]
    for k, image in enumerate(images):
        (origin,) = image.SourceImageSequence
        assert origin.ReferencedSOPClassUID == EnhancedMRImageStorage
        assert origin.ReferencedSOPInstanceUID == whole.SOPInstanceUID
        frame = whole.PerFrameFunctionalGroupsSequence[origin.ReferencedFrameNumber - 1]
        assert frame.FrameContentSequence[0].InStackPositionNumber == k + 1 == image.InstanceNumber
        assert image.AcquisitionDateTime == frame.FrameContentSequence[0].FrameAcquisitionDateTime
        assert image.WindowCenter == 500 + k
        for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "Manufacturer"):
            assert image[name] == whole[name]
        assert image.SeriesInstanceUID != whole.SeriesInstanceUID


def test_mr_is_described_in_the_terms_of_classic_images(tmp_path: Path) -> None:
    _, images = derive(source(tmp_path / "in", "MR"), tmp_path / "sr")
    expected = {
        "ImageType": ["DERIVED", "SECONDARY", "OTHER", "VOLUME"], "ScanningSequence": ["SE", "IR"],
        "SequenceVariant": ["SK", "SP", "OSP"], "ScanOptions": "PFP", "MRAcquisitionType": "2D",
        "RepetitionTime": 3000, "FlipAngle": 90, "EchoTrainLength": 5, "InversionTime": 120, "NumberOfAverages": 2,
        "ImagingFrequency": 63.8625, "ImagedNucleus": "1H", "MagneticFieldStrength": 1.5, "PixelBandwidth": 130,
        "InPlanePhaseEncodingDirection": "COL", "AcquisitionMatrix": [13, 0, 0, 11], "ImageLaterality": "U",
        "ContrastBolusAgent": "Gadolinium",
    }  # fmt: skip
    for image in images:
        assert {name: image[name].value for name in expected} == expected
        assert image.EchoTime == pytest.approx(100 / 3, abs=1e-9)
        assert len(str(image.EchoTime)) <= 16
        assert image.AnatomicRegionSequence[0].CodeMeaning == "Head"
        for name in ("EffectiveEchoTime", "ContentQualification", "EchoPulseSequence", "RescaleSlope"):
            assert name not in image
        for name in ("PerFrameFunctionalGroupsSequence", "NumberOfFrames", "DimensionOrganizationSequence"):
            assert name not in image
        assert not [element for element in image.iterall() if element.tag.is_private]


def test_ct_is_described_in_the_terms_of_classic_images(tmp_path: Path) -> None:
    _, images = derive(source(tmp_path / "in", "CT"), tmp_path / "sr")
    expected = {
        "ImageType": ["DERIVED", "SECONDARY", "AXIAL"], "KVP": 120, "ExposureTime": 500, "Exposure": 100,
        "RotationDirection": "CW", "RevolutionTime": 0.5, "ConvolutionKernel": "B30", "ReconstructionDiameter": 250,
        "RescaleSlope": 1, "RescaleIntercept": -1024, "FilterType": "WEDGE", "FocalSpots": 1.2,
    }  # fmt: skip
    for k, image in enumerate(images):
        assert {name: image[name].value for name in expected} == expected
        assert image.XRayTubeCurrent == round(200.6 + k)


@pytest.mark.parametrize(
    ("stated", "name", "expected"),
    [
        ({}, "ScanningSequence", "RM"),
        ({}, "SequenceVariant", "NONE"),
        ({}, "ScanOptions", None),
        ({"EchoPulseSequence": "BOTH", "EchoPlanarPulseSequence": "YES"}, "ScanningSequence", ["SE", "GR", "EP"]),
        ({"SteadyStatePulseSequence": "FREE_PRECESSION"}, "SequenceVariant", "SS"),
        ({"SteadyStatePulseSequence": "TIME_REVERSED"}, "SequenceVariant", "TRSS"),
        ({"MagnetizationTransfer": "OFF_RESONANCE", "Spoiling": "NONE"}, "SequenceVariant", "MTC"),
        ({"SpectrallySelectedSuppression": "FAT", "FlowCompensation": "GMN"}, "ScanOptions", ["FC", "FS"]),
        ({"PartialFourier": "YES", "PartialFourierDirection": "COMBINATION"}, "ScanOptions", ["PFF", "PFP"]),
        ({"SpatialPresaturation": "SLAB", "PartialFourier": "NO"}, "ScanOptions", "SP"),
        ({"InversionTimes": []}, "InversionTime", None),
        ({"ComplexImageComponent": "PHASE"}, "ImageType", ["A", "B", "PHASE MAP", "VOLUME"]),
        ({"ComplexImageComponent": "REAL"}, "ImageType", ["A", "B", "OTHER", "VOLUME", "REAL"]),
        ({"InPlanePhaseEncodingDirection": "OTHER"}, "InPlanePhaseEncodingDirection", ""),
        ({"InPlanePhaseEncodingDirection": "ROW"}, "InPlanePhaseEncodingDirection", "ROW"),
        ({"ScanningSequence": "GR", "EchoPulseSequence": "SPIN"}, "ScanningSequence", "GR"),
    ],
)
def test_terms_of_mr(stated: dict[str, Any], name: str, expected: Any) -> None:
    frame = item(SOPClassUID=EnhancedMRImageStorage, ImageType=["A", "B", "VOLUME", "NONE"], **stated)
    if "InversionTimes" in stated:
        frame.InversionTime = []
    assert classic_header(frame)[name].value == expected


def test_legacy_converted_images_get_their_elements_back() -> None:
    kind = ["ORIGINAL", "PRIMARY", "M_FFE", "ND"]
    frame = item(SOPClassUID=LegacyConvertedEnhancedMRImageStorage, ImageType=kind, ScanningSequence="GR", EchoTime=5)
    header = classic_header(frame)
    assert (header.ImageType, header.ScanningSequence, header.EchoTime) == (kind, "GR", 5)


def test_a_chosen_volume_of_several_is_referred_to(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "in" / "a.dcm", frames(2), order=lambda i: i)
    volume = read_volume(tmp_path / "in", select=["EchoTime=20"])
    _, images = derive(volume, tmp_path / "sr")
    numbers = [image.SourceImageSequence[0].ReferencedFrameNumber for image in images]
    assert numbers == [SHAPE[2] + k + 1 for k in range(SHAPE[2])]
    assert {image.EchoTime for image in images} == {20}
    np.testing.assert_array_equal(images[2].pixel_array[::4, ::4], stored(1)[:, :, 2].T)


def weighted(group: Dataset, volume: int, k: int) -> None:
    """Make a frame that of a b-value of 0, or of one of two directions."""
    of_mr(group, volume, k)
    group.MREchoSequence[0].EffectiveEchoTime = 90.0
    one = item(DiffusionBValue=1000.0 if volume else 0.0, DiffusionDirectionality="DIRECTIONAL" if volume else "NONE")
    if volume:
        orientation = [[1.0, 0, 0], [0, 0.6, 0.8]][volume - 1]
        one.DiffusionGradientDirectionSequence = [item(DiffusionGradientOrientation=orientation)]
    group.MRDiffusionSequence = [one]


@pytest.mark.parametrize(
    ("number", "select"),
    [(0, ["DiffusionBValue=0"]), (2, ["DiffusionBValue=1000", r"DiffusionGradientOrientation=0\0.6\0.8"])],
)
def test_a_diffusion_image_keeps_b_value_and_direction(number: int, select: list[str], tmp_path: Path) -> None:
    image = write_enhanced(tmp_path / "in" / "a.dcm", frames(3, orientation(20), edit=weighted), order=lambda i: i)
    complete(image)
    image.save_as(tmp_path / "in" / "a.dcm")
    volume = read_volume(tmp_path / "in", select=select)
    _, images = derive(volume, tmp_path / "sr")
    for k, one in enumerate(images):
        assert one.SourceImageSequence[0].ReferencedFrameNumber == number * SHAPE[2] + k + 1
        assert (one.DiffusionBValue, one.EchoTime) == (1000 if number else 0, 90)
        assert one.get("DiffusionGradientOrientation") == ([0, 0.6, 0.8] if number else None)
        assert one.SeriesDescription.startswith(f"SR 4x DiffusionBValue={one.DiffusionBValue:.0f}")
    np.testing.assert_array_equal(images[2].pixel_array[::4, ::4], stored(number)[:, :, 2].T)
    if shutil.which("dciodvfy"):  # both extend the MR image, which is no error
        extended = ("Warning - </DiffusionBValue(", "Warning - </DiffusionGradientOrientation(")
        assert all(line.startswith(extended) for line in complaints(tmp_path / "sr"))


def test_a_slope_of_each_frame_becomes_one_of_the_series(tmp_path: Path) -> None:
    def rescaled(group: Dataset, _: int, k: int) -> None:
        group.PixelValueTransformationSequence = [item(RescaleSlope=0.5 + k, RescaleIntercept=-k, RescaleType="US")]

    write_enhanced(tmp_path / "in" / "a.dcm", frames(edit=rescaled))
    volume = read_volume(tmp_path / "in")
    finer, images = derive(volume, tmp_path / "sr")
    assert len({(image.RescaleSlope, image.RescaleIntercept) for image in images}) == 1
    assert_read_back(finer, tmp_path / "sr", np.ptp(finer.array) / 65535)


@pytest.mark.parametrize("name", ["in", "in/a.dcm"])
def test_the_command_writes_a_series_of_a_folder_or_a_file(name: str, bundle: Path, tmp_path: Path) -> None:
    volume = source(tmp_path / "in", "CT")
    done = sr(bundle, tmp_path / name, "--out-format", "dicom", "--uncertainty", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    name = "a_sr" if name.endswith("dcm") else "in_sr"
    result = read_volume(tmp_path / "out" / name)
    assert result.array.shape == (4 * SHAPE[0], 4 * SHAPE[1], SHAPE[2])
    center = np.array([[(size - 1) / 2 for size in SHAPE] + [1]]).T
    finer = np.array([[(size - 1) / 2 for size in result.array.shape] + [1]]).T
    np.testing.assert_allclose(result.affine @ finer, volume.affine @ center, atol=0.01)
    assert (tmp_path / "out" / f"{name}_uncertainty" / "0001.dcm").is_file()


def test_other_modalities_and_damaged_numbers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def pet(image: FileDataset) -> None:
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedPETImageStorage

    with pytest.raises(ImageError, match=r"a\.dcm contains Enhanced PET Image Storage in MONOCHROME2, but a series"):
        source_headers(source(tmp_path / "pet", "CT", edit=pet))

    def damaged(image: FileDataset) -> None:
        image.PerFrameFunctionalGroupsSequence[0].CTXRayDetailsSequence[0].KVP = float("nan")

    with pytest.raises(ImageError, match=r"ct has a header that a derived image cannot repeat \("):
        source_headers(source(tmp_path / "ct", "CT", edit=damaged))


def test_the_header_of_a_frame_stays(tmp_path: Path) -> None:
    headers = source_headers(source(tmp_path / "in", "CT"))
    before = [str(header) for header in headers]
    assert {header.SOPClassUID for header in headers} == {EnhancedCTImageStorage}
    assert headers[0].ImagePositionPatient[2] == pytest.approx(ORIGIN[2])
    for header in headers:
        classic_header(header)
    assert [str(header) for header in headers] == before
