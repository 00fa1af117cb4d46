"""Headers of the series that a result is derived from."""

from __future__ import annotations

from copy import deepcopy
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from miar_monai.data.dicom_headers import as_they_are, read_header, text
from miar_monai.data.dicom_reader import series_files
from miar_monai.data.geometry import axial_axis
from miar_monai.data.volume import Volume
from miar_monai.errors import GeometryError, ImageError, in_one_sentence

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["repeated", "source_headers"]

_NEEDED = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Columns",
    "PhotometricInterpretation",
    "PixelRepresentation",
)

_NO_LONGER_TRUE = (
    "InstanceCreatorUID",
    "SmallestImagePixelValue",
    "LargestImagePixelValue",
    "SmallestPixelValueInSeries",
    "LargestPixelValueInSeries",
    "PixelPaddingValue",  # padding does not survive the network as one value
    "PixelPaddingRangeLimit",
    "RealWorldValueMappingSequence",  # of the source's stored values
    "IconImageSequence",
    "MACParametersSequence",
    "DigitalSignaturesSequence",
    "DataSetTrailingPadding",
)


@as_they_are()
def source_headers(volume: Volume) -> list[Dataset]:
    """Read the headers of the series that a result is to be derived from; worth asking before the work is done.

    Args:
        volume: the source, as read from the folder of its series.

    Returns:
        The headers without pixels, in the order of the volume's slices.

    Raises:
        ImageError: if the volume is no DICOM series, or the series is neither CT nor MR, or lacks what a derived
            image must repeat, or has a header that is damaged.
        GeometryError: if the slices of the series are not axial: then others become finer than those it consists of.
    """
    folder = volume.path
    if not folder.is_dir():
        raise ImageError(
            f"{folder} is no DICOM series, and a derived series repeats the patient and the study of its source: "
            "give a folder with a DICOM series, or write NIfTI (--out-format nifti)."
        )
    if axial_axis(volume.affine) != 2:
        raise GeometryError(
            f"{folder}: the slices are not axial, but it is the axial plane that becomes finer, so they have no "
            "counterparts in a derived series: write NIfTI (--out-format nifti)."
        )
    advice = "export the series again, or write NIfTI (--out-format nifti)."
    with in_one_sentence(ImageError, f"{folder} has a header that a derived image cannot repeat", advice):
        files = series_files(folder, volume.series, volume.select)
        headers = [read_header(file) for file in files]
        for header in headers:
            _check_header(header)
            repeated(header).save_as(BytesIO())  # what will be repeated
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
    if kind not in (CTImageStorage, MRImageStorage) or coding != "MONOCHROME2":
        raise ImageError(
            f"{header.filename} holds {kind.name} in {coding}, but a series is "
            "derived from CT or MR Image Storage in MONOCHROME2 only: write NIfTI (--out-format nifti)."
        )


def repeated(header: Dataset) -> Dataset:
    """Return what still holds of a source's header."""
    from pydicom.dataset import FileDataset

    # what a file is wrapped in is said here, since pydicom 2 and 3 have no common words for it when they write
    repeated = FileDataset("", {}, preamble=bytes(128), is_implicit_VR=False, is_little_endian=True)
    for element in header:
        curve_or_overlay = element.tag.group & 0xFF00 in (0x5000, 0x6000)
        of_the_file = element.tag.group < 8  # such a one belongs before the data set, and here only by damage
        if not (element.tag.is_private or curve_or_overlay or of_the_file or element.keyword in _NO_LONGER_TRUE):
            repeated.add(deepcopy(element))  # an element is shared otherwise, and what is set here changes the source's
    repeated.remove_private_tags()  # within sequences
    return repeated
