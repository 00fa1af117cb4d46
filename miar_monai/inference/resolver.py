"""Super-resolution in one call, on the code path of the bundles: their ``inference.json`` says how."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from torch import Tensor

from miar_monai.data.cases import read_case
from miar_monai.data.checks import check_volume
from miar_monai.data.geometry import axial_axis
from miar_monai.data.io import Volume, uncertainty_of
from miar_monai.data.nifti import check_layout, nifti_to_volume, volume_to_nifti
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, ImageError, SettingError, in_one_sentence
from miar_monai.inference.bundle import check_switches, find_bundle, metadata, weights_path
from miar_monai.inference.inferer import BeamSearchInferer
from miar_monai.inference.input_checks import TrainingDomain, input_warnings
from miar_monai.networks.weights import load_weights
from miar_monai.transforms.intensity import limits_in_units
from miar_monai.transforms.metatensor import metatensor_to_volume, with_affine

__all__ = ["Image", "Prepared", "SuperResolver", "choose_device", "super_resolve"]

Image = str | os.PathLike[str] | np.ndarray | nib.Nifti1Image | nib.MGHImage | MetaTensor
"""What can be super-resolved."""

_IN_MEMORY = Path("the image")  # how messages call an image without a file


def super_resolve(image: Image, model: str | os.PathLike[str] = "brats", device: str = "auto", **settings: Any) -> Any:
    """Super-resolve the axial slices of an image four times in-plane, with a bundle and its weights.

    The result covers the same field of view; the distance of the slices stays. Each call loads the weights: make one
    `SuperResolver` for many images.

    Args:
        image: one gray-value image in the units of its source (HU for CT):

            - a path of a NIfTI file, a folder with a DICOM series, or a zip file of either;
            - a nibabel NIfTI or MGH image, (X, Y, Z);
            - a `MetaTensor` (1, X, Y) or (1, X, Y, Z), whose affine says which axis is the axial one;
            - a NumPy array (X, Y) or (X, Y, Z), which has no place in millimeters: its slices lie along the last axis,
              X runs to the patient's right and Y to the front, as in a RAS+ volume.
        model: ``"brats"`` for brain MRI, ``"lidc"`` for chest CT, or the folder of a bundle (see
            `miar_monai.inference.bundle.find_bundle`).
        device: ``"auto"`` (a GPU by CUDA where there is one, else the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:<index>"``
            or ``"mps"``.
        **settings: settings of inference by their names in the bundle's ``inference.json``, such as
            ``lookahead_tokens``, ``fidelity``, ``sw_batch_size`` or ``progress``; what is not given is the bundle's.

    Returns:
        The same kind in the same units: a nibabel image for paths and nibabel images, a `MetaTensor` with the affine of
        the finer grid, or an array. Images that come from a file of integers are rounded to its dtype, as ``miar sr``
        does; all others are float32. With ``uncertainty=True`` a pair: this, and of the same kind, float32, the
        absolute error to expect of each voxel (see `miar_monai.inference.error_model`).

    Raises:
        ImageError: if the image cannot be read or has no contrast, NaN voxels or another number of axes.
        GeometryError: if the voxels have no place in millimeters.
        ConfigurationError: if there is no such bundle, device or setting.
        CheckpointError: if the bundle has no weights, or they are damaged.

    Example:
        >>> super_resolve(np.random.rand(9, 7), model="brats", device="cpu", lookahead_tokens=0).shape
        (36, 28)
    """
    return SuperResolver(model, device, **settings)(image)


class Prepared(NamedTuple):
    """A volume that is ready for the network.

    Attributes:
        image: what the inferer gets, (1, X, Y, Z), after the bundle's preprocessing.
        assumed: the degradation that is assumed of the volume, given to the network.
        limits: intensities beyond which the result is interpolated, in units of the volume; None if there are none.
        warnings: in which respects it is unlike those of the training, and what else makes its result doubtful.
    """

    image: MetaTensor
    assumed: Degradation
    limits: tuple[float, float] | None
    warnings: list[str]


class SuperResolver:
    """A bundle with its weights in memory, ready for many images.

    Args:
        model: as in `super_resolve`.
        device: likewise.
        **settings: likewise.

    Raises:
        ConfigurationError: if there is no such bundle, device or setting.
        CheckpointError: if the bundle has no weights, or they are damaged.

    Attributes:
        bundle: folder of the bundle.
        about: its ``metadata.json``.
        domain: what that says of the training.
        weights: file of the weights.
        device: where the network is.
        settings: all settings of inference, the bundle's and the given.
        network, inferer, preprocessing, postprocessing: what the bundle describes.
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
        """Make what the bundle describes, with settings in place of its own."""
        config = self.bundle / "configs" / "inference.json"
        self._given = given
        with self._usable():
            parser = _read(config, {**given, "bundle_root": str(self.bundle), "device": self.device})
            self.settings = {name: parser.get_parsed_content(name) for name in _setting_names(parser)}
            check_switches(**{name: self.settings[name] for name in ("amp", "uncertainty")})
            self.inferer: BeamSearchInferer = parser.get_parsed_content("inferer")
            if not isinstance(self.inferer, BeamSearchInferer):
                raise TypeError(f"its inferer is a {type(self.inferer).__name__}, not a BeamSearchInferer")
            self.preprocessing = parser.get_parsed_content("preprocessing")
            self.postprocessing = parser.get_parsed_content("postprocessing")
            if with_network:
                self.network = parser.get_parsed_content("network_def")

    def with_settings(self, **settings: Any) -> SuperResolver:
        """Return a resolver with other settings over the same network, whose weights are not loaded again.

        Both can be used at the same time, in several threads too: a call keeps nothing in the network.

        Args:
            **settings: as in `super_resolve`; what is not given is as it is here.

        Raises:
            ConfigurationError: if there is no such setting, or it is out of range.

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

    def _usable(self) -> AbstractContextManager[None]:
        """Let an error of a component of the config be one sentence; MONAI wraps what they raise."""
        config = self.bundle / "configs" / "inference.json"
        advice = "the inference.json of a MIAR bundle is needed; restore it."
        return in_one_sentence(ConfigurationError, f"{config} cannot be used", advice)

    def __call__(self, image: Image) -> Any:
        """Super-resolve an image; see `super_resolve` for what it can be and what comes back."""
        if isinstance(image, str | os.PathLike):
            return self._like(image, self.volume(read_case(image)))
        return self._like(image, self.volume(_volume(image)))

    def volume(self, volume: Volume, prepared: Prepared | None = None) -> Volume:
        """Super-resolve a volume in memory: preprocessing, inferer and postprocessing of the bundle.

        Args:
            volume: in its own units, (X, Y, Z); not changed.
            prepared: of `prepared`, for callers who need it too; made here otherwise, as far as it is needed.

        Returns:
            The finer volume over the same field of view, in the same units, axes and dtype for storage; with the
            setting ``uncertainty`` it has one.
        """
        image, assumed = (prepared.image, prepared.assumed) if prepared else (self._preprocessed(volume), None)
        data = {"image": image, "pred": self.infer(image, assumed)}
        with self._usable():
            data = self.postprocessing(data)
        sr = metatensor_to_volume(data["pred"])
        error = metatensor_to_volume(data["uncertainty"]).array if "uncertainty" in data else None
        return volume._replace(array=sr.array, affine=sr.affine, uncertainty=error, description=sr.description)

    def prepared(self, volume: Volume) -> Prepared:
        """Return what the inferer gets of a volume, and what is known of that before the network runs."""
        image = self._preprocessed(volume)
        limits = limits_in_units(image, self.inferer.intensity_range)
        warnings = input_warnings(volume, self.domain, self.inferer.blur, image.shape[1:3], limits)
        return Prepared(image, self.input_degradation(image), limits, warnings)

    def _preprocessed(self, volume: Volume) -> MetaTensor:
        with self._usable():
            image: MetaTensor = self.preprocessing({"image": volume})["image"]
        return image

    def infer(self, image: MetaTensor, assumed: Degradation | None = None) -> Tensor | dict[str, Tensor]:
        """Run the inferer on a preprocessed volume (1, X, Y, Z), whose slices go to the device a few at a time."""
        # recording a CUDA graph synchronizes the current device, which must not be another process's
        here = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        bfloat16 = torch.autocast(self.device.type, torch.bfloat16) if self.settings["amp"] else nullcontext()
        with torch.inference_mode(), here, bfloat16:
            result = self.inferer(image[None], self.network, assumed=assumed)
        return {name: x[0] for name, x in result.items()} if isinstance(result, dict) else result[0]

    def input_degradation(self, image: MetaTensor) -> Degradation:
        """Return the degradation that is assumed of a preprocessed volume: ``blur``, measured if "auto"."""
        return self.inferer.input_degradation(image.as_tensor().movedim(-1, 0), self.network)

    def num_tiles(self, volume: Volume) -> int:
        """Return how many tiles a volume is cut into; the time that it takes is proportional to it."""
        sides = list(volume.array.shape)
        slices = sides.pop(axial_axis(volume.affine))
        return slices * self.inferer.num_tiles(sides[0], sides[1], self.network)

    def seconds_per_tile(self) -> float:
        """Return how long one tile takes now on this machine, but for the first one, which takes longer."""
        side = self.network.side // int(self.network.degradation.scales[0])
        silent = copy(self.inferer)
        silent.progress = False
        with torch.inference_mode():
            for _ in range(2):
                start = time.perf_counter()
                silent(torch.zeros(1, 1, side, side, device=self.device), self.network)
        return time.perf_counter() - start

    @classmethod
    def _like(cls, image: Image, sr: Volume) -> Any:
        """Return a result in the kind of its input, and its uncertainty, if there is one, likewise."""
        if sr.uncertainty is not None:
            parts = sr._replace(uncertainty=None), uncertainty_of(sr)
            return tuple(cls._like(image, part) for part in parts)
        if isinstance(image, MetaTensor):
            result = with_affine(image, torch.from_numpy(sr.array)[None], sr.affine)
            return result[..., 0] if image.ndim == 3 else result
        if isinstance(image, np.ndarray):
            return sr.array[..., 0] if image.ndim == 2 else sr.array
        return volume_to_nifti(sr)


def choose_device(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``. Processes of ``torchrun`` get the GPUs
            of ``"auto"`` and ``"cuda"`` in turn.

    Raises:
        ConfigurationError: if the name is another one, or this machine has no such device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": lambda: (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available,
    }
    if device.type not in there:
        raise SettingError(f"there is no device {name!r}: give auto, cpu, cuda, cuda:<index> or mps.")
    if not there[device.type]():
        raise SettingError(f"the device {name!r} is not on this machine: give cpu, or auto.")
    return device


def _read(config: Path, overrides: dict[str, Any]) -> ConfigParser:
    """Read a bundle's inference with settings in place of its own."""
    parser = ConfigParser()
    parser.read_config(config)
    names = _setting_names(parser)
    unknown = sorted(set(overrides) - {*names, "bundle_root", "device"})
    if unknown:
        raise SettingError(f"there is no setting {unknown[0]!r}: {config} has {', '.join(sorted(names))}.")
    for name, value in overrides.items():
        if isinstance(value, dict | list) or str(value)[:1] in ("$", "@", "%"):  # which a config would run as a program
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


def _volume(image: np.ndarray | nib.Nifti1Image | nib.MGHImage | MetaTensor) -> Volume:
    """Return an image in memory as a volume, checked as those from files are.

    Only that arrays of floating-point numbers are no label maps, so that small made-up images can be tried.
    """
    can_be_labels = True
    if isinstance(image, nib.Nifti1Pair | nib.MGHImage):
        check_layout(_IN_MEMORY, image)
        volume = nifti_to_volume(image, _IN_MEMORY)
    elif isinstance(image, MetaTensor):
        array = _plain(image.detach().cpu().numpy(), image.ndim - 1, "a MetaTensor (1, X, Y) or (1, X, Y, Z)", (3, 4))
        affine = to_affine_nd(3, np.asarray(image.affine.cpu(), dtype=np.float64))
        volume = Volume(array, affine, np.dtype(np.float32), _IN_MEMORY)
        can_be_labels = not image.dtype.is_floating_point
    elif isinstance(image, np.ndarray):
        array = _plain(image, image.ndim, "an array (X, Y) or (X, Y, Z)", (2, 3))
        volume = Volume(array, np.eye(4), np.dtype(np.float32), _IN_MEMORY)
        can_be_labels = image.dtype.kind != "f"
    else:
        kind = "torch.Tensor" if isinstance(image, Tensor) else type(image).__name__
        hint = "; give tensor.numpy(), or a MetaTensor (1, X, Y, Z) with its affine" if kind == "torch.Tensor" else ""
        raise ImageError(
            f"the image is a {kind}: a path, a NumPy array, a nibabel NIfTI or MGH image, or a MetaTensor is needed"
            f"{hint}."
        )
    return check_volume(volume, can_be_labels)


def _plain(array: np.ndarray, num_spatial: int, wanted: str, ndims: tuple[int, int]) -> np.ndarray:
    """Return the voxels (X, Y, Z), float32, of an array with or without a channel and a slice axis."""
    if array.dtype.kind not in "biuf" or array.ndim not in ndims or array.size == 0:
        problem = f"has the shape {array.shape} and the type {array.dtype}"
    elif num_spatial < array.ndim and array.shape[0] != 1:
        problem = f"has {array.shape[0]} channels"
    else:
        array = array[0] if num_spatial < array.ndim else array
        return np.array(array[..., None] if array.ndim == 2 else array, dtype=np.float32)  # a copy
    raise ImageError(f"the image {problem}: {wanted} of real numbers, not empty, is needed.")
