"""Label maps that go along: by the command and in Python."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.bundle_runs import workflow
from helpers.commands import sr
from helpers.phantoms import head, write_dicom_series, write_nifti_phantom
from monai.data import MetaTensor

from miar_monai import SuperResolver
from miar_monai.cli import runner
from miar_monai.data.io import read_labels, read_volume
from miar_monai.errors import find_miar_error
from miar_monai.inference import memory

pytestmark = pytest.mark.usefixtures("elsewhere")

SHAPE = (37, 31, 7)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_nifti_phantom(tmp_path / "in" / "scan.nii.gz", SHAPE)


@pytest.fixture
def seg(scan: Path, tmp_path: Path) -> Path:
    """Return a segmentation of the head in FreeSurfer's numbers."""
    numbers = np.array([0, 17, 53, 1035], np.int16)[np.digitize(head(SHAPE), [0.1, 0.45, 0.6])]
    nib.save(nib.Nifti1Image(numbers, nib.load(scan).affine), tmp_path / "seg.nii.gz")
    return tmp_path / "seg.nii.gz"


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".nrrd"])
def test_labels_lie_on_the_voxels_of_the_result(ending: str, bundle: Path, scan: Path, seg: Path) -> None:
    done = sr(bundle, scan, "--labels", seg, "-o", f"out{ending}", "--factor", "2,1.5,3", "--report", "run.json")
    assert done.exit_code == 0
    assert f"labels: out_labels{ending}" in done.stderr
    result, labels = read_volume(f"out{ending}"), read_labels(f"out_labels{ending}")
    assert labels.array.shape == result.array.shape
    assert labels.affine == pytest.approx(result.affine, abs=1e-4)
    assert labels.dtype == np.int16
    assert set(np.unique(labels.array)) == {0, 17, 53, 1035}
    report = json.loads(Path("run.json").read_text())["cases"][0]
    assert report["auxiliary_outputs"] == {"labels": f"out_labels{ending}"}
    assert report["labels"]["input"] == str(seg)
    before, after = report["labels"]["volumes_mm3"].values()
    assert list(before) == ["17", "53", "1035"]
    assert after == pytest.approx(before, rel=0.01)


def test_what_does_not_fit_with_its_labels_is_refused_before_they_are_carried(
    bundle: Path, scan: Path, seg: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, voxels = np.prod(SHAPE), 16 * np.prod(SHAPE)
    needed = (4 + 2) * voxels  # of the result, and of the label map in 16 bits, besides the inputs
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    done = sr(bundle, scan, "--labels", seg, "--report", "run.json")
    assert done.exit_code == 0
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    assert case["memory_needed_bytes"] == needed + (4 + 2) * given  # an image of 16 bits is in memory once
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    monkeypatch.setattr(runner, "carry_labels", lambda *_: pytest.fail("the labels were carried"))
    done = sr(bundle, scan, "--labels", seg, "--overwrite")
    assert done.exit_code == 1
    assert "are available: ask for a coarser grid, leave the label map out, crop" in done.stderr


def test_labels_of_a_series_are_a_file_beside_the_new_series(bundle: Path, tmp_path: Path) -> None:
    folder = write_dicom_series(tmp_path / "ct", SHAPE)
    volume = read_volume(folder)
    nib.save(nib.Nifti1Image((volume.array > 0).astype(np.uint8), volume.affine), "mask.nii.gz")
    done = sr(bundle, folder, "--labels", "mask.nii.gz", "--out-format", "dicom", "-o", "out")
    assert done.exit_code == 0
    labels, result = read_labels("out/ct_sr_labels.nii.gz"), read_volume("out/ct_sr")
    assert labels.affine == pytest.approx(result.affine, abs=1e-3)
    assert labels.array.shape == result.array.shape
    again = sr(bundle, folder, "--labels", "mask.nii.gz", "--out-format", "dicom", "-o", "out", "--overwrite")
    assert again.exit_code == 0, again.output


def test_an_earlier_label_map_is_no_case_and_is_not_replaced(bundle: Path, scan: Path, seg: Path) -> None:
    folder = scan.parent
    assert sr(bundle, scan, "--labels", seg, "-o", folder).exit_code == 0
    (folder / "scan_sr.nii.gz").unlink()
    refused = sr(bundle, scan, "--labels", seg, "-o", folder)
    assert refused.exit_code == 1
    assert "scan_sr_labels.nii.gz exists already" in refused.stderr
    assert sr(bundle, folder, "-o", folder).stdout == f"{folder}/scan_sr.nii.gz\n"


@pytest.mark.parametrize(
    ("labels", "code", "sentence"),
    [
        ("scan", 1, "is not a label map"),
        ("far", 1, "has no voxel in the field of view of the image"),
        ("missing.nii", 2, "does not exist"),
    ],
)
def test_other_labels_are_refused_before_anything_is_written(
    labels: str, code: int, sentence: str, bundle: Path, scan: Path, tmp_path: Path
) -> None:
    files = {"scan": "float.nii", "far": "far.nii"}
    nib.save(nib.Nifti1Image(head(SHAPE).astype(np.float32), np.eye(4)), "float.nii")
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.diag([1, 1, 1, 1]) + 900 * np.eye(4, k=3)), "far.nii")
    refused = sr(bundle, scan, "--labels", files.get(labels, labels))
    assert refused.exit_code == code
    assert sentence in refused.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["far.nii", "float.nii"]


def test_labels_belong_to_one_case(bundle: Path, scan: Path, seg: Path) -> None:
    refused = sr(bundle, scan.parent, "--labels", seg)
    assert refused.exit_code == 2
    assert "is a folder of cases, but --labels belongs to one: give one case" in refused.stderr


def test_the_bundle_takes_labels_along_as_the_command_does(bundle: Path, scan: Path, seg: Path, tmp_path: Path) -> None:
    assert sr(bundle, scan, "--labels", seg).exit_code == 0
    settings = {"checkpoint": str(bundle / "models" / "model.pt"), "labels": str(seg)}
    workflow("miar_brats", "inference", dataset_dir=str(scan), output_dir=str(tmp_path / "out"), **settings).run()
    by_command, by_bundle = (
        read_labels("scan_sr_labels.nii.gz"),
        read_labels(tmp_path / "out" / "scan_sr_labels.nii.gz"),
    )
    np.testing.assert_array_equal(by_bundle.array, by_command.array)
    assert by_bundle.dtype == by_command.dtype == np.int16
    assert by_bundle.affine == pytest.approx(by_command.affine)
    write_nifti_phantom(scan.parent / "other.nii.gz", SHAPE)
    with pytest.raises(Exception, match="Failed to instantiate") as caught:
        workflow("miar_brats", "inference", dataset_dir=str(scan.parent), output_dir="out", **settings).run()
    assert "the input has 2 cases, but" in str(find_miar_error(caught.value))


def test_labels_in_python_keep_their_type(bundle: Path, scan: Path, seg: Path) -> None:
    resolver = SuperResolver(bundle, "cpu", uncertainty=True)
    image, error, labels = resolver(scan, labels=seg)
    assert labels.shape == image.shape == error.shape
    assert labels.affine == pytest.approx(image.affine)
    assert labels.get_data_dtype() == np.int16
    expected = np.asarray(labels.dataobj)
    loaded = nib.load(seg)
    assert np.array_equal(resolver(scan, labels=loaded)[-1].dataobj, expected)
    array = np.asarray(loaded.dataobj)
    tensor = MetaTensor(torch.from_numpy(array)[None], affine=torch.as_tensor(loaded.affine))
    carried = resolver(scan, labels=tensor)[-1]
    assert isinstance(carried, MetaTensor)
    assert carried.dtype == torch.int16
    assert np.array_equal(carried[0].numpy(), expected)
    assert carried.affine.numpy() == pytest.approx(image.affine)
    plain = resolver.with_settings(uncertainty=False)
    sliced, mask = plain(np.asarray(nib.load(scan).dataobj)[..., 3].astype(float), labels=array[..., 3] > 17)
    assert sliced.shape == mask.shape == (148, 124)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}
