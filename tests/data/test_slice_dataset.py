"""The dataset of slices: of all planes, with and without guides."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from monai.data import DataLoader
from monai.transforms import (
    Compose,
    MapTransform,
    Orientationd,
    RandFlipd,
    RandRotate90d,
    RandSpatialCropd,
    SpatialPadd,
)

from miar_monai.data.datasets import brats_datalist, paired_datalist, volume_datalist
from miar_monai.data.slices import SliceDataset
from miar_monai.errors import DatasetError, SettingError
from miar_monai.transforms import CentralSlicesd, DetailedPlanesd, LoadVolumed, ScaleIntensityRobustd

SHAPE = (17, 13, 9)
PLANES = ("axial", "sagittal", "coronal")


def images(dataset: SliceDataset) -> list[torch.Tensor]:
    return [dataset[i]["image"] for i in range(len(dataset))]


class Counted(MapTransform):
    """Counts how often volumes are loaded."""

    calls = 0

    def __call__(self, data: dict) -> dict:
        type(self).calls += 1
        return data


@pytest.fixture
def items(tmp_path: Path) -> list[dict[str, str]]:
    return brats_datalist(write_brats_folder(tmp_path / "brats", subjects=3, shape=SHAPE, contrasts=("t2",)))


@pytest.fixture
def transform() -> Compose:
    Counted.calls = 0
    return Compose(
        [
            Counted("image"),
            LoadVolumed("image"),
            CentralSlicesd("image", None),
            Orientationd("image", axcodes="RAS", labels=None),
            ScaleIntensityRobustd("image"),
        ]
    )


def test_slices_are_those_of_the_volumes(items: list[dict[str, str]], transform: Compose) -> None:
    dataset = SliceDataset(items, transform)
    expected = [s for item in items for s in transform(item)["image"].as_tensor().unbind(-1) if s.max() > s.min()]
    assert 0 < len(dataset) == len(expected) < 27, "the slices above and below the head are empty"
    for i, slice_ in enumerate(expected):
        image = dataset[i]["image"]
        assert type(image) is torch.Tensor
        assert image.dtype == torch.float32
        assert image.is_contiguous()
        assert torch.equal(image, slice_)
    assert dataset.data == items
    assert dataset.transform is transform


@pytest.mark.parametrize("settings", [{"num_workers": 2}, {"progress": True}])
def test_loading_in_other_ways_changes_nothing(
    items: list[dict[str, str]], transform: Compose, settings: dict, capsys: pytest.CaptureFixture
) -> None:
    reference = SliceDataset(items, transform)
    assert capsys.readouterr().err == ""
    dataset = SliceDataset(items, transform, **settings)
    assert all(torch.equal(a, b) for a, b in zip(images(reference), images(dataset), strict=True))
    assert ("3/3" in capsys.readouterr().err) is settings.get("progress", False)


def test_cache_loads_once_and_notices_changes(tmp_path: Path, items: list[dict[str, str]], transform: Compose) -> None:
    reference = SliceDataset(items, transform)
    for calls in (6, 6):
        cached = SliceDataset(items, transform, cache_dir=tmp_path / "cache")
        assert Counted.calls == calls
        assert all(torch.equal(a, b) for a, b in zip(images(reference), images(cached), strict=True))
    SliceDataset(
        items, Compose([*transform.transforms[:-1], ScaleIntensityRobustd("image", 90)]), cache_dir=tmp_path / "cache"
    )
    assert Counted.calls == 9
    os.utime(items[0]["image"], (1, 1))
    SliceDataset(items, transform, cache_dir=tmp_path / "cache")
    assert Counted.calls == 10


def test_augmentation_of_plain_slices(items: list[dict[str, str]], transform: Compose) -> None:
    dataset = SliceDataset(items, transform, Compose([RandFlipd("image", prob=1, spatial_axis=0)]))
    for _ in range(2):
        image = dataset[4]["image"]
        assert type(image) is torch.Tensor
        assert torch.equal(image, dataset.slices[4]["image"].flip(1)), "the slices in memory do not change"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_seeds_the_augmentation(items: list[dict[str, str]], transform: Compose, num_workers: int) -> None:
    dataset = SliceDataset(items, transform, Compose([RandFlipd("image", prob=0.5, spatial_axis=1)]))

    def epochs(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        loader = DataLoader(dataset, batch_size=4, num_workers=num_workers)
        return [torch.cat([batch["image"] for batch in loader]) for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_volumes_without_content(items: list[dict[str, str]]) -> None:
    def empty(item: dict[str, str]) -> dict[str, torch.Tensor]:
        return {"image": torch.zeros(1, 5, 4, 3)}

    with pytest.raises(
        DatasetError, match=r"none of 3 volumes has a slice with content: at least one is needed; check"
    ):
        SliceDataset(items, empty)


def test_volumes_of_different_sizes(tmp_path: Path, transform: Compose) -> None:
    paths = [write_nifti_phantom(tmp_path / f"{n}.nii", (n, n + 2, 5)) for n in (8, 11)]
    dataset = SliceDataset(volume_datalist(paths), transform)
    assert {tuple(item["image"].shape) for item in (dataset[i] for i in range(len(dataset)))} == {
        (1, 8, 10),
        (1, 11, 13),
    }
    assert np.isfinite(torch.cat([image.flatten() for image in images(dataset)]).numpy()).all()


# ------------------------------------------------------------------------------------------- planes and guides


def test_slices_of_all_planes(items: list[dict[str, str]], transform: Compose) -> None:
    volumes = [transform(item)["image"].as_tensor() for item in items]
    dataset = SliceDataset(items, transform, planes=PLANES)
    expected = [s for volume in volumes for dim in (3, 1, 2) for s in volume.unbind(dim) if s.max() > s.min()]
    found = images(dataset)
    assert {tuple(image.shape) for image in found} == {(1, 17, 13), (1, 13, 9), (1, 17, 9)}
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected)
    assert all(image.is_contiguous() and image.dtype == torch.float32 for image in found)


def test_an_item_chooses_its_planes(items: list[dict[str, str]], transform: Compose) -> None:
    items = [{**items[0], "planes": ["coronal"]}, items[1]]
    assert {tuple(image.shape) for image in images(SliceDataset(items[:1], transform))} == {(1, 17, 9)}
    assert {tuple(image.shape) for image in images(SliceDataset(items, transform))} == {(1, 17, 9), (1, 17, 13)}
    with pytest.raises(SettingError, match=r"planes has 'oblique', but there are only sagittal, coronal, axial"):
        SliceDataset(items, transform, planes=["oblique"])


@pytest.mark.parametrize("cache", [False, True])
def test_planes_are_measured(tmp_path: Path, cache: bool) -> None:
    """White noise has detail along all axes, and noise that is interpolated along one axis does not."""
    import nibabel as nib

    noise = np.random.default_rng(0).uniform(1, 2, (33, 34, 36)).astype(np.float32)
    volumes = {"isotropic": noise, "interpolated": (noise + np.roll(noise, 1, 2)) / 2}
    for name, array in volumes.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}.nii")
    data = volume_datalist([tmp_path / f"{name}.nii" for name in volumes])
    measure = Compose([LoadVolumed("image"), DetailedPlanesd("image")])
    for _ in range(2):
        dataset = SliceDataset(data, measure, cache_dir=tmp_path / "cache" if cache else None)
        shapes = [tuple(image.shape) for image in images(dataset)]
        counts = {shape: shapes.count(shape) for shape in shapes}
        assert counts == {(1, 33, 34): 72, (1, 34, 36): 33, (1, 33, 36): 34}
    chosen = [{**data[0], "planes": ["axial"]}]
    assert len(SliceDataset(chosen, measure)) == 36, "the choice of an item is kept"


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict[str, str]]:
    """Return the pairs of two subjects with T1 and T2, and one with T2 only."""
    folder = write_brats_folder(tmp_path / "pairs", subjects=3, shape=SHAPE)
    (folder / "BraTS_00002" / "BraTS_00002_t1.nii.gz").unlink()
    return paired_datalist(brats_datalist(folder, ("t1", "t2")))


@pytest.fixture
def load_pair() -> Compose:
    keys = ["image", "guide"]
    return Compose([LoadVolumed(keys, allow_missing_keys=True), SetUnits(keys, allow_missing_keys=True)])


class SetUnits(MapTransform):
    def __call__(self, data: dict) -> dict:
        return {**data, **{key: data[key] / 1000 for key in self.key_iterator(data)}}


def test_guides_are_the_same_slices_of_the_other_contrast(pairs: list[dict[str, str]], load_pair: Compose) -> None:
    dataset = SliceDataset(pairs, load_pair, planes=PLANES)
    alone = {
        item["image"]: images(SliceDataset([{"image": item["image"]}], load_pair, planes=PLANES)) for item in pairs
    }
    start = 0
    for item in pairs:
        stop = start + len(alone[item["image"]])
        for k, i in enumerate(range(start, stop)):
            found = dataset[i]
            assert torch.equal(found["image"], alone[item["image"]][k])
            guide = alone[item["guide"]][k] if "guide" in item else torch.zeros_like(found["image"])
            assert torch.equal(found["guide"], guide)
            assert found["guide"].is_contiguous()
        start = stop
    assert start == len(dataset)
    assert pairs[-1].keys() == {"image", "subject", "contrast"}, "one item has no guide"
    lone = SliceDataset(pairs[-1:], load_pair)
    assert lone[0].keys() == {"image"}, "without any guide there is no key for it"


def test_augmentation_of_pairs_of_all_planes(pairs: list[dict[str, str]], load_pair: Compose) -> None:
    keys = ["image", "guide"]
    augmentation = Compose(
        [
            SpatialPadd(keys, (16, 16)),
            RandSpatialCropd(keys, (16, 16), random_size=False),
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandRotate90d(keys, prob=0.5),
        ]
    )
    data = [{**item, "guide": item["image"]} for item in pairs]  # the same image, so that both must stay equal
    dataset = SliceDataset(data, load_pair, augmentation, planes=PLANES)
    for batch in DataLoader(dataset, batch_size=8, shuffle=True, num_workers=0):
        assert batch["image"].shape[1:] == (1, 16, 16)
        assert type(batch["guide"]) is torch.Tensor
        assert torch.equal(batch["image"], batch["guide"])


def test_the_cache_notices_another_guide(tmp_path: Path, pairs: list[dict[str, str]], transform: Compose) -> None:
    both = Compose([Counted("image"), LoadVolumed(["image", "guide"])])
    for calls in (1, 1):
        SliceDataset(pairs[:1], both, cache_dir=tmp_path / "cache")
        assert Counted.calls == calls
    os.utime(pairs[0]["guide"], (1, 1))
    SliceDataset(pairs[:1], both, cache_dir=tmp_path / "cache")
    assert Counted.calls == 2


def test_a_guide_on_another_grid_is_refused(tmp_path: Path) -> None:
    paths = [str(write_nifti_phantom(tmp_path / f"{n}.nii", (n, 9, 5))) for n in (8, 11)]
    item = {"image": paths[0], "guide": paths[1]}
    sentence = (
        r"8\.nii has \(1, 8, 9, 5\) voxels and its guide .*11\.nii has \(1, 11, 9, 5\): both are needed on the same"
    )
    with pytest.raises(DatasetError, match=sentence):
        SliceDataset([item], LoadVolumed(["image", "guide"]))


def test_slices_are_read_fast() -> None:
    """Slices across the memory of a volume would take 0.7 ms each, 30 times as long."""
    generator = torch.Generator().manual_seed(0)

    def load(item: dict[str, str]) -> dict[str, torch.Tensor]:
        return {key: torch.rand((1, 200, 200, 130), generator=generator) for key in ("image", "guide")}

    dataset = SliceDataset([{"image": "a", "guide": "b"}], load, planes=PLANES)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    start = time.perf_counter()
    for i in order:
        dataset[i]
    assert len(order) == 530
    assert (time.perf_counter() - start) / len(order) < 1e-3
