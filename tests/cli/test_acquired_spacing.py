"""``miar sr --acquired-spacing``: the input goes back to its acquired grid first."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.derived_series import by_height
from helpers.phantoms import write_dicom_series, write_nifti_phantom
from helpers.scanner import anatomy, noisy, zero_filled

from miar_monai.cli.main import main
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import read_volume


def miar_sr(bundle: Path, *parts: object) -> Result:
    options = ["sr", "--model", bundle, "--device", "cpu", *parts]
    return CliRunner().invoke(main, [str(option) for option in options])


@pytest.mark.usefixtures("elsewhere")
class TestCommand:
    def test_the_input_is_reduced_and_the_report_says_so(self, bundle: Path) -> None:
        image = zero_filled(noisy(anatomy((72, 66, 2)), 0.01), (144, 132))
        affine = np.diag([0.5, 0.5, 4, 1])
        nib.save(nib.Nifti1Image((1000 * image).astype(np.float32), affine), "scan.nii")
        before = miar_sr(bundle, "scan.nii", "-o", "before")
        assert "(--acquired-spacing " in before.stderr
        after = miar_sr(bundle, "scan.nii", "-o", "after", "--acquired-spacing", "1", "--report", "run.json")
        assert after.exit_code == 0, after.output
        assert "interpolated" not in after.stderr
        (case,) = json.loads(Path("run.json").read_text())["cases"]
        assert case["acquired_spacing_mm"] == [1.0]
        assert case["before"]["spacing_mm"] == [1, 1, 4]
        source, sr = read_volume("scan.nii"), read_volume("after/scan_sr.nii.gz")
        assert sr.grid.patient_spacing == pytest.approx((0.25, 0.25, 4))
        corners = fov_corners(source.affine, source.array.shape)
        assert fov_corners(sr.affine, sr.array.shape) == pytest.approx(corners, abs=1e-4)

    @pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)], ids=["axial", "sagittal"])
    def test_a_series_at_its_acquired_spacing_is_written_in_its_planes(
        self, orientation: tuple[float, ...], bundle: Path, tmp_path: Path
    ) -> None:
        series = write_dicom_series(tmp_path / "ct", (30, 26, 5), (0.5, 0.5, 3), orientation=orientation)
        options = ("--out-format", "dicom", "--acquired-spacing", "0.9")
        done = miar_sr(bundle, series, *options)
        assert done.exit_code == 0, done.output
        source, sr = read_volume(series), read_volume("ct_sr")
        sources = {image.SOPInstanceUID for image in by_height(series)}
        for image in by_height(Path("ct_sr")):
            assert {item.ReferencedSOPInstanceUID for item in image.SourceImageSequence} <= sources
            assert image.ImageOrientationPatient == list(orientation)
        center = [fov_corners(volume.affine, volume.array.shape).mean(0) for volume in (source, sr)]
        assert center[1] == pytest.approx(center[0], abs=0.01)
        plane = [0, 1] if orientation[1] == 0 else [0, 2]  # voxel axes of the axial plane
        for axis in range(3):
            acquired = 0.9 if axis < 2 else 3
            assert sr.grid.spacing[axis] == pytest.approx(acquired / 4 if axis in plane else acquired, rel=1e-3)

    @pytest.mark.parametrize("value", ["0", "1,2", "-1", "thin", "0.5", "1,1,0.5"])
    def test_impossible_spacings_are_refused(self, value: str, bundle: Path) -> None:
        write_nifti_phantom("scan.nii", (20, 18, 3))
        refused = miar_sr(bundle, "scan.nii", "--acquired-spacing", value)
        assert refused.exit_code == 2, refused.output
        assert not list(Path().glob("*sr*"))
