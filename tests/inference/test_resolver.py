"""One call for all types of images: the voxels of the bundle's result, over the same field of view."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.bundle_runs import BUNDLES, NAMES, TOKENS, workflow
from helpers.phantoms import LPS_AFFINE, head, write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle
from monai.data import MetaTensor

from miar_monai import SuperResolver, super_resolve
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import write_series
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import read_volume
from miar_monai.errors import CheckpointError, ConfigurationError, GeometryError, ImageError
from miar_monai.inference.report import derivation
from miar_monai.transforms import LoadVolume

SHAPE = (19, 13, 3)
SAGITTAL = np.array([[0.0, 0, 2, 0], [1.5, 0, 0, 3], [0, -1.25, 0, 7], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def resolver(bundle: Path) -> SuperResolver:
    return SuperResolver(bundle, "cpu", lookahead_tokens=1)


def test_an_mgh_image_in_memory_gives_the_result_of_its_file(resolver: SuperResolver, tmp_path: Path) -> None:
    scan = nib.load(write_nifti_phantom(tmp_path / "scan.nii.gz", SHAPE))
    nib.save(nib.MGHImage(np.asarray(scan.dataobj), scan.affine), tmp_path / "scan.mgz")
    result, expected = (resolver(image) for image in (nib.load(tmp_path / "scan.mgz"), tmp_path / "scan.mgz"))
    np.testing.assert_array_equal(result.get_fdata(), expected.get_fdata())
    np.testing.assert_array_equal(result.affine, expected.affine)


@pytest.mark.parametrize("name", [*NAMES, TOKENS])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_path_gives_the_result_of_the_bundle_voxel_by_voxel(name: str, dtype: type, tmp_path: Path) -> None:
    tiny = write_tiny_bundle(tmp_path / "tiny", name)
    scan = write_nifti_phantom(tmp_path / "scan.nii.gz", SHAPE, dtype=dtype, low=0 if name == "miar_brats" else -1000)
    image = nib.load(scan)
    image.set_sform(image.affine, 4)  # of MNI
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header), tmp_path / "mni.nii.gz")
    scan = (tmp_path / "mni.nii.gz").replace(scan)
    before = scan.read_bytes()
    workflow(
        name,
        "inference",
        checkpoint=str(tiny / "models" / "model.pt"),
        dataset_dir=str(scan),
        output_dir=str(tmp_path / "out"),
        progress=False,
    ).run()
    written = nib.load(tmp_path / "out" / "scan_sr.nii.gz")
    result = super_resolve(scan, tiny, "cpu")
    assert result.get_data_dtype() == written.get_data_dtype() == dtype
    assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))
    assert np.array_equal(result.affine, written.affine)
    assert all(result.header[field] == written.header[field] for field in ("descrip", "sform_code", "qform_code"))
    assert int(written.header["sform_code"]) == 4
    assert bytes(written.header["descrip"]).startswith(b"miar-monai")
    assert scan.read_bytes() == before


@pytest.mark.parametrize("affine", [LPS_AFFINE, SAGITTAL], ids=["axial", "sagittal"])
def test_all_types_of_images_give_the_same_result(affine: np.ndarray, resolver: SuperResolver, tmp_path: Path) -> None:
    path = write_nifti_phantom(tmp_path / "scan.nii", SHAPE, affine, np.float32)
    image = nib.load(path)
    expected = resolver(path)
    voxels = expected.get_fdata(dtype=np.float32)
    assert sorted(new // old for new, old in zip(voxels.shape, SHAPE, strict=True)) == [1, 4, 4]
    corners = fov_corners(image.affine, SHAPE)
    assert fov_corners(expected.affine, voxels.shape) == pytest.approx(corners, abs=1e-4)

    from_nibabel = resolver(image)
    assert isinstance(from_nibabel, nib.Nifti1Image)
    assert np.array_equal(from_nibabel.get_fdata(dtype=np.float32), voxels)
    assert np.array_equal(from_nibabel.affine, expected.affine)

    tensor = LoadVolume()(path)
    from_tensor = resolver(tensor)
    assert isinstance(from_tensor, MetaTensor)
    assert from_tensor.dtype == torch.float32
    assert np.array_equal(from_tensor.numpy()[0], voxels)
    assert fov_corners(from_tensor.affine.numpy(), voxels.shape) == pytest.approx(corners, abs=1e-4)
    assert from_tensor.meta["filename_or_obj"] == str(path)
    assert tensor.shape[1:] == SHAPE  # and is what it was


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_results_are_marked_and_recognized(kind: str, resolver: SuperResolver, tmp_path: Path) -> None:
    if kind == "dicom":
        source = write_dicom_series(tmp_path / "ct", SHAPE)
        volume = read_volume(source)
        headers = source_headers(volume)
        result = write_series(tmp_path / "sr", resolver.volume(volume), headers, derivation(resolver))
    else:
        source, result = write_nifti_phantom(tmp_path / "scan.nii", SHAPE), tmp_path / "sr.nii"
        nib.save(resolver(source), result)
    first, second = (resolver.prepare(read_volume(path)).warnings for path in (source, result))
    sentence = "the image is already a super-resolved image: give the original."
    assert sentence not in first
    assert second[0] == sentence


def test_nothing_becomes_darker_than_the_input(resolver: SuperResolver, request: pytest.FixtureRequest) -> None:
    array = 1000.0 * (head((24, 24, 2), seed=3) > 0.5)  # edges, around which an inverse rings
    assert resolver(array - 500).min() == pytest.approx(-500, abs=1e-2)
    assert resolver(array).min() == 0  # exactly, where nothing is negative
    request.getfixturevalue("unbounded")
    assert resolver(array - 500).min() < -505
    assert resolver(array).min() == 0


def test_an_array_is_taken_as_a_ras_volume(resolver: SuperResolver) -> None:
    array = (800 * head(SHAPE)).astype(np.int16)
    before = array.copy()
    result = resolver(array)
    image = resolver(nib.Nifti1Image(array.astype(np.float32), np.diag([2.0, 3, 4, 1])))
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float32
    assert np.array_equal(result, image.get_fdata(dtype=np.float32))
    assert np.array_equal(array, before)


def test_a_slice_is_a_volume_of_one_slice(resolver: SuperResolver) -> None:
    array = 800 * head((19, 13, 3))[..., 1]
    result, tensor = resolver(array), resolver(MetaTensor(torch.from_numpy(array)[None], affine=torch.eye(4)))
    assert result.shape == (76, 52)
    assert tensor.shape == (1, 76, 52)
    assert np.array_equal(result, resolver(array[..., None])[..., 0])
    assert np.array_equal(result, tensor[0].numpy())


def test_series_and_zip_files_are_read_as_by_the_command(resolver: SuperResolver, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "series", (11, 9, 3))
    packed = shutil.make_archive(str(tmp_path / "study"), "zip", tmp_path, "series")
    one, other = resolver(series), resolver(packed)
    assert one.get_data_dtype() == np.int16
    assert np.array_equal(np.asarray(one.dataobj), np.asarray(other.dataobj))
    assert np.array_equal(one.affine, other.affine)


def test_settings_default_to_those_of_the_bundle(bundle: Path, resolver: SuperResolver) -> None:
    shipped = json.loads((BUNDLES / "miar_brats" / "configs" / "inference.json").read_text())
    other = SuperResolver(bundle, "cpu", fidelity=1, lookahead_tokens=0)
    assert resolver.settings["fidelity"] == resolver.inferer.fidelity == shipped["fidelity"]
    assert (other.inferer.fidelity, other.inferer.decoding.lookahead_tokens) == (1, 0)
    array = 800 * head(SHAPE)
    assert not np.array_equal(other(array), resolver(array))
    assert np.array_equal(resolver(array), resolver(array))


def test_resolvers_with_other_settings_share_weights_and_are_thread_safe(resolver: SuperResolver) -> None:
    jobs = [(head(SHAPE, seed=i), {"fidelity": 0.2 * i, "lookahead_tokens": i % 2}) for i in range(4)]
    resolvers = [resolver.with_settings(**settings) for _, settings in jobs]
    expected = [SuperResolver(resolver.bundle, "cpu", **settings)(image) for image, settings in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: resolvers[i](jobs[i][0]), range(4)))
    for other, result, wanted in zip(resolvers, results, expected, strict=True):
        assert other.network is resolver.network
        assert np.array_equal(result, wanted)
    assert len({result.tobytes() for result in results}) == 4
    assert resolver.settings["fidelity"] == 0.25  # as before
    with pytest.raises(ConfigurationError, match="fidelity is 2, but it must lie between 0 and 1"):
        resolver.with_settings(fidelity=2)


def test_bfloat16_is_a_setting(resolver: SuperResolver) -> None:
    image = resolver.prepare(_volume(SHAPE)).image
    with torch.autocast("cpu", torch.bfloat16):
        expected = resolver.infer(image)
    result = resolver.with_settings(amp=True).infer(image)
    assert torch.equal(result, expected)
    assert not torch.equal(result, resolver.infer(image))


@pytest.mark.parametrize("value", ["$__import__('os').getpid()", "@alpha", "%alpha", {"_target_": "os.getpid"}, [1]])
def test_settings_are_not_executed_as_code(resolver: SuperResolver, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^blur is .*, but a number or a word is needed;"):
        resolver.with_settings(blur=value)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"fidelity": "high"}, "fidelity is 'high', but it must lie between 0 and 1; correct the setting."),
        ({"fidelity": None}, "fidelity is None, but it must lie between 0 and 1; correct the setting."),
        ({"lookahead_tokens": "two"}, "lookahead_tokens is 'two', but it must be a whole number; correct the setting."),
        ({"top_k": float("nan")}, "top_k is nan, but it must be a whole number; correct the setting."),
        (
            {"amp": "false"},
            "amp is 'false', but it must be True or False; on the command line give --amp True or --amp False, with a "
            "capital letter.",
        ),
        ({"lookahead_tokens": True}, "lookahead_tokens is True, but it must lie between 0 and 8; correct the setting."),
    ],
)
def test_a_setting_of_the_wrong_type_is_reported(resolver: SuperResolver, setting: dict, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolver.with_settings(**setting)
    assert str(caught.value) == sentence


def test_the_number_of_tiles_equals_that_of_network_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = SuperResolver(write_tiny_bundle(tmp_path / "tokens", TOKENS), "cpu", lookahead_tokens=0)
    volume = _volume((101, 64, 2))
    seen: list[int] = []
    original = resolver.network.predict

    def counted(tiles: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(tiles))
        return original(tiles, *args, **kwargs)

    monkeypatch.setattr(resolver.network, "predict", counted)
    resolver.volume(volume)
    assert 2 * resolver.inferer.num_tiles(101, 64, resolver.network) == sum(seen) == 4


def test_a_prepared_volume_can_be_used_again(bundle: Path) -> None:
    resolver, volume = SuperResolver(bundle, "cpu", lookahead_tokens=0), _volume((21, 17, 2))
    prepared = resolver.prepare(volume)
    expected = resolver.volume(volume)
    for _ in range(2):
        assert np.array_equal(resolver.volume(volume, prepared).array, expected.array)
    assert prepared.image.shape == (1, 21, 17, 2)


@pytest.mark.parametrize(
    ("component", "key", "value", "found"),
    [
        ("inferer", "_target_", "builtins.dict", "its inferer is a dict, not a BeamSearchInferer"),
        ("volume_inferer", "inferer", True, "its volume_inferer#inferer is a bool, not a BeamSearchInferer"),
        ("network_def", "degradation", 1e308, "its network_def#degradation is a float, not a Degradation"),
    ],
)
def test_a_component_of_another_class_is_refused(
    component: str, key: str, value: object, found: str, bundle: Path, tmp_path: Path
) -> None:
    config = shutil.copytree(bundle, tmp_path / "copy") / "configs" / "inference.json"
    content = json.loads(config.read_text())
    content[component][key] = value
    config.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=rf"inference\.json cannot be used .*{found}"):
        SuperResolver(tmp_path / "copy", "cpu")


def _volume(shape: tuple[int, int, int]) -> Any:
    from miar_monai.data.io import Volume

    return Volume(head(shape).astype(np.float32), np.eye(4), np.dtype(np.float32), Path("the image"))


@pytest.mark.parametrize(
    ("image", "kind", "sentence"),
    [
        (np.zeros((5, 4)), ImageError, "the image: all 20 voxels are 0; an image with contrast is needed"),
        (np.array([[1.0, np.nan]]), ImageError, "the image: 1 voxels are NaN and 0 infinite"),
        (np.ones(4), ImageError, r"has the shape \(4,\) .* an array \(X, Y\) or \(X, Y, Z\) of real numbers"),
        (np.ones((4, 4), complex), ImageError, "type complex128: an array"),
        (np.ones((0, 4)), ImageError, r"shape \(0, 4\)"),
        (MetaTensor(torch.rand(3, 5, 5)), ImageError, "has 3 channels: a MetaTensor"),
        (torch.rand(1, 5, 5), ImageError, "is a torch.Tensor: a path, a NumPy array"),
        ([[1, 2]], ImageError, "is a list: a path"),
        (MetaTensor(torch.rand(1, 5, 5, 5), affine=torch.zeros(4, 4)), GeometryError, "singular"),
        (nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), ImageError, "one 3D volume is needed"),
        ("nowhere.nii", ImageError, r"nowhere\.nii does not exist"),
    ],
)
def test_unusable_images_are_refused_in_one_sentence(
    image: Any, kind: type[Exception], sentence: str, resolver: SuperResolver
) -> None:
    with pytest.raises(kind, match=sentence):
        resolver(image)


def test_unknown_settings_devices_and_bundles_are_reported(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"no setting 'beams': .*\.json has alpha, amp, blur, factor"):
        SuperResolver(bundle, "cpu", beams=3)
    with pytest.raises(ConfigurationError, match="fidelity"):
        SuperResolver(bundle, "cpu", fidelity=3)
    with pytest.raises(ConfigurationError, match="there is no device 'gpu': give auto, cpu"):
        SuperResolver(bundle, "gpu")
    with pytest.raises(ConfigurationError, match="'cuda:77' is not on this machine"):
        SuperResolver(bundle, "cuda:77")
    with pytest.raises(ConfigurationError, match=r"a bundle is needed; give .* a name among brain_mri, chest_ct, "):
        SuperResolver(tmp_path)
    monkeypatch.setenv("MIAR_BUNDLES", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"miar_brats.*does not exist: .* set MIAR_BUNDLES to the folder"):
        SuperResolver("brats")
    write_tiny_bundle(tmp_path / "miar_brats")
    assert SuperResolver("brats").bundle == tmp_path / "miar_brats"


def test_missing_weights_and_damaged_configs_are_one_sentence(tmp_path: Path) -> None:
    tiny = write_tiny_bundle(tmp_path / "tiny")
    (tiny / "models" / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no weights at .*model\.pt; copy a trained model\.pt there, train"):
        SuperResolver(tiny, "cpu")
    for text in ("{", "[]", '{"inferer": {}}', '{"inferer": 3, "postprocessing": 1}'):
        (tiny / "configs" / "inference.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"inference\.json cannot be used \(.*\): the inference\.json"):
            SuperResolver(tiny, "cpu")


def test_the_package_offers_the_call_without_loading_pytorch() -> None:
    code = "import sys, miar_monai; dir(miar_monai); print('torch' in sys.modules); miar_monai.super_resolve"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == "False\n"
    import miar_monai

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        miar_monai.nothing  # noqa: B018
