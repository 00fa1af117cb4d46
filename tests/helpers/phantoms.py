"""Small deterministic volumes and folders for tests: smooth blobs in an ellipsoid, like a head, on background."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

LPS_AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 30], [0, 0, 1.5, -10], [0, 0, 0, 1]])


def head(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Return a head: smooth tissue in (0.2, 1] inside an ellipsoid, exactly 0 outside, float64."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*((2 * np.arange(size) + 1) / size - 1 for size in shape), indexing="ij"), -1)
    centers = generator.uniform(-0.7, 0.7, (12, 3))
    widths = generator.uniform(0.15, 0.5, 12)
    distances = ((grid[..., None, :] - centers) ** 2).sum(-1)
    tissue = (generator.uniform(0.3, 1, 12) * np.exp(-distances / (2 * widths**2))).sum(-1)
    inside = (grid**2 @ np.array([1.3, 1.1, 1.3])) < 1
    return np.where(inside, 0.2 + 0.8 * tissue / tissue.max(), 0.0)


def write_nifti_phantom(
    path: str | Path,
    shape: Sequence[int] = (37, 31, 7),
    affine: np.ndarray = LPS_AFFINE,
    dtype: np.dtype | type | str = np.int16,
    seed: int = 0,
    low: float = 0,
    high: float = 1000,
) -> Path:
    """Write a head whose background is ``low`` and whose brightest tissue is ``high``, with nibabel only."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = (low + (high - low) * head(shape, seed)).astype(dtype)
    image = nib.Nifti1Image(array, affine, dtype=np.dtype(dtype))
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def write_brats_folder(
    root: str | Path,
    subjects: int = 10,
    shape: Sequence[int] = (40, 36, 44),
    contrasts: Sequence[str] = ("t1", "t2"),
) -> Path:
    """Write ``BraTS_00000/BraTS_00000_t1.nii.gz`` and so on; the contrasts of a subject are inverse to each other."""
    for i in range(subjects):
        for j, contrast in enumerate(contrasts):
            path = Path(root, f"BraTS_{i:05d}", f"BraTS_{i:05d}_{contrast}.nii.gz")
            write_nifti_phantom(path, shape, seed=i, low=0, high=1000 - 200 * j)
    return Path(root)


def write_dicom_series(
    folder: str | Path,
    shape: Sequence[int] = (37, 31, 7),
    spacing: Sequence[float] = (0.8, 0.9, 2.5),
    patient_id: str = "PHANTOM-0001",
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    step: Sequence[float] | None = None,
    origin: Sequence[float] = (-15, -14, 100),
    series: str = "1",
    modality: str = "CT",
    prefix: str = "slice",
    seed: int = 0,
    slope: float = 1,
) -> Path:
    """Write a CT series of a head in air (-1000 HU), one file a slice, in the patient axes of DICOM (LPS).

    Args:
        folder: where the files go.
        shape: columns, rows, slices.
        spacing: millimeters between columns, rows and slices.
        patient_id: PatientID.
        orientation: ImageOrientationPatient, the directions along a row and along a column.
        step: millimeters from one slice to the next, (3,); by default along the normal, otherwise a tilted gantry.
        origin: ImagePositionPatient of the first slice.
        series: the series that the files belong to; calls with the same text add to the same series.
        modality: Modality.
        prefix: beginning of the file names.
        seed: seed of the head.
        slope: RescaleSlope; other than 1, the voxels are not in HU.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = np.round(24 + 2000 * head(shape, seed)).astype(np.int16)
    normal = np.cross(orientation[:3], orientation[3:])
    step = normal * spacing[2] if step is None else np.asarray(step, dtype=float)
    for k in range(shape[2]):
        uid = generate_uid(entropy_srcs=[patient_id, series, prefix, str(k)])
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = uid
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = folder / f"{prefix}{(k * 5) % 97:03d}.dcm"  # names in another order than the positions
        image = FileDataset(str(path), {}, preamble=bytes(128), file_meta=meta, is_implicit_VR=False)
        image.SOPClassUID, image.SOPInstanceUID = CTImageStorage, uid
        image.PatientID, image.PatientName, image.Modality = patient_id, "Phantom", modality
        image.StudyInstanceUID = generate_uid(entropy_srcs=[patient_id, "study"])
        image.SeriesInstanceUID = generate_uid(entropy_srcs=[patient_id, "series", series])
        image.FrameOfReferenceUID = generate_uid(entropy_srcs=[patient_id, "frame"])
        image.SeriesNumber, image.InstanceNumber = 1, shape[2] - k
        image.ImagePositionPatient = [round(float(x), 6) for x in np.asarray(origin) + k * step]
        image.ImageOrientationPatient = [float(x) for x in orientation]
        image.PixelSpacing, image.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        image.Rows, image.Columns = shape[1], shape[0]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = slope, -1024, "HU"
        image.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        image.save_as(path)
    return folder


def write_dicom_object(path: str | Path, sop_class: str, **elements: object) -> Path:
    """Write a DICOM object that is not an image, such as a structured report, in a study of its own."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    path, meta = Path(path), FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = sop_class, generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    item = FileDataset(str(path), {}, preamble=bytes(128), file_meta=meta, is_implicit_VR=False)
    if sop_class != "1.2.840.10008.1.3.10":  # a DICOMDIR has its SOP class in its meta information only
        item.SOPClassUID, item.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
        item.SeriesInstanceUID = generate_uid(entropy_srcs=[str(path), "series"])
    for name, value in elements.items():
        setattr(item, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    item.save_as(path)
    return path


def set_raw(image: Any, keyword: str, value: bytes) -> None:
    """Give an element of a DICOM header a value as files have it, whether the standard allows it or not."""
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    padded = value + b" " * (len(value) % 2)
    image[keyword] = RawDataElement(Tag(keyword), dictionary_VR(keyword), len(padded), padded, 0, False, True)
