"""Enhanced (multi-frame) MR and CT images as scanners write them, with functional groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from helpers.phantoms import head
from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (13, 11, 6)
SPACING = (0.8, 0.9, 2.5)
ORIGIN = (-15.0, -14.0, 100.0)


def item(**elements: Any) -> Dataset:
    """Return the item of a sequence."""
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def orientation(degrees: float = 0) -> list[float]:
    """Return an ImageOrientationPatient that is turned about two axes."""
    a, b = np.deg2rad([degrees, degrees / 2])
    row = [np.cos(a), np.sin(a), 0]
    return [*row, -np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), np.sin(b)]


def stored(seed: int, shape: Sequence[int] = SHAPE) -> np.ndarray:
    """Return the stored values of a volume, (X, Y, Z)."""
    return np.round(24 + 2000 * head(shape, seed)).astype(np.int16)


def frames(
    volumes: int = 1,
    cosines: Sequence[float] = (1, 0, 0, 0, 1, 0),
    stack: str = "1",
    origin: Sequence[float] = ORIGIN,
    seed: int = 0,
    edit: Callable[[Dataset, int, int], None] = lambda group, volume, k: None,
) -> list[tuple[Dataset, np.ndarray]]:
    """Return the functional groups and the pixels (rows, columns) of the frames of some volumes of a stack.

    Args:
        volumes: at the same positions; each has an echo time of its own, 10 ms and so on.
        cosines: ImageOrientationPatient.
        stack: StackID.
        origin: position of the first slice.
        seed: of the first volume; others have the following ones.
        edit: changes the group of a frame, given the numbers of volume and slice.
    """
    normal, found = np.cross(cosines[:3], cosines[3:]), []
    for volume in range(volumes):
        for k in range(SHAPE[2]):
            position = np.asarray(origin) + k * SPACING[2] * normal
            group = item(
                PlanePositionSequence=[item(ImagePositionPatient=[round(float(x), 8) for x in position])],
                PlaneOrientationSequence=[item(ImageOrientationPatient=[round(float(x), 10) for x in cosines])],
                FrameContentSequence=[
                    item(StackID=stack, InStackPositionNumber=k + 1, TemporalPositionIndex=1, FrameAcquisitionNumber=1)
                ],
                MREchoSequence=[item(EffectiveEchoTime=10.0 * (volume + 1))],
            )
            edit(group, volume, k)
            found.append((group, np.ascontiguousarray(stored(seed + volume)[:, :, k].T)))
    return found


def write_enhanced(
    path: str | Path,
    parts: Sequence[tuple[Dataset, np.ndarray]],
    modality: str = "MR",
    series: str = "1",
    slope: float = 1,
    order: Callable[[int], int] = lambda i: -(i * 7) % 997,
) -> FileDataset:
    """Write an enhanced image whose frames are in an order of their own, and return it.

    Args:
        path: of the file.
        parts: of `frames`.
        modality: MR, with spacing shared by all frames; or CT, with spacing and rescaling of each frame.
        series: the series that the file belongs to.
        slope: rescaling of all frames of MR; of CT, HU.
        order: sort key of the frames.
    """
    path, meta = Path(path), FileMetaDataset()
    path.parent.mkdir(parents=True, exist_ok=True)
    sop_class = EnhancedMRImageStorage if modality == "MR" else EnhancedCTImageStorage
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = sop_class, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    image = FileDataset(str(path), {}, preamble=bytes(128), file_meta=meta, is_implicit_VR=False)
    image.SOPClassUID, image.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    image.Modality, image.PatientID, image.PatientName = modality, "PHANTOM-0002", "Phantom"
    image.StudyInstanceUID = generate_uid(entropy_srcs=["enhanced study"])
    image.SeriesInstanceUID = generate_uid(entropy_srcs=["enhanced series", series])
    image.FrameOfReferenceUID = generate_uid(entropy_srcs=["enhanced frame"])
    image.SeriesNumber, image.InstanceNumber, image.ImageType = 1, 1, ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    parts = [parts[i] for i in sorted(range(len(parts)), key=order)]
    measures = item(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=SPACING[2])
    intercept, unit = (-1024, "HU") if modality == "CT" else (0, "US")
    rescaling = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType=unit)
    shared = Dataset()
    if modality == "MR":
        shared.PixelMeasuresSequence, shared.PixelValueTransformationSequence = [measures], [rescaling]
        shared.MRTimingAndRelatedParametersSequence = [item(RepetitionTime=3000.0, FlipAngle=90.0)]
    else:
        for group, _ in parts:
            group.PixelMeasuresSequence, group.PixelValueTransformationSequence = [measures], [rescaling]
            del group.MREchoSequence
    image.SharedFunctionalGroupsSequence = [shared]
    image.PerFrameFunctionalGroupsSequence = [group for group, _ in parts]
    image.NumberOfFrames = len(parts)
    image.Rows, image.Columns = parts[0][1].shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.PixelData = b"".join(pixels.tobytes() for _, pixels in parts)
    image.save_as(path)
    return image


HEAD = item(CodeValue="69536005", CodingSchemeDesignator="SCT", CodeMeaning="Head")


def of_mr(group: Dataset, volume: int, k: int) -> None:
    """Add what scanners state of each frame of MR."""
    number = volume * SHAPE[2] + k
    frame_type = item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], ComplexImageComponent="MAGNITUDE")
    group.MRImageFrameTypeSequence = [frame_type]
    group.FrameAnatomySequence = [item(FrameLaterality="U", AnatomicRegionSequence=[HEAD])]
    group.FrameVOILUTSequence = [item(WindowCenter=500.0 + k, WindowWidth=1000.0)]
    group.FrameContentSequence[0].FrameAcquisitionDateTime = f"202001011200{number:02}"
    group.MREchoSequence[0].EffectiveEchoTime = 100 / 3
    group.MRModifierSequence = [
        item(InversionRecovery="YES", InversionTimes=[120.0], FlowCompensation="NONE", Spoiling="RF",
             PartialFourier="YES", PartialFourierDirection="PHASE", SpatialPresaturation="NONE")
    ]  # fmt: skip
    group.MRImagingModifierSequence = [
        item(TransmitterFrequency=63.8625, MagnetizationTransfer="NONE", PixelBandwidth=130.0)
    ]
    group.MRTimingAndRelatedParametersSequence = [item(RepetitionTime=3000.0, FlipAngle=90.0, EchoTrainLength=5)]
    group.MRAveragesSequence = [item(NumberOfAverages=2.0)]
    group.MRFOVGeometrySequence = [
        item(InPlanePhaseEncodingDirection="COLUMN", MRAcquisitionFrequencyEncodingSteps=13,
             MRAcquisitionPhaseEncodingStepsInPlane=11)
    ]  # fmt: skip


def of_ct(group: Dataset, _: int, k: int) -> None:
    """Add what scanners state of each frame of CT."""
    group.CTImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])]
    group.FrameAnatomySequence = [item(FrameLaterality="U", AnatomicRegionSequence=[HEAD])]
    group.CTExposureSequence = [item(ExposureTimeInms=500.4, XRayTubeCurrentInmA=200.6 + k, ExposureInmAs=100.0)]
    group.CTXRayDetailsSequence = [item(KVP=120.0, FocalSpots=[1.2], FilterType="WEDGE")]
    group.CTAcquisitionDetailsSequence = [item(RotationDirection="CW", RevolutionTime=0.5, GantryDetectorTilt=0.0)]
    group.CTReconstructionSequence = [item(ConvolutionKernel="B30", ReconstructionDiameter=250.0)]
