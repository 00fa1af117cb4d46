"""Frames of enhanced (multi-frame) DICOM images, as slices with headers and files of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from miar_monai.errors import ImageError, in_one_sentence

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.dataset import FileDataset
    from pydicom.uid import UID

__all__ = ["FRAME_NUMBER", "FUNCTIONAL_GROUPS", "frame_headers", "is_enhanced", "single_slices", "slice_name"]

FRAME_NUMBER = "ReferencedFrameNumber"
"""Element of a frame's header with its number in its file, from 1; headers of other slices do not have it."""

FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
"""Elements with what all frames of an enhanced image have in common, and with what differs."""

_NAMES = {
    "EffectiveEchoTime": "EchoTime",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
    "FrameAcquisitionNumber": "AcquisitionNumber",
    "FrameAcquisitionDateTime": "AcquisitionDateTime",
    "FrameType": "ImageType",
    "InversionTimes": "InversionTime",
    "NominalCardiacTriggerDelayTime": "TriggerTime",
}
"""Elements of functional groups, and those with the same meaning in images of one slice."""


_OF_FRAMES = ("AnatomicRegionSequence",)
"""Sequences of functional groups that images of one slice have too."""


def is_enhanced(header: Dataset) -> bool:
    """Return whether an image has functional groups, as enhanced MR and CT images do."""
    return any(name in header for name in FUNCTIONAL_GROUPS)


def frame_headers(header: Dataset) -> list[Dataset]:
    """Return a header for each frame of an enhanced image, as if the frame were a file of its own.

    The elements of the functional groups, first those that all frames share, become elements of the header, also under
    the names that they have in images of one slice: ``EchoTime`` for ``EffectiveEchoTime``, for example.

    Args:
        header: of an enhanced image, without pixels.

    Raises:
        ImageError: if the number of frames is not that of their functional groups.

    Example:
        >>> from pydicom import Dataset
        >>> header, shared, echo = Dataset(), Dataset(), Dataset()
        >>> header.filename, echo.EffectiveEchoTime = "a.dcm", 80.0
        >>> shared.MREchoSequence, header.NumberOfFrames = [echo], 2
        >>> header.SharedFunctionalGroupsSequence = [shared]
        >>> [(float(frame.EchoTime), int(frame.ReferencedFrameNumber)) for frame in frame_headers(header)]
        [(80.0, 1), (80.0, 2)]
    """
    from pydicom import Dataset

    shared, groups = (header.get(name) or [] for name in FUNCTIONAL_GROUPS)
    count = int(header.get("NumberOfFrames") or max(len(groups), 1))
    if groups and len(groups) != count:
        raise ImageError(
            f"{header.filename} has {count} frames, but the functional groups of {len(groups)}, so their positions are "
            "unknown: a complete file is needed; export the series again."
        )
    left_out = (*FUNCTIONAL_GROUPS, "NumberOfFrames")
    common = [element for element in header if element.keyword not in left_out]
    frames = []
    for number in range(1, count + 1):
        frame = Dataset()
        frame.filename = header.filename
        for element in common:
            frame[element.tag] = element
        for group in [*shared[:1], *groups[number - 1 : number]]:
            _take_over(frame, group)
        _set(frame, FRAME_NUMBER, number)
        frames.append(frame)
    return frames


def _set(frame: Dataset, keyword: str, value: Any) -> None:
    """Set an element; frames share other elements, which are therefore replaced and not changed."""
    from pydicom.datadict import dictionary_VR

    frame.add_new(keyword, dictionary_VR(keyword), value)


def _take_over(frame: Dataset, group: Dataset) -> None:
    """Copy the elements of a functional group to the header of a frame."""
    for macro in group:
        if macro.VR == "SQ" and not macro.tag.is_private:
            for item in macro.value[:1]:
                _copy_elements(frame, item)
    _set_acquisition_matrix(frame, group)


def _copy_elements(frame: Dataset, item: Dataset) -> None:
    for element in item:
        if element.tag.is_private or not element.keyword:
            continue
        if element.VR != "SQ":
            frame[element.tag] = element
            if element.keyword in _NAMES:
                _set(frame, _NAMES[element.keyword], element.value)
        elif element.keyword in _OF_FRAMES:
            frame[element.tag] = element
        elif element.keyword == "DiffusionGradientDirectionSequence":
            for direction in element.value[:1]:
                _copy_elements(frame, direction)


def _set_acquisition_matrix(frame: Dataset, group: Dataset) -> None:
    """Set the AcquisitionMatrix: samples and lines along rows and columns, by the direction of the phase encoding."""
    if "MRFOVGeometrySequence" not in group:
        return
    samples = frame.get("MRAcquisitionFrequencyEncodingSteps")
    lines = frame.get("MRAcquisitionPhaseEncodingStepsInPlane") or 0
    direction = frame.get("InPlanePhaseEncodingDirection")
    if samples and direction in ("COLUMN", "ROW"):
        along_rows = direction == "COLUMN"  # the samples, as the lines are along the columns
        _set(frame, "AcquisitionMatrix", [samples, 0, 0, lines] if along_rows else [0, samples, lines, 0])


def slice_name(header: Dataset) -> str:
    """Return the file of a slice, and its frame if it is one, for messages.

    Example:
        >>> from pydicom import Dataset
        >>> header = Dataset()
        >>> header.filename, header.ReferencedFrameNumber = "mr.dcm", 7
        >>> slice_name(header)
        'mr.dcm (frame 7)'
    """
    return f"{header.filename} (frame {header[FRAME_NUMBER].value})" if FRAME_NUMBER in header else str(header.filename)


@contextmanager
def single_slices(headers: Sequence[Dataset]) -> Iterator[list[str]]:
    """Yield a file with one slice for each header: its own, or for a frame a temporary one with the same pixels.

    Args:
        headers: of slices and frames.

    Raises:
        ImageError: if the pixels of a frame cannot be read.
    """
    with TemporaryDirectory(prefix="miar-") as folder:
        paths = [str(header.filename) for header in headers]
        for file in dict.fromkeys(path for path, header in zip(paths, headers, strict=True) if FRAME_NUMBER in header):
            own = [i for i, header in enumerate(headers) if str(header.filename) == file]
            advice = "a complete DICOM image is needed; copy it again."
            with in_one_sentence(ImageError, f"{file} cannot be read", advice):
                frames = _Frames(file)
                for i in own:
                    paths[i] = str(Path(folder, f"{i}.dcm"))
                    frames.write(headers[i], paths[i])
        yield paths


class _Frames:
    """The pixels of the frames of an image, as they are encoded in its file."""

    def __init__(self, file: str) -> None:
        from pydicom import dcmread
        from pydicom.uid import ExplicitVRLittleEndian

        self.image = dcmread(file, force=True)
        syntax = self.image.file_meta.TransferSyntaxUID
        self.is_compressed = syntax.is_compressed and not syntax.is_deflated
        self.syntax = syntax if self.is_compressed else ExplicitVRLittleEndian
        count = int(self.image.get("NumberOfFrames") or 1)
        if self.is_compressed:
            self.encoded: Sequence[bytes | np.ndarray] = _compressed_frames(self.image.PixelData, count)
            return
        if self.image.BitsAllocated % 8:
            raise ValueError(f"{self.image.BitsAllocated} bits per pixel")
        pixels = np.frombuffer(self.image.PixelData, np.uint8)
        size = self.image.Rows * self.image.Columns * self.image.BitsAllocated // 8
        if len(pixels) < count * size:
            raise ValueError(f"{len(pixels)} bytes of pixels for {count} frames of {size} bytes")
        if not syntax.is_little_endian:
            pixels = pixels.view(f"u{self.image.BitsAllocated // 8}").byteswap().view(np.uint8)
        self.encoded = [pixels[k * size : (k + 1) * size] for k in range(count)]

    def write(self, header: Dataset, path: str) -> None:
        """Write a frame as an image of one slice.

        The SOP class is that of CT, as ITK ignores the rescaling of some others.
        """
        from pydicom.encaps import encapsulate
        from pydicom.uid import CTImageStorage, generate_uid

        slice_ = _new_image(self.syntax, CTImageStorage, generate_uid())
        for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
            setattr(slice_, name, self.image[name].value)
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            value = header.get(name)
            setattr(slice_, name, default if value in (None, "") else value)
        frame = bytes(self.encoded[int(header[FRAME_NUMBER].value) - 1])
        slice_.PixelData = encapsulate([frame]) if self.is_compressed else frame
        slice_["PixelData"].VR = "OB" if self.is_compressed else "OW"
        slice_["PixelData"].is_undefined_length = self.is_compressed
        slice_.save_as(path)


def _new_image(syntax: UID, sop_class: UID, uid: UID) -> FileDataset:
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = sop_class, uid, syntax
    # the encoding is set here, as the arguments of save_as differ between pydicom 2 and 3
    image = FileDataset("", {}, preamble=bytes(128), file_meta=meta, is_implicit_VR=False, is_little_endian=True)
    image.SOPClassUID, image.SOPInstanceUID = sop_class, uid
    return image


def _compressed_frames(pixel_data: bytes, count: int) -> list[bytes]:
    """Return the compressed frames, by the function of pydicom 3 or the one of pydicom 2."""
    from pydicom import encaps

    if hasattr(encaps, "generate_frames"):
        return list(encaps.generate_frames(pixel_data, number_of_frames=count))
    return list(encaps.generate_pixel_data_frame(pixel_data, count))
