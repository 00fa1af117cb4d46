"""Volumes in from files of several formats and DICOM series, volumes out to NIfTI; what has no place is refused.

Every refusal is one sentence that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from miar_monai.data.checks import checked
from miar_monai.data.dicom_reader import read_series
from miar_monai.data.dicom_signature import is_dicom
from miar_monai.data.formats import expected_format, format_of, header_of, is_nifti, is_volume_file, volume_stem
from miar_monai.data.itk_images import read_with_itk
from miar_monai.data.nifti import read_nifti, write_nifti, write_volume
from miar_monai.data.outputs import check_output_folder
from miar_monai.data.volume import (
    SOFTWARE,
    Volume,
    as_float,
    as_stored,
    parts_to_save,
    result_description,
    uncertainty_of,
)
from miar_monai.errors import ImageError, SettingError, in_one_sentence

__all__ = [
    "SOFTWARE",
    "Volume",
    "as_float",
    "as_stored",
    "check_output_folder",
    "is_nifti",
    "is_volume_file",
    "parts_to_save",
    "read_volume",
    "result_description",
    "uncertainty_of",
    "volume_stem",
    "write_nifti",
    "write_volume",
]

_UNREAD = {
    "Analyze": "is an Analyze 7.5 image, whose header does not say which side is left",
    "MINC": "is a MINC image, which is not read",
    "Zstandard": "is compressed by Zstandard, which is not read",
    "xz": "is compressed by xz, which is not read",
}


def read_volume(path: str | os.PathLike[str], series: str = "", select: Sequence[str] = ()) -> Volume:
    """Read a 3D volume, or one slice, from a file or from a folder that holds a DICOM series.

    NIfTI scaling (``scl_slope``) and DICOM rescaling are applied. DICOM slices are sorted by position; the affine
    is made of the positions themselves, so the shear of a tilted gantry is kept. A file is read as what its content
    is, whatever its name: NIfTI-1 and 2 (.nii, or a pair .hdr and .img) and MGH, as they are or compressed by gzip or
    bzip2; NRRD and MetaImage with or without a file of their own for the voxels.

    Args:
        path: a file, or a folder.
        series: SeriesInstanceUID of the series to read, of a folder with several.
        select: which of the volumes to read, of a series with several such as echoes or time points: what the headers
            of its slices must hold, such as ``["EchoTime=80"]``, or ``["TriggerTime=#2"]`` for the second value at each
            position.

    Returns:
        The volume.

    Raises:
        ImageError: if the file is missing, unreadable or truncated, is not a 3D volume of real numbers, holds NaN or
            infinite voxels, is constant, is a label map (see `miar_monai.data.labels`), has more than
            `miar_monai.data.checks.MAX_VOXELS` voxels, or axial slices with more than
            `miar_monai.data.checks.MAX_SIDE` on a side.
        SettingError: if a series or slices are asked of a file, or slices that there are not.
        GeometryError: if the affine is singular, the only slice is not an axial one, or a folder holds several series
            and it is not said which, or slices that are missing, duplicate or unevenly spaced.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path} does not exist: a NIfTI file or a folder with a DICOM series is needed.")
    if series and not path.is_dir():
        raise SettingError(f"{path} is a file, so there is no series {series} in it: leave out which series to read.")
    if select and not path.is_dir():
        raise SettingError(f"{path} is a file, so no slices can be selected by {' '.join(select)}: leave it out.")
    return checked(read_series(path, series, tuple(select)) if path.is_dir() else _read_file(path))


def _read_file(path: Path) -> Volume:
    """Read a file as what it is, whatever its name."""
    advice = "the complete file is needed; copy or download it again."
    header = header_of(path)
    with in_one_sentence(ImageError, f"{path} is truncated or damaged", advice):
        kind = "DICOM" if is_dicom(path) else format_of(header)
    if kind == "DICOM":
        raise ImageError(f"{path} is a single DICOM file: the folder of its series is needed; give {path.parent}.")
    if kind == "pointer":
        raise ImageError(
            f"{path} is a pointer of git-annex or Git LFS to a file that is not here: the file itself is needed; fetch"
            " it (datalad get, git annex get, git lfs pull)."
        )
    if kind in _UNREAD:
        raise ImageError(f"{path} {_UNREAD[kind]}: a NIfTI file is needed; convert it to .nii.gz.")
    if kind in ("NRRD", "MetaImage"):
        return read_with_itk(path, kind)
    if kind:
        return read_nifti(path, header, kind)
    found = "its content is that of no known format"
    if path.name.lower().endswith((".img", ".img.gz")) and header == path:
        found = f"there is no {volume_stem(path)}.hdr beside it"
    raise ImageError(
        f"{path} cannot be read as {expected_format(path)} ({found}): a complete NIfTI, MGH, NRRD or MetaImage file is "
        "needed; copy it again, or convert it to .nii.gz."
    )
