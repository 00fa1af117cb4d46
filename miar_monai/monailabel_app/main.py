"""The app that a MONAI Label server starts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from miar_monai._version import __version__
from miar_monai.errors import MiarError
from miar_monai.inference.bundle import find_bundle, models
from miar_monai.monailabel_app.store import ResultStore, image_source, is_result
from miar_monai.monailabel_app.task import Result, SuperResolutionTask, parse_flag


class MiarApp(MONAILabelApp):
    """Super-resolution of the images in a datastore: a folder, or a PACS by DICOMweb.

    Args:
        app_dir: this folder, or a copy of it.
        studies: a folder, or the URL of a DICOMweb server.
        conf: options ``--conf <key> <value>``; this app uses ``models``, a comma-separated list of names or folders of
            bundles.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="MIAR",
            description="Super-resolution of MRI and CT to finer grids. For research, not for clinical use.",
            version=__version__,
        )
        self._results = ResultStore()

    def init_infers(self) -> dict[str, SuperResolutionTask]:
        """Return a task for each bundle, by the name of its folder; the first request loads the weights."""
        bundles = [find_bundle(name) for name in self.conf.get("models", ",".join(models())).split(",")]
        return {bundle.name: SuperResolutionTask(bundle) for bundle in bundles}

    def _download_dcmqi_tools(self) -> None:
        """Skip the download of tools for segmentations."""

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Super-resolve an image.

        Args:
            request: ``model``; ``image``, an id of the datastore or a path; ``guide``, another contrast of the same
                patient, likewise; settings of the task; ``save_image``, whether to save the result in the datastore.
            datastore: that of the app by default.

        Returns:
            ``file``, the result, and ``params``, its description for the client: the report of ``miar sr`` with
            warnings, the ids of saved images, and the mean and maximum of the uncertainty if it was requested. The map
            of the uncertainty is available only if saved.

        Raises:
            HTTPException: with a sentence for the user: 404 if the model or the image does not exist, 400 if the image
                or a setting cannot be used.
        """
        name, image = request.get("model"), str(request.get("image"))
        datastore = datastore or self.datastore()
        if name not in self._infers:
            raise HTTPException(404, f"there is no model {name!r}: this server has {', '.join(self._infers)}.")
        if request.get("label_info"):
            raise HTTPException(400, f"{name} returns images, which DICOM SEG does not support: request output=image.")
        try:
            save = parse_flag(request, "save_image")
            guide = image_source(str(request["guide"]), datastore) if request.get("guide") else nullcontext()
            with image_source(image, datastore) as source, guide as guide_source:
                result = self._infers[name].super_resolve(source, request, guide_source)
                if save:
                    self._save(result, datastore)
        except MiarError as error:
            raise HTTPException(400, str(error)) from error
        return {"file": str(result.file), "params": result.params}

    def _save(self, result: Result, datastore: Datastore) -> None:
        try:
            result.params.update(self._results.save(result, datastore))
        except BaseException:
            result.file.unlink()  # it will not be served
            raise

    def init_batch_infer(self) -> BatchInferTask:
        """Return the task that finds the images of a batch."""
        return _OriginalImages()

    def batch_infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Super-resolve many images and save the results, as a batch returns none; a failure does not stop others."""

        def infer(request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
            try:
                return self.infer(request, datastore)
            except HTTPException as error:
                return {"error": error.detail}

        on_gpus = (
            request.get("multi_gpu", True) and torch.cuda.is_available()
        )  # MONAI Label divides by the number of GPUs
        result: dict[str, Any] = self._batch_infer(
            {**request, "save_image": True, "multi_gpu": on_gpus}, datastore or self.datastore(), infer
        )
        return result


class _OriginalImages(BatchInferTask):
    """Finds all images of a datastore that are not results."""

    def get_images(self, request: dict[str, Any], datastore: Datastore) -> list[str]:
        return [image for image in super().get_images(request, datastore) if not is_result(image, datastore)]
