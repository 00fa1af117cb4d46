"""NRRD and MetaImage: read by ITK, and written layer by layer."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai.data.checks import check_num_voxels
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.labels import label_map_error
from miar_monai.data.volume import Volume, as_stored, dtype_among
from miar_monai.errors import ImageError, MiarError

__all__ = ["read_with_itk", "write_metaimage", "write_nrrd"]

_DESCRIPTION = "description"
_WRITTEN = {
    "uint8": "unsigned char", "int16": "short", "uint16": "unsigned short", "int32": "int", "uint32": "unsigned int",
    "float32": "float", "float64": "double",
}  # fmt: skip
"""Names in NRRD of the dtypes that are written."""

_LEVEL = 2  # of compression, as ITK's
_GZIP, _ZLIB = 31, 15  # sizes of the window by which zlib is told the format
_UNKNOWN = 20 * "0"  # a size that is replaced once the voxels are written
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
    voxels = itk.array_view_from_image(image).transpose(2, 1, 0)  # of ITK's memory
    array = np.array(voxels, dtype=dtype if as_labels else np.float32, order="C")
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


def write_nrrd(path: Path, volume: Volume, compress: bool = True) -> None:
    """Write a volume as NRRD, with its description, layer by layer, so that it is not copied as ITK would.

    Args:
        path: the file to write, .nrrd.
        volume: integers of 8 bits with a sign and of 64 bits get another dtype, as ITK cannot write these, see
            `miar_monai.data.volume.dtype_among`.
        compress: the voxels, by gzip.

    References:
        https://teem.sourceforge.net/nrrd/format.html
    """
    dtype, lps = dtype_among(volume, tuple(_WRITTEN)), LPS_TO_RAS @ volume.affine
    header = {
        "type": _WRITTEN[dtype.name],
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": _words(volume.array.shape),
        "space directions": " ".join(f"({_words(column, ',')})" for column in lps[:3, :3].T),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "gzip" if compress else "raw",
        "space origin": f"({_words(lps[:3, 3], ',')})",
    }
    lines = ["NRRD0004", *(f"{name}: {value}" for name, value in header.items())]
    lines += [f"{_DESCRIPTION}:={_line(volume.description)}"] if volume.description else []
    with path.open("wb") as file:
        file.write("\n".join([*lines, "", ""]).encode())
        _write_layers(file, volume.array, dtype, _GZIP if compress else None)


def write_metaimage(path: Path, volume: Volume, compress: bool = True) -> None:
    """Write a volume as MetaImage, with its description, layer by layer; see `write_nrrd`.

    Args:
        path: the file to write, .mha.
        volume: as in `write_nrrd`.
        compress: the voxels, by zlib.

    References:
        https://itk.org/Wiki/ITK/MetaIO/Documentation
    """
    dtype, lps = dtype_among(volume, tuple(_WRITTEN)), LPS_TO_RAS @ volume.affine
    spacing = voxel_sizes(lps)
    header = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": str(compress),
        **({"CompressedDataSize": _UNKNOWN} if compress else {}),
        "TransformMatrix": _words((lps[:3, :3] / spacing).T.flat),
        "Offset": _words(lps[:3, 3]),
        "ElementSpacing": _words(spacing),
        **({_DESCRIPTION: _line(volume.description)} if volume.description else {}),
        "DimSize": _words(volume.array.shape),
        "ElementType": f"MET_{_WRITTEN[dtype.name].replace('unsigned ', 'u')}".upper(),
        "ElementDataFile": "LOCAL",
    }
    text = "".join(f"{name} = {value}\n" for name, value in header.items()).encode()
    with path.open("wb") as file:
        file.write(text)
        _write_layers(file, volume.array, dtype, _ZLIB if compress else None)
        if compress:
            size = file.tell() - len(text)
            file.seek(text.index(_UNKNOWN.encode()))
            file.write(f"{size:0{len(_UNKNOWN)}}".encode())


def _write_layers(file: BinaryIO, array: np.ndarray, dtype: np.dtype, window: int | None) -> None:
    """Write voxels (X, Y, Z) as they are stored, the first axis fastest, compressed if there is a window of zlib."""
    packer = zlib.compressobj(_LEVEL, wbits=window) if window else None
    for k in range(array.shape[-1]):
        layer = as_stored(array[..., k : k + 1], dtype).astype(dtype.newbyteorder("<")).tobytes(order="F")
        file.write(packer.compress(layer) if packer else layer)
    if packer:
        file.write(packer.flush())


def _words(numbers: Iterable[float], separator: str = " ") -> str:
    return separator.join(f"{number:.17g}" for number in numbers)


def _line(text: str) -> str:
    """Return a text as one line, since a field of a header ends with it."""
    return " ".join(text.split())
