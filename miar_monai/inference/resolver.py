"""Super-resolution in one call, by the ``inference.json`` of a bundle."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch import Tensor

from miar_monai.data.cases import read_case
from miar_monai.data.grid_request import axis_values
from miar_monai.data.io import Volume, read_labels, sample_maps
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, SettingError, in_one_sentence
from miar_monai.inference.bundle import check_switches, find_bundle, metadata, weights_path
from miar_monai.inference.devices import choose_device
from miar_monai.inference.guide_checks import check_guide, guide_detail_warnings
from miar_monai.inference.images import Image, image_like, image_volume, label_volume
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.inference.input_checks import TrainingDomain, input_warnings
from miar_monai.inference.passes import Plan
from miar_monai.inference.volume_inferer import VolumeInferer, check_has_guide
from miar_monai.networks.weights import load_weights
from miar_monai.transforms.intensity import limits_in_units
from miar_monai.transforms.labels import carry_labels
from miar_monai.transforms.metatensor import metatensor_to_volume

__all__ = ["Image", "Prepared", "SuperResolver", "choose_device", "super_resolve"]


def super_resolve(
    image: Image,
    model: str | os.PathLike[str] = "brats",
    device: str = "auto",
    guide: Image | None = None,
    labels: Image | None = None,
    **settings: Any,
) -> Any:
    """Super-resolve an image, with a bundle and its weights.

    The result covers the same field of view. By default, the axial plane becomes four times finer and the distance
    between slices stays; ``factor``, ``spacing`` or ``isotropic`` ask for another grid. Each call loads the weights:
    for many images use one `SuperResolver`.

    Args:
        image: a gray-value image in its own units (HU for CT):

            - the path of a NIfTI file, of a folder with a DICOM series, or of a zip file of either;
            - a nibabel NIfTI or MGH image, (X, Y, Z);
            - a `MetaTensor` (1, X, Y) or (1, X, Y, Z), whose affine determines the axial plane;
            - a NumPy array (X, Y) or (X, Y, Z), taken as a RAS+ volume: slices along the last axis, X to the patient's
              right, Y to the front.
        model: ``"brats"`` for brain MRI, ``"lidc"`` for chest CT, or the folder of a bundle (see
            `miar_monai.inference.bundle.find_bundle`).
        device: ``"auto"`` (a GPU with CUDA, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``.
        guide: another contrast of the same patient, of one of these types, for a model that was trained with a guide.
            It may have any orientation and resolution, since positions in millimeters count; voxels of arrays are 1 mm.
        labels: a label map of the image, such as a segmentation, of one of these types (a path is that of a file). It
            is carried to the grid of the result, see `miar_monai.transforms.labels.carry_labels`.
        **settings: settings of inference by their names in the bundle's ``inference.json``, such as
            ``lookahead_tokens``, ``fidelity``, ``sw_batch_size`` or ``progress``; the bundle's by default. For the
            grid, at most one of ``factor`` (how many times finer, 1 to 8), ``spacing`` (in millimeters), both one
            number or three for left-right, posterior-anterior and inferior-superior, and ``isotropic=True``;
            ``slice_thickness`` in millimeters if it is not the distance of the slices, and ``slice_profile``,
            ``"slr"``, ``"gaussian"`` or ``"box"``.

    Returns:
        The same type in the same units: a nibabel image for paths and nibabel images, a `MetaTensor` with the affine of
        the finer grid, or an array. Results of integer files are rounded to the dtype of the file; all others are
        float32. With ``uncertainty=True`` a pair of this type: the result, and the expected absolute error of each
        voxel, float32 (see `miar_monai.inference.error_model`). With ``samples`` a dictionary of this type:
        ``"image"``, ``"uncertainty"`` if requested, and float32 maps of the posterior samples by the names of
        `miar_monai.data.volume.sample_maps`. With ``labels``, a tuple whose last item, or with samples the entry
        ``"labels"``, is the label map on the finer grid, of the type and in the dtype of ``labels``.

    Raises:
        ImageError: if the image cannot be read, is constant, has NaN voxels or the wrong number of axes.
        GeometryError: if the positions of the voxels are not defined.
        SettingError: if there is no such bundle, device or setting, or a setting is out of range.
        CheckpointError: if the bundle has no weights, or they are damaged.

    Example:
        >>> import numpy as np
        >>> super_resolve(np.random.rand(9, 7), model="brats", device="cpu", lookahead_tokens=0).shape
        (36, 28)
        >>> super_resolve(np.random.rand(9, 7, 4), device="cpu", lookahead_tokens=0, factor=(1, 1, 2.5)).shape
        (9, 7, 10)
    """
    return SuperResolver(model, device, **settings)(image, guide, labels)


_AXIS_SETTINGS = ("factor", "spacing")  # one number, or three


class Prepared(NamedTuple):
    """A volume that is ready for the network.

    Attributes:
        image: the input of the inferer, (1, X, Y, Z), after the bundle's preprocessing.
        plan: the passes of the super-resolution, with the degradations that are assumed.
        limits: intensities beyond which the result is interpolated, in units of the volume, or None.
        warnings: sentences on properties that make the result doubtful, such as differences from the training data.
        guide: another contrast on its own grid, (1, X, Y, Z), after the bundle's preprocessing, or None.
    """

    image: MetaTensor
    plan: Plan
    limits: tuple[float, float] | None
    warnings: list[str]
    guide: MetaTensor | None = None

    @property
    def assumed(self) -> Degradation:
        """The assumed degradation in the last pass; of the only one, if the axial plane becomes finer."""
        return self.plan.assumed


class SuperResolver:
    """A bundle with its weights in memory, for many images.

    Args:
        model: as in `super_resolve`.
        device: as in `super_resolve`.
        **settings: as in `super_resolve`.

    Raises:
        SettingError: if there is no such bundle, device or setting, or a setting is out of range.
        CheckpointError: if the bundle has no weights, or they are damaged.

    Attributes:
        bundle: folder of the bundle.
        about: its ``metadata.json``.
        domain: the training data that it describes.
        weights: file of the weights.
        device: device of the network.
        settings: all settings of inference.
        network, inferer, volume_inferer, preprocessing, postprocessing: the components of the bundle.
    """

    def __init__(self, model: str | os.PathLike[str] = "brats", device: str = "auto", **settings: Any) -> None:
        self.bundle = find_bundle(model)
        self.device = choose_device(device)
        self.weights = weights_path(self.bundle)
        self.about = metadata(self.bundle)
        self.domain = TrainingDomain.of(self.about)
        self._configure(settings, with_network=True)
        load_weights(
            self.network,
            self.weights,
            "copy a trained model.pt there, train the bundle (its docs/README.md says how), or choose another model.",
        )
        self.network.to(self.device).eval()

    def _configure(self, given: dict[str, Any], with_network: bool = False) -> None:
        """Instantiate the components of the bundle with some settings replaced."""
        config = self.bundle / "configs" / "inference.json"
        self._given = given
        with self._wrap_config_errors():
            parser = _read(config, {**given, "bundle_root": str(self.bundle), "device": self.device})
            self.settings = {name: parser.get_parsed_content(name) for name in _setting_names(parser)}
            check_switches(**{name: self.settings[name] for name in _SWITCHES if name in self.settings})
            self.inferer: BeamSearchInferer = parser.get_parsed_content("inferer")
            self.volume_inferer: VolumeInferer = parser.get_parsed_content("volume_inferer")
            _check_type("inferer", self.inferer, BeamSearchInferer)
            _check_type("volume_inferer", self.volume_inferer, VolumeInferer)
            _check_type("volume_inferer#inferer", self.volume_inferer.inferer, BeamSearchInferer)
            self.preprocessing = parser.get_parsed_content("preprocessing")
            self.postprocessing = parser.get_parsed_content("postprocessing")
            if with_network:
                self.network = parser.get_parsed_content("network_def")
                _check_type("network_def#degradation", getattr(self.network, "degradation", None), Degradation)
        if self.volume_inferer.samples:
            self.network.check_samples()

    def with_settings(self, **settings: Any) -> SuperResolver:
        """Return a resolver with other settings that shares this one's network, without loading the weights again.

        Both can be used at the same time, also in several threads: calls leave no state in the network.

        Args:
            **settings: as in `super_resolve`; the present ones by default.

        Raises:
            SettingError: if there is no such setting, or it is out of range.

        Example:
            >>> resolver = SuperResolver("brats", "cpu", lookahead_tokens=0)
            >>> faithful = resolver.with_settings(fidelity=1.0)
            >>> faithful.settings["lookahead_tokens"], faithful.settings["fidelity"]
            (0, 1.0)
            >>> faithful.network is resolver.network
            True
        """
        other = copy(self)
        other._configure({**self._given, **settings})
        return other

    def _wrap_config_errors(self) -> AbstractContextManager[None]:
        """Convert errors of the components to one sentence that names the config."""
        config = self.bundle / "configs" / "inference.json"
        advice = "the inference.json of a MIAR bundle is needed; restore it."
        return in_one_sentence(ConfigurationError, f"{config} cannot be used", advice)

    def __call__(self, image: Image, guide: Image | None = None, labels: Image | None = None) -> Any:
        """Super-resolve an image; see `super_resolve` for its types, its guide, labels and the return value."""
        volume = _read_image(image)
        if labels is None:
            prepared = None if guide is None else self.prepare(volume, _read_image(guide))
            return image_like(image, self.volume(volume, prepared))
        given = read_labels(labels) if isinstance(labels, str | os.PathLike) else label_volume(labels)
        prepared = self.prepare(volume, None if guide is None else _read_image(guide))
        carried = carry_labels(given, prepared.plan.grids(volume.grid)[-1])
        result = self.volume(volume, prepared)
        images = image_like(image, result)
        if isinstance(images, dict):
            return images | {"labels": image_like(labels, carried)}
        return (*(images if result.uncertainty is not None else (images,)), image_like(labels, carried))

    def volume(self, volume: Volume, prepared: Prepared | None = None) -> Volume:
        """Super-resolve a volume in memory: preprocessing, inferer and postprocessing of the bundle.

        Args:
            volume: in its own units, (X, Y, Z); not changed.
            prepared: from `prepare`, for callers that need it too; by default the volume is preprocessed here.

        Returns:
            The finer volume over the same field of view, in the same units, axes and storage dtype, with
            ``uncertainty`` and ``sampled`` if these settings are on.
        """
        if prepared:
            image, plan, guide = prepared.image, prepared.plan, prepared.guide
        else:
            image, plan, guide = self._preprocessed(volume)["image"], None, None
        data = {"image": image, "pred": self.infer(image, plan, guide)}
        with self._wrap_config_errors():
            data = self.postprocessing(data)
        sr = metatensor_to_volume(data["pred"])
        error = metatensor_to_volume(data["uncertainty"]).array if "uncertainty" in data else None
        names = sample_maps(self.volume_inferer.samples, self.volume_inferer.keep_samples)
        sampled = {name: metatensor_to_volume(data[name]).array for name in names} or None
        return volume._replace(
            array=sr.array, affine=sr.affine, uncertainty=error, description=sr.description, sampled=sampled
        )

    def prepare(self, volume: Volume, guide: Volume | None = None) -> Prepared:
        """Preprocess and check a volume, and determine its degradation, before the network runs.

        Args:
            volume: in its own units, (X, Y, Z); not changed.
            guide: another contrast of the same patient, on any grid in the same millimeters.

        Raises:
            SettingError: if there is a guide, but the network has none.
            ImageError, GeometryError: if the guide cannot be used, see `check_guide`.
        """
        check_has_guide(self.network, guide)
        about_guide = [] if guide is None else check_guide(guide, volume)
        data = self._preprocessed(volume, guide)
        image = data["image"]
        limits, plan = limits_in_units(image, self.inferer.intensity_range), self.plan(image)
        warnings = input_warnings(volume, self.domain, self.inferer.blur, plan, limits)
        about_guide += [] if guide is None else guide_detail_warnings(guide, plan.factors)
        return Prepared(image, plan, limits, warnings + about_guide, data.get("guide"))

    def _preprocessed(self, volume: Volume, guide: Volume | None = None) -> dict[str, MetaTensor]:
        """Return the volume (``"image"``) and the guide, if there is one, after the preprocessing of the bundle."""
        with self._wrap_config_errors():
            data: dict[str, MetaTensor] = self.preprocessing(
                {"image": volume} if guide is None else {"image": volume, "guide": guide}
            )
        return data

    def infer(
        self, image: MetaTensor, plan: Plan | None = None, guide: MetaTensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Run the inferer on a preprocessed volume (1, X, Y, Z); slices are moved to the device in batches.

        Args:
            image: the volume.
            plan: from `plan`; made here by default.
            guide: a preprocessed guide on any grid in the same millimeters, (1, X, Y, Z).
        """
        # recording a CUDA graph synchronizes the current device, which must not be that of another process
        own_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16) if self.settings["amp"] else nullcontext()
        with torch.inference_mode(), own_device, bfloat16:
            guides = None if guide is None else guide[None]
            result = self.volume_inferer(image[None], self.network, plan=plan, guide=guides)
        return {name: x[0] for name, x in result.items()} if isinstance(result, dict) else result[0]

    def plan(self, image: MetaTensor) -> Plan:
        """Return the passes for a preprocessed volume; its blur is measured if that is "auto"."""
        return self.volume_inferer.plan(image, self.network)


_SWITCHES = ("amp", "uncertainty", "isotropic", "save_samples")


def _check_type(name: str, found: object, kind: type) -> None:
    """Check the class of a component of a bundle, which its config may replace by anything."""
    if not isinstance(found, kind):
        raise TypeError(f"its {name} is a {type(found).__name__}, not a {kind.__name__}")


def _read_image(image: Image) -> Volume:
    return read_case(image) if isinstance(image, str | os.PathLike) else image_volume(image)


def _read(config: Path, overrides: dict[str, Any]) -> ConfigParser:
    """Read the ``inference.json`` of a bundle with some settings replaced."""
    parser = ConfigParser()
    parser.read_config(config)
    names = _setting_names(parser)
    unknown = sorted(set(overrides) - {*names, "bundle_root", "device"})
    if unknown:
        raise SettingError(f"there is no setting {unknown[0]!r}: {config} has {', '.join(sorted(names))}.")
    overrides = {name: axis_values(name, x) if name in _AXIS_SETTINGS else x for name, x in overrides.items()}
    for name, value in overrides.items():
        is_several = isinstance(value, dict | list | tuple) and name not in _AXIS_SETTINGS
        if is_several or str(value)[:1] in ("$", "@", "%"):  # a config would run it as code
            raise SettingError(f"{name} is {value!r}, but a number or a word is needed; correct the setting.")
    if "progress" in names:
        parser["progress"] = False
    for name, value in overrides.items():
        parser[name] = value
    return parser


def _setting_names(parser: ConfigParser) -> list[str]:
    """Return the names of the settings of inference, which the config lists."""
    names: list[str] = parser["settings"]
    return names
