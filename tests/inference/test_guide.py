"""A guide from the user's file to the network: by the command, in Python and by the bundle."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.bundle_runs import workflow
from helpers.phantoms import write_nifti_phantom

from miar_monai import SuperResolver, super_resolve
from miar_monai.cli.main import main
from miar_monai.data.io import read_volume
from miar_monai.errors import ImageError, SettingError, find_miar_error

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


def test_models_without_guide_refuse_one(bundle: Path, scans: tuple[Path, Path], tmp_path: Path) -> None:
    image, guide = scans
    result = sr(image, "--model", bundle, "--guide", guide)
    assert result.exit_code == 2
    assert f"error: {REFUSED}" in result.output.replace("\n", " ")
    with pytest.raises(SettingError, match=REFUSED[:40]):
        super_resolve(image, bundle, "cpu", guide=guide)
    settings = {"dataset_dir": str(image), "guide": str(guide), "checkpoint": str(bundle / "models" / "model.pt")}
    with pytest.raises(Exception) as raised:  # noqa: PT011  # MONAI wraps it
        workflow("miar_brats", "inference", output_dir=str(tmp_path / "out"), **settings).run()
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
