"""Transforms of volumes and slices: array versions, and dictionary versions (``...d``) of the same operation.

Images are channel-first: volumes (1, X, Y, Z), slices (1, X, Y). X and Y are the in-plane axes.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, InvertibleTransform, MapTransform, RandomizableTransform, Transform
from monai.transforms.utils import allow_missing_keys_mode
from monai.utils import ImageMetaKey, TraceKeys, convert_to_tensor, ensure_tuple
from torch import Tensor

from miar_monai.cases import case_stem, read_case
from miar_monai.decoding import check_range
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, ImageError, OutputError
from miar_monai.files import check_name, refuse_to_overwrite
from miar_monai.geometry import axial_axis, downscaled_affine, upscaled_affine
from miar_monai.intensity_range import IntensityRange
from miar_monai.io import Volume, check_output_folder, what_it_is, write_nifti

__all__ = [
    "CentralSlices",
    "CentralSlicesd",
    "InvertSuperResolutiond",
    "LoadVolume",
    "LoadVolumed",
    "RandSimulateLowResolutiond",
    "SaveVolume",
    "SaveVolumed",
    "ScaleIntensityHU",
    "ScaleIntensityHUd",
    "ScaleIntensityRobust",
    "ScaleIntensityRobustd",
    "SimulateLowResolution",
    "SimulateLowResolutiond",
    "SplitUncertaintyd",
    "check_results",
    "limits_in_units",
    "result_path",
]

_DTYPE_KEY, _SPACE_KEY, _DESCRIPTION_KEY = "original_dtype", "sform_code", "descrip"
_QFORM_KEY, _QFORM_CODE_KEY = "sform_to_qform", "qform_code"


def _name(image: Tensor) -> str:
    """Return what the user knows an image by: its file."""
    return str(getattr(image, "meta", {}).get(ImageMetaKey.FILENAME_OR_OBJ, "the volume"))


def _moved(image: MetaTensor, voxels: Tensor, affine: np.ndarray) -> MetaTensor:
    """Return ``voxels`` with the metadata of ``image`` and a new affine."""
    moved = MetaTensor(voxels).copy_meta_from(image)
    moved.affine = torch.as_tensor(affine, dtype=torch.float64)
    return moved


class LoadVolume(Transform):
    """Read a volume with `miar_monai.cases.read_case`.

    Returns a `MetaTensor` (1, X, Y, Z), float32, in the orientation and the units of the file, whose metadata holds
    the affine, the path (``filename_or_obj``), the dtype that a result is written in (``original_dtype``), what NIfTI
    calls ``sform_code`` and ``descrip``, the space of the affine and the description of `miar_monai.io.Volume`, and its
    qform, as ``sform_to_qform``, (4, 4), and ``qform_code``.
    """

    def __call__(self, source: str | os.PathLike[str] | Volume) -> MetaTensor:
        """Return the volume at ``source``, a file, a folder with a DICOM series, or a zip file of either.

        A volume that is in memory already is taken as it is.
        """
        volume = source if isinstance(source, Volume) else read_case(source)
        to_qform, code = volume.qform or (np.eye(4), volume.space)  # collating knows no None
        return MetaTensor(
            torch.from_numpy(np.ascontiguousarray(volume.array))[None],
            affine=torch.as_tensor(volume.affine, dtype=torch.float64),
            meta={
                ImageMetaKey.FILENAME_OR_OBJ: str(volume.path),
                _DTYPE_KEY: volume.dtype.name,
                _SPACE_KEY: volume.space,
                _DESCRIPTION_KEY: volume.description,
                _QFORM_KEY: to_qform,
                _QFORM_CODE_KEY: code,
            },
        )


def result_path(
    source: str | os.PathLike[str], output_dir: str | os.PathLike[str], postfix: str = "sr", name: str = ""
) -> Path:
    """Return where the result of an input goes.

    Args:
        source: the input.
        output_dir: folder of the results.
        postfix: ending of the name.
        name: of the result, instead of that of the input; perhaps with folders.

    Example:
        >>> result_path("scans/case.nii.gz", "output").as_posix()
        'output/case_sr.nii.gz'
        >>> result_path("scans/a/case.nii.gz", "output", name="a/case").as_posix()
        'output/a/case_sr.nii.gz'
    """
    return Path(output_dir, f"{name or case_stem(Path(source))}_{postfix}.nii.gz")


def check_results(
    items: Sequence[Mapping[str, str]],
    output_dir: str | os.PathLike[str],
    postfix: str | Sequence[str] = "sr",
    overwrite: bool = False,
    key: str = "image",
) -> None:
    """Check, before hours of work, that each input has a result of its own and replaces none.

    Args:
        items: the inputs, ``key`` holding the path and perhaps ``"name"`` the name of the result.
        output_dir: folder of the results.
        postfix: ending of their names, or the endings where an input has several.
        overwrite: whether existing results may be replaced.
        key: of the path.

    Raises:
        OutputError: if two inputs would be written to the same file, a name is too long, or a result exists and
            ``overwrite`` is False.
    """
    taken: dict[Path, str] = {}
    for item, ending in product(items, ensure_tuple(postfix)):
        path = result_path(item[key], output_dir, ending, item.get("name", ""))
        if path in taken:
            raise OutputError(
                f"{taken[path]} and {item[key]} would both be written to {path}; give them one at a time, each with an "
                "output folder of its own."
            )
        taken[path] = item[key]
        check_name(path)
        if not overwrite:
            refuse_to_overwrite(path)


class SaveVolume(Transform):
    """Write a volume as ``<output_dir>/<input stem>_<postfix>.nii.gz``, in the dtype of its input.

    Args:
        output_dir: folder of the results; made if needed.
        postfix: ending of the name.
        overwrite: replace existing files.

    Raises:
        OutputError: if the folder cannot be written to; said here, before hours of work.
    """

    def __init__(self, output_dir: str | os.PathLike[str], postfix: str = "sr", overwrite: bool = False) -> None:
        check_output_folder(output_dir)
        self.output_dir = Path(output_dir)
        self.postfix = postfix
        self.overwrite = overwrite

    def __call__(self, image: MetaTensor, name: str = "") -> MetaTensor:
        """Write ``image``, (1, X, Y, Z), and return it unchanged; ``name`` is as in `result_path`.

        Raises:
            OutputError: if the file exists or cannot be written.
        """
        path = result_path(image.meta[ImageMetaKey.FILENAME_OR_OBJ], self.output_dir, self.postfix, name)
        array = image.as_tensor()[0].cpu().float().numpy()
        dtype, space = image.meta.get(_DTYPE_KEY, "float32"), image.meta.get(_SPACE_KEY, 1)
        description, qform = image.meta.get(_DESCRIPTION_KEY, ""), None
        if _QFORM_KEY in image.meta:
            qform = np.asarray(image.meta[_QFORM_KEY]), int(image.meta[_QFORM_CODE_KEY])
        write_nifti(path, array, np.asarray(image.affine), dtype, self.overwrite, space, description, qform)
        return image


class CentralSlices(Transform):
    """Keep the central slices along the patient's inferior-superior axis, whatever axis of the array that is.

    The paper takes the central 40 axial slices (Section 4.1). Where one more slice could stay above or below, it is
    dropped above, so that the choice does not depend on how the volume is stored.

    Args:
        num_slices: how many slices to keep; None or 0 keeps all (a bundle's command line cannot say None).

    Example:
        >>> CentralSlices(4)(MetaTensor(torch.zeros(1, 5, 5, 7), affine=torch.eye(4))).affine[2, 3].item()
        1.0
    """

    def __init__(self, num_slices: int | None = 40) -> None:
        self.num_slices = num_slices

    def __call__(self, image: MetaTensor) -> MetaTensor:
        """Return the central slices of a volume (C, X, Y, Z), with the affine that belongs to them.

        Raises:
            ImageError: if the volume has fewer slices.
        """
        if not self.num_slices:
            return image
        affine = np.asarray(image.affine, dtype=np.float64)
        axis = axial_axis(affine)
        surplus = image.shape[axis + 1] - self.num_slices
        if surplus < 0:
            raise ImageError(
                f"{_name(image)} has {image.shape[axis + 1]} axial slices and num_slices asks for the central "
                f"{self.num_slices}: use a volume with more slices, or set num_slices lower, or to 0 for all."
            )
        start = surplus // 2 if affine[2, axis] > 0 else surplus - surplus // 2
        shift = np.eye(4)
        shift[axis, 3] = start
        return _moved(image, image.as_tensor().narrow(axis + 1, start, self.num_slices), affine @ shift)


class SimulateLowResolution(Transform):
    """Degrade slices in-plane as the paper does (Section 4.1): bicubic downsampling and a Gaussian blur.

    Args:
        scale: HR voxels for each LR voxel along X and Y.
        sigma: standard deviation of the blur in voxels of the side it acts on; 0 leaves the blur out.
        blur_on: ``"lr"`` (the paper's words) or ``"hr"``.

    Example:
        >>> SimulateLowResolution()(torch.zeros(1, 32, 16, 7)).shape
        torch.Size([1, 8, 4, 7])
    """

    def __init__(self, scale: int = 4, sigma: float = 1.0, blur_on: str = "lr") -> None:
        self.degradation = Degradation(scale, sigma, blur_on)

    def __call__(self, image: Tensor) -> Tensor:
        """Return the LR version of a slice (C, X, Y) or a volume (C, X, Y, Z); for a `MetaTensor` with its affine.

        Raises:
            ConfigurationError: if X or Y is not a multiple of the scale.
        """
        voxels = convert_to_tensor(image, track_meta=False)
        slices = voxels.movedim(-1, 1) if voxels.ndim == 4 else voxels
        lr = self.degradation(slices)
        lr = lr.movedim(1, -1).contiguous() if voxels.ndim == 4 else lr
        if not isinstance(image, MetaTensor):
            return lr
        scale = self.degradation.scale
        return _moved(image, lr, downscaled_affine(np.asarray(image.affine), (scale, scale, 1)))


class _ScaleIntensity(InvertibleTransform):
    """Map an intensity window linearly to [0, 1], without clipping, and back; a subclass says which window."""

    def window(self, image: Tensor) -> tuple[float, float]:
        """Return the intensities that become 0 and 1."""
        raise NotImplementedError

    def __call__(self, image: Tensor) -> Tensor:
        """Return the scaled image, float32, of the same shape."""
        image = convert_to_tensor(image, track_meta=True)
        low, high = self.window(image)
        scaled = (image.float() - low) / (high - low)
        return self.push_transform(scaled, extra_info={"low": low, "high": high})

    def inverse(self, image: MetaTensor) -> MetaTensor:
        """Return the image in the units it had before, float32."""
        window = self.pop_transform(image)[TraceKeys.EXTRA_INFO]
        return image * (window["high"] - window["low"]) + window["low"]

    @staticmethod
    def zero(image: MetaTensor) -> float:
        """Return what 0 became in a scaled image."""
        zero = 0.0
        for window in _ScaleIntensity._windows(image):
            zero = (zero - window["low"]) / (window["high"] - window["low"])
        return zero

    @staticmethod
    def forget_offset(image: MetaTensor) -> None:
        """Let the inverse multiply only: a difference of intensities has no offset."""
        for window in _ScaleIntensity._windows(image):
            window.update(low=0.0, high=window["high"] - window["low"])

    @staticmethod
    def _windows(image: MetaTensor) -> list[dict[str, float]]:
        """Return the windows that an image was scaled by, in that order; what is changed in them, the inverse takes."""
        found = (operation.get(TraceKeys.EXTRA_INFO, {}) for operation in image.applied_operations)
        return [window for window in found if {"low", "high"} <= set(window)]


def limits_in_units(image: MetaTensor, known: IntensityRange | None) -> tuple[float, float] | None:
    """Return the limits of a range of intensities in the units that a preprocessed image had before, if there are any.

    Example:
        >>> limits_in_units(ScaleIntensityHU()(torch.zeros(1, 4, 4)), IntensityRange(0, 2))
        (-1024.0, 3072.0)
    """
    if known is None:
        return None
    low, high = known.low, known.high
    for window in reversed(_ScaleIntensity._windows(image)):
        low, high = (x * (window["high"] - window["low"]) + window["low"] for x in (low, high))
    return low, high


class ScaleIntensityRobust(_ScaleIntensity):
    """Scale an MRI volume: its background becomes 0, a high percentile of the voxels above the background becomes 1.

    The background is 0 where at least a tenth of the voxels are exactly 0 and fewer than a hundredth below
    (interpolation leaves a few negative voxels in skull-stripped volumes, which must not lift it), and the minimum
    otherwise (standardized volumes). It is not counted, so the size of the field of view does not change the scale.
    Darker voxels stay below 0, brighter ones above 1. Invertible.

    Args:
        percentile: the percentile that becomes 1, in (0, 100].

    Example:
        >>> ScaleIntensityRobust(100)(torch.tensor([[0.0, 0.0, 50.0, 200.0]])).tolist()
        [[0.0, 0.0, 0.25, 1.0]]
    """

    def __init__(self, percentile: float = 99.5) -> None:
        self.percentile = percentile

    def window(self, image: Tensor) -> tuple[float, float]:
        """Return the background and the percentile.

        Raises:
            ImageError: if the volume is constant.
        """
        voxels = convert_to_tensor(image, track_meta=False).cpu().numpy()
        zero_is_background = np.mean(voxels == 0) >= 0.1 and np.mean(voxels < 0) < 0.01
        low = 0.0 if zero_is_background else float(voxels.min())
        above = voxels[voxels > low]
        if not above.size:
            raise ImageError(
                f"{_name(image)}: none of the {voxels.size} voxels is above {low:g}; a volume with contrast is needed "
                "to scale its intensities: leave this volume out."
            )
        return low, float(np.percentile(above, self.percentile))


class ScaleIntensityHU(_ScaleIntensity):
    """Scale a CT volume: the Hounsfield units ``low`` become 0 and ``high`` become 1, the same for every volume.

    Units outside of the window stay outside of [0, 1]. Invertible.

    Args:
        low: HU that become 0.
        high: HU that become 1.

    Example:
        >>> ScaleIntensityHU()(torch.tensor([[-1024.0, 0.0, 1024.0]])).tolist()
        [[0.0, 0.5, 1.0]]
    """

    def __init__(self, low: float = -1024, high: float = 1024) -> None:
        self.low = low
        self.high = high

    def window(self, image: Tensor) -> tuple[float, float]:
        """Return ``low`` and ``high``."""
        return self.low, self.high


class _ArrayTransformd(MapTransform):
    """Apply an array transform to each of the keys."""

    def __init__(self, keys: KeysCollection, transform: Any, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the transform applied to the keys."""
        return {**data, **{key: self.transform(data[key]) for key in self.key_iterator(data)}}


class _InvertibleArrayTransformd(_ArrayTransformd, InvertibleTransform):
    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the transform undone at the keys."""
        return {**data, **{key: self.transform.inverse(data[key]) for key in self.key_iterator(data)}}


class LoadVolumed(_ArrayTransformd):
    """Dictionary version of `LoadVolume`."""

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, LoadVolume(), allow_missing_keys)


class SaveVolumed(_ArrayTransformd):
    """Dictionary version of `SaveVolume`; ``"name"`` names the results, if it is there."""

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_dir: str | os.PathLike[str] = ".",
        postfix: str = "sr",
        overwrite: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, SaveVolume(output_dir, postfix, overwrite), allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` whose volumes have been written."""
        name = data.get("name", "")
        return {**data, **{key: self.transform(data[key], name) for key in self.key_iterator(data)}}


class CentralSlicesd(_ArrayTransformd):
    """Dictionary version of `CentralSlices`."""

    def __init__(self, keys: KeysCollection, num_slices: int | None = 40, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, CentralSlices(num_slices), allow_missing_keys)


class SimulateLowResolutiond(_ArrayTransformd):
    """Dictionary version of `SimulateLowResolution`."""

    def __init__(
        self,
        keys: KeysCollection,
        scale: int = 4,
        sigma: float = 1.0,
        blur_on: str = "lr",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, SimulateLowResolution(scale, sigma, blur_on), allow_missing_keys)


class RandSimulateLowResolutiond(RandomizableTransform, MapTransform):
    """Degrade slices by one of several degradations, drawn for each, and add white noise to some of them.

    Which one it was is written to the item: the index as ``degradation_key``, int64.

    Args:
        keys: of slices (C, X, Y).
        degradations: the first is the main one; see `miar_monai.degradation.with_blurs`.
        other_prob: probability of one of the others.
        noise: lowest and highest standard deviation of the noise, in units of the intensities; drawn uniformly in the
            logarithm.
        noise_prob: probability of noise.
        degradation_key: where the index goes.
        allow_missing_keys: pass over missing slices.

    Example:
        >>> simulate = RandSimulateLowResolutiond("image", [Degradation(), Degradation(sigma=0)]).set_random_state(0)
        >>> item = simulate({"image": torch.zeros(1, 32, 16)})
        >>> item["image"].shape, item["degradation"].dtype
        (torch.Size([1, 8, 4]), torch.int64)
    """

    def __init__(
        self,
        keys: KeysCollection,
        degradations: Sequence[Degradation],
        other_prob: float = 0.5,
        noise: Sequence[float] = (1e-4, 0.02),
        noise_prob: float = 0.5,
        degradation_key: str = "degradation",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob=1.0)
        for name, value in (("other_prob", other_prob), ("noise_prob", noise_prob)):
            check_range(name, value, 0, 1)
        if not 0 < noise[0] <= noise[1]:
            raise ConfigurationError(
                f"noise is {list(noise)}, but a lowest and a highest level above 0 are needed; correct the setting."
            )
        self.degradations = list(degradations)
        self.other_prob = other_prob
        self.noise = noise
        self.noise_prob = noise_prob
        self.degradation_key = degradation_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with degraded slices and the index of their degradation."""
        index, level = 0, 0.0
        if len(self.degradations) > 1 and self.R.rand() < self.other_prob:
            index = int(self.R.randint(1, len(self.degradations)))
        if self.R.rand() < self.noise_prob:
            level = float(np.exp(self.R.uniform(*np.log(self.noise))))
        result: dict[Hashable, Any] = {**data, self.degradation_key: torch.tensor(index)}
        for key in self.key_iterator(data):
            lr = self.degradations[index](convert_to_tensor(data[key], track_meta=False))
            if level:
                lr = lr + level * torch.from_numpy(self.R.standard_normal(lr.shape)).to(lr)
            result[key] = lr
        return result


class ScaleIntensityRobustd(_InvertibleArrayTransformd):
    """Dictionary version of `ScaleIntensityRobust`."""

    def __init__(self, keys: KeysCollection, percentile: float = 99.5, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, ScaleIntensityRobust(percentile), allow_missing_keys)


class ScaleIntensityHUd(_InvertibleArrayTransformd):
    """Dictionary version of `ScaleIntensityHU`."""

    def __init__(
        self, keys: KeysCollection, low: float = -1024, high: float = 1024, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, ScaleIntensityHU(low, high), allow_missing_keys)


class SplitUncertaintyd(MapTransform):
    """Take the second channel of a prediction, the expected error if there is one, to a key of its own.

    Args:
        keys: key of the prediction, (1 or 2, X', Y', Z').
        uncertainty_key: where the second channel goes.
        allow_missing_keys: pass over missing predictions.

    Example:
        >>> data = SplitUncertaintyd("pred")({"pred": torch.zeros(2, 8, 8, 3)})
        >>> {key: tuple(value.shape) for key, value in data.items()}
        {'pred': (1, 8, 8, 3), 'uncertainty': (1, 8, 8, 3)}
    """

    def __init__(
        self, keys: KeysCollection = "pred", uncertainty_key: str = "uncertainty", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.uncertainty_key = uncertainty_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` whose prediction has one channel."""
        result = dict(data)
        for key in self.key_iterator(data):
            if len(data[key]) == 2:
                result[key], result[self.uncertainty_key] = data[key][:1], data[key][1:]
        return result


class InvertSuperResolutiond(MapTransform):
    """Bring a super-resolved prediction back to the intensities and the voxel axes of its input.

    `monai.transforms.Invertd` gives the prediction the affine of the LR image, four times too large in millimeters.
    Here the prediction covers the field of view of the LR image: its affine follows from the two sizes.

    What is nowhere negative, such as the magnitude of an MR signal, does not become so.

    Args:
        keys: key of the prediction, (1, X', Y', Z').
        transform: the preprocessing that was applied to ``orig_key``; its invertible parts are undone.
        orig_key: key of the network's input, a `MetaTensor` (1, X, Y, Z).
        difference_keys: those of the keys that hold differences of intensities, such as errors: they are scaled
            without an offset, and are not rounded when they are written.
        allow_missing_keys: pass over missing predictions.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Compose,
        orig_key: str = "image",
        difference_keys: KeysCollection = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform
        self.orig_key = orig_key
        self.difference_keys = ensure_tuple(difference_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the predictions in the units and the orientation of the input."""
        inverted = {
            key: self._invert(data[key], data[self.orig_key], key in self.difference_keys)
            for key in self.key_iterator(data)
        }
        return {**data, **inverted}

    def _invert(self, prediction: Tensor, image: MetaTensor, is_difference: bool) -> MetaTensor:
        factors = [new / old for new, old in zip(prediction.shape[1:], image.shape[1:], strict=True)]
        affine = upscaled_affine(np.asarray(image.affine), factors)
        placed: Any = _moved(image, convert_to_tensor(prediction, track_meta=False).detach().cpu(), affine)
        placed.applied_operations = deepcopy(image.applied_operations)
        placed.meta[_DESCRIPTION_KEY] = what_it_is(is_difference)
        if is_difference:
            _ScaleIntensity.forget_offset(placed)
            placed.meta[_DTYPE_KEY] = "float32"
        elif float(image.min()) >= (zero := _ScaleIntensity.zero(image)):
            placed = placed.clamp(min=zero)
        with allow_missing_keys_mode(self.transform):
            return self.transform.inverse({self.orig_key: placed})[self.orig_key]
