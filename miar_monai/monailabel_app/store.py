"""Images out of a datastore of MONAI Label, results into it: as new images, or as new series of a PACS."""

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
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import is_miar_result, write_series
from miar_monai.data.io import as_float, parts_to_save, volume_stem, write_volume
from miar_monai.data.outputs import UNCERTAINTY_POSTFIX
from miar_monai.errors import OutputError
from miar_monai.inference.report import derivation
from miar_monai.monailabel_app.task import Result

__all__ = ["ResultStore", "image_source", "is_result"]

_ORIGIN = "super_resolved_from"
_UID = re.compile(r"\d+(\.\d+)*")


def is_result(image: str, datastore: Datastore) -> bool:
    """Return whether an image is a result, or the map of one: saved by this app, or a series of ``miar sr``.

    Of a series of a PACS the header of one slice says so; if the PACS does not give it, the answer is no.

    Args:
        image: an id of the datastore; anything else is no result.
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
    """Give the NIfTI file or the DICOM folder of an image while it is worked on.

    Args:
        image: an id of the datastore (for a PACS, a SeriesInstanceUID), or the path of what a client has sent.
        datastore: where ids belong.

    Raises:
        HTTPException: 404 if there is no such image, 502 if the PACS does not give it.
        ImageError: if a zip file cannot be used.
    """
    if os.path.exists(image):
        given = unpacked(image)
    elif isinstance(datastore, DICOMWebDatastore):
        given = _downloaded(image, datastore)
    elif path := datastore.get_image_uri(image):
        given = unpacked(path)
    else:
        raise _missing_image(image, datastore)
    with given as source:
        yield source


@contextmanager
def _downloaded(image: str, datastore: DICOMWebDatastore) -> Iterator[Path]:
    """Give the slices of a series as the PACS has them now.

    MONAI Label keeps what it downloads: a request that comes while slices arrive, at the PACS or here, would have the
    ones after it work on a part of the series.
    """
    if not _UID.fullmatch(image):  # it becomes a name of a folder
        raise _missing_image(image, datastore)
    with temporary_folder(image, image) as folder:
        try:
            if datastore._fetch_by_frame:
                _download_frames(image, folder, datastore._client)
            else:
                dicom_web_download_series(None, image, folder, datastore._client)
        except IndexError as error:  # of the empty answer of the PACS
            raise _missing_image(image, datastore) from error
        except RequestException as error:
            raise HTTPException(502, f"{datastore.name()} does not give the series {image} ({error}).") from error
        yield folder


def _download_frames(series: str, folder: Path, client: DICOMwebClient) -> None:
    """Download a series from a PACS that gives metadata and frames, but no files: uncompressed, little-endian.

    MONAI Label's own function asks for frames of any kind, which not every PACS understands, writes files that not
    every reader takes, and leaves out, without a word, the slices that fail.

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
    return HTTPException(404, f"there is no image {image!r} in {datastore.name()}: give the id of one that it has.")


class ResultStore:
    """Saves results one after another, each under a name of its own."""

    def __init__(self) -> None:
        self._lock = Lock()

    def save(self, result: Result, datastore: Datastore) -> dict[str, str]:
        """Save a result and its uncertainty, if it has one, side by side.

        Returns:
            ``image`` and ``uncertainty_image``, their ids in the datastore: for a PACS, the SeriesInstanceUIDs of the
            new series.

        Raises:
            ImageError: if the PACS is to get a result that does not come from a DICOM series.
            OutputError: if the datastore does not take it.
        """
        with self._lock:
            if isinstance(datastore, DICOMWebDatastore):
                return _add_series(result, datastore)
            return _add_images(result, datastore)


def _add_images(result: Result, datastore: Datastore) -> dict[str, str]:
    """Add ``<image>_sr`` and, if there is one, ``<image>_sr_uncertainty``; the next ones of an image get numbers."""
    name, how = volume_stem(result.lr.path), derivation(result.resolver)
    known, i = f"{name}_sr", 1
    while any(
        datastore.get_image_info(f"{known}{suffix}") for suffix in ("", UNCERTAINTY_POSTFIX)
    ):  # no map beside another result
        i += 1
        known = f"{name}_sr{i}"
    added = {}
    with tempfile.TemporaryDirectory(prefix="miar-") as folder:
        for volume, quantity in parts_to_save(result.sr):
            image = f"{known}{UNCERTAINTY_POSTFIX}" if quantity else known
            file = write_volume(Path(folder, f"{image}.nii.gz"), as_float(volume))
            info = {_ORIGIN: name, "derivation": how, "quantity": quantity}
            added[_response_key(quantity)] = str(datastore.add_image(image, str(file), info))
    return added


def _add_series(result: Result, datastore: DICOMWebDatastore) -> dict[str, str]:
    """Store a result in the study of its source, as ``miar sr --out-format dicom`` writes it."""
    from pydicom import dcmread

    headers, how = source_headers(result.lr), derivation(result.resolver)
    images = {}
    with tempfile.TemporaryDirectory(prefix="miar-") as folder:
        for volume, quantity in parts_to_save(result.sr):
            written = write_series(Path(folder, _response_key(quantity)), volume, headers, how, quantity=quantity)
            images[_response_key(quantity)] = [dcmread(file) for file in sorted(written.iterdir())]
        try:  # in one request; the datastore itself stores nothing but segmentations
            datastore._client.store_instances([image for series in images.values() for image in series])
        except (RequestException, OSError) as error:
            raise OutputError(
                f"{datastore.name()} does not take the series ({error}): it must allow to store (STOW-RS); "
                "look at its settings, or ask without save_image."
            ) from error
    DICOMWebDatastore.list_images.cache_clear()  # which MONAI Label keeps for two hours
    return {key: str(series[0].SeriesInstanceUID) for key, series in images.items()}


def _response_key(quantity: str) -> str:
    """Return how the answer calls the id of a part of a result."""
    return "uncertainty_image" if quantity else "image"
