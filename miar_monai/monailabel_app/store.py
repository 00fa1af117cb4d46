"""Reads images from a datastore of MONAI Label, and saves results to it: as new images, or as new series of a PACS."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from dicomweb_client import DICOMwebClient
from fastapi import HTTPException
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.utils.dicom import dicom_web_download_series
from monailabel.interfaces.datastore import Datastore
from requests import RequestException

from miar_monai.data.cases import temporary_folder, unpacked
from miar_monai.data.dicom_source import Guide, source_headers
from miar_monai.data.dicom_writer import is_miar_result, write_series
from miar_monai.data.io import as_float, parts_to_save, quantity_of, volume_stem, write_volume
from miar_monai.data.outputs import UNCERTAINTY_POSTFIX
from miar_monai.data.volume import SAMPLE_MAPS
from miar_monai.errors import OutputError
from miar_monai.inference.report import derivation
from miar_monai.monailabel_app.task import Result

__all__ = ["ResultStore", "image_source", "is_result"]

_ORIGIN = "super_resolved_from"
_UID = re.compile(r"\d+(\.\d+)*")


def is_result(image: str, datastore: Datastore) -> bool:
    """Return whether an image is a result, or the map of its error: saved by this app, or a series of ``miar sr``.

    For a series of a PACS, this is read from the header of one slice; False if that is not available.

    Args:
        image: an id of the datastore; other names are not results.
        datastore: a folder, or a PACS.
    """
    from pydicom import Dataset

    if not isinstance(datastore, DICOMWebDatastore):
        return _ORIGIN in datastore.get_image_info(image)
    if not _UID.fullmatch(image):
        return False
    client = datastore._client
    try:
        study = datastore._dicom_info(image)["StudyInstanceUID"]
        one = Dataset.from_json(client.search_for_instances(study, image, limit=1)[0])
        return is_miar_result(Dataset.from_json(client.retrieve_instance_metadata(study, image, one.SOPInstanceUID)))
    except (RequestException, LookupError, ValueError):
        return False


@contextmanager
def image_source(image: str, datastore: Datastore) -> Iterator[Path]:
    """Yield the file or the DICOM folder of an image.

    Args:
        image: an id of the datastore (for a PACS, a SeriesInstanceUID), or the path of a file that a client has sent.
        datastore: of the ids.

    Raises:
        HTTPException: 404 if the image does not exist, 502 if the PACS does not send it.
        ImageError: if a zip file cannot be used.
    """
    if os.path.exists(image):
        opened = unpacked(image)
    elif isinstance(datastore, DICOMWebDatastore):
        opened = _downloaded(image, datastore)
    elif path := datastore.get_image_uri(image):
        opened = unpacked(path)
    else:
        raise _missing_image(image, datastore)
    with opened as source:
        yield source


@contextmanager
def _downloaded(image: str, datastore: DICOMWebDatastore) -> Iterator[Path]:
    """Yield a folder with the current slices of a series.

    The download of MONAI Label is cached: after a request during the arrival of slices, later requests would see an
    incomplete series.
    """
    if not _UID.fullmatch(image):  # becomes the name of a folder
        raise _missing_image(image, datastore)
    with temporary_folder(image, image) as folder:
        try:
            if datastore._fetch_by_frame:
                _download_frames(image, folder, datastore._client)
            else:
                dicom_web_download_series(None, image, folder, datastore._client)
        except IndexError as error:  # the answer of the PACS is empty
            raise _missing_image(image, datastore) from error
        except RequestException as error:
            raise HTTPException(502, f"{datastore.name()} does not send the series {image} ({error}).") from error
        yield folder


def _download_frames(series: str, folder: Path, client: DICOMwebClient) -> None:
    """Download a series from a PACS that sends metadata and frames, but not files: uncompressed, little-endian.

    The function of MONAI Label requests frames of any media type, which some PACS reject, writes files that some
    readers reject, and silently omits slices that fail.

    Raises:
        IndexError: if the PACS does not have the series.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    found = client.search_for_series(search_filters={"SeriesInstanceUID": series})
    studies = [item["0020000D"]["Value"][0] for item in found if item["0020000E"]["Value"] == [series]]
    study = str(studies[0])
    for metadata in client.retrieve_series_metadata(study, series):
        image = Dataset.from_json(metadata, bulk_data_uri_handler=lambda *_: b"")
        numbers = list(range(1, int(image.get("NumberOfFrames") or 1) + 1))
        frames = client.retrieve_instance_frames(
            study, series, image.SOPInstanceUID, numbers, media_types=("application/octet-stream",)
        )
        pixels = b"".join(frames)
        image.PixelData = pixels + b"\0" * (len(pixels) % 2)
        image["PixelData"].VR = "OB" if image.BitsAllocated <= 8 else "OW"
        image.is_little_endian, image.is_implicit_VR = True, False
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.save_as(folder / f"{image.SOPInstanceUID}.dcm", write_like_original=False)


def _missing_image(image: str, datastore: Datastore) -> HTTPException:
    return HTTPException(404, f"there is no image {image!r} in {datastore.name()}: give the id of an existing image.")


class ResultStore:
    """Saves results one at a time, under unique names."""

    def __init__(self) -> None:
        self._lock = Lock()

    def save(self, result: Result, datastore: Datastore) -> dict[str, str]:
        """Save a result, and its uncertainty and the maps of its samples, if any.

        Returns:
            ``image``, ``uncertainty_image``, ``mean_image`` and so on, their ids in the datastore: for a PACS, the
            SeriesInstanceUIDs of the new series.

        Raises:
            ImageError: if the datastore is a PACS and the source is not a DICOM series.
            OutputError: if the datastore does not accept it.
        """
        with self._lock:
            if isinstance(datastore, DICOMWebDatastore):
                return _add_series(result, datastore)
            return _add_images(result, datastore)


def _add_images(result: Result, datastore: Datastore) -> dict[str, str]:
    """Add ``<image>_sr`` and, if any, its maps, ``<image>_sr_uncertainty``; further results are numbered."""
    name, (method, _) = volume_stem(result.lr.path), _method(result)
    result_name, i = f"{name}_sr", 1
    # a map must not be combined with the image of another result
    suffixes = ["", UNCERTAINTY_POSTFIX, *(f"_{kind}" for kind in SAMPLE_MAPS)]
    while any(datastore.get_image_info(f"{result_name}{suffix}") for suffix in suffixes):
        i += 1
        result_name = f"{name}_sr{i}"
    added = {}
    with tempfile.TemporaryDirectory(prefix="miar-") as folder:
        for volume, kind in parts_to_save(result.sr):
            image = f"{result_name}_{kind}" if kind else result_name
            file = write_volume(Path(folder, f"{image}.nii.gz"), as_float(volume))
            info = {_ORIGIN: name, "derivation": method, "quantity": quantity_of(kind)}
            added[_response_key(kind)] = str(datastore.add_image(image, str(file), info))
    return added


def _add_series(result: Result, datastore: DICOMWebDatastore) -> dict[str, str]:
    """Store a result in the study of its source, as ``miar sr --out-format dicom`` writes it."""
    from pydicom import dcmread

    headers, (method, guide) = source_headers(result.lr), _method(result)
    images = {}
    with tempfile.TemporaryDirectory(prefix="miar-") as folder:
        for volume, kind in parts_to_save(result.sr):
            key = _response_key(kind)
            written = write_series(Path(folder, key), volume, headers, method, quantity=quantity_of(kind), guide=guide)
            images[key] = [dcmread(file) for file in sorted(written.iterdir())]
        try:  # in one request; the datastore itself stores only segmentations
            datastore._client.store_instances([image for series in images.values() for image in series])
        except (RequestException, OSError) as error:
            raise OutputError(
                f"{datastore.name()} does not accept the series ({error}): permission to store (STOW-RS) is "
                "needed; change its settings, or send the request without save_image."
            ) from error
    DICOMWebDatastore.list_images.cache_clear()  # MONAI Label caches it for two hours
    return {key: str(series[0].SeriesInstanceUID) for key, series in images.items()}


def _method(result: Result) -> tuple[str, Guide | None]:
    """Return how a result was made, and its guide."""
    guide = None if result.guide is None else Guide.of(result.guide)
    return derivation(result.resolver, guide.name if guide else ""), guide


def _response_key(kind: str) -> str:
    """Return the key of the id of a saved volume in the response."""
    return f"{kind}_image" if kind else "image"
