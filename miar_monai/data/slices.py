"""A dataset of the slices of volumes, in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from monai.data import Dataset, PersistentDataset, get_track_meta, set_track_meta
from monai.data.utils import pickle_hashing
from monai.utils import convert_to_tensor, ensure_tuple
from torch import Tensor

from miar_monai.data.spectrum import PLANES
from miar_monai.errors import DatasetError, SettingError

__all__ = ["SliceDataset"]

_KEYS = ("image", "guide")


class SliceDataset(torch.utils.data.Dataset):
    """The slices of some volumes, in memory, each with the slice of a guide if it has one; each volume is loaded once.

    The slices are plain contiguous float32 tensors, because a `monai.data.MetaTensor` costs more than the augmentation.
    Constant (empty) slices are left out. Slices of different planes and volumes may differ in size.
    `monai.data.DataLoader` seeds ``augmentation`` through ``set_rnd``.

    Args:
        data: dictionaries with ``"image"`` (path), as the datalists of `miar_monai.data.datasets` return them, and
            optionally ``"guide"`` (path of another contrast of the same patient, see `paired_datalist`).
        transform: loads the volumes: dictionary in, dictionary with ``"image"`` (1, X, Y, Z) out, in RAS orientation
            for planes other than the axial, and with ``"guide"`` on the same grid for items that have one. A key
            ``"planes"`` (see `miar_monai.transforms.DetailedPlanesd`) chooses the planes of that volume.
        augmentation: applied to ``{"image": (1, X, Y)}`` each time that a slice is asked for. If any of the items has a
            guide, the dictionary also has ``"guide"``, of the same size; it is zero where there is none.
        cache_dir: keeps the loaded volumes on disk between runs (`monai.data.PersistentDataset`); a volume is loaded
            again when the transform, the path, the size or the time stamp of its file changes.
        progress: show a progress bar while loading.
        num_workers: threads that load volumes; 0 loads them one after the other.
        planes: planes of volumes without the key ``"planes"``, among ``"axial"`` (X, Y), ``"sagittal"`` (Y, Z) and
            ``"coronal"`` (X, Z).

    Raises:
        DatasetError: if no slice with content is left, or a guide is not on the grid of its image.
        SettingError: if a plane is unknown.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable,
        augmentation: Callable | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        progress: bool = False,
        num_workers: int = 0,
        planes: Sequence[str] = ("axial",),
    ) -> None:
        self.data = list(data)
        self.transform = transform
        self.augmentation = augmentation
        self.planes = ensure_tuple(planes)
        self.has_guides = any("guide" in item for item in self.data)
        self.slices = self._load(cache_dir, progress, num_workers)
        if not self.slices:
            raise DatasetError(
                f"none of {len(self.data)} volumes has a slice with content: at least one is needed; "
                "check the dataset folder and the transform."
            )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {key: view.contiguous() for key, view in self.slices[index].items()}
        if self.has_guides and "guide" not in item:
            item["guide"] = torch.zeros_like(item["image"])
        if self.augmentation is None:
            return item
        tracked = get_track_meta()
        set_track_meta(False)  # metadata would take three times as long as the augmentation
        try:
            return convert_to_tensor(self.augmentation(item), track_meta=False)
        finally:
            set_track_meta(tracked)

    def _load(
        self, cache_dir: str | os.PathLike[str] | None, progress: bool, num_workers: int
    ) -> list[dict[str, Tensor]]:
        from tqdm.auto import tqdm

        volumes: Dataset = Dataset(self.data, self.transform)
        if cache_dir is not None:
            volumes = PersistentDataset(
                self.data, self.transform, Path(cache_dir), hash_func=_hash_with_files, hash_transform=pickle_hashing
            )
        # on an error this pool waits for its threads; one that is cut off inside C++ aborts the process at its exit
        with ThreadPoolExecutor(max(num_workers, 1)) as pool:
            loaded = pool.map(lambda i: self._slices(volumes[i], self.data[i]), range(len(self.data)))
            return [one for many in tqdm(loaded, "volumes", len(self.data), disable=not progress) for one in many]

    def _slices(self, loaded: Mapping[str, Any], item: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """Return the slices with content of a volume as views, (1, X, Y)."""
        volumes = {key: convert_to_tensor(loaded[key], track_meta=False).float() for key in _KEYS if key in loaded}
        sizes = [tuple(volume.shape) for volume in volumes.values()]
        if len(set(sizes)) > 1:
            raise DatasetError(
                f"{item['image']} has {sizes[0]} voxels and its guide {item['guide']} has {sizes[1]}: both are needed "
                "on the same grid; add ResampleGuided to the transform."
            )
        found = []
        for plane in ensure_tuple(loaded.get("planes", self.planes)):
            parts = {key: _in_plane(volume, plane) for key, volume in volumes.items()}
            image = parts["image"]
            content = (image.amax((1, 2, 3)) > image.amin((1, 2, 3))).nonzero().flatten().tolist()
            found += [{key: part[k] for key, part in parts.items()} for k in content]
        return found


def _in_plane(volume: Tensor, plane: str) -> Tensor:
    """Return all slices of a volume (1, X, Y, Z) in a plane, (slices, 1, rows, columns)."""
    if plane not in PLANES:
        raise SettingError(f"planes has {plane!r}, but there are only {', '.join(PLANES)}: correct the setting.")
    slices = volume.movedim(PLANES[plane] + 1, 0)
    # Axial slices are copied, as reading one across the memory of a volume takes 0.7 ms; the others share the volume.
    return slices.contiguous() if plane == "axial" else slices


def _hash_with_files(item: Mapping[str, Any]) -> bytes:
    states = [os.stat(item[key]) for key in _KEYS if key in item]
    return pickle_hashing({**item, "files": [(state.st_size, state.st_mtime_ns) for state in states]})
