"""NIfTI, with both the sform and the qform, and MGH."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.fileholders import FileHolder
from nibabel.quaternions import quat2mat

from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.checks import check_num_voxels
from miar_monai.data.formats import decompressed_size, open_decompressed
from miar_monai.data.geometry import corner_distance, is_singular, nearest_rotation
from miar_monai.data.labels import label_map_error
from miar_monai.data.volume import Volume, as_stored, dtype_among
from miar_monai.errors import ImageError, in_one_sentence

__all__ = [
    "check_layout",
    "nifti_to_save",
    "nifti_to_volume",
    "read_nifti",
    "volume_to_mgh",
    "volume_to_nifti",
    "write_nifti",
]

_LABEL_INTENTS = (1002, 1003)  # LABEL and NEURONAME
_CLASSES: dict[str, Any] = {
    "NIfTI-1": nib.Nifti1Image,
    "NIfTI-2": nib.Nifti2Image,
    "NIfTI-1 pair": nib.Nifti1Pair,
    "NIfTI-2 pair": nib.Nifti2Pair,
    "MGH": nib.MGHImage,
}
_MGH_DTYPES = ("uint8", "int16", "int32", "float32")
_MM_PER_UNIT = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # unknown, meter, millimeter, micron


def read_nifti(path: Path, header: Path, kind: str, as_labels: bool = False) -> Volume:
    """Read a NIfTI or MGH file.

    Args:
        path: the file; of a pair, .hdr or .img.
        header: the file with the header.
        kind: of the header, from `miar_monai.data.formats.detect_format`.
        as_labels: see `nifti_to_volume`.

    Raises:
        ImageError: if the file is truncated or damaged, or is not one volume of real numbers.
    """
    advice = "a complete file is needed; copy or download it again."
    with in_one_sentence(ImageError, f"{path} cannot be read as {kind}", advice), _files(path, header, kind) as files:
        image = _CLASSES[kind].from_file_map(files)
        with in_one_sentence(ImageError, f"{path} is truncated or damaged", advice):
            check_layout(path, image)
            _check_length(path, image)
            return nifti_to_volume(image, path, as_labels)


@contextmanager
def _files(path: Path, header: Path, kind: str) -> Iterator[dict[str, FileHolder]]:
    """Yield the open files of an image, for nibabel."""
    paths: dict[str, Any] = {"image": header}
    if kind.endswith("pair"):
        paths = {part: holder.filename for part, holder in nib.Nifti1Pair.filespec_to_file_map(str(path)).items()}
    with ExitStack() as stack:
        yield {
            part: FileHolder(str(name), stack.enter_context(open_decompressed(name))) for part, name in paths.items()
        }


def _check_length(path: Path, image: Any) -> None:
    """Check, before memory is allocated, that a file is as large as its header declares.

    Compressed files are read to the end to verify the checksum, which nibabel does not.
    """
    check_num_voxels(path, image.shape)
    needed = image.dataobj.offset + prod(image.shape) * image.get_data_dtype().itemsize
    length = decompressed_size(image.file_map["image"].filename, needed)  # the .img file of a pair
    if length < needed:
        raise ValueError(f"it contains {length} bytes, but its header declares {needed}")


def check_layout(path: Path, image: Any) -> None:
    """Check that an image is one volume, or one slice, of real numbers."""
    stored = image.get_data_dtype()
    if stored.kind not in "iuf":
        kind = "RGB colors" if stored.fields else f"{stored.name} numbers"
        raise ImageError(
            f"{path}: the voxels are {kind}, but gray values (real numbers) are needed: convert the volume."
        )
    if len(image.shape) < 2 or any(size != 1 for size in image.shape[3:]) or 0 in image.shape:
        sizes = " x ".join(map(str, image.shape))
        raise ImageError(
            f"{path} has {len(image.shape)} dimensions ({sizes}): one 3D volume is needed; "
            "split it into 3D volumes (nibabel.four_to_three) and give them one by one."
        )


def _check_intent(path: Path, header: Any) -> None:
    code = int(header["intent_code"])
    if code in _LABEL_INTENTS:
        raise label_map_error(path, f"its intent code is {code}", "set this code to 0")


def nifti_to_volume(image: Any, path: Path, as_labels: bool = False) -> Volume:
    """Return a nibabel image of NIfTI or MGH, (X, Y) or (X, Y, Z), as a volume.

    The affine is the sform if its code is not 0 and it is invertible, otherwise the qform, as in nibabel; the volume
    also keeps the other one.

    Args:
        image: the image.
        path: of its file, or its name in messages.
        as_labels: a label map is accepted, and its numbers keep their dtype.
    """
    shape = (*image.shape[:3], 1)[:3]
    if as_labels:
        array = np.asarray(image.dataobj).reshape(shape)
        array = array.astype(array.dtype.newbyteorder("="))
    else:
        array = _floats(image).reshape(shape)
    dtype = array.dtype if as_labels else _result_dtype(image)
    volume = Volume(array, image.affine.astype(np.float64), dtype, path)
    if isinstance(image, nib.MGHImage):
        return volume
    if not as_labels:
        _check_intent(path, image.header)
    description = bytes(image.header["descrip"]).split(b"\0")[0].decode("latin-1")
    return _placed(volume._replace(description=description), image.header)


def _floats(image: Any) -> np.ndarray:
    """Return the voxels of a nibabel image in float32, scaled.

    Those of an open file in another dtype are read slice by slice: nibabel would scale them as a whole in double
    precision. A file that is not open would be opened, and decompressed from its start, for each slice.
    """
    is_open = nib.is_proxy(image.dataobj) and hasattr(image.dataobj.file_like, "read")
    if len(image.shape) < 3 or not is_open or image.get_data_dtype() == np.float32:
        return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    array = np.empty(image.shape, np.float32, order="F")
    for k in range(image.shape[2]):
        array[:, :, k] = image.dataobj[:, :, k]
    return array


def _placed(volume: Volume, header: Any) -> Volume:
    """Return a volume with the affine, space, qform and remarks that follow from its NIfTI header."""
    remarks = []
    unit = int(header["xyzt_units"]) % 8
    if unit not in _MM_PER_UNIT:
        remarks.append(f"the unit of length has the code {unit}, which NIfTI does not define: millimeters are assumed.")
    to_mm = np.diag([_MM_PER_UNIT.get(unit, 1.0)] * 3 + [1.0])
    affine, space = to_mm @ volume.affine, int(header["sform_code"])
    affine, code = _with_thickness(affine, volume.array.shape), int(header["qform_code"])
    qform = to_mm @ _qform(header)
    is_usable = code != 0 and not is_singular(qform)
    if space and is_usable and is_singular(affine):
        remarks.append("the sform is singular: the qform is used.")
        affine, space = qform, 0
    if not space:  # the affine is the qform, or nibabel's default
        return volume._replace(affine=affine, space=code, remarks=tuple(remarks))
    if is_singular(affine):  # refused by check_volume
        return volume._replace(affine=affine, space=space)
    if not is_usable:
        qform, code = _with_sizes(affine, to_mm[0, 0] * _sizes(header)), space
    remarks += _disagreement(affine, qform, volume.array.shape, "qform" if is_usable else "pixdim")
    return volume._replace(
        affine=affine, space=space, qform=(qform @ np.linalg.inv(affine), code), remarks=tuple(remarks)
    )


def _sizes(header: Any) -> np.ndarray:
    """Return pixdim along the axes of a volume, (3,), 0 if undefined."""
    sizes = np.zeros(3)
    num_axes = min(len(header.get_data_shape()), 3)
    sizes[:num_axes] = header["pixdim"][1 : num_axes + 1]
    return sizes


def _with_sizes(affine: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return an affine with other voxel sizes, where they are positive and finite, and the same position of voxel 0."""
    is_size = (sizes > 0) & np.isfinite(sizes)
    return affine @ np.diag([*np.where(is_size, sizes / voxel_sizes(affine), 1), 1])


def _qform(header: Any) -> np.ndarray:
    """Return the qform, (4, 4), computed as in nifticlib and ITK; NaN if a voxel size is infinite.

    For rotations by 180 degrees, nibabel's result is off by up to 0.03 degrees due to rounding.
    """
    vector = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    square = float(vector @ vector)
    scalar = 0.0 if square > 1 - 1e-7 else np.sqrt(1 - square)
    vector = vector / np.sqrt(square) if scalar == 0 else vector
    qform, sizes = np.eye(4), np.asarray(header["pixdim"][:4], dtype=np.float64)
    steps = np.where(sizes[1:] > 0, sizes[1:], 1)
    steps[2] *= -1 if sizes[0] < 0 else 1
    if not np.isfinite(steps).all():
        return np.full((4, 4), np.nan)
    qform[:3, :3] = quat2mat([scalar, *vector]) * steps
    qform[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return qform


def _with_thickness(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the affine of one slice with a thickness of 1 mm if its header has 0."""
    if shape[2] == 1 and not affine[:3, 2].any() and np.isfinite(affine).all():
        affine = affine.copy()
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1)
    return affine


def _disagreement(affine: np.ndarray, other: np.ndarray, shape: Sequence[int], name: str) -> list[str]:
    """Return a remark on the difference between the sform and the qform or pixdim, if it is a tenth of a voxel or more.

    Smaller differences are due to rounding, such as that of an sform with three decimals.
    """
    distance = corner_distance(affine, other, shape)
    if distance <= 0.1 * voxel_sizes(affine).min():
        return []
    own, others = (" x ".join(f"{mm:.4g}" for mm in voxel_sizes(form)) for form in (affine, other))
    voxels = f" (voxels of {own} mm and of {others} mm)" if own != others else ""
    return [
        f"sform and {name} disagree{voxels}: the corners of the field of view are up to {distance:.2f} mm apart; the "
        "sform is used, and the result has both."
    ]


def _result_dtype(image: Any) -> np.dtype:
    if not nib.is_proxy(image.dataobj):  # an array in memory
        return np.dtype(np.float32)
    stored = image.get_data_dtype().newbyteorder("=")
    scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)
    return stored if stored.kind in "iu" and stored.itemsize in (2, 4) and not scaled else np.dtype(np.float32)


def write_nifti(
    path: str | os.PathLike[str],
    array: np.ndarray,
    affine: np.ndarray,
    dtype: np.dtype | type | str = np.float32,
    overwrite: bool = False,
    space: int = 1,
    description: str = "",
    qform: tuple[np.ndarray, int] | None = None,
) -> Path:
    """Write a volume as NIfTI, atomically.

    The sform is the affine. The qform, which can only represent a rotation and zooms, is that of the source over the
    same field of view; otherwise it is the rotation nearest to the affine about the center of the volume, with the code
    of the sform. So readers without support for shear, such as ITK and 3D Slicer, can open sheared volumes (tilted
    gantry, affine registration).

    Args:
        path: the file to write, .nii or .nii.gz. Its folder is created if needed.
        array: intensities, (X, Y, Z).
        affine: voxel indices to millimeters in RAS+, (4, 4).
        dtype: dtype of the stored voxels; for integers, values are rounded and saturated.
        overwrite: replace an existing file.
        space: see `Volume`. Readers ignore a form with code 0, and place the origin at the center of the volume
            (nibabel) or at its first voxel (ITK).
        description: up to 79 characters.
        qform: see `Volume`.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_nifti(folder + "/a.nii.gz", np.arange(8.0).reshape(2, 2, 2), np.eye(4), np.int16)
        ...     nib.load(path).get_data_dtype().name
        'int16'
    """
    volume = Volume(array, affine, np.dtype(dtype), Path(path), space=space, description=description, qform=qform)
    with atomic_file(path, overwrite) as part:
        nib.save(nifti_to_save(volume), part)
    return volume.path


def volume_to_nifti(volume: Volume) -> nib.Nifti1Image:
    """Return a volume as a nibabel image; see `write_nifti`."""
    return _nifti_image(volume, as_stored(volume.array, volume.dtype))


def nifti_to_save(volume: Volume) -> nib.Nifti1Image:
    """Return a volume as a nibabel image whose voxels are rounded when it is saved, slice by slice, and not copied."""
    image = _nifti_image(volume, _to_save(volume.array, volume.dtype))
    image.header.set_slope_inter(1, 0)
    return image


def _to_save(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return voxels that nibabel saves in a dtype as `as_stored` returns them.

    It rounds and saturates floats, but as integers of more than 16 bits at the nearest float below the limit.
    """
    return array if array.dtype == np.float32 and dtype.itemsize <= 2 else as_stored(array, dtype)


def _nifti_image(volume: Volume, array: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(array, volume.affine, dtype=volume.dtype)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = volume.description.encode("latin-1", "replace")[:79]
    to_qform, code = volume.qform or (np.eye(4), volume.space)
    image.set_sform(volume.affine, code=volume.space)
    image.set_qform(nearest_rotation(to_qform @ volume.affine, image.shape), code=code)
    return image


def volume_to_mgh(volume: Volume) -> nib.MGHImage:
    """Return a volume as a nibabel image of MGH to be saved, which has no field for a description, space or qform.

    MGH has no integers of 64 bits, and no unsigned ones of 16 or 32 bits: see `miar_monai.data.volume.dtype_among`.
    """
    dtype = dtype_among(volume, _MGH_DTYPES)
    image = nib.MGHImage(_to_save(volume.array, dtype), volume.affine)
    image.header.set_data_dtype(dtype)
    return image
