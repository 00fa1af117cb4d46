"""Volumes from files and to files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from monai.utils import ImageMetaKey

from miar_monai.data.cases import read_case
from miar_monai.data.io import Volume, write_nifti
from miar_monai.data.outputs import check_output_folder, result_path
from miar_monai.transforms.metatensor import DESCRIPTION_KEY, DTYPE_KEY, QFORM_CODE_KEY, QFORM_KEY, SPACE_KEY

__all__ = ["LoadVolume", "SaveVolume"]


class LoadVolume(Transform):
    """Read a volume with `miar_monai.data.cases.read_case`.

    Returns a `MetaTensor` (1, X, Y, Z), float32, in the orientation and the units of the file, whose metadata holds
    the affine, the path (``filename_or_obj``), the dtype that a result is written in (``original_dtype``), what NIfTI
    calls ``sform_code`` and ``descrip``, the space of the affine and the description of `Volume`, and its
    qform, as ``sform_to_qform``, (4, 4), and ``qform_code``.
    """

    def __call__(self, source: str | os.PathLike[str] | Volume) -> MetaTensor:
        """Return the volume at ``source``, a file, a folder with a DICOM series, or a zip file of either.

        A volume that is in memory already is taken as it is.
        """
        volume = source if isinstance(source, Volume) else read_case(source)
        to_qform, code = volume.qform or (np.eye(4), volume.space)  # collating knows no None
        return MetaTensor(
            torch.from_numpy(np.ascontiguousarray(volume.array))[None],
            affine=torch.as_tensor(volume.affine, dtype=torch.float64),
            meta={
                ImageMetaKey.FILENAME_OR_OBJ: str(volume.path),
                DTYPE_KEY: volume.dtype.name,
                SPACE_KEY: volume.space,
                DESCRIPTION_KEY: volume.description,
                QFORM_KEY: to_qform,
                QFORM_CODE_KEY: code,
            },
        )


class SaveVolume(Transform):
    """Write a volume as ``<output_dir>/<input stem>_<postfix>.nii.gz``, in the dtype of its input.

    Args:
        output_dir: folder of the results; made if needed.
        postfix: ending of the name.
        overwrite: replace existing files.

    Raises:
        OutputError: if the folder cannot be written to; said here, before hours of work.
    """

    def __init__(self, output_dir: str | os.PathLike[str], postfix: str = "sr", overwrite: bool = False) -> None:
        check_output_folder(output_dir)
        self.output_dir = Path(output_dir)
        self.postfix = postfix
        self.overwrite = overwrite

    def __call__(self, image: MetaTensor, name: str = "") -> MetaTensor:
        """Write ``image``, (1, X, Y, Z), and return it unchanged; ``name`` is as in `result_path`.

        Raises:
            OutputError: if the file exists or cannot be written.
        """
        path = result_path(image.meta[ImageMetaKey.FILENAME_OR_OBJ], self.output_dir, self.postfix, name)
        array = image.as_tensor()[0].cpu().float().numpy()
        dtype, space = image.meta.get(DTYPE_KEY, "float32"), image.meta.get(SPACE_KEY, 1)
        description, qform = image.meta.get(DESCRIPTION_KEY, ""), None
        if QFORM_KEY in image.meta:
            qform = np.asarray(image.meta[QFORM_KEY]), int(image.meta[QFORM_CODE_KEY])
        write_nifti(path, array, np.asarray(image.affine), dtype, self.overwrite, space, description, qform)
        return image
