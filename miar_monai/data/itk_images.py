"""NRRD and MetaImage, by ITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai.data.checks import check_num_voxels
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.labels import label_map_error
from miar_monai.data.volume import Volume, as_stored
from miar_monai.errors import ImageError, MiarError

__all__ = ["read_with_itk", "write_with_itk"]

_DESCRIPTION = "description"
_ADVICE = "complete files of the header and the voxels are needed; copy them again."


def read_with_itk(path: Path, kind: str) -> Volume:
    """Read NRRD or MetaImage, with the voxels in the same file or in another one.

    Args:
        path: the file, or the header of two files.
        kind: ``"NRRD"`` or ``"MetaImage"``.

    Raises:
        ImageError: if the file is truncated or damaged, or is not one volume of real numbers.
    """
    import itk

    reader = (itk.NrrdImageIO if kind == "NRRD" else itk.MetaImageIO).New(FileName=str(path))
    try:
        reader.ReadImageInformation()
        sizes = [int(reader.GetDimensions(i)) for i in range(reader.GetNumberOfDimensions())]
        _check_layout(path, reader, sizes)
        image = itk.imread(str(path), pixel_type=itk.F, imageio=reader) if len(sizes) == 3 else _as_volume(path, reader)
    except MiarError:
        raise
    except Exception as error:  # a damaged header can cause any error in ITK
        raise ImageError(f"{path} cannot be read as {kind}: {_ADVICE}") from error
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    array = np.ascontiguousarray(itk.array_from_image(image).transpose(2, 1, 0), dtype=np.float32)
    fields = reader.GetMetaDataDictionary()
    return Volume(
        array,
        LPS_TO_RAS @ affine,
        _result_dtype(reader),
        path,
        description=fields[_DESCRIPTION] if fields.HasKey(_DESCRIPTION) else "",
        remarks=_remarks(reader, kind),
    )


def _as_volume(path: Path, reader: Any) -> Any:
    """Return a slice, or a volume with further axes of size 1, as a volume."""
    import itk

    source = itk.ImageFileReader[itk.Image[itk.F, 3]].New(FileName=str(path), ImageIO=reader)
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
    if reader.GetMetaDataDictionary().HasKey("Segment0_ID"):  # of 3D Slicer
        raise label_map_error(path, "it has segments", "export it as a volume")


def _result_dtype(reader: Any) -> np.dtype:
    stored = np.dtype(_COMPONENTS.get(reader.GetComponentTypeAsString(reader.GetComponentType()), np.float32))
    return stored if stored.kind in "iu" else np.dtype(np.float32)


_COMPONENTS = {"short": np.int16, "unsigned_short": np.uint16, "int": np.int32, "unsigned_int": np.uint32}


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
        volume: its dtype must be one of 16- or 32-bit integers, uint8 or float32.
        compress: the voxels, by gzip in NRRD and by zlib in MetaImage.
    """
    import itk

    lps = LPS_TO_RAS @ volume.affine
    spacing = voxel_sizes(lps)
    array = as_stored(volume.array, volume.dtype).transpose(2, 1, 0)
    image = itk.image_view_from_array(np.ascontiguousarray(array))
    image.SetSpacing(spacing)
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    image.SetOrigin(lps[:3, 3])
    if volume.description:
        image[_DESCRIPTION] = volume.description
    itk.imwrite(image, str(path), compression=compress)
