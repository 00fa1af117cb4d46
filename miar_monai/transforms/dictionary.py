"""Dictionary versions of the array transforms."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import InvertibleTransform, MapTransform, RandomizableTransform
from monai.utils import convert_to_tensor

from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError, check_range
from miar_monai.transforms.files import LoadVolume, SaveVolume
from miar_monai.transforms.intensity import ScaleIntensityHU, ScaleIntensityRobust
from miar_monai.transforms.simulate import CentralSlices, SimulateLowResolution

__all__ = [
    "CentralSlicesd",
    "LoadVolumed",
    "RandSimulateLowResolutiond",
    "SaveVolumed",
    "ScaleIntensityHUd",
    "ScaleIntensityRobustd",
    "SimulateLowResolutiond",
]


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
    """Dictionary version of `SaveVolume`; the optional key ``"name"`` is the name of the result."""

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
        """Write the volumes and return a copy of ``data``."""
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
    """Degrade slices by one of several degradations, chosen at random, and add white noise with some probability.

    Args:
        keys: of slices (C, X, Y).
        degradations: the default comes first; see `miar_monai.degradation.with_blurs`.
        other_prob: probability that one of the others is chosen.
        noise: minimum and maximum standard deviation of the noise, in units of the intensities; log-uniform.
        noise_prob: probability of noise.
        degradation_key: key of the index of the chosen degradation, int64.
        allow_missing_keys: ignore missing slices.

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
                f"noise is {list(noise)}, but a minimum and a maximum above 0 are needed; correct the setting."
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
