"""Read volumes from files and write them to files."""

from __future__ import annotations

import os
from pathlib import Path

from monai.data import MetaTensor
from monai.transforms import Transform

from miar_monai.data.cases import read_case
from miar_monai.data.io import Volume, write_volume
from miar_monai.data.outputs import check_output_folder, result_path
from miar_monai.transforms.metatensor import metatensor_to_volume, volume_to_metatensor

__all__ = ["LoadVolume", "SaveVolume"]


class LoadVolume(Transform):
    """Read a volume with `miar_monai.data.cases.read_case`.

    Returns a `MetaTensor` (1, X, Y, Z), float32, in the orientation and the units of the file; its metadata are those
    of `miar_monai.transforms.metatensor.volume_to_metatensor`.
    """

    def __call__(self, source: str | os.PathLike[str] | Volume) -> MetaTensor:
        """Return the volume at ``source``: a file, a DICOM series, a zip file of either, or a `Volume` in memory."""
        return volume_to_metatensor(source if isinstance(source, Volume) else read_case(source))


class SaveVolume(Transform):
    """Write a volume as ``<output_dir>/<input stem>_<postfix>.nii.gz``, in the dtype of its input.

    Args:
        output_dir: folder of the results; created if needed.
        postfix: last part of the name.
        overwrite: replace existing files.

    Raises:
        OutputError: if the folder cannot be written to; checked here, before the work is done.
    """

    def __init__(self, output_dir: str | os.PathLike[str], postfix: str = "sr", overwrite: bool = False) -> None:
        check_output_folder(output_dir)
        self.output_dir = Path(output_dir)
        self.postfix = postfix
        self.overwrite = overwrite

    def __call__(self, image: MetaTensor, name: str = "") -> MetaTensor:
        """Write ``image``, (1, X, Y, Z), and return it unchanged; for ``name`` see `result_path`.

        Raises:
            OutputError: if the file exists or cannot be written.
        """
        volume = metatensor_to_volume(image)
        write_volume(result_path(volume.path, self.output_dir, self.postfix, name), volume, self.overwrite)
        return image
