"""A bundle as a task of a MONAI Label server, with the results of ``miar sr``."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from uuid import uuid4

from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import device_list, name_to_device

from miar_monai.data.grid_request import axis_values
from miar_monai.data.io import Volume, as_float, as_stored, read_volume, write_volume
from miar_monai.errors import ConfigurationError
from miar_monai.inference.bundle import metadata, number_or_text, weights_path
from miar_monai.inference.report import capture_warnings, case_report
from miar_monai.inference.resolver import SuperResolver

__all__ = ["Result", "SuperResolutionTask", "parse_flag"]

_EXTENSIONS = [".nii.gz", ".nii", ".nrrd"]  # 3D Slicer and OHIF request .nrrd
_INFERENCE = Lock()  # one image at a time for all models: two need twice the memory and are not faster


class Result(NamedTuple):
    """The result of a task.

    Attributes:
        file: the result, for the response; removed by the server.
        params: its description for the client.
        lr: the image.
        sr: the result, with the values of ``file`` and, if requested, the uncertainty.
        resolver: the model with the settings of the request.
        guide: the guide, or None.
    """

    file: Path
    params: dict[str, Any]
    lr: Volume
    sr: Volume
    resolver: SuperResolver
    guide: Volume | None = None


class SuperResolutionTask(InferTask):
    """Super-resolves volumes with a bundle; the first request loads the weights.

    The type is ``others``, as clients expect label maps from all other types. Each request can override the settings in
    ``displayable_configs``.

    Args:
        bundle: folder of the bundle.
    """

    displayable_configs = (
        *("lookahead_tokens", "fidelity", "blur", "uncertainty", "samples", "sampling_seed"),
        *("factor", "spacing", "isotropic", "slice_thickness", "slice_profile"),
    )

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._resolvers: dict[str, SuperResolver] = {}  # by device, with the settings of the last request
        self._loading = Lock()
        config = json.loads((bundle / "configs" / "inference.json").read_text(encoding="utf-8"))
        super().__init__(
            type=InferType.OTHERS,
            labels=[],
            dimension=3,
            description=metadata(bundle)["description"],
            config={
                "device": device_list(),
                **{name: "" if config[name] is None else config[name] for name in self.displayable_configs},
                "save_image": False,
                "result_extension": _EXTENSIONS,
            },
        )

    def is_valid(self) -> bool:
        """Return whether the weights exist; the server only lists valid tasks."""
        return weights_path(self._bundle).is_file()

    def info(self) -> dict[str, Any]:
        """Return the description of the task for ``/info/``."""
        return {**super().info(), "version": metadata(self._bundle)["version"]}

    def get_path(self, validate: bool = True) -> str | None:
        """Return the file of the weights, for ``/model/``; None if ``validate`` and it is missing."""
        return str(weights_path(self._bundle)) if self.is_valid() or not validate else None

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Super-resolve the image at the path ``request["image"]``; return the path of the result and ``params``."""
        result = self.super_resolve(Path(request["image"]), request)
        return str(result.file), result.params

    def super_resolve(self, source: Path, request: dict[str, Any], guide: Path | None = None) -> Result:
        """Super-resolve an image, with the same voxels as ``miar sr``.

        Args:
            source: a NIfTI file or a folder with a DICOM series.
            request: settings by name; other keys, such as ``result_dtype``, are ignored.
            guide: another contrast of the same patient, likewise a file or a folder.

        Raises:
            MiarError: if the image or a setting cannot be used.
        """
        start = time.perf_counter()
        extension = _choice(request, "result_extension", _EXTENSIONS)
        resolver = self._resolver(request)
        lr, other = read_volume(source), None if guide is None else read_volume(guide)
        read = time.perf_counter()
        with _INFERENCE, capture_warnings() as captured:
            waited = time.perf_counter()
            prepared = resolver.prepare(lr, other)
            sr = resolver.volume(lr, prepared)
        inferred = time.perf_counter()
        sr = sr._replace(array=as_stored(sr.array, sr.dtype).astype("float32"))
        file = Path(tempfile.gettempdir(), f"miar-{uuid4().hex}{extension}")
        seconds, warnings = inferred - waited, [*prepared.warnings, *captured]
        report = case_report(
            source.name, file, lr, sr, prepared.plan, seconds, resolver.device, warnings, limits=prepared.limits
        )
        write_volume(file, as_float(sr), compress=False)  # last, as only the server removes it
        file.chmod(0o600)  # other users can list the folder
        end = time.perf_counter()
        latencies = {"pre": read - start, "wait": waited - read, "infer": inferred - waited, "write": end - inferred}
        params = {
            "kind": "image",
            "label_names": [],  # clients expect it and the centroids
            "centroids": {},
            "latencies": {name: round(value, 2) for name, value in {**latencies, "total": end - start}.items()},
            "settings": {name: resolver.settings[name] for name in self.displayable_configs},
            **{name: value for name, value in report.items() if name not in ("input", "output", "auxiliary_outputs")},
        }
        return Result(file, params, lr, sr, resolver, other)

    def _resolver(self, request: dict[str, Any]) -> SuperResolver:
        """Return the model on the device and with the settings of a request.

        The weights are loaded once; the state of the inferer, such as CUDA graphs, is kept while requests have the same
        settings.
        """
        device = name_to_device(str(request.get("device") or ""))
        requested = {name: request.get(name) for name in self.displayable_configs}
        settings = {name: self._config[name] if value is None else _number(value) for name, value in requested.items()}
        settings |= {name: parse_flag(settings, name) for name in ("uncertainty", "isotropic")}
        # clients show no value as an empty text
        empty = [name for name in ("factor", "spacing", "slice_thickness") if settings[name] == ""]
        settings |= dict.fromkeys(empty)
        settings |= {name: axis_values(name, settings[name]) for name in ("factor", "spacing")}
        with self._loading:
            resolver = self._resolvers.get(device) or SuperResolver(self._bundle, device, **settings)
            if any(resolver.settings[name] != value for name, value in settings.items()):
                resolver = resolver.with_settings(**settings)
            self._resolvers[device] = resolver
            return resolver


def _number(value: Any) -> Any:
    """Return a number that a client sent as a string or as a float; other values are returned unchanged."""
    value = number_or_text(value) if isinstance(value, str) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse_flag(request: dict[str, Any], name: str) -> bool:
    """Return a boolean setting, False by default.

    Raises:
        ConfigurationError: if it is not a boolean.
    """
    value = request.get(name) or False
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is {value!r}, but it must be true or false; correct it.")
    return value


def _choice(request: dict[str, Any], name: str, choices: list[str]) -> str:
    """Return a setting with several choices, the first by default."""
    value = request.get(name) or choices[0]
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}, but it must be one of {', '.join(choices)}; correct it.")
    return str(value)
