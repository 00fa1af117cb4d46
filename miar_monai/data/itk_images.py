"""NRRD and MetaImage, by ITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai.data.checks import check_num_voxels
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.labels import label_map_error
from miar_monai.data.volume import Volume, as_stored, dtype_among
from miar_monai.errors import ImageError, MiarError

__all__ = ["read_with_itk", "write_with_itk"]

_DESCRIPTION = "description"
_WRITTEN = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
_ADVICE = "complete files of the header and the voxels are needed; copy them again."


def read_with_itk(path: Path, kind: str, as_labels: bool = False) -> Volume:
    """Read NRRD or MetaImage, with the voxels in the same file or in another one.

    Args:
        path: the file, or the header of two files.
        kind: ``"NRRD"`` or ``"MetaImage"``.
        as_labels: a label map is accepted, and its numbers keep their dtype.

    Raises:
        ImageError: if the file is truncated or damaged, or is not one volume of real numbers.
    """
    import itk

    reader = (itk.NrrdImageIO if kind == "NRRD" else itk.MetaImageIO).New(FileName=str(path))
    try:
        reader.ReadImageInformation()
        sizes = [int(reader.GetDimensions(i)) for i in range(reader.GetNumberOfDimensions())]
        _check_layout(path, reader, sizes)
        if not as_labels:
            _check_segments(path, reader)
        image = _as_volume(path, reader, itk.D if as_labels else itk.F)  # double precision holds all labels
    except MiarError:
        raise
    except Exception as error:  # a damaged header can cause any error in ITK
        raise ImageError(f"{path} cannot be read as {kind}: {_ADVICE}") from error
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    dtype = _stored_dtype(reader)
    array = np.ascontiguousarray(
        itk.array_from_image(image).transpose(2, 1, 0), dtype=dtype if as_labels else np.float32
    )
    fields = reader.GetMetaDataDictionary()
    return Volume(
        array,
        LPS_TO_RAS @ affine,
        dtype if as_labels or (dtype.kind in "iu" and dtype.itemsize in (2, 4)) else np.dtype(np.float32),
        path,
        description=fields[_DESCRIPTION] if fields.HasKey(_DESCRIPTION) else "",
        remarks=_remarks(reader, kind),
    )


def _as_volume(path: Path, reader: Any, pixel_type: Any) -> Any:
    """Return an image as a volume, also a slice, or a volume with further axes of size 1."""
    import itk

    source = itk.ImageFileReader[itk.Image[pixel_type, 3]].New(FileName=str(path), ImageIO=reader)
    source.Update()
    return source.GetOutput()


def _check_layout(path: Path, reader: Any, sizes: list[int]) -> None:
    check_num_voxels(path, sizes)
    if reader.GetNumberOfComponents() != 1 or len(sizes) < 2 or any(size != 1 for size in sizes[3:]) or 0 in sizes:
        values = reader.GetNumberOfComponents()
        raise ImageError(
            f"{path} has {len(sizes)} dimensions ({' x '.join(map(str, sizes))}) and {values} values per voxel: one "
            "3D volume of gray values is needed; split it into volumes and give them one at a time."
        )


def _check_segments(path: Path, reader: Any) -> None:
    if reader.GetMetaDataDictionary().HasKey("Segment0_ID"):  # of 3D Slicer
        raise label_map_error(path, "it has segments", "export it as a volume")


_DTYPES = {
    "char": "int8", "unsigned_char": "uint8", "short": "int16", "unsigned_short": "uint16", "int": "int32",
    "unsigned_int": "uint32", "long": "int64", "unsigned_long": "uint64", "long_long": "int64",
    "unsigned_long_long": "uint64", "float": "float32", "double": "float64",
}  # fmt: skip


def _stored_dtype(reader: Any) -> np.dtype:
    return np.dtype(_DTYPES.get(reader.GetComponentTypeAsString(reader.GetComponentType()), "float32"))


def _remarks(reader: Any, kind: str) -> tuple[str, ...]:
    if kind == "NRRD" and not reader.GetMetaDataDictionary().HasKey("NRRD_space"):
        return (
            "the file does not define the orientation of its voxels (no space): slices along its third axis are assumed"
            " to be axial, and left and right are unknown.",
        )
    return ()


def write_with_itk(path: Path, volume: Volume, compress: bool = True) -> None:
    """Write a volume as NRRD or MetaImage, with its description.

    Args:
        path: the file to write, .nrrd or .mha.
        volume: integers of 8 bits with a sign and of 64 bits, which ITK does not write, get another dtype, see
            `miar_monai.data.volume.dtype_among`.
        compress: the voxels, by gzip in NRRD and by zlib in MetaImage.
    """
    import itk

    lps = LPS_TO_RAS @ volume.affine
    spacing = voxel_sizes(lps)
    array = as_stored(volume.array, dtype_among(volume, _WRITTEN)).transpose(2, 1, 0)
    image = itk.image_view_from_array(np.ascontiguousarray(array))
    image.SetSpacing(spacing)
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    image.SetOrigin(lps[:3, 3])
    if volume.description:
        image[_DESCRIPTION] = volume.description
    itk.imwrite(image, str(path), compression=compress)
