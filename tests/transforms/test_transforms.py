from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.affines import upscaled_affine
from helpers.phantoms import LPS_AFFINE, head, write_dicom_series, write_nifti_phantom
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.transforms import Compose, Flip, Invertd, Orientationd, Transform

import miar_monai.transforms as T
from miar_monai.data.geometry import axial_axis, fov_corners
from miar_monai.data.io import read_volume
from miar_monai.degradation import Degradation, with_blurs
from miar_monai.errors import ConfigurationError, ImageError, OutputError, find_miar_error
from miar_monai.transforms.simulate import SimulateLowResolution

SHAPE = (37, 31, 7)
SAGITTAL = np.array([[0.0, 0.2, 2, 5], [-0.9, 0, 0, 7], [0, -0.8, 0.1, 9], [0, 0, 0, 1]])


def volume(shape: tuple[int, ...] = SHAPE, affine: np.ndarray = LPS_AFFINE, **meta: str) -> MetaTensor:
    return MetaTensor(torch.from_numpy(head(shape))[None], affine=torch.from_numpy(affine), meta=meta)


def mm_of_slices(image: MetaTensor) -> np.ndarray:
    """Return the z coordinates of the centers of the axial slices, in millimeters, sorted."""
    affine, axis = image.affine.numpy(), axial_axis(image.affine.numpy())
    index = (np.array(image.shape[1:]) - 1) / 2
    centers = np.tile(index, (image.shape[axis + 1], 1))
    centers[:, axis] = np.arange(image.shape[axis + 1])
    return np.sort(centers @ affine[2, :3] + affine[2, 3])


# ------------------------------------------------------------------------------------------------ central slices


@pytest.mark.parametrize("num_slices", [1, 4, 5, 7])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_central_slices_do_not_depend_on_the_orientation(num_slices: int, axis: int, flip: bool) -> None:
    image = volume()
    reference = T.CentralSlices(num_slices)(image)
    order = [0, 1]
    order.insert(axis, 2)
    permutation = np.eye(4)[:, [*order, 3]]
    stored = MetaTensor(
        image.as_tensor().permute(0, *(a + 1 for a in order)), affine=image.affine @ torch.from_numpy(permutation)
    )
    if flip:
        stored = Flip(spatial_axis=axis)(stored)
    assert axial_axis(stored.affine.numpy()) == axis
    central = T.CentralSlices(num_slices)(stored)
    assert central.shape[axis + 1] == num_slices
    np.testing.assert_allclose(mm_of_slices(central), mm_of_slices(reference))
    voxels = central.as_tensor().flip(axis + 1) if flip else central.as_tensor()
    back = torch.argsort(torch.tensor(order)) + 1
    assert torch.equal(voxels.permute(0, *back.tolist()), reference.as_tensor())


def test_central_slices_are_central() -> None:
    image = volume((8, 8, 9))
    central = T.CentralSlices(3)(image)
    assert torch.equal(central.as_tensor(), image.as_tensor()[..., 3:6])
    assert mm_of_slices(central).mean() == pytest.approx(mm_of_slices(image).mean())


def test_all_slices_on_demand() -> None:
    image = volume()
    assert T.CentralSlices(None)(image) is image


def test_too_few_slices() -> None:
    sentence = r"^in/a\.nii\.gz has 7 axial slices, but num_slices is 40: use a volume with more"
    with pytest.raises(ImageError, match=sentence):
        T.CentralSlices()(volume(filename_or_obj="in/a.nii.gz"))


# ------------------------------------------------------------------------------------------------ low resolution


KINDS = with_blurs(Degradation(), [0.0, 0.5])


def simulate(seed: int = 0, **settings: Any) -> T.RandSimulateLowResolutiond:
    return T.RandSimulateLowResolutiond("image", KINDS, **settings).set_random_state(seed)


def test_random_low_resolution_returns_its_degradation() -> None:
    slice_, transform, seen = torch.from_numpy(head((64, 48, 1))[None, ..., 0]), simulate(noise_prob=0.0), []
    for _ in range(300):
        item = transform({"image": slice_, "label": slice_})
        seen.append(int(item["degradation"]))
        torch.testing.assert_close(item["image"], KINDS[seen[-1]](slice_))
        assert item["label"] is slice_
    counts = np.bincount(seen, minlength=3)
    assert 120 < counts[0] < 180
    assert counts[1:].min() > 50


def test_random_noise_is_within_its_bounds() -> None:
    slice_, transform, levels = torch.zeros(1, 128, 128), simulate(other_prob=0.0, noise=(0.01, 0.1)), []
    for _ in range(200):
        levels.append(transform({"image": slice_})["image"].std().item())
    noisy = np.array([level for level in levels if level > 0])
    assert 70 < len(noisy) < 130
    assert 0.009 < noisy.min() < 0.013
    assert 0.075 < noisy.max() < 0.11
    assert 0.025 < np.median(noisy) < 0.04  # log-uniform: 0.032


def test_random_low_resolution_is_repeatable() -> None:
    item = {"image": torch.from_numpy(head((32, 32, 1))[None, ..., 0])}
    first, again, other = (simulate(seed, noise_prob=1.0)(item)["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"noise": (0.0, 0.1)}, r"^noise is \[0.0, 0.1\], but a minimum and a maximum above 0 are needed"),
        ({"noise": (0.2, 0.1)}, r"^noise is \[0.2, 0.1\], but"),
        ({"noise_prob": 1.5}, "^noise_prob is 1.5, but it must lie between 0 and 1"),
        ({"other_prob": -1}, "^other_prob is -1, but it must lie between 0 and 1"),
    ],
)
def test_random_low_resolution_out_of_range_is_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        simulate(**settings)


@pytest.mark.parametrize("affine", [LPS_AFFINE, SAGITTAL])
def test_low_resolution_keeps_the_field_of_view_and_the_slices(affine: np.ndarray) -> None:
    image = volume((36, 28, 7), affine, filename_or_obj="a.nii")
    lr = T.SimulateLowResolution()(image)
    assert lr.shape == (1, 9, 7, 7)
    assert lr.meta["filename_or_obj"] == "a.nii"
    np.testing.assert_allclose(
        fov_corners(lr.affine.numpy(), lr.shape[1:]), fov_corners(affine, image.shape[1:]), atol=1e-9
    )
    for z in range(7):
        torch.testing.assert_close(lr.as_tensor()[..., z], Degradation()(image.as_tensor()[..., z]))


@pytest.mark.parametrize("settings", [{"blur_on": "hr"}, {"scale": 2}, {"sigma": 2.0}])
def test_low_resolution_of_plain_slices(settings: dict) -> None:
    slice_ = torch.from_numpy(head((36, 28, 1))[None, ..., 0])
    lr = T.SimulateLowResolution(**settings)(slice_)
    assert type(lr) is torch.Tensor
    assert torch.equal(lr, Degradation(**settings)(slice_))


def test_a_blob_stays_where_it_is_in_millimeters() -> None:
    image = volume((64, 48, 3))
    lr = T.SimulateLowResolution()(image)

    def center(x: MetaTensor) -> np.ndarray:
        grid = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in x.shape[1:]), indexing="ij"), -1)
        index = (grid * x.as_tensor()[0, ..., None]).sum((0, 1, 2)) / x.as_tensor().sum()
        return (x.affine[:3, :3] @ index + x.affine[:3, 3]).numpy()

    np.testing.assert_allclose(center(lr), center(image), atol=0.02)


def test_low_resolution_of_odd_sizes_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="an image side of 37 voxels cannot be downsampled by 4"):
        T.SimulateLowResolution()(volume())


# ------------------------------------------------------------------------------------------------ intensities


def test_robust_scale_of_a_head() -> None:
    image = 700 * volume() + 30
    scaled = T.ScaleIntensityRobust(90)(image)
    tissue = scaled.as_tensor()[image.as_tensor() > 30]
    assert scaled.min() == 0
    assert scaled.dtype == torch.float32
    assert (tissue <= 1).double().mean() == pytest.approx(0.9, abs=0.002)
    assert scaled.max() > 1, "bright voxels are not clipped"
    padded = torch.nn.functional.pad(image.as_tensor(), (0, 0, 20, 20), value=30)
    torch.testing.assert_close(
        T.ScaleIntensityRobust(90)(padded).max(), scaled.max().as_tensor().as_subclass(MetaTensor)
    )


def test_hounsfield_window() -> None:
    hu = torch.tensor([[-2000.0, -1024, -24, 976, 3000]])
    scaled = T.ScaleIntensityHU(-1024, 976)(hu)
    torch.testing.assert_close(scaled.as_tensor(), torch.tensor([[-0.488, 0, 0.5, 1, 2.012]]))


def test_a_few_negative_voxels_do_not_shift_the_background() -> None:
    image = torch.zeros(1, 10, 10, 10)
    image[:, 2:8, 2:8, 2:8] = torch.linspace(1, 100, 216).view(1, 6, 6, 6)
    ringing = image.clone()
    ringing[:, 0, 0, :5] = -30
    torch.testing.assert_close(T.ScaleIntensityRobust()(ringing)[:, 1:], T.ScaleIntensityRobust()(image)[:, 1:])
    standardized = torch.where(image > 0, (image - 50) / 30, 0)  # as from some tools: 0 is both gray and background
    assert T.ScaleIntensityRobust()(standardized).min() == 0
    standardized = (image - 20) / 7
    torch.testing.assert_close(T.ScaleIntensityRobust()(standardized), T.ScaleIntensityRobust()(image))


@pytest.mark.parametrize("transform", [T.ScaleIntensityRobust(), T.ScaleIntensityHU(-160, 240)], ids=["robust", "HU"])
def test_scales_are_inverted(transform: T.ScaleIntensityRobust | T.ScaleIntensityHU) -> None:
    image = (3000 * volume() - 1000).float()
    before = image.as_tensor().clone()
    scaled = transform(image)
    assert torch.equal(image.as_tensor(), before), "the input is not changed"
    assert len(scaled.applied_operations) == 1
    inverted = transform.inverse(scaled)
    torch.testing.assert_close(inverted.as_tensor(), before, atol=1e-3, rtol=0)
    assert inverted.applied_operations == []


def test_a_constant_volume_has_no_scale() -> None:
    image = MetaTensor(torch.full((1, 2, 3, 4), 7.0), meta={"filename_or_obj": "flat.nii"})
    with pytest.raises(ImageError, match=r"^flat\.nii: none of the 24 voxels is above 7; a volume with contrast"):
        T.ScaleIntensityRobust()(image)
    with pytest.raises(ImageError, match=r"^the volume: none of the 24 voxels"):
        T.ScaleIntensityRobust()(image.as_tensor())


# ------------------------------------------------------------------------------------------------ files


def test_load_and_save_a_volume(tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "case.nii.gz", SHAPE)
    image = T.LoadVolume()(path)
    assert image.shape == (1, *SHAPE)
    assert image.dtype == torch.float32
    assert image.affine.dtype == torch.float64
    assert image.meta["filename_or_obj"] == str(path)
    assert image.meta["original_dtype"] == "int16"
    assert T.SaveVolume(tmp_path / "out", "copy")(image) is image
    saved = nib.load(tmp_path / "out" / "case_copy.nii.gz")
    assert saved.get_data_dtype() == np.int16
    np.testing.assert_array_equal(saved.get_fdata(), nib.load(path).get_fdata())
    np.testing.assert_allclose(saved.affine, LPS_AFFINE)


def test_dicom_series_in_nifti_out(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series.7", SHAPE)
    data = T.SaveVolumed("image", tmp_path / "out")(T.LoadVolumed("image")({"image": str(series)}))
    saved = read_volume(tmp_path / "out" / "series.7_sr.nii.gz")
    np.testing.assert_array_equal(saved.array, data["image"].numpy()[0])
    np.testing.assert_allclose(saved.affine, data["image"].affine.numpy(), atol=1e-5)
    assert saved.dtype == np.int16


def test_results_are_overwritten_on_demand_only(tmp_path: Path) -> None:
    image = T.LoadVolume()(write_nifti_phantom(tmp_path / "case.nii.gz", SHAPE))
    T.SaveVolume(tmp_path)(image)
    with pytest.raises(OutputError, match=r"case_sr\.nii\.gz exists already"):
        T.SaveVolume(tmp_path)(image)
    T.SaveVolume(tmp_path, overwrite=True)(image + 1)
    assert read_volume(tmp_path / "case_sr.nii.gz").array.min() == 1


def test_an_output_folder_is_checked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError, match=r"results cannot be written to .*file: .* is not a folder with write permission"
    ):
        T.SaveVolumed("pred", tmp_path / "file")


def test_errors_keep_their_sentence_through_compose(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        Compose([T.LoadVolumed("image")])({"image": tmp_path / "absent.nii"})
    assert "absent.nii does not exist" in str(find_miar_error(caught.value))


# ------------------------------------------------------------------------------------------------ inversion


def nearest_network(lr: torch.Tensor) -> torch.Tensor:
    return lr.repeat_interleave(4, -3).repeat_interleave(4, -2)


@pytest.mark.parametrize("affine", [LPS_AFFINE, SAGITTAL, np.diag([1.0, -2, 3, 1])], ids=["LPS", "sagittal", "RAI"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "scale", [T.ScaleIntensityRobustd("image"), T.ScaleIntensityHUd("image", -200, 900)], ids=["robust", "HU"]
)
def test_prediction_returns_to_the_input(tmp_path: Path, affine: np.ndarray, batched: bool, scale: Transform) -> None:
    path = write_nifti_phantom(tmp_path / "case.nii.gz", SHAPE, affine)
    preprocessing = Compose([T.LoadVolumed("image"), Orientationd("image", axcodes="RAS", labels=None), scale])
    if batched:
        batch = next(iter(DataLoader(Dataset([{"image": str(path)}], preprocessing), batch_size=1)))
        batch["pred"] = nearest_network(batch["image"])
        data = decollate_batch(batch)[0]
    else:
        data = preprocessing({"image": str(path)})
        data["pred"] = nearest_network(data["image"].as_tensor())
    post = Compose([T.InvertSuperResolutiond("pred", preprocessing), T.SaveVolumed("pred", tmp_path / "out")])
    shapes = data["image"].shape, data["pred"].shape
    post(data)
    assert (data["image"].shape, data["pred"].shape) == shapes, "the data that came in are not changed"

    lr, sr = nib.load(path), nib.load(tmp_path / "out" / "case_sr.nii.gz")
    assert nib.aff2axcodes(sr.affine) == nib.aff2axcodes(lr.affine)
    in_plane = [4 if code in "LRAP" else 1 for code in nib.aff2axcodes(lr.affine)]
    assert sr.shape == tuple(np.multiply(lr.shape, in_plane))
    np.testing.assert_allclose(sr.affine, upscaled_affine(lr.affine, in_plane), atol=1e-5)
    np.testing.assert_allclose(fov_corners(sr.affine, sr.shape), fov_corners(lr.affine, lr.shape), atol=1e-4)
    expected = lr.get_fdata()
    for axis, factor in enumerate(in_plane):
        expected = expected.repeat(factor, axis)
    np.testing.assert_array_equal(sr.get_fdata(), expected)
    assert sr.get_data_dtype() == np.int16


def test_invertd_of_monai_gives_a_wrong_affine(tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "case.nii.gz", SHAPE)
    preprocessing = Compose([T.LoadVolumed("image"), Orientationd("image", axcodes="RAS", labels=None)])
    data = preprocessing({"image": str(path)})
    data["pred"] = nearest_network(data["image"])
    inverted = Invertd("pred", preprocessing, "image", nearest_interp=False)(data)["pred"]
    zooms = np.linalg.norm(inverted.affine.numpy()[:3, :3], axis=0)
    np.testing.assert_allclose(zooms, [1, 1, 1.5], err_msg="MONAI has corrected the zooms: use Invertd")


def test_evaluation_chain(tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "case.nii.gz", (40, 32, 9))
    chain = Compose(
        [
            T.LoadVolumed("label"),
            T.CentralSlicesd("label", 5),
            Orientationd("label", axcodes="RAS", labels=None),
            T.ScaleIntensityRobustd("label"),
        ]
    )
    data = chain({"label": str(path)})
    data["image"] = T.SimulateLowResolution()(data["label"])
    data["pred"] = nearest_network(data["image"])
    restored = T.InvertSuperResolutiond("pred", chain, orig_key="label")(data)["pred"]
    truth = T.CentralSlices(5)(T.LoadVolume()(path))
    np.testing.assert_allclose(restored.affine.numpy(), truth.affine.numpy(), atol=1e-6)
    expected = nearest_network(T.SimulateLowResolution()(truth).as_tensor())
    torch.testing.assert_close(restored.as_tensor(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", [name for name in T.__all__ if name.endswith("d") and name[:-1] in T.__all__])
def test_dictionary_versions_have_the_settings_of_the_array_versions(name: str) -> None:
    array, dictionary = (inspect.signature(getattr(T, n)).parameters for n in (name[:-1], name))
    assert list(dictionary) == ["keys", *array, "allow_missing_keys"]
    for key, parameter in array.items():
        if parameter.default is not inspect.Parameter.empty:
            assert dictionary[key].default == parameter.default
    transform = getattr(T, name)(
        "absent", **({"output_dir": "."} if "output_dir" in array else {}), allow_missing_keys=True
    )
    assert transform({"other": 1}) == {"other": 1}
    with pytest.raises(KeyError, match="absent"):
        getattr(T, name)("absent")({"other": 1})


def test_missing_predictions_are_ignored_on_demand() -> None:
    assert T.InvertSuperResolutiond("pred", Compose([]), allow_missing_keys=True)({"image": 1}) == {"image": 1}


def test_results_are_refused_before_the_work_begins(tmp_path: Path) -> None:
    items = [{"image": f"{folder}/case.nii.gz"} for folder in ("a", "b")]
    T.check_results(items[:1], tmp_path)
    (tmp_path / "case_sr.nii.gz").touch()
    with pytest.raises(OutputError, match=r"case_sr\.nii\.gz exists already and is left as it is"):
        T.check_results(items[:1], tmp_path)
    T.check_results(items[:1], tmp_path, overwrite=True)
    with pytest.raises(OutputError, match=r"^a/case\.nii\.gz and b/case\.nii\.gz would both be written to "):
        T.check_results(items, tmp_path, overwrite=True)


@pytest.mark.parametrize("scale", [4, 2, 2.5])
@pytest.mark.parametrize("shape", [(1, 32, 16), (1, 40, 16, 3)])
def test_the_affine_of_a_simulated_image_has_the_spacing_of_its_scale(scale: float, shape: tuple[int, ...]) -> None:
    """Of slices too; where the size is not a multiple of the scale, the spacing is exact and the center stays."""
    image = MetaTensor(torch.rand(shape), affine=torch.diag(torch.tensor([-1.0, 1.5, 3, 1])))
    lr = SimulateLowResolution(scale, sigma=0)(image)
    assert lr.shape[1:3] == (round(shape[1] / scale), round(shape[2] / scale))
    np.testing.assert_allclose(np.diag(lr.affine), (-scale, 1.5 * scale, 3, 1))
    middles = [(np.asarray(x.affine) @ [(x.shape[1] - 1) / 2, (x.shape[2] - 1) / 2, 0, 1])[:3] for x in (image, lr)]
    np.testing.assert_allclose(*middles, atol=1e-9)
