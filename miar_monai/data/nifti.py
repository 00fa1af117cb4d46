"""NIfTI and MGH images in, NIfTI images out, with both transforms of a NIfTI header."""

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

from miar_monai.data.atomic_write import whole_file
from miar_monai.data.checks import check_num_voxels
from miar_monai.data.formats import length_of, opened_file
from miar_monai.data.geometry import corner_distance, is_singular, nearest_rotation
from miar_monai.data.labels import refusal_of_labels
from miar_monai.data.volume import Volume, as_stored
from miar_monai.errors import ImageError, in_one_sentence

__all__ = ["check_layout", "nifti_image", "read_nifti", "volume_of", "write_nifti", "write_volume"]

_LABEL_INTENTS = (1002, 1003)  # LABEL and NEURONAME
_CLASSES: dict[str, Any] = {
    "NIfTI-1": nib.Nifti1Image,
    "NIfTI-2": nib.Nifti2Image,
    "NIfTI-1 pair": nib.Nifti1Pair,
    "NIfTI-2 pair": nib.Nifti2Pair,
    "MGH": nib.MGHImage,
}
_MM_PER_UNIT = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # unknown, meter, millimeter, micron


def read_nifti(path: Path, header: Path, kind: str) -> Volume:
    """Read a NIfTI or MGH file.

    Args:
        path: the file; of a pair, .hdr or .img.
        header: the file with the header.
        kind: of the header, as `miar_monai.data.formats.format_of` says it.

    Raises:
        ImageError: if the file is truncated or damaged, or is not one volume of real numbers.
    """
    advice = "a complete file is needed; copy or download it again."
    with in_one_sentence(ImageError, f"{path} cannot be read as {kind}", advice), _files(path, header, kind) as files:
        image = _CLASSES[kind].from_file_map(files)
        with in_one_sentence(ImageError, f"{path} is truncated or damaged", advice):
            check_layout(path, image)
            _check_length(path, image)
            return volume_of(image, path)


@contextmanager
def _files(path: Path, header: Path, kind: str) -> Iterator[dict[str, FileHolder]]:
    """Give the open files of an image, as nibabel wants them."""
    paths: dict[str, Any] = {"image": header}
    if kind.endswith("pair"):
        paths = {part: holder.filename for part, holder in nib.Nifti1Pair.filespec_to_file_map(str(path)).items()}
    with ExitStack() as stack:
        yield {part: FileHolder(str(name), stack.enter_context(opened_file(name))) for part, name in paths.items()}


def _check_length(path: Path, image: Any) -> None:
    """Refuse a file that holds less than its header says, before memory is asked for.

    A compressed file is read to its end, where its checksum is: nibabel stops before, and damage would pass.
    """
    check_num_voxels(path, image.shape)
    needed = image.dataobj.offset + prod(image.shape) * image.get_data_dtype().itemsize
    length = length_of(image.file_map["image"].filename, needed)  # of a pair, the .img file
    if length < needed:
        raise ValueError(f"it holds {length} bytes, but its header speaks of {needed}")


def check_layout(path: Path, image: Any) -> None:
    """Refuse what is not one volume, or one slice, of real numbers."""
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
        raise refusal_of_labels(path, f"its intent code is {code}", "set this code to 0")


def volume_of(image: Any, path: Path) -> Volume:
    """Return a nibabel image of NIfTI or MGH, (X, Y) or (X, Y, Z), as a volume.

    The sform is taken where its code is not 0 and it is invertible, otherwise the qform, as nibabel does; the other
    one is kept beside it.
    """
    shape = (*image.shape[:3], 1)[:3]
    array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged")).reshape(shape)
    volume = Volume(array, image.affine.astype(np.float64), _result_dtype(image), path)
    if isinstance(image, nib.MGHImage):
        return volume
    _check_intent(path, image.header)
    description = bytes(image.header["descrip"]).split(b"\0")[0].decode("latin-1")
    return _placed(volume._replace(description=description), image.header)


def _placed(volume: Volume, header: Any) -> Volume:
    """Return a volume in the place that its NIfTI header gives it, with what is doubtful about that."""
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
        remarks.append("the sform maps different voxels to one place: the qform is taken.")
        affine, space = qform, 0
    if not space:  # then the affine is the qform, or nibabel's guess
        return volume._replace(affine=affine, space=code, remarks=tuple(remarks))
    if is_singular(affine):  # and will be refused
        return volume._replace(affine=affine, space=space)
    if not is_usable:
        qform, code = _with_sizes(affine, to_mm[0, 0] * _sizes(header)), space
    remarks += _disagreement(affine, qform, volume.array.shape, "qform" if is_usable else "pixdim")
    return volume._replace(
        affine=affine, space=space, qform=(qform @ np.linalg.inv(affine), code), remarks=tuple(remarks)
    )


def _sizes(header: Any) -> np.ndarray:
    """Return pixdim along the axes of a volume, (3,), with 0 where it says nothing."""
    sizes = np.zeros(3)
    num_axes = min(len(header.get_data_shape()), 3)
    sizes[:num_axes] = header["pixdim"][1 : num_axes + 1]
    return sizes


def _with_sizes(affine: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return an affine with other sizes of the voxels, where they are greater than 0, and the same first voxel."""
    return affine @ np.diag([*np.where(sizes > 0, sizes / voxel_sizes(affine), 1), 1])


def _qform(header: Any) -> np.ndarray:
    """Return the qform, (4, 4), as the reference library of NIfTI and so ITK compute it.

    nibabel takes the rounding of a rotation by 180 degrees for a rotation by 0.03 degrees more or less.
    """
    vector = np.array([header[f"quatern_{axis}"] for axis in "bcd"], dtype=np.float64)
    square = float(vector @ vector)
    scalar = 0.0 if square > 1 - 1e-7 else np.sqrt(1 - square)
    vector = vector / np.sqrt(square) if scalar == 0 else vector
    qform, sizes = np.eye(4), np.asarray(header["pixdim"][:4], dtype=np.float64)
    steps = np.where(sizes[1:] > 0, sizes[1:], 1)
    steps[2] *= -1 if sizes[0] < 0 else 1
    qform[:3, :3] = quat2mat([scalar, *vector]) * steps
    qform[:3, 3] = [header[f"qoffset_{axis}"] for axis in "xyz"]
    return qform


def _with_thickness(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the affine of one slice with a thickness of 1 mm where its header leaves it 0."""
    if shape[2] == 1 and not affine[:3, 2].any() and np.isfinite(affine).all():
        affine = affine.copy()
        normal = np.cross(affine[:3, 0], affine[:3, 1])
        affine[:3, 2] = normal / (np.linalg.norm(normal) or 1)
    return affine


def _disagreement(affine: np.ndarray, other: np.ndarray, shape: Sequence[int], name: str) -> list[str]:
    """Return by how much the sform and what the header says beside it differ, if it is a tenth of a voxel or more.

    Less is rounding, such as that of an sform with three decimals.
    """
    distance = corner_distance(affine, other, shape)
    if distance <= 0.1 * voxel_sizes(affine).min():
        return []
    own, others = (" x ".join(f"{mm:.4g}" for mm in voxel_sizes(form)) for form in (affine, other))
    voxels = f" (voxels of {own} mm and of {others} mm)" if own != others else ""
    return [
        f"sform and {name} disagree{voxels}: the corners of the field of view lie up to {distance:.2f} mm apart; the "
        "sform is taken, and the result has both."
    ]


def _result_dtype(image: Any) -> np.dtype:
    if not nib.is_proxy(image.dataobj):  # an array in memory, and no file's integers
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
    """Write a volume as NIfTI: whole or not at all, and never over an existing file unless asked to.

    The sform is the affine. The qform, which is a rotation and zooms only, is the one that the volume came with, over
    the same field of view; otherwise it is the rotation nearest to the affine about the center of the volume, with the
    code of the sform. So readers that know no shear, such as ITK and 3D Slicer, open a sheared volume (tilted gantry,
    affine registration) too.

    Args:
        path: the file to write, .nii or .nii.gz. Its folder is made if needed.
        array: intensities, (X, Y, Z).
        affine: voxel indices to millimeters in RAS+, (4, 4).
        dtype: dtype of the stored voxels; for integers, values are rounded and saturated.
        overwrite: replace an existing file.
        space: of the affine, see `Volume`. Readers do not look at a form with code 0, and count from the
            middle of the volume (nibabel) or from its first voxel (ITK).
        description: of the volume, up to 79 characters.
        qform: of the volume, see `Volume`.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_nifti(folder + "/a.nii.gz", np.arange(8.0).reshape(2, 2, 2), np.eye(4), np.int16)
        ...     nib.load(path).get_data_dtype().name
        'int16'
    """
    volume = Volume(array, affine, np.dtype(dtype), Path(path), space=space, description=description, qform=qform)
    return write_volume(path, volume, overwrite)


def write_volume(path: str | os.PathLike[str], volume: Volume, overwrite: bool = False) -> Path:
    """Write a volume as NIfTI with what is known of it; see `write_nifti`."""
    path, image = Path(path), nifti_image(volume)
    with whole_file(path, overwrite) as part:
        nib.save(image, part)
    return path


def nifti_image(volume: Volume) -> nib.Nifti1Image:
    """Return a volume as a nibabel image; see `write_nifti`."""
    image = nib.Nifti1Image(as_stored(volume.array, volume.dtype), volume.affine, dtype=volume.dtype)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = volume.description.encode("latin-1", "replace")[:79]
    to_qform, code = volume.qform or (np.eye(4), volume.space)
    image.set_sform(volume.affine, code=volume.space)
    image.set_qform(nearest_rotation(to_qform @ volume.affine, image.shape), code=code)
    return image
