"""Several volumes in one series, such as echoes or time points: listed in the error, and selected by headers."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.derived_series import complaints, complete, to_mr, upsampled
from helpers.phantoms import head, set_raw, write_dicom_series, write_nifti_phantom
from pydicom import Dataset, dcmread
from pydicom.uid import MRImageStorage, generate_uid

from miar_monai.cli.main import main
from miar_monai.data.dicom_select import parse_conditions
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import write_series
from miar_monai.data.io import read_volume
from miar_monai.errors import GeometryError, SettingError

SHAPE = (11, 9, 4)
Edit = Callable[[Dataset, int, int], None]


def write_volumes(folder: Path, count: int, edit: Edit) -> Path:
    """Write volumes of one MR series at the same positions, of different heads; ``edit`` gets volume and slice."""
    for volume in range(count):
        write_dicom_series(folder, SHAPE, prefix=f"v{volume}_", seed=volume, modality="MR")
        for path in folder.glob(f"v{volume}_*"):
            image = dcmread(path)
            image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = MRImageStorage
            k = round((image.ImagePositionPatient[2] - 100) / 2.5)
            image.InstanceNumber = 1 + volume + count * k
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            edit(image, volume, k)
            image.save_as(path)
    return folder


def expected(volume: int) -> np.ndarray:
    return np.round(24 + 2000 * head(SHAPE, volume)) - 1024


def sentence(folder: Path, select: tuple[str, ...] = ()) -> str:
    with pytest.raises(GeometryError) as caught:
        read_volume(folder, select=select)
    found = str(caught.value)
    assert found.startswith(f"{folder}: ")
    assert "\n" not in found
    assert "export again" not in found
    return found


def advised(message: str) -> tuple[str, ...]:
    """Return the options that an error message proposes, split as by a shell."""
    command = re.search(r"for example by (.*) \(or select of miar_monai\.data\.io\.read_volume\)\.$", message)
    assert command is not None
    words = shlex.split(command[1])
    assert set(words[::2]) == {"--select"}
    return tuple(words[1::2])


def set_to(name: str, values: list[object]) -> Edit:
    return lambda image, volume, _: setattr(image, name, values[volume])


def siemens(image: Dataset, volume: int, _: int) -> None:
    image.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", [0, 1000][volume])


def ge(image: Dataset, volume: int, _: int) -> None:
    value = [[0, 8, 0, 0], [1000001000, 8, 0, 0]][volume]
    image.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x39, "IS", value)


def philips(image: Dataset, volume: int, _: int) -> None:
    image.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", [0.0, 1000.0][volume])


def frame_type(image: Dataset, volume: int, _: int) -> None:
    image.ImageType = ["ORIGINAL", "PRIMARY", "M_FFE" if volume == 0 else "PHASE MAP"]


KINDS = {
    "echoes": (set_to("EchoTime", [10, 80]), "2 echoes (EchoTime 10 and 80 ms)", "EchoTime=10"),
    "time points": (
        set_to("TemporalPositionIdentifier", [1, 2]),
        "2 temporal positions (TemporalPositionIdentifier 1 and 2)",
        "TemporalPositionIdentifier=1",
    ),
    "b-values": (
        set_to("DiffusionBValue", [0.0, 1000.0]),
        "2 diffusion b-values (DiffusionBValue 0 and 1000 s/mm2)",
        "DiffusionBValue=0",
    ),
    "Siemens": (siemens, "2 diffusion b-values (DiffusionBValue 0 and 1000 s/mm2)", "DiffusionBValue=0"),
    "GE": (ge, "2 diffusion b-values (DiffusionBValue 0 and 1000 s/mm2)", "DiffusionBValue=0"),
    "Philips": (philips, "2 diffusion b-values (DiffusionBValue 0 and 1000 s/mm2)", "DiffusionBValue=0"),
    "cine": (set_to("TriggerTime", [0, 430.5]), "2 trigger times (TriggerTime 0 and 430.5 ms)", "TriggerTime=0"),
    "inversion": (set_to("InversionTime", [100, 900]), "2 inversion times (InversionTime 100 and", "InversionTime=100"),
    "flip angles": (set_to("FlipAngle", [5, 15]), "2 flip angles (FlipAngle 5 and 15 degrees)", "FlipAngle=5"),
    "acquisitions": (set_to("AcquisitionNumber", [7, 8]), "2 acquisitions (AcquisitionNumber 7", "AcquisitionNumber=7"),
    "phase": (frame_type, "2 image types (ImageType ORIGINAL\\PRIMARY\\M_FFE and ORIGINAL\\PRIMARY", "ImageType=M_FFE"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_several_volumes_are_listed_and_one_can_be_selected(kind: str, tmp_path: Path) -> None:
    edit, what, condition = KINDS[kind]
    folder = write_volumes(tmp_path / "series", 2, edit)
    message = sentence(folder)
    assert f"2 slices are at each position, of {what}" in message
    assert advised(message) == (condition,)
    volume = read_volume(folder, select=[condition])
    np.testing.assert_array_equal(volume.array, expected(0))
    assert volume.select == (condition,)
    assert {header.filename for header in source_headers(volume)} == {str(path) for path in folder.glob("v0_*")}


@pytest.mark.parametrize("kind", ["b-values", "Siemens", "GE", "Philips"])
@pytest.mark.parametrize("b", [0, 1000])
def test_a_derived_series_states_the_b_value(kind: str, b: int, tmp_path: Path) -> None:
    edit, _, _ = KINDS[kind]

    def whole(image: Dataset, volume: int, k: int) -> None:
        edit(image, volume, k)
        to_mr(image)
        complete(image)

    folder = write_volumes(tmp_path / "series", 2, whole)
    volume = read_volume(folder, select=[f"DiffusionBValue={b}"])
    written = write_series(tmp_path / "sr", upsampled(volume), source_headers(volume), "upsampled")
    for path in written.iterdir():
        image = dcmread(path)
        assert image.DiffusionBValue == b
        assert image.SeriesDescription == f"SR 4x DiffusionBValue={b}"
        assert not [element for element in image if element.tag.is_private]
    assert read_volume(written).array.shape == upsampled(volume).array.shape
    if shutil.which("dciodvfy"):  # the b-value extends the MR image
        assert {line for line in complaints(written) if "</DiffusionBValue(" not in line} <= complaints(folder)
        assert not [line for line in complaints(written) if line.startswith("Error")]


def test_two_conditions_if_one_is_not_enough(tmp_path: Path) -> None:
    def edit(image: Dataset, volume: int, _: int) -> None:
        image.EchoTime = [4.92, 9.84][volume // 2]
        image.ImageType = ["ORIGINAL", "PRIMARY", "MP"[volume % 2]]

    folder = write_volumes(tmp_path / "series", 4, edit)
    message = sentence(folder)
    assert (
        "4 slices are at each position, of 2 echoes (EchoTime 4.92 and 9.84 ms) and 2 image types (ImageType" in message
    )
    assert advised(message) == ("EchoTime=4.92", "ImageType=M")
    np.testing.assert_array_equal(read_volume(folder, select=("EchoTime=9.84", "ImageType=p")).array, expected(3))
    assert "2 image types" in sentence(folder, ("EchoTime=9.84",))


def test_an_image_without_diffusion_direction_is_proposed(tmp_path: Path) -> None:
    def edit(image: Dataset, volume: int, _: int) -> None:
        image.DiffusionBValue = 1000.0 if volume else 0.0
        if volume:
            image.DiffusionGradientOrientation = np.eye(3)[volume - 1].tolist()

    folder = write_volumes(tmp_path / "series", 4, edit)
    assert advised(sentence(folder)) == ("DiffusionBValue=0",)
    np.testing.assert_array_equal(read_volume(folder, select=["DiffusionBValue=0"]).array, expected(0))
    message = sentence(folder, ("DiffusionBValue=1000",))
    assert "3 diffusion directions" in message
    (condition,) = advised(message)
    assert condition == "DiffusionGradientOrientation=0\\0\\1"
    chosen = read_volume(folder, select=["DiffusionBValue=1000", condition])
    np.testing.assert_array_equal(chosen.array, expected(3))


def test_times_that_differ_between_slices_are_selected_by_rank(tmp_path: Path) -> None:
    folder = write_volumes(
        tmp_path / "series", 3, lambda image, volume, k: setattr(image, "TriggerTime", 100 * volume + 3 * k + 9)
    )
    message = sentence(folder)
    assert "of 3 trigger times (TriggerTime, whose values differ between positions)" in message
    assert advised(message) == ("TriggerTime=#1",)
    for volume in range(3):
        found = read_volume(folder, select=[f"TriggerTime=#{volume + 1}"]).array
        np.testing.assert_array_equal(found, expected(volume))


def test_an_incomplete_time_point_is_not_proposed(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "series", 3, set_to("TemporalPositionIdentifier", [1, 2, 3]))
    next(iter(sorted(folder.glob("v0_*")))).unlink()
    message = sentence(folder)
    assert "2 to 3 slices are at each position, of 3 temporal positions" in message
    assert advised(message) == ("TemporalPositionIdentifier=2",)
    np.testing.assert_array_equal(read_volume(folder, select=["TemporalPositionIdentifier=2"]).array, expected(1))


def test_the_nth_value_of_incomplete_volumes_is_refused(tmp_path: Path) -> None:
    folder = write_volumes(
        tmp_path / "series", 3, lambda image, volume, k: setattr(image, "TriggerTime", 100 * volume + 3 * k + 9)
    )
    min(folder.glob("v0_*")).unlink()  # the second trigger time here belongs to the third volume
    with pytest.raises(GeometryError, match=r"2 to 3 values of TriggerTime .* TriggerTime=#2 would mix volumes"):
        read_volume(folder, select=["TriggerTime=#2"])


def test_a_volume_with_fewer_slices_than_the_others_gets_a_remark(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "series", 2, set_to("EchoTime", [10, 80]))
    last = max(folder.glob("v1_*"), key=lambda path: dcmread(path).ImagePositionPatient[2])
    last.unlink()
    volume = read_volume(folder, select=["EchoTime=80"])
    assert volume.array.shape == (11, 9, 3)
    assert volume.remarks == ("the selected volume has slices at 3 of the 4 positions of its series.",)
    assert read_volume(folder, select=["EchoTime=10"]).remarks == ()


def test_volumes_without_other_differences_are_selected_by_instance_number(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "series", 2, lambda *_: None)
    message = sentence(folder)
    assert advised(message) == ("InstanceNumber=#1",)
    np.testing.assert_array_equal(read_volume(folder, select=["InstanceNumber=#2"]).array, expected(1))


def test_copies_are_reported_as_copies(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "series", 1, lambda *_: None)
    for path in list(folder.iterdir())[:3]:
        (folder / f"{path.name} (1)").write_bytes(path.read_bytes())
    message = sentence(folder)
    assert "3 slices share a position with another one (7 slices at 4 positions)" in message
    assert "remove the copies" in message


def test_missing_values_are_refused(tmp_path: Path) -> None:
    folder = write_volumes(tmp_path / "series", 2, set_to("EchoTime", [10, 80]))
    with pytest.raises(SettingError, match=r"no slice has EchoTime=30: in its 8 slices EchoTime is 10 and 80; choose"):
        read_volume(folder, select=["EchoTime=30"])
    with pytest.raises(SettingError, match=r"no slice has EchoTime=#3: in its 8 slices EchoTime is 10 and 80"):
        read_volume(folder, select=["EchoTime=#3"])
    with pytest.raises(SettingError, match=r"no slice has KVP=80: in its 8 slices none has KVP"):
        read_volume(folder, select=["KVP=80"])
    for text in ("EchoTime", "EchoTime=", "Echo=3", "=3", ""):
        with pytest.raises(
            SettingError, match=re.escape(f"{text!r} is not a condition on slices: the keyword of a DICOM element")
        ):
            parse_conditions([text])
    scan = write_nifti_phantom(tmp_path / "scan.nii", SHAPE)
    with pytest.raises(
        SettingError, match="is a file, so no slices can be selected by EchoTime=10: omit the selection"
    ):
        read_volume(scan, select=["EchoTime=10"])


@pytest.mark.parametrize("text", [b"80", b"80.0", b"+80.000", b"8.0e1", b" 80 "])
def test_numbers_are_compared_as_numbers(text: bytes, tmp_path: Path) -> None:
    folder = write_volumes(
        tmp_path / "series", 2, lambda image, volume, _: set_raw(image, "EchoTime", text if volume else b"8")
    )
    np.testing.assert_array_equal(read_volume(folder, select=["EchoTime=80"]).array, expected(1))


def test_a_damaged_value_gives_no_traceback(tmp_path: Path) -> None:
    folder = write_volumes(
        tmp_path / "series", 2, lambda image, volume, _: set_raw(image, "EchoTime", b"80" if volume else b"eighty")
    )
    assert "2 slices are at each position" in sentence(folder)
    np.testing.assert_array_equal(read_volume(folder, select=["EchoTime=80"]).array, expected(1))


@pytest.mark.parametrize("text", ["Echo=3", "EchoTime"])
def test_the_command_refuses_malformed_conditions_first(text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["sr", str(tmp_path), "--select", text, "--model", "no such model"])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {text!r} is not a condition on slices:")
