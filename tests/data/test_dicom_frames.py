"""Enhanced (multi-frame) MR and CT: positions, spacing, units and echoes of each frame, by its functional groups."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.enhanced import ORIGIN, SHAPE, SPACING, frames, item, orientation, stored, write_enhanced
from helpers.phantoms import write_dicom_series
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from miar_monai.cli.main import main
from miar_monai.data.dicom_source import Guide
from miar_monai.data.geometry import corner_distance
from miar_monai.data.io import read_volume
from miar_monai.errors import GeometryError, ImageError, MiarError, SettingError

LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


def affine(cosines: list[float], origin: tuple[float, ...] = ORIGIN) -> np.ndarray:
    """Return the affine by the standard, PS3.3 C.7.6.2.1.1."""
    result = np.eye(4)
    axes = np.array([cosines[:3], cosines[3:], np.cross(cosines[:3], cosines[3:])])
    result[:3, :3] = axes.T * SPACING
    result[:3, 3] = origin
    return LPS_TO_RAS @ result


def sentence(folder: Path, kind: type[MiarError] = GeometryError, select: tuple[str, ...] = ()) -> str:
    with pytest.raises(kind) as caught:
        read_volume(folder, select=select)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def advised(message: str) -> tuple[str, ...]:
    words = shlex.split(re.search(r"for example by (.*) \(or select of", message)[1])
    assert set(words[::2]) == {"--select"}
    return tuple(words[1::2])


@given(st.floats(-60, 60), st.tuples(*3 * [st.floats(-500, 500)]))
def test_positions_orientation_and_spacing_are_those_of_the_frames(
    tmp_path_factory: pytest.TempPathFactory, degrees: float, origin: tuple[float, ...]
) -> None:
    path = tmp_path_factory.getbasetemp() / "geometry" / "mr.dcm"
    cosines = orientation(degrees)
    write_enhanced(path, frames(1, cosines, origin=origin))
    for source in (path, path.parent):
        volume = read_volume(source)
        assert corner_distance(volume.affine, affine(cosines, origin), SHAPE) < 0.01
        np.testing.assert_array_equal(volume.array, stored(0))
        assert (volume.dtype, volume.modality, volume.slice_thickness) == (np.int16, "MR", 2.5)


def test_itk_places_the_frames_likewise(tmp_path: Path) -> None:
    import itk

    write_enhanced(tmp_path / "a" / "mr.dcm", frames(), order=lambda i: i)
    image = itk.imread(str(tmp_path / "a" / "mr.dcm"), itk.F)
    volume = read_volume(tmp_path / "a")
    assert list(image.GetSpacing()) == pytest.approx(volume.grid.spacing.tolist())
    assert list(image.GetOrigin()) == pytest.approx((LPS_TO_RAS @ volume.affine)[:3, 3].tolist())
    np.testing.assert_array_equal(itk.array_from_image(image).transpose(2, 1, 0), volume.array)


def test_enhanced_ct_is_in_hounsfield_units(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "ct" / "a", frames(1, orientation(30)), "CT")
    volume = read_volume(tmp_path / "ct")
    np.testing.assert_array_equal(volume.array, stored(0) - 1024.0)
    assert (volume.dtype, volume.modality) == (np.int16, "CT")
    assert corner_distance(volume.affine, affine(orientation(30)), SHAPE) < 0.01


def test_each_frame_has_a_slope_of_its_own(tmp_path: Path) -> None:
    def rescaled(group: Dataset, _: int, k: int) -> None:
        group.PixelValueTransformationSequence = [item(RescaleSlope=0.5 + k, RescaleIntercept=-k, RescaleType="US")]

    write_enhanced(tmp_path / "mr" / "a", frames(edit=rescaled))
    k = np.arange(SHAPE[2])
    volume = read_volume(tmp_path / "mr")
    np.testing.assert_allclose(volume.array, stored(0) * (0.5 + k) - k, rtol=1e-6)
    assert volume.dtype == np.float32


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless],
    ids=lambda syntax: syntax.name,
)
def test_transfer_syntaxes(syntax: UID, tmp_path: Path) -> None:
    path = tmp_path / "mr" / "a.dcm"
    image = write_enhanced(path, frames(2))
    if syntax == RLELossless:
        image.compress(syntax)
    if syntax == ExplicitVRBigEndian:
        image.PixelData = image.pixel_array.astype(">i2").tobytes()
    image.file_meta.TransferSyntaxUID = syntax
    is_big = syntax == ExplicitVRBigEndian
    dcmwrite(path, image, little_endian=not is_big, implicit_vr=syntax == ImplicitVRLittleEndian, force_encoding=is_big)
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_volume(path, select=["EchoTime=20"]).array, stored(1))


def temporal(group: Dataset, volume: int, _: int) -> None:
    group.MREchoSequence[0].EffectiveEchoTime = 10.0
    group.FrameContentSequence[0].TemporalPositionIndex = volume + 1


def phase(group: Dataset, volume: int, _: int) -> None:
    group.MREchoSequence[0].EffectiveEchoTime = 10.0
    kind = ["MAGNITUDE", "PHASE"][volume]
    frame_type = item(FrameType=["ORIGINAL", "PRIMARY", "T1", "NONE"], ComplexImageComponent=kind)
    group.MRImageFrameTypeSequence = [frame_type]


def diffusion(group: Dataset, volume: int, _: int) -> None:
    group.MREchoSequence[0].EffectiveEchoTime = 90.0
    group.MRDiffusionSequence = [item(DiffusionBValue=[0.0, 1000.0][volume], DiffusionDirectionality="ISOTROPIC")]


def cardiac(group: Dataset, volume: int, k: int) -> None:
    group.MREchoSequence[0].EffectiveEchoTime = 2.0
    group.CardiacSynchronizationSequence = [item(NominalCardiacTriggerDelayTime=[0.0, 400.0][volume] + k)]


def nothing(group: Dataset, _: int, __: int) -> None:
    group.MREchoSequence[0].EffectiveEchoTime = 2.0


VOLUMES: dict[str, tuple[Callable[[Dataset, int, int], None] | None, str, str]] = {
    "echoes": (None, "2 echoes (EchoTime 10 and 20 ms)", "EchoTime=10"),
    "time points": (temporal, "2 temporal positions", "TemporalPositionIdentifier=1"),
    "phase": (phase, "2 components of a complex image", "ComplexImageComponent=MAGNITUDE"),
    "b-values": (diffusion, "2 diffusion b-values (DiffusionBValue 0 and 1000 s/mm2)", "DiffusionBValue=0"),
    "cine": (cardiac, "2 trigger times (TriggerTime, whose values differ between positions)", "TriggerTime=#1"),
    "copies": (nothing, "2 instances (ReferencedFrameNumber, whose", "ReferencedFrameNumber=#1"),
}


@pytest.mark.parametrize("kind", VOLUMES)
def test_volumes_are_listed_and_chosen(kind: str, tmp_path: Path) -> None:
    edit, what, condition = VOLUMES[kind]
    parts = frames(2, edit=edit) if edit else frames(2)
    write_enhanced(tmp_path / "mr" / "a", parts, order=lambda i: i)
    message = sentence(tmp_path / "mr")
    assert f"2 slices are at each position, of {what}" in message
    assert advised(message) == (condition,)
    volume = read_volume(tmp_path / "mr", select=[condition])
    np.testing.assert_array_equal(volume.array, stored(0))
    assert volume.select == (condition,)


def test_a_volume_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    """Siemens XA writes one file for each time point."""
    for volume in range(2):
        parts = frames(seed=volume, edit=lambda group, _, k, volume=volume: temporal(group, volume, k))
        write_enhanced(tmp_path / "mr" / f"{volume}.dcm", parts)
    (condition,) = advised(sentence(tmp_path / "mr"))
    assert condition == "TemporalPositionIdentifier=1"
    np.testing.assert_array_equal(read_volume(tmp_path / "mr", select=[condition]).array, stored(0))
    np.testing.assert_array_equal(read_volume(tmp_path / "mr" / "1.dcm").array, stored(1))


def test_stacks_are_listed_and_chosen(tmp_path: Path) -> None:
    sagittal = [0.0, 1, 0, 0, 0, -1]
    beside = (ORIGIN[0], ORIGIN[1], ORIGIN[2] + 200)
    parts = [*frames(), *frames(cosines=sagittal, stack="2", seed=1), *frames(origin=beside, stack="3", seed=2)]
    write_enhanced(tmp_path / "mr" / "a", parts)
    message = sentence(tmp_path / "mr")
    assert "3 stacks of slices (StackID=1: 6 axial frames; StackID=2: 6 sagittal frames; StackID=3: 6 axial" in message
    assert advised(message) == ("StackID=1",)
    for number, (cosines, origin) in enumerate(
        [((1, 0, 0, 0, 1, 0), ORIGIN), (sagittal, ORIGIN), ((1, 0, 0, 0, 1, 0), beside)]
    ):
        volume = read_volume(tmp_path / "mr", select=[f"StackID={number + 1}"])
        np.testing.assert_array_equal(volume.array, stored(number))
        assert corner_distance(volume.affine, affine(cosines, origin), SHAPE) < 0.01
    assert "StackID is 1, 2 and 3; choose one" in sentence(tmp_path / "mr", SettingError, ("StackID=4",))


def test_localizer_frames_are_left_aside_and_named(tmp_path: Path) -> None:
    def named(group: Dataset, _: int, __: int) -> None:
        group.MRImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"])]

    parts = [*frames(), *frames(cosines=[0.0, 1, 0, 0, 0, -1], stack="2", edit=named)[:2]]
    write_enhanced(tmp_path / "mr" / "a.dcm", parts, order=lambda i: i)
    volume = read_volume(tmp_path / "mr")
    np.testing.assert_array_equal(volume.array, stored(0))
    assert volume.remarks == ("2 localizers are left aside: a.dcm (frame 7), a.dcm (frame 8).",)


def test_the_acquired_spacing_is_that_of_the_frames(tmp_path: Path) -> None:
    def measured(group: Dataset, _: int, __: int) -> None:
        group.MRFOVGeometrySequence = [
            item(
                InPlanePhaseEncodingDirection="COLUMN",
                MRAcquisitionFrequencyEncodingSteps=4,
                MRAcquisitionPhaseEncodingStepsInPlane=3,
            )
        ]

    write_enhanced(tmp_path / "mr" / "a.dcm", frames(edit=measured))
    assert read_volume(tmp_path / "mr").acquired_spacing == pytest.approx(SHAPE[0] * SPACING[0] / 4)


def without_position(image: Dataset) -> None:
    del image.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence


def without_groups(image: Dataset) -> None:
    del image.PerFrameFunctionalGroupsSequence[2]


def cut(image: Dataset) -> None:
    image.PixelData = image.PixelData[: len(image.PixelData) // 2]


def one_bit(image: Dataset) -> None:
    image.BitsAllocated = 1


def without_pixels(image: Dataset) -> None:
    del image.PixelData


@pytest.mark.parametrize(
    ("edit", "kind", "found"),
    [
        (
            without_position,
            GeometryError,
            "a.dcm (frame 3) has no ImagePositionPatient, so its voxels",
        ),
        (without_groups, ImageError, "a.dcm has 6 frames, but the functional groups of 5"),
        (cut, ImageError, "a.dcm cannot be read (858 bytes of pixels for 6 frames of 286 bytes): a complete DICOM"),
        (one_bit, ImageError, "a.dcm cannot be read (1 bits per pixel)"),
        (without_pixels, ImageError, "a.dcm cannot be read ("),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(
    edit: Callable[[Dataset], None], kind: type[MiarError], found: str, tmp_path: Path
) -> None:
    image = write_enhanced(tmp_path / "mr" / "a.dcm", frames())
    edit(image)
    image.save_as(tmp_path / "mr" / "a.dcm")
    assert found in sentence(tmp_path / "mr", kind)


def test_random_damage_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path, rng = tmp_path / "mr" / "a.dcm", np.random.default_rng(0)
    write_enhanced(path, frames())
    whole = path.read_bytes()
    for _ in range(60):
        content = bytearray(whole)
        for position in rng.integers(132, len(whole) - 1716, 8):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        for source in (path, path.parent):
            message = ""
            try:
                read_volume(source)
            except MiarError as error:
                message = str(error)
            assert "\n" not in message


def test_a_missing_frame_is_reported(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "mr" / "a.dcm", [part for k, part in enumerate(frames()) if k != 3])
    assert "1 slice is missing" in sentence(tmp_path / "mr")


def test_classic_and_enhanced_series_in_one_folder_are_listed(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "a" / "e.dcm", frames())
    write_dicom_series(tmp_path / "a", SHAPE)
    message = sentence(tmp_path / "a")
    assert "(no description, 6 frames)" in message
    assert "(no description, 6 files)" in message


def test_an_enhanced_guide_is_referred_to_by_its_frames(tmp_path: Path) -> None:
    write_enhanced(tmp_path / "mr" / "a.dcm", frames())
    volume = read_volume(tmp_path / "mr")
    guide = Guide.of(volume)
    one = volume.grid._replace(shape=(*SHAPE[:2], 1))
    (header,) = guide.slices_at(one)
    group = dcmread(tmp_path / "mr" / "a.dcm").PerFrameFunctionalGroupsSequence[int(header.ReferencedFrameNumber) - 1]
    assert list(group.PlanePositionSequence[0].ImagePositionPatient) == list(ORIGIN)


def test_the_command_takes_a_file_or_a_folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_enhanced(tmp_path / "mr" / "scan.dcm", frames(2))
    options = ("--model", str(bundle), "--device", "cpu")
    refused = CliRunner().invoke(main, ["sr", "mr", *options])
    assert refused.exit_code == 1
    assert "--select EchoTime=10" in refused.stderr
    for source, name in (("mr", "mr_sr"), ("mr/scan.dcm", "scan_sr")):
        done = CliRunner().invoke(main, ["sr", source, "--select", "EchoTime=20", *options])
        assert done.stdout == f"{name}.nii.gz\n"
    np.testing.assert_array_equal(read_volume("mr_sr.nii.gz").array, read_volume("scan_sr.nii.gz").array)


def test_legacy_converted_images_have_the_elements_of_their_slices(tmp_path: Path) -> None:
    """Their echo times are in a sequence of elements without a functional group of their own."""

    def unassigned(group: Dataset, volume: int, _: int) -> None:
        del group.MREchoSequence
        group.UnassignedPerFrameConvertedAttributesSequence = [item(EchoTime=[10, 80][volume])]

    write_enhanced(tmp_path / "mr" / "a.dcm", frames(2, edit=unassigned))
    assert advised(sentence(tmp_path / "mr")) == ("EchoTime=10",)
    np.testing.assert_array_equal(read_volume(tmp_path / "mr", select=["EchoTime=80"]).array, stored(1))
