"""Where results of NIfTI files lie, for readers of the sform and for ITK, which knows no shear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantoms import head
from scipy.spatial.transform import Rotation

from miar_monai.geometry import fov_corners, upscaled_affine
from miar_monai.io import Volume, read_volume, write_volume

# SWIG warns while the modules of ITK load; as an error, that is a segmentation fault
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")

SHAPE = (23, 19, 5)
VOXELS = (1000 * head(SHAPE)).astype(np.int16)


def placed(
    angles: tuple[float, float, float] = (0, 0, 0),
    sizes: tuple[float, float, float] = (1.8, 1.7, 5.0),
    flip: bool = False,
    shear: float = 0,
    decimals: int | None = None,
    at: tuple[float, float, float] = (40, -50, -20),
) -> np.ndarray:
    """Return the affine of a turned, perhaps left-handed, sheared and rounded grid."""
    affine = np.eye(4)
    turn = Rotation.from_euler("zyx", angles, degrees=True).as_matrix() @ np.diag([-1.0 if flip else 1.0, 1, 1])
    affine[:3, :3] = turn @ (np.eye(3) + shear * np.eye(3, k=1)) * sizes
    affine[:3, 3] = at
    return affine if decimals is None else affine.round(decimals)


def write(path: Path, sform: np.ndarray | None, s: int, qform: np.ndarray | None, q: int, **fields: Any) -> Path:
    """Write an image with two transforms and their codes, and other fields of the header."""
    image = nib.Nifti1Image(VOXELS, np.eye(4))
    image.header.set_xyzt_units("mm")
    image.set_qform(np.eye(4) if qform is None else qform, q)
    image.set_sform(np.eye(4) if sform is None else sform, s)
    for name, value in fields.items():
        image.header[name] = value
    path.write_bytes(image.header.binaryblock + b"\0\0\0\0" + VOXELS.tobytes(order="F"))
    content = bytearray(path.read_bytes())
    content[108:112] = np.float32(352).tobytes()
    path.write_bytes(content)
    return path


def finer(volume: Volume) -> Volume:
    """Return a volume on the grid of its result."""
    array = volume.array.repeat(4, axis=0).repeat(4, axis=1)
    return volume._replace(array=array, affine=upscaled_affine(volume.affine, (4, 4, 1)))


def itk_corners(path: Path) -> np.ndarray:
    """Return the corners of the field of view as ITK sees it, LPS."""
    import itk

    image = itk.imread(str(path))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return fov_corners(affine, itk.size(image))


TURNED = ((12, 0, 0), (25, -17, 8), (179.99, 0.02, 0), (180, 0, 0), (-90, 45, 3))


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("shear", [0, 1e-7, 1e-5, 1e-4, 1e-3, 0.02, 0.2])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("decimals", [None, 3])
@pytest.mark.parametrize("angles", TURNED)
def test_itk_opens_a_result_where_it_opens_the_input(
    codes: tuple[int, int], shear: float, flip: bool, decimals: int | None, angles: Any, tmp_path: Path
) -> None:
    sform, qform = placed(angles, flip=flip, shear=shear, decimals=decimals), placed(angles, flip=flip)
    source = write(tmp_path / "in.nii", sform, codes[0], qform, codes[1])
    volume = read_volume(source)
    result = write_volume(tmp_path / "out.nii", finer(volume))
    assert itk_corners(result) == pytest.approx(itk_corners(source), abs=0.01)
    header = nib.load(result).header
    assert (int(header["sform_code"]), int(header["qform_code"])) == codes
    shape = header.get_data_shape()
    assert fov_corners(header.get_sform(), shape) == pytest.approx(fov_corners(sform, SHAPE), abs=1e-3)
    held = nib.load(source).header.get_qform()
    assert fov_corners(header.get_qform(), shape) == pytest.approx(fov_corners(held, SHAPE), abs=0.01)
