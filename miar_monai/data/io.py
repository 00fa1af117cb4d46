"""Reading and writing of volumes in all supported formats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.checks import check_affine, check_volume
from miar_monai.data.dicom_headers import is_enhanced_file
from miar_monai.data.dicom_reader import read_series
from miar_monai.data.dicom_signature import is_dicom
from miar_monai.data.formats import (
    check_output_suffix,
    detect_format,
    expected_format,
    header_file,
    is_nifti,
    is_volume_file,
    volume_stem,
)
from miar_monai.data.itk_images import read_with_itk, write_metaimage, write_nrrd
from miar_monai.data.nifti import nifti_to_save, read_nifti, volume_to_mgh, write_nifti
from miar_monai.data.outputs import check_output_folder
from miar_monai.data.volume import (
    SOFTWARE,
    Volume,
    as_float,
    as_stored,
    parts_to_save,
    quantity_of,
    result_description,
    sample_maps,
    sampled_volumes,
    uncertainty_of,
)
from miar_monai.errors import ImageError, SettingError, in_one_sentence

__all__ = [
    "SOFTWARE",
    "Volume",
    "as_float",
    "as_stored",
    "check_labels",
    "check_output_folder",
    "is_nifti",
    "is_rounded_at_once",
    "is_volume_file",
    "parts_to_save",
    "quantity_of",
    "read_labels",
    "read_volume",
    "result_description",
    "sample_maps",
    "sampled_volumes",
    "uncertainty_of",
    "volume_stem",
    "write_nifti",
    "write_volume",
]

_UNSUPPORTED = {
    "Analyze": "is an Analyze 7.5 image, whose header does not define left and right",
    "MINC": "is a MINC image, which is not supported",
    "Zstandard": "is compressed by Zstandard, which is not supported",
    "xz": "is compressed by xz, which is not supported",
}


def read_volume(path: str | os.PathLike[str], series: str = "", select: Sequence[str] = ()) -> Volume:
    """Read a 3D volume, or one slice, from a file or from a folder with a DICOM series.

    An enhanced (multi-frame) DICOM image is a series, in a folder or as a file.

    NIfTI scaling (``scl_slope``) and DICOM rescaling are applied. DICOM slices are sorted by position; the affine
    follows from the positions, including the shear of a tilted gantry. The format of a file is detected by its
    content: NIfTI-1 and 2 (.nii, or a pair .hdr and .img) and MGH, optionally compressed by gzip or bzip2; NRRD and
    MetaImage with the voxels in the same or in another file.

    Args:
        path: a file, or a folder.
        series: SeriesInstanceUID of the series to read, for a folder with several.
        select: conditions on the headers of slices, for a series with several volumes, such as echoes, time points or
            stacks: ``["EchoTime=80"]``, or ``["TriggerTime=#2"]`` for the second value at each position.

    Returns:
        The volume.

    Raises:
        ImageError: if the file is missing, unreadable or truncated, is not a 3D volume of real numbers, contains NaN or
            infinite voxels, is constant, is a label map (see `miar_monai.data.labels`), has more than
            `miar_monai.data.checks.MAX_VOXELS` voxels, or axial slices with a side of more than
            `miar_monai.data.checks.MAX_SIDE`.
        SettingError: if ``series`` or ``select`` is given for a file, or ``select`` matches no slice.
        GeometryError: if the affine is singular, the volume is a line, a folder contains several
            series and ``series`` is empty, or slices are missing, duplicate or unevenly spaced.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path} does not exist: a volume, or a folder with a DICOM series, is needed.")
    is_series = path.is_dir() or is_enhanced_file(path)
    if series and not is_series:
        raise SettingError(f"{path} is a file, so the series {series} cannot be selected: omit the series.")
    if select and not is_series:
        raise SettingError(f"{path} is a file, so no slices can be selected by {' '.join(select)}: omit the selection.")
    return check_volume(read_series(path, series, tuple(select)) if is_series else _read_file(path))


def read_labels(path: str | os.PathLike[str]) -> Volume:
    """Read a label map, such as a segmentation, from a file of the same formats as `read_volume`.

    Args:
        path: the file.

    Returns:
        The labels, whole numbers in the dtype of the file.

    Raises:
        ImageError: if the file is missing, unreadable or truncated, or is not a 3D volume of whole numbers.
        GeometryError: if the affine is singular.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ImageError(f"{path} {found}: a label map in a file, such as .nii.gz, .mgz, .nrrd or .mha, is needed.")
    return check_labels(_read_file(path, as_labels=True))


def check_labels(labels: Volume) -> Volume:
    """Check that a volume is a label map with positions in millimeters, and return it.

    Raises:
        ImageError: if voxels are not whole numbers.
        GeometryError: if the affine is singular.

    Example:
        >>> check_labels(Volume(np.array([[[0, 0.5]]]), np.eye(4), np.dtype("float64"), Path("a.nii")))
        Traceback (most recent call last):
            ...
        miar_monai.errors.ImageError: a.nii is not a label map, as 1 of 2 voxels are not whole numbers: one number for \
each label is needed; round or threshold it.
    """
    if labels.array.dtype.kind == "f":
        others = int(np.count_nonzero(~np.isfinite(labels.array) | (labels.array != np.rint(labels.array))))
        if others:
            raise ImageError(
                f"{labels.path} is not a label map, as {others} of {labels.array.size} voxels are not whole numbers: "
                "one number for each label is needed; round or threshold it."
            )
    check_affine(labels)
    return labels


def _read_file(path: Path, as_labels: bool = False) -> Volume:
    """Read a file in the format that its content has."""
    advice = "the complete file is needed; copy or download it again."
    header = header_file(path)
    with in_one_sentence(ImageError, f"{path} is truncated or damaged", advice):
        kind = "DICOM" if is_dicom(path) else detect_format(header)
    if kind == "DICOM" and as_labels:
        raise ImageError(f"{path} is a DICOM file: a label map in another format is needed; convert it to .nii.gz.")
    if kind == "DICOM":
        raise ImageError(f"{path} is a single DICOM file: the folder of its series is needed; give {path.parent}.")
    if kind == "pointer":
        raise ImageError(
            f"{path} is a pointer of git-annex or Git LFS to a file that is missing: the file itself is needed; fetch"
            " it (datalad get, git annex get, git lfs pull)."
        )
    if kind in _UNSUPPORTED:
        raise ImageError(f"{path} {_UNSUPPORTED[kind]}: a NIfTI file is needed; convert it to .nii.gz.")
    if kind in ("NRRD", "MetaImage"):
        return read_with_itk(path, kind, as_labels)
    if kind:
        return read_nifti(path, header, kind, as_labels)
    found = "its content has no known format"
    if path.name.lower().endswith((".img", ".img.gz")) and header == path:
        found = f"{volume_stem(path)}.hdr is missing"
    raise ImageError(
        f"{path} cannot be read as {expected_format(path)} ({found}): a complete NIfTI, MGH, NRRD or MetaImage file is "
        "needed; copy it again, or convert it to .nii.gz."
    )


def is_rounded_at_once(path: str | os.PathLike[str], dtype: np.dtype) -> bool:
    """Return whether `write_volume` rounds a volume as a whole, in additional memory of its size, and not by slices.

    Example:
        >>> [is_rounded_at_once(name, np.dtype("int32")) for name in ("a.nii.gz", "a.mgz", "a.nrrd")]
        [True, True, False]
        >>> is_rounded_at_once("a.nii.gz", np.dtype("int16"))
        False
    """
    return dtype.kind in "iu" and dtype.itemsize > 2 and expected_format(path) in ("NIfTI", "MGH")


def write_volume(path: str | os.PathLike[str], volume: Volume, overwrite: bool = False, compress: bool = True) -> Path:
    """Write a volume with its metadata, atomically, in the format of the file's suffix.

    The affine, including shear, and the units are the same in all formats. NIfTI also keeps the space and the qform,
    see `miar_monai.data.nifti.write_nifti`; MGH has no field for the description.

    Args:
        path: the file to write: .nii, .nii.gz, .mgh, .mgz, .nrrd or .mha. Its folder is created if needed.
        volume: integers are rounded and saturated; where a format lacks the dtype, see
            `miar_monai.data.volume.dtype_among`.
        overwrite: replace an existing file.
        compress: the voxels of .nrrd and .mha; other suffixes say whether they are compressed.

    Returns:
        ``path``.

    Raises:
        SettingError: if the suffix is another one.
        OutputError: if the file exists and ``overwrite`` is False, or cannot be written.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> head = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.eye(4), np.dtype("int16"), Path("a.nii"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     bool((read_volume(write_volume(folder + "/a.nrrd", head)).array == head.array).all())
        True
    """
    check_output_suffix(path)
    kind = expected_format(path)
    with atomic_file(path, overwrite) as part:
        if kind in ("NRRD", "MetaImage"):
            (write_nrrd if kind == "NRRD" else write_metaimage)(part, volume, compress)
        else:
            nib.save(volume_to_mgh(volume) if kind == "MGH" else nifti_to_save(volume), part)
    return Path(path)
