"""Derived DICOM series for tests: written, changed, read back and validated."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from helpers.affines import upscaled_affine
from pydicom import Dataset
from pydicom.dataset import validate_file_meta
from pydicom.uid import MRImageStorage
from scipy.ndimage import affine_transform

from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import write_series
from miar_monai.data.geometry import fov_corners
from miar_monai.data.grid import Grid
from miar_monai.data.io import Volume, read_volume


def upsampled(volume: Volume) -> Volume:
    """Return a volume on a grid four times finer in-plane, by nearest neighbor."""
    array = volume.array.repeat(4, axis=0).repeat(4, axis=1)
    return volume._replace(array=array, affine=upscaled_affine(volume.affine, (4, 4, 1)))


def change(folder: Path, edit: Callable[[Dataset], None]) -> Path:
    """Edit every file of a series in place."""
    for path in folder.iterdir():
        image = pydicom.dcmread(path)
        edit(image)
        image.save_as(path)
    return folder


def on_grid(volume: Volume, grid: Grid) -> Volume:
    """Return a volume on another grid, by linear interpolation in millimeters, edges replicated."""
    to_volume = np.linalg.inv(volume.affine) @ grid.affine
    array = affine_transform(volume.array, to_volume, output_shape=grid.shape, order=1, mode="nearest")
    return volume._replace(array=array, affine=grid.affine)


def to_mr(image: Dataset) -> None:
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = MRImageStorage
    image.Modality = "MR"


def derive(folder: Path, **changes: np.ndarray) -> tuple[Volume, Path, list[Dataset]]:
    """Write a derived series; return its volume, its folder, and its images sorted by name."""
    source = read_volume(folder)
    sr = upsampled(source)._replace(**changes)
    written = write_series(folder.with_name("sr"), sr, source_headers(source), "upsampled")
    return sr, written, [pydicom.dcmread(path) for path in sorted(written.iterdir())]


def by_height(folder: Path) -> list[Dataset]:
    return sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda image: image.ImagePositionPatient[2])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_read_back(sr: Volume, written: Path, tolerance: float) -> None:
    """Compare a series, read by this package and by ITK, with the written volume."""
    import itk

    back = read_volume(written)
    assert np.abs(back.array - sr.array).max() <= tolerance
    assert np.abs(back.affine - sr.affine).max() < 1e-3
    assert np.abs(fov_corners(back.affine, back.array.shape) - fov_corners(sr.affine, sr.array.shape)).max() < 0.01
    for k, path in enumerate(sorted(written.iterdir())):
        image = itk.imread(str(path), imageio=itk.GDCMImageIO.New())
        assert np.abs(itk.array_from_image(image)[0] - sr.array[:, :, k].T).max() <= tolerance
        assert np.allclose(np.diag([-1, -1, 1]) @ image.GetOrigin(), (sr.affine @ [0, 0, k, 1])[:3], atol=1e-3)


def complete(image: Dataset) -> None:
    """Add the elements of CT and MR images that the phantoms lack."""
    for name in ("AccessionNumber", "Manufacturer", "PatientBirthDate", "PatientSex", "PositionReferenceIndicator"):
        setattr(image, name, "")
    image.PatientName, image.PatientPosition, image.ReferringPhysicianName = "Phantom^A", "HFS", ""
    image.StudyDate, image.StudyTime, image.StudyID = "20200101", "120000", "1"
    image.ImageType, image.BodyPartExamined = ["ORIGINAL", "PRIMARY", "AXIAL"], "HEAD"
    image.file_meta.FileMetaInformationGroupLength = 0  # computed when written
    validate_file_meta(image.file_meta, enforce_standard=True)
    if image.Modality == "MR":
        image.ImageType[2] = "OTHER"
        image.ScanningSequence, image.SequenceVariant, image.ScanOptions = "SE", "NONE", ""
        image.MRAcquisitionType = "2D"
        image.EchoTime, image.EchoTrainLength, image.RepetitionTime = 80, 1, 2000
        del image.RescaleSlope, image.RescaleIntercept, image.RescaleType
    else:
        image.KVP, image.AcquisitionNumber = 120, 1


def complaints(folder: Path) -> set[str]:
    """Return the output of dciodvfy for the images of a series, without the first line."""
    runs = [subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True) for path in folder.iterdir()]
    return {line for run in runs for line in f"{run.stdout}{run.stderr}".splitlines() if " - " in line}
