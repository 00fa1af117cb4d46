"""Writes NRRD, the format that 3D Slicer and OHIF request from a MONAI Label server."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.volume import Volume

__all__ = ["write_nrrd"]


def write_nrrd(path: str | os.PathLike[str], volume: Volume, overwrite: bool = False) -> Path:
    """Write a volume as uncompressed NRRD, atomically.

    Args:
        path: the file to write, .nrrd.
        volume: written in float32.
        overwrite: replace an existing file.

    Returns:
        ``path``.

    Raises:
        OutputError: if the file exists and ``overwrite`` is False, or if it cannot be written.
    """
    import itk

    lps = LPS_TO_RAS @ volume.affine
    spacing = voxel_sizes(lps)
    image = itk.image_from_array(np.ascontiguousarray(volume.array.transpose(2, 1, 0)))
    image.SetSpacing(spacing)
    image.SetDirection(itk.matrix_from_array(lps[:3, :3] / spacing))
    image.SetOrigin(lps[:3, 3])
    with atomic_file(path, overwrite) as part:
        itk.imwrite(image, str(part))
    return Path(path)
