"""Images out of a datastore of MONAI Label, results into it: as new images, or as new series of a PACS."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from fastapi import HTTPException
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.datastore import Datastore
from requests import RequestException

from miar_monai.cases import opened
from miar_monai.dicom_writer import source_headers, write_series
from miar_monai.errors import OutputError
from miar_monai.io import volume_stem, write_nifti
from miar_monai.monailabel_app.task import Result
from miar_monai.report import derivation

__all__ = ["ResultStore", "origin", "source_of"]

_ORIGIN = "super_resolved_from"


def origin(image: str, datastore: Datastore) -> str:
    """Return the id of the image that an image was made of, or an empty text if it is no saved result.

    Of the series of a PACS the datastore does not know it.
    """
    return str(datastore.get_image_info(image).get(_ORIGIN, ""))


@contextmanager
def source_of(image: str, datastore: Datastore) -> Iterator[Path]:
    """Give the NIfTI file or the DICOM folder of an image while it is worked on.

    Args:
        image: an id of the datastore (for a PACS, a SeriesInstanceUID), or the path of what a client has sent.
        datastore: where ids belong.

    Raises:
        HTTPException: 404 if there is no such image, 502 if the PACS does not give it.
        ImageError: if a zip file cannot be used.
    """
    path = Path(image) if os.path.exists(image) else _from_datastore(image, datastore)
    with opened(path) as source:
        yield source


def _from_datastore(image: str, datastore: Datastore) -> Path:
    found = ""
    if not isinstance(datastore, DICOMWebDatastore):
        found = datastore.get_image_uri(image)
    elif re.fullmatch(r"\d+(\.\d+)*", image):  # it becomes a name of a folder
        try:
            found = datastore.get_image_uri(image)
        except IndexError:  # of the empty answer of the PACS
            found = ""
        except RequestException as error:
            raise HTTPException(502, f"{datastore.name()} does not give the series {image} ({error}).") from error
    if not found:
        raise HTTPException(404, f"there is no image {image!r} in {datastore.name()}: give the id of one that it has.")
    if isinstance(datastore, DICOMWebDatastore) and os.path.isfile(found):
        # the slices themselves tell more than the NIfTI that MONAI Label makes of them, which is a temporary file at
        # first, so that its place is asked for
        return Path(datastore.get_image_info(image)["path"]).with_name(image)
    return Path(found)


class ResultStore:
    """Saves results one after another, each under a name of its own."""

    def __init__(self) -> None:
        self._lock = Lock()

    def save(self, result: Result, datastore: Datastore) -> dict[str, Any]:
        """Save a result.

        Returns:
            ``image``, its id in the datastore: for a PACS, the SeriesInstanceUID of the new series.

        Raises:
            ImageError: if the PACS is to get a result that does not come from a DICOM series.
            OutputError: if the datastore does not take it.
        """
        with self._lock:
            if isinstance(datastore, DICOMWebDatastore):
                return {"image": _add_series(result, datastore)}
            return {"image": _add_image(result, datastore)}


def _add_image(result: Result, datastore: Datastore) -> str:
    """Add a result as ``<image>_sr``; the next ones of the same image get numbers."""
    name = volume_stem(result.lr.path)
    known, i = f"{name}_sr", 1
    while datastore.get_image_info(known):
        i += 1
        known = f"{name}_sr{i}"
    with tempfile.TemporaryDirectory(prefix="miar-") as folder:
        file = write_nifti(Path(folder, f"{known}.nii.gz"), result.sr.array, result.sr.affine)
        info = {_ORIGIN: name, "derivation": derivation(result.resolver)}
        return str(datastore.add_image(known, str(file), info))


def _add_series(result: Result, datastore: DICOMWebDatastore) -> str:
    """Store a result in the study of its source, as ``miar sr --out-format dicom`` writes it."""
    from pydicom import dcmread

    with tempfile.TemporaryDirectory(prefix="miar-") as folder:
        headers = source_headers(result.lr)
        written = write_series(Path(folder, "sr"), result.sr, headers, derivation(result.resolver))
        images = [dcmread(file) for file in sorted(written.iterdir())]
        try:
            datastore._client.store_instances(images)  # the datastore itself stores nothing but segmentations
        except (RequestException, OSError) as error:
            raise OutputError(
                f"{datastore.name()} does not take the series ({error}): it must allow to store (STOW-RS); "
                "look at its settings, or ask without save_image."
            ) from error
    DICOMWebDatastore.list_images.cache_clear()  # which MONAI Label keeps for two hours
    return str(images[0].SeriesInstanceUID)
