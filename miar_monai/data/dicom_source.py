"""Headers of the series that a result is derived from, and of its guide."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from nibabel.affines import apply_affine

from miar_monai.data.dicom_classic import classic_header, classic_sop_class
from miar_monai.data.dicom_frames import FRAME_NUMBER, frame_headers
from miar_monai.data.dicom_headers import add_b_value, is_enhanced_file, lenient_pydicom, read_header, text
from miar_monai.data.dicom_reader import series_headers
from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.data.volume import Volume
from miar_monai.errors import ImageError, in_one_sentence

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Guide", "repeated", "source_headers"]

_REFERENCE = ("SOPClassUID", "SOPInstanceUID")
_TOUCHING = 0.01  # of a slice: less overlap is due to rounding

_NEEDED = (
    *_REFERENCE,
    "StudyInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Columns",
    "PhotometricInterpretation",
    "PixelRepresentation",
)

_INVALID_AFTER_RESAMPLING = (
    "InstanceCreatorUID",
    "SmallestImagePixelValue",
    "LargestImagePixelValue",
    "SmallestPixelValueInSeries",
    "LargestPixelValueInSeries",
    "PixelPaddingValue",  # padding is not constant after super-resolution
    "PixelPaddingRangeLimit",
    "RealWorldValueMappingSequence",  # refers to the stored values of the source
    "IconImageSequence",
    "MACParametersSequence",
    "DigitalSignaturesSequence",
    "DataSetTrailingPadding",
)


@lenient_pydicom()
def source_headers(volume: Volume) -> list[Dataset]:
    """Read the headers of the series that a result is derived from, and check that a derived series can be written.

    Args:
        volume: the source, as read from the folder of its series, or from the file of an enhanced image.

    Returns:
        The headers without pixels, of frames as `frame_headers` has them, in the order of the volume's slices, its
        third axis.

    Raises:
        ImageError: if the volume is not a DICOM series, or the series is neither CT nor MR, lacks elements that a
            derived image must repeat, or has a damaged header.
    """
    folder = volume.path
    if not folder.is_dir() and not is_enhanced_file(folder):
        raise ImageError(
            f"{folder} is not a DICOM series, but a derived series needs the patient and the study of its source: "
            "give a folder with a DICOM series, or write NIfTI (--out-format nifti)."
        )
    advice = "export the series again, or write NIfTI (--out-format nifti)."
    with in_one_sentence(ImageError, f"{folder} has a header that a derived image cannot repeat", advice):
        found = series_headers(folder, volume.series, volume.select)
        headers = _complete(found)
        for header in headers:
            _check_header(header)
            repeated(header).save_as(BytesIO())  # as write_series will
        return _in_order(headers)


def _complete(found: Sequence[Dataset]) -> list[Dataset]:
    """Return the headers of slices and frames with all their elements, given those needed for a volume."""
    files: dict[str, list[Dataset]] = {}
    complete = []
    for header in found:
        file = str(header.filename)
        if FRAME_NUMBER not in header:
            complete.append(read_header(file))
            add_b_value(complete[-1])  # private elements are not repeated
            continue
        if file not in files:
            files[file] = frame_headers(read_header(file))
        frame = files[file][int(header[FRAME_NUMBER].value) - 1]
        frame.pop("InstanceNumber", None)  # that of the file, whereas slices are numbered by their position
        complete.append(frame)
    return complete


class Guide(NamedTuple):
    """The guide of a result, for the headers of a derived series."""

    name: str
    """Of its file, or description and SeriesInstanceUID of its series."""
    grid: Grid
    headers: list[Dataset]
    """UIDs of its slices along the third axis of the grid; empty for other formats."""

    @classmethod
    @lenient_pydicom()
    def of(cls, volume: Volume) -> Guide:
        """Return what headers state of a guide, while the folder that it was read from still exists."""
        if not volume.path.is_dir():
            return cls(volume.path.name, volume.grid, [])
        headers = _in_order(series_headers(volume.path, volume.series, volume.select))
        name = " ".join(filter(None, (text(headers[0], key) for key in ("SeriesDescription", "SeriesInstanceUID"))))
        complete = all(text(header, key) for header in headers for key in _REFERENCE)
        return cls(name or volume.path.name, volume.grid, headers if complete else [])

    def slices_at(self, grid: Grid) -> list[Dataset]:
        """Return the headers of the slices that overlap a slice of another grid, (X, Y, 1), between their planes.

        Example:
            >>> thick = Guide("t1.nii", Grid((9, 9, 3), np.diag([1.0, 1, 5, 1])), ["first", "second", "third"])
            >>> thick.slices_at(Grid((9, 9, 1), np.eye(4)))
            ['first']
        """
        corners = apply_affine(np.linalg.inv(self.grid.affine) @ grid.affine, fov_corners(np.eye(4), grid.shape))
        first, last = corners[:, 2].min() - 0.5 + _TOUCHING, corners[:, 2].max() + 0.5 - _TOUCHING
        return self.headers[max(int(np.ceil(first)), 0) : max(int(np.floor(last)) + 1, 0)]


def _in_order(headers: list[Dataset]) -> list[Dataset]:
    """Return the headers of parallel slices in the order of the third axis of their volume."""
    normal = np.cross(*np.reshape(headers[0].ImageOrientationPatient, (2, 3)).astype(float))
    heights = [np.asarray(header.ImagePositionPatient, dtype=float) @ normal for header in headers]
    return [headers[i] for i in np.argsort(heights, kind="stable")]


def _check_header(header: Dataset) -> None:
    from pydicom.uid import UID, CTImageStorage, MRImageStorage

    missing = [name for name in _NEEDED if header.get(name) in (None, "")]
    if missing:
        raise ImageError(
            f"{header.filename} has no {missing[0]}, which a derived image must have: "
            "export the series again, or write NIfTI (--out-format nifti)."
        )
    kind, coding = UID(text(header, "SOPClassUID")), text(header, "PhotometricInterpretation")
    derived = classic_sop_class(header) if FRAME_NUMBER in header else kind
    if derived not in (CTImageStorage, MRImageStorage) or coding != "MONOCHROME2":
        raise ImageError(
            f"{header.filename} contains {kind.name} in {coding}, but a series can be "
            "derived from CT or MR Image Storage in MONOCHROME2 only: write NIfTI (--out-format nifti)."
        )


def repeated(header: Dataset) -> Dataset:
    """Return the elements of a source's header that are valid for a derived image, which has one slice."""
    from pydicom.dataset import FileDataset

    # the encoding is set here, as the arguments of save_as differ between pydicom 2 and 3
    repeated = FileDataset("", {}, preamble=bytes(128), is_implicit_VR=False, is_little_endian=True)
    for element in classic_header(header) if FRAME_NUMBER in header else header:
        curve_or_overlay = element.tag.group & 0xFF00 in (0x5000, 0x6000)
        in_file_meta = element.tag.group < 8  # only damaged files have it in the data set
        if not (
            element.tag.is_private or curve_or_overlay or in_file_meta or element.keyword in _INVALID_AFTER_RESAMPLING
        ):
            repeated.add(deepcopy(element))  # otherwise changes affect the source
    repeated.remove_private_tags()  # inside sequences
    return repeated
