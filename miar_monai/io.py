"""Volumes in from NIfTI files and DICOM series, volumes out to NIfTI; what cannot be placed or trusted is refused.

Every refusal is one sentence that names the file.
"""

from __future__ import annotations

import gzip
import os
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np

import miar_monai
from miar_monai.dicom import check_num_voxels, dicom_tag, is_dicom, read_series
from miar_monai.errors import GeometryError, ImageError, OutputError, SettingError, in_one_sentence
from miar_monai.files import whole_file
from miar_monai.formats import is_nifti, is_volume_file, volume_stem
from miar_monai.geometry import fov_corners, is_singular

__all__ = [
    "Volume",
    "as_float",
    "as_stored",
    "check_output_folder",
    "is_nifti",
    "is_volume_file",
    "parts_to_save",
    "read_volume",
    "uncertainty_of",
    "volume_stem",
    "what_it_is",
    "write_nifti",
    "write_volume",
]

SOFTWARE = "miar-monai"
"""Results of this package say so by this name in their headers."""

_MAX_SURPLUS = 2**28  # bytes after the voxels of a compressed file: a bomb has more
_LARGEST = 1e18  # its square is a number of single precision
_MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


class Volume(NamedTuple):
    """A volume in the units of its file.

    Attributes:
        array: intensities (HU for CT), (X, Y, Z), float32.
        affine: voxel indices to millimeters in RAS+, (4, 4), float64.
        dtype: what a result in these units is stored in: integers where the input has integers of 16 or 32 bits
            without scaling (NIfTI) or after rescaling (DICOM), otherwise float32.
        path: the file, or the folder of the series.
        modality: of the DICOM header, such as ``"CT"``; empty where no file says it.
        uncertainty: the expected absolute error of a super-resolved volume in its units, (X, Y, Z), float32; None
            where nobody asked for it.
        space: what the millimeters of the affine are counted from, as NIfTI's codes say it: 1 the scanner's origin, 2
            another image, 3 Talairach, 4 MNI; 0 where a file does not say where its voxels lie.
        description: what the file says of itself: ``descrip`` of NIfTI, ``DerivationDescription`` of DICOM.
        series: SeriesInstanceUID that was asked for, of a folder with several series.
        remarks: what reading found that a user must know, a sentence each, such as which of two transforms was taken.
    """

    array: np.ndarray
    affine: np.ndarray
    dtype: np.dtype
    path: Path
    modality: str = ""
    uncertainty: np.ndarray | None = None
    space: int = 1
    description: str = ""
    series: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether this is a result of this package already."""
        return SOFTWARE in self.description


def read_volume(path: str | os.PathLike[str], series: str = "") -> Volume:
    """Read a 3D volume from a NIfTI file or from a folder that holds a DICOM series.

    NIfTI scaling (``scl_slope``) and DICOM rescaling are applied. DICOM slices are sorted by position; the affine
    is made of the positions themselves, so the shear of a tilted gantry is kept.

    Args:
        path: a NIfTI file (.nii, .nii.gz, or one of a pair .hdr and .img), or a folder.
        series: SeriesInstanceUID of the series to read, of a folder with several.

    Returns:
        The volume.

    Raises:
        ImageError: if the file is missing, unreadable or truncated, is not a 3D volume of real numbers, holds NaN or
            infinite voxels, is constant, or has more than `miar_monai.dicom.MAX_VOXELS` voxels.
        SettingError: if a series is asked of a file.
        GeometryError: if the affine is singular, or a folder holds several series and it is not said which, or slices
            that are missing, duplicate or unevenly spaced.
    """
    path = Path(path)
    if not path.exists():
        raise ImageError(f"{path} does not exist: a NIfTI file or a folder with a DICOM series is needed.")
    if series and not path.is_dir():
        raise SettingError(f"{path} is a file, so there is no series {series} in it: leave out which series to read.")
    volume = _read_folder(path, series) if path.is_dir() else _read_nifti(path)
    _check_intensities(volume)
    if is_singular(volume.affine):
        raise GeometryError(
            f"{path}: the affine {np.round(volume.affine, 4).tolist()} is singular, so voxels have no place in "
            "millimeters; a file with a valid sform or qform is needed: convert it again from its source."
        )
    return volume


def _read_folder(path: Path, series: str) -> Volume:
    array, affine, dtype, file = read_series(path, series)
    modality, description = (dicom_tag(file, tag) for tag in ("0008|0060", "0008|2111"))
    return Volume(array, affine, dtype, path, modality, description=description, series=series)


def uncertainty_of(sr: Volume) -> Volume:
    """Return the expected error of a super-resolved volume as a volume of its own, which is never rounded."""
    assert sr.uncertainty is not None, "uncertainty was not asked for"
    return Volume(
        sr.uncertainty, sr.affine, np.dtype(np.float32), sr.path, space=sr.space, description=what_it_is(True)
    )


def what_it_is(is_error: bool = False) -> str:
    """Return how a result describes itself in the 80 characters of a NIfTI header, or the map of its error.

    Example:
        >>> what_it_is().split(": ")[1]
        '4x super-resolution, detail may be invented'
    """
    image, error = "4x super-resolution, detail may be invented", "expected absolute error of a 4x super-resolution"
    return f"{SOFTWARE} {miar_monai.__version__}: {error if is_error else image}"


def parts_to_save(sr: Volume) -> list[tuple[Volume, str]]:
    """Return what is saved of a super-resolved volume, each part with the ``quantity`` that `write_series` names it by.

    The image itself, whose quantity is the source's and so has no name, comes last: when it is there, all is.
    """
    maps = [] if sr.uncertainty is None else [(uncertainty_of(sr), "expected error")]
    return [*maps, (sr, "")]


def _check_intensities(volume: Volume) -> None:
    bad = int(np.count_nonzero(~np.isfinite(volume.array)))
    if bad:
        nan = int(np.count_nonzero(np.isnan(volume.array)))
        raise ImageError(
            f"{volume.path}: {nan} voxels are NaN and {bad - nan} infinite, of {volume.array.size}; finite "
            "intensities are needed: repair the volume, for example by setting these voxels to the background."
        )
    low, high = float(volume.array.min()), float(volume.array.max())
    if low == high:
        raise ImageError(
            f"{volume.path}: all {volume.array.size} voxels are {low:g}; "
            "an image with contrast is needed: check the export of this volume."
        )
    if max(-low, high) > _LARGEST or high - low < 1 / _LARGEST:
        raise ImageError(
            f"{volume.path}: the voxels reach from {low:g} to {high:g}, beyond what can be computed with; usual "
            "intensities are needed: check the file for damage, or scale it."
        )


def _read_nifti(path: Path) -> Volume:
    advice = "a complete .nii or .nii.gz file is needed; copy it again."
    with in_one_sentence(ImageError, f"{path} cannot be read as NIfTI", advice):
        image: Any = None if is_dicom(path) else nib.load(path)
    if image is None:
        raise ImageError(f"{path} is a single DICOM file: the folder of its series is needed; give {path.parent}.")
    if not isinstance(image, nib.Nifti1Pair):
        raise ImageError(f"{path} is a {type(image).__name__}: a NIfTI file is needed; convert it to .nii.gz.")
    advice = "the complete file is needed; copy or download it again."
    with in_one_sentence(ImageError, f"{path} is truncated or damaged", advice):
        _check_nifti_layout(path, image)
        _check_length(path, image)
        return _nifti_volume(image, path)


def _check_length(path: Path, image: Any) -> None:
    """Refuse a file that holds less than its header says, before memory is asked for.

    A compressed file is read to its end, where its checksum is: nibabel stops before, and damage would pass.
    """
    check_num_voxels(path, image.shape)
    needed = image.dataobj.offset + prod(image.shape) * image.get_data_dtype().itemsize
    path = Path(image.file_map["image"].filename)  # of a pair, the .img file
    if path.name.lower().endswith(".gz"):
        length = 0
        with gzip.open(path) as file:
            while block := file.read(2**20):
                length += len(block)
                if length > needed + _MAX_SURPLUS:
                    raise ValueError(f"it goes on after the {needed} bytes that its header speaks of")
    else:
        length = path.stat().st_size
    if length < needed:
        raise ValueError(f"it holds {length} bytes, but its header speaks of {needed}")


def _nifti_volume(image: Any, path: Path) -> Volume:
    array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(image.shape[:3])
    affine = np.diag([_MM_PER_UNIT[image.header.get_xyzt_units()[0]]] * 3 + [1.0]) @ image.affine
    space = int(image.header["sform_code"]) or int(image.header["qform_code"])  # nibabel takes the sform if it has one
    description = bytes(image.header["descrip"]).split(b"\0")[0].decode("latin-1")
    return Volume(array, affine, _result_dtype(image), path, space=space, description=description)


def _result_dtype(image: Any) -> np.dtype:
    if not nib.is_proxy(image.dataobj):  # an array in memory, and no file's integers
        return np.dtype(np.float32)
    stored = image.get_data_dtype().newbyteorder("=")
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    return stored if stored.kind in "iu" and stored.itemsize in (2, 4) and not scaled else np.dtype(np.float32)


def _check_nifti_layout(path: Path, image: Any) -> None:
    stored = image.get_data_dtype()
    if stored.kind not in "iuf":
        kind = "RGB colors" if stored.fields else f"{stored.name} numbers"
        raise ImageError(
            f"{path}: the voxels are {kind}, but gray values (real numbers) are needed: convert the volume."
        )
    if len(image.shape) < 3 or any(size != 1 for size in image.shape[3:]):
        sizes = " x ".join(map(str, image.shape))
        raise ImageError(
            f"{path} has {len(image.shape)} dimensions ({sizes}): one 3D volume is needed; "
            "split it into 3D volumes and give them one by one."
        )


def write_nifti(
    path: str | os.PathLike[str],
    array: np.ndarray,
    affine: np.ndarray,
    dtype: np.dtype | type | str = np.float32,
    overwrite: bool = False,
    space: int = 1,
    description: str = "",
) -> Path:
    """Write a volume as NIfTI: whole or not at all, and never over an existing file unless asked to.

    sform and qform both hold the affine, with the code of its space. A sheared affine (tilted gantry) does not fit into
    a qform, which is a rotation and zooms only; then the qform code is 0 and readers take the sform.

    Args:
        path: the file to write, .nii or .nii.gz. Its folder is made if needed.
        array: intensities, (X, Y, Z).
        affine: voxel indices to millimeters in RAS+, (4, 4).
        dtype: dtype of the stored voxels; for integers, values are rounded and saturated.
        overwrite: replace an existing file.
        space: of the affine, see `Volume`. Readers do not look at a form with code 0, and count from the middle of the
            volume (nibabel) or from its first voxel (ITK).
        description: of the volume, up to 79 characters.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_nifti(folder + "/a.nii.gz", np.arange(8.0).reshape(2, 2, 2), np.eye(4), np.int16)
        ...     read_volume(path).dtype
        dtype('int16')
    """
    path = Path(path)
    image = _nifti_image(array, affine, np.dtype(dtype), space, description)
    with whole_file(path, overwrite) as part:
        nib.save(image, part)
    return path


def write_volume(path: str | os.PathLike[str], volume: Volume, overwrite: bool = False) -> Path:
    """Write a volume as NIfTI with what is known of it; see `write_nifti`."""
    return write_nifti(
        path, volume.array, volume.affine, volume.dtype, overwrite, space=volume.space, description=volume.description
    )


def check_output_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that results cannot be written to, before the work is done; nothing is made or changed.

    Args:
        folder: the folder; it need not exist yet.

    Raises:
        OutputError: if the folder, or the closest folder above it that exists, is not writable.
    """
    absolute = Path(folder).absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(
            f"results cannot be written to {folder}: {existing} is not a folder with write permission; "
            "give another output folder."
        )


def as_float(volume: Volume) -> Volume:
    """Return a volume that is stored in float32, which all readers know."""
    return volume._replace(dtype=np.dtype(np.float32))


def as_stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return intensities as a file of a dtype holds them: for integers, rounded and saturated.

    Example:
        >>> as_stored(np.array([-0.6, 1.4, 300]), np.dtype(np.uint8))
        array([  0,   1, 255], dtype=uint8)
    """
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        array = np.rint(np.asarray(array, np.result_type(array, dtype)))  # a float that holds the limits exactly
        array = np.clip(array, limits.min, limits.max, out=array)
    return array.astype(dtype, copy=False)


def _nifti_image(
    array: np.ndarray, affine: np.ndarray, dtype: np.dtype, space: int = 1, description: str = ""
) -> nib.Nifti1Image:
    image = nib.Nifti1Image(as_stored(array, dtype), affine, dtype=dtype)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("latin-1", "replace")[:79]
    image.set_sform(affine, code=space)
    image.set_qform(affine, code=space)
    wanted, held = (fov_corners(form, image.shape) for form in (image.get_sform(), image.get_qform()))
    if not np.allclose(wanted, held, atol=1e-3, rtol=0):
        image.set_qform(affine, code=0)
    return image
