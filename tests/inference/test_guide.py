"""A guide from the user's file to the network: by the command, in Python and by the bundle."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from helpers.bundle_runs import TOKENS, workflow
from helpers.derived_series import by_height, change, complaints, complete, to_mr
from helpers.phantoms import write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle
from monai.bundle import ConfigWorkflow

from miar_monai import SuperResolver, super_resolve
from miar_monai.cli.main import main
from miar_monai.data.io import read_volume
from miar_monai.errors import ImageError, SettingError, find_miar_error
from miar_monai.networks import Estimator
from miar_monai.networks.weights import save_weights

pytestmark = pytest.mark.usefixtures("elsewhere")

SHAPE = (19, 13, 3)
REFUSED = "a guide is given, but this model was trained without one; leave it out, or choose a model with a guide."


@pytest.fixture
def scans(tmp_path: Path) -> tuple[Path, Path]:
    """Return a T2 and a T1 on another grid."""
    t1 = write_nifti_phantom(
        tmp_path / "in" / "t1.nii.gz", (30, 28, 12), np.diag([-0.7, -0.7, 0.5, 1]) + _shift(20, 30, -10)
    )
    return write_nifti_phantom(tmp_path / "in" / "t2.nii.gz", SHAPE), t1


def _shift(x: float, y: float, z: float) -> np.ndarray:
    matrix = np.zeros((4, 4))
    matrix[:3, 3] = x, y, z
    return matrix


def sr(*parts: object) -> Result:
    result = CliRunner().invoke(main, ["sr", "--device", "cpu", *(str(part) for part in parts)])
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize("name", ["miar_lidc", TOKENS])
def test_models_without_guide_refuse_one(name: str, scans: tuple[Path, Path], tmp_path: Path) -> None:
    image, guide = scans
    bundle = write_tiny_bundle(tmp_path / name, name)
    result = sr(image, "--model", bundle, "--guide", guide)
    assert result.exit_code == 2
    assert f"error: {REFUSED}" in result.output.replace("\n", " ")
    with pytest.raises(SettingError, match=REFUSED[:40]):
        super_resolve(image, bundle, "cpu", guide=guide)
    settings = {"dataset_dir": str(image), "guide": str(guide), "checkpoint": str(bundle / "models" / "model.pt")}
    with pytest.raises(Exception) as raised:  # noqa: PT011  # MONAI wraps it
        workflow(name, "inference", output_dir=str(tmp_path / "out"), **settings).run()
    assert str(find_miar_error(raised.value)) == REFUSED
    assert list(tmp_path.glob("out/*")) == []


def test_a_guide_belongs_to_one_case(bundle: Path, scans: tuple[Path, Path]) -> None:
    image, guide = scans
    write_nifti_phantom(image.parent / "other.nii", SHAPE)
    result = sr(image.parent, "--model", bundle, "--guide", guide)
    assert result.exit_code == 2
    assert "the input has 2 cases, but" in result.output
    result = sr(image, "--model", bundle, "--guide", "absent.nii")
    assert result.exit_code == 2
    assert "absent.nii" in result.output


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose network has a guide, with random weights."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("guided") / "bundle")
    path = folder / "configs" / "inference.json"
    content = json.loads(path.read_text())
    content["network_def"] = {
        "_target_": "miar_monai.networks.Estimator",
        "channels": [8, 16],
        "blocks": [1, 1],
        "guide_channels": 1,
        "degradation": "@degradation",
    }
    path.write_text(json.dumps(content))
    torch.manual_seed(0)
    network = Estimator(channels=(8, 16), blocks=(1, 1), guide_channels=1)
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.05)  # otherwise zero
    save_weights(network, folder / "models" / "model.pt")
    return folder


@pytest.mark.parametrize("settings", [{}, {"isotropic": True}, {"factor": "1,1,3"}, {"spacing": "0.5,0.5,1"}])
def test_the_guide_counts_by_its_position(guided: Path, scans: tuple[Path, Path], settings: dict[str, Any]) -> None:
    image, guide = scans
    resolver = SuperResolver(guided, "cpu", **settings)
    alone, result = resolver(image), resolver(image, guide)
    assert np.array_equal(result.affine, alone.affine)
    difference = result.get_fdata() - alone.get_fdata()
    assert abs(difference).max() > 5
    turned = nib.as_closest_canonical(nib.load(guide))
    assert turned.shape == (30, 28, 12)
    nib.save(turned, guide.parent / "turned.nii.gz")
    assert not np.array_equal(turned.affine, nib.load(guide).affine)
    again = resolver(image, guide.parent / "turned.nii.gz")
    np.testing.assert_allclose(again.get_fdata(), result.get_fdata(), atol=1.5)
    moved = nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine + _shift(3, 3, 3), turned.header)
    nib.save(moved, guide.parent / "moved.nii.gz")
    other = resolver(image, guide.parent / "moved.nii.gz")
    assert abs(other.get_fdata() - result.get_fdata()).max() > 5


def test_command_python_and_bundle_agree(guided: Path, scans: tuple[Path, Path], tmp_path: Path) -> None:
    image, guide = scans
    result = sr(image, "--model", guided, "--guide", guide, "-o", "by_command.nii.gz", "--report", "run.json")
    assert result.exit_code == 0, result.output
    expected = super_resolve(image, guided, "cpu", guide=guide)
    assert np.array_equal(np.asarray(nib.load("by_command.nii.gz").dataobj), np.asarray(expected.dataobj))
    assert json.loads(Path("run.json").read_text())["cases"][0]["guide"] == str(guide)
    hook = sys.excepthook
    built = ConfigWorkflow(
        str(guided / "configs" / "inference.json"),
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(guided),
        device="cpu",
        dataset_dir=str(image.parent),
        guide=str(guide),
        output_dir=str(tmp_path / "out"),
        progress=False,
    )
    built.initialize()
    sys.excepthook = hook
    built.run()
    written = nib.load(tmp_path / "out" / "t2_sr.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), np.asarray(expected.dataobj))
    assert not (tmp_path / "out" / "t1_sr.nii.gz").exists()


def test_warnings_on_the_guide_are_printed(guided: Path, scans: tuple[Path, Path]) -> None:
    image, _ = scans
    guide = write_nifti_phantom(image.parent / "coarse.nii", (10, 8, 2), np.diag([-2.0, -2, 3, 1]) + _shift(20, 30, -9))
    result = sr(image, "--model", guided, "--guide", guide)
    assert result.exit_code == 0
    assert "warning: the guide is coarser than the image along left-right (2 mm, the image 1 mm)" in result.output


def test_a_guide_is_prepared_as_the_image(
    bundle: Path, scans: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = SuperResolver(bundle, "cpu")
    monkeypatch.setattr(resolver.network, "guide_channels", 1)
    volume, guide = (read_volume(path) for path in scans)
    prepared = resolver.prepare(volume, guide)
    assert prepared.guide is not None
    assert prepared.guide.shape == (1, 30, 28, 12)
    assert prepared.guide.min() == 0
    assert 0.9 < prepared.guide.max() < 1.5
    assert nib.aff2axcodes(prepared.guide.affine.numpy()) == nib.aff2axcodes(prepared.image.affine.numpy())
    assert not [sentence for sentence in prepared.warnings if "guide" in sentence]
    far = guide._replace(affine=guide.affine + _shift(0, 0, 1.5))
    assert any(sentence.startswith("the guide covers") for sentence in resolver.prepare(volume, far).warnings)
    with pytest.raises(ImageError, match="is the image itself"):
        resolver.prepare(volume, volume)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Return a folder with MR slices of 30 x 26 x 5 voxels, 3 mm apart, from z = 100 mm on."""
    folder = write_dicom_series(tmp_path / "t2", (30, 26, 5), (0.8, 0.9, 3))
    return change(change(folder, to_mr), complete)


def uids(images: list[Any]) -> set[str]:
    return {image.SOPInstanceUID for image in images}


def references(image: Any) -> set[str]:
    items = {item.ReferencedSOPInstanceUID: item for item in image.SourceImageSequence}
    assert len(items) == len(image.SourceImageSequence)
    assert {item.PurposeOfReferenceCodeSequence[0].CodeValue for item in items.values()} == {"121322"}
    return set(items)


def test_slices_of_a_dicom_result_refer_to_those_of_the_guide_that_overlap_them(
    guided: Path, series: Path, tmp_path: Path
) -> None:
    parallel = write_dicom_series(tmp_path / "t1", (30, 26, 16), (0.8, 0.9, 1), series="t1", prefix="a", seed=1)
    change(parallel, lambda image: setattr(image, "SeriesDescription", "t1 mprage"))
    done = sr(series, "--model", guided, "--guide", parallel, "--out-format", "dicom")
    assert done.exit_code == 0, done.output
    sources, guides, images = by_height(series), by_height(parallel), by_height(Path("t2_sr"))
    for k, image in enumerate(images):  # 3 mm around 100 + 3 k mm: at most 1.5 mm from it, guides 0.5 mm around theirs
        overlapping = guides[max(3 * k - 1, 0) : 3 * k + 2]
        assert references(image) == uids([sources[k]]) | uids(overlapping)
        assert f", guide t1 mprage {guides[0].SeriesInstanceUID}. For research" in image.DerivationDescription


def test_a_sagittal_guide_from_a_zip_file_is_referred_to_as_a_whole(guided: Path, series: Path, tmp_path: Path) -> None:
    place = {"orientation": (0, 1, 0, 0, 0, -1), "origin": (8, -16, 130)}  # x from -15 to 9 mm, as the image
    sagittal = write_dicom_series(tmp_path / "t1", (40, 40, 12), (0.9, 0.9, 2), series="t1", prefix="a", **place)
    archive = shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path, "t1")
    done = sr(series, "--model", guided, "--guide", archive, "--out-format", "dicom", "--factor", "1,1,3")
    assert done.exit_code == 0, done.output
    images = by_height(Path("t2_sr"))
    assert len(images) == 15
    assert all(uids(by_height(sagittal)) < references(image) for image in images)
    if shutil.which("dciodvfy"):
        assert complaints(Path("t2_sr")) == set()


def test_a_guide_that_is_a_file_is_named_only(guided: Path, series: Path, tmp_path: Path) -> None:
    volume = read_volume(series)
    guide = tmp_path / "t1.nii.gz"
    nib.save(nib.Nifti1Image(volume.array[:, :, ::-1].copy(), volume.affine), guide)
    done = sr(series, "--model", guided, "--guide", guide, "--out-format", "dicom")
    assert done.exit_code == 0, done.output
    for image, source in zip(by_height(Path("t2_sr")), by_height(series), strict=True):
        assert references(image) == {source.SOPInstanceUID}
        assert ", guide t1.nii.gz. For research" in image.DerivationDescription
