"""Headers of classic images, one slice per file, for the frames of enhanced (multi-frame) MR and CT images.

A derived image may be of another SOP class than its source, and images of one slice are what all viewers and archives
take. Elements that classic images do not have are left out, as the standard gives those of functional groups no meaning
outside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from miar_monai.data.dicom_headers import is_missing, text, values

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["classic_header", "classic_sop_class"]

_PATIENT = 0x0010  # group of the patient, all of whose elements classic images have

# keywords of the other elements that are repeated, of both modalities and of one
_COMMON = """
    SpecificCharacterSet TimezoneOffsetFromUTC SOPInstanceUID ImageType Modality
    StudyInstanceUID StudyDate StudyTime StudyID StudyDescription AccessionNumber ReferringPhysicianName
    PhysiciansOfRecord NameOfPhysiciansReadingStudy IssuerOfAccessionNumberSequence ProcedureCodeSequence
    ReferencedStudySequence SeriesInstanceUID SeriesNumber SeriesDescription PerformingPhysicianName OperatorsName
    ProtocolName BodyPartExamined PatientPosition Laterality PerformedProcedureStepID PerformedProcedureStepStartDate
    PerformedProcedureStepStartTime PerformedProcedureStepDescription PerformedProtocolCodeSequence
    ReferencedPerformedProcedureStepSequence RequestAttributesSequence
    FrameOfReferenceUID PositionReferenceIndicator
    Manufacturer ManufacturerModelName InstitutionName InstitutionAddress InstitutionalDepartmentName StationName
    DeviceSerialNumber DeviceUID SoftwareVersions GantryID DateOfLastCalibration TimeOfLastCalibration
    ContributingEquipmentSequence DerivationDescription ImageComments BurnedInAnnotation RecognizableVisualFeatures
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod
    AcquisitionNumber AcquisitionDateTime AcquisitionDate AcquisitionTime
    ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness SpacingBetweenSlices
    Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation
    WindowCenter WindowWidth WindowCenterWidthExplanation VOILUTFunction
    ContrastBolusAgent ContrastBolusRoute ScanOptions AnatomicRegionSequence ImageLaterality
"""

_OF_MR = """
    ScanningSequence SequenceVariant SequenceName MRAcquisitionType RepetitionTime EchoTime EchoNumbers EchoTrainLength
    InversionTime TriggerTime FlipAngle VariableFlipAngleFlag SAR dBdt AngioFlag NumberOfAverages ImagingFrequency
    ImagedNucleus MagneticFieldStrength NumberOfPhaseEncodingSteps PercentSampling PercentPhaseFieldOfView
    PixelBandwidth ReceiveCoilName TransmitCoilName AcquisitionMatrix InPlanePhaseEncodingDirection
    TemporalPositionIdentifier NumberOfTemporalPositions TemporalResolution DiffusionBValue
    DiffusionGradientOrientation
"""

_OF_CT = """
    KVP RescaleType DataCollectionDiameter ReconstructionDiameter ReconstructionTargetCenterPatient
    DataCollectionCenterPatient DistanceSourceToDetector DistanceSourceToPatient GantryDetectorTilt TableHeight
    RotationDirection ExposureTime XRayTubeCurrent Exposure FilterType FocalSpots ConvolutionKernel RevolutionTime
    SingleCollimationWidth TotalCollimationWidth TableSpeed TableFeedPerRotation SpiralPitchFactor
    ExposureModulationType EstimatedDoseSaving CTDIvol
"""

_NAMES = {
    "TransmitterFrequency": "ImagingFrequency",
    "ResonantNucleus": "ImagedNucleus",
    "ExposureTimeInms": "ExposureTime",
    "XRayTubeCurrentInmA": "XRayTubeCurrent",
    "ExposureInmAs": "Exposure",
    "FrameComments": "ImageComments",
    "FrameLaterality": "ImageLaterality",
}
"""Elements of enhanced images, and those with the same meaning in classic ones; others are in `dicom_frames`."""

_EMPTY = {
    "MR": ("ScanOptions", "MRAcquisitionType", "RepetitionTime", "EchoTime", "EchoTrainLength"),
    "CT": ("KVP", "AcquisitionNumber"),
}
"""Elements that must be there, but may be empty."""

_SEQUENCES: dict[str, Callable[[Dataset], bool]] = {
    "SE": lambda frame: text(frame, "EchoPulseSequence") in ("SPIN", "BOTH"),
    "GR": lambda frame: text(frame, "EchoPulseSequence") in ("GRADIENT", "BOTH"),
    "IR": lambda frame: text(frame, "InversionRecovery") == "YES",
    "EP": lambda frame: text(frame, "EchoPlanarPulseSequence") == "YES",
}
_VARIANTS: dict[str, Callable[[Dataset], bool]] = {
    "SK": lambda frame: text(frame, "SegmentedKSpaceTraversal") in ("PARTIAL", "FULL"),
    "MTC": lambda frame: text(frame, "MagnetizationTransfer") in ("ON_RESONANCE", "OFF_RESONANCE"),
    "SS": lambda frame: text(frame, "SteadyStatePulseSequence") in ("FREE_PRECESSION", "LONGITUDINAL"),
    "TRSS": lambda frame: text(frame, "SteadyStatePulseSequence") in ("TRANSVERSE", "TIME_REVERSED"),
    "SP": lambda frame: text(frame, "Spoiling") in ("RF", "GRADIENT", "RF_AND_GRADIENT"),
    "OSP": lambda frame: text(frame, "OversamplingPhase") in ("2D", "3D", "2D_3D"),
}
_OPTIONS: dict[str, Callable[[Dataset], bool]] = {
    "FC": lambda frame: text(frame, "FlowCompensation") not in ("", "NONE"),
    "PFF": lambda frame: _is_partial(frame, "FREQUENCY"),
    "PFP": lambda frame: _is_partial(frame, "PHASE"),
    "SP": lambda frame: text(frame, "SpatialPresaturation") == "SLAB",
    "FS": lambda frame: text(frame, "SpectrallySelectedSuppression") in ("FAT", "FAT_AND_WATER"),
}


def classic_sop_class(frame: Dataset) -> str | None:
    """Return the SOP class of classic images of the modality of an enhanced one, or None for other modalities."""
    from pydicom import uid

    classes = {
        uid.EnhancedMRImageStorage: uid.MRImageStorage,
        uid.LegacyConvertedEnhancedMRImageStorage: uid.MRImageStorage,
        uid.EnhancedCTImageStorage: uid.CTImageStorage,
        uid.LegacyConvertedEnhancedCTImageStorage: uid.CTImageStorage,
    }
    return classes.get(uid.UID(text(frame, "SOPClassUID")))


def classic_header(frame: Dataset) -> Dataset:
    """Return the header of an image of one slice with what the header of a frame states.

    Elements of the modules of both kinds of images stay. Those of functional groups are converted where the standard
    defines classic elements with the same meaning (PS3.3, C.8.3.1 and C.8.13 for MR, C.8.2.1 and C.8.15 for CT): pulse
    sequence and suppression of MR, exposure of CT, contrast agent. Others are left out.

    Args:
        frame: from `miar_monai.data.dicom_frames.frame_headers`, of an enhanced or legacy converted MR or CT image.

    Example:
        >>> from pydicom import Dataset, uid
        >>> frame = Dataset()
        >>> frame.SOPClassUID, frame.EchoPulseSequence, frame.Spoiling = uid.EnhancedMRImageStorage, "GRADIENT", "RF"
        >>> header = classic_header(frame)
        >>> header.SOPClassUID.name, header.ScanningSequence, header.SequenceVariant
        ('MR Image Storage', 'GR', 'SP')
    """
    from pydicom import Dataset

    sop_class = classic_sop_class(frame)
    assert sop_class, "the frame is neither MR nor CT"
    header, is_mr = Dataset(), "MR" in sop_class.name  # type: ignore[attr-defined]
    kept = f"{_COMMON} {_OF_MR if is_mr else _OF_CT}".split()
    for element in frame:
        name = _NAMES.get(element.keyword, element.keyword)
        if name and (element.tag.group == _PATIENT or name in kept) and name not in header:
            _set(header, name, element.value)
    header.SOPClassUID = sop_class
    if "Legacy" not in frame.SOPClassUID.name:  # these have the image type of the classic images that they were
        header.ImageType = _image_type(frame, is_mr)
    if is_mr:
        _describe_pulse_sequence(header, frame)
    _name_contrast_agent(header, frame)
    for name in _EMPTY["MR" if is_mr else "CT"]:
        if name not in header:
            _set(header, name, None)
    return header


def _set(header: Dataset, name: str, value: Any) -> None:
    """Set an element, whose numbers may have another representation and multiplicity in functional groups."""
    from pydicom.datadict import dictionary_VM, dictionary_VR
    from pydicom.multival import MultiValue
    from pydicom.valuerep import DSfloat

    representation = dictionary_VR(name)
    several = isinstance(value, (MultiValue, list)) and representation != "SQ"
    if several and dictionary_VM(name) == "1":
        several, value = False, value[0] if value else None
    if representation in ("DS", "IS") and value not in (None, ""):
        numbers = [float(x) for x in (value if several else [value])]
        whole = representation == "IS"
        value = [round(x) if whole else DSfloat(x, auto_format=True) for x in numbers]
    header.add_new(name, representation, value)


def _image_type(frame: Dataset, is_mr: bool) -> list[str]:
    """Return the image type of a classic image: the third value of an enhanced one is of another kind."""
    kind = [*values(frame, "ImageType"), "", "", ""]
    if not is_mr:
        return [*kind[:2], "AXIAL"]
    component = text(frame, "ComplexImageComponent")
    third = "PHASE MAP" if component == "PHASE" else "OTHER"
    own = (kind[2], component if component in ("REAL", "IMAGINARY") else "")
    return [*kind[:2], third, *filter(None, own)]


def _describe_pulse_sequence(header: Dataset, frame: Dataset) -> None:
    """Set the elements of classic MR images that enhanced ones state in other words."""
    for name, terms, other in (
        ("ScanningSequence", _SEQUENCES, "RM"),  # research mode: neither is known
        ("SequenceVariant", _VARIANTS, "NONE"),
        ("ScanOptions", _OPTIONS, None),
    ):
        if is_missing(header, name):  # images that were converted from classic ones have them
            found = [term for term, holds in terms.items() if holds(frame)]
            _set(header, name, found or other)
    if direction := text(header, "InPlanePhaseEncodingDirection"):
        header.InPlanePhaseEncodingDirection = {"COLUMN": "COL", "OTHER": ""}.get(direction, direction)


def _is_partial(frame: Dataset, direction: str) -> bool:
    directions = (direction, "COMBINATION")
    return text(frame, "PartialFourier") == "YES" and text(frame, "PartialFourierDirection") in directions


def _name_contrast_agent(header: Dataset, frame: Dataset) -> None:
    """Set the contrast agents by name."""
    agents = [" ".join(values(item, "CodeMeaning")) for item in frame.get("ContrastBolusAgentSequence") or []]
    if agents and is_missing(header, "ContrastBolusAgent"):
        header.ContrastBolusAgent = ", ".join(agents)[:64]
