from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path

import pytest
from helpers.phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.data.datasets import (
    brats_datalist,
    lidc_datalist,
    paired_datalist,
    series_datalist,
    split_by_patient,
    subject_datalist,
    volume_datalist,
)
from miar_monai.errors import DatasetError, ImageError, SettingError

SECTIONS = ("training", "validation", "test")
SHAPE = (17, 13, 9)


# ------------------------------------------------------------------------------------------------ lists


def test_brats_folder(tmp_path: Path) -> None:
    write_brats_folder(tmp_path / "a", subjects=3, shape=SHAPE)
    name = "BraTS-GLI-00001-000"
    write_nifti_phantom(tmp_path / "b" / name / f"{name}-t2w.nii.gz", SHAPE)
    write_nifti_phantom(tmp_path / "b" / name / f"{name}-t1n.nii", SHAPE)
    write_nifti_phantom(tmp_path / "b" / name / f"{name}-seg.nii.gz", SHAPE)
    items = brats_datalist([tmp_path / "a", str(tmp_path / "b")], ("t1", "t2"))
    assert [(item["subject"], item["contrast"]) for item in items] == [
        (subject, contrast) for subject in [*(f"BraTS_{i:05d}" for i in range(3)), name] for contrast in ("t1", "t2")
    ]
    assert all(Path(item["image"]).is_file() and item["subject"] in item["image"] for item in items)
    assert brats_datalist(tmp_path / "a") == [item for item in items[:6] if item["contrast"] == "t2"]


def test_brats_volumes_that_are_missing_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_brats_folder(tmp_path, subjects=3, shape=SHAPE, contrasts=("t2",))
    (tmp_path / "BraTS_00001" / "BraTS_00001_t2.nii.gz").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(brats_datalist(tmp_path)) == 2
    assert f"{tmp_path}: 1 volumes of the contrasts t2 are missing" in caplog.text


def test_a_folder_without_brats_volumes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"absent is not a folder: a dataset folder with <dataset_dir>/<subject>/<sub"
    ):
        brats_datalist(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    sentence = (
        r"has 1 folders but no volume of the contrasts t2: <dataset_dir>/<subject>/<subject>_t2\.nii\.gz or .*-t2w\.nii"
    )
    with pytest.raises(DatasetError, match=sentence):
        brats_datalist(tmp_path)


def test_the_other_contrasts_of_a_subject_are_guides(tmp_path: Path) -> None:
    write_brats_folder(tmp_path, subjects=2, shape=SHAPE)
    (tmp_path / "BraTS_00001" / "BraTS_00001_t1.nii.gz").unlink()
    write_nifti_phantom(tmp_path / "BraTS_00000" / "BraTS_00000_flair.nii.gz", SHAPE)
    items = brats_datalist(tmp_path, ("t1", "t2", "flair"))
    found = [(Path(item["image"]).name, Path(item.get("guide", "none")).name) for item in paired_datalist(items)]
    t1, t2, flair = (f"BraTS_00000_{contrast}.nii.gz" for contrast in ("t1", "t2", "flair"))
    lone = "BraTS_00001_t2.nii.gz"
    assert found == [(t1, t2), (t1, flair), (t2, t1), (t2, flair), (flair, t1), (flair, t2), (lone, "none")]
    assert all("guide" not in item for item in items), "the items themselves do not change"


def test_volumes_without_contrast_are_no_pairs() -> None:
    scans = [{"image": f"{i}.nii", "subject": "a"} for i in range(2)]
    assert paired_datalist(scans) == scans


def test_file_names_of_subjects_and_modalities_of_series_can_be_chosen(tmp_path: Path) -> None:
    first = write_nifti_phantom(tmp_path / "knees" / "knee1" / "knee1_pd.nii.gz", SHAPE)
    second = write_nifti_phantom(tmp_path / "knees" / "knee2" / "pd.nii", SHAPE)
    found = subject_datalist(tmp_path / "knees", {"pd": ["{subject}_pd", "pd"]})
    assert found == [
        {"image": str(first), "subject": "knee1", "contrast": "pd"},
        {"image": str(second), "subject": "knee2", "contrast": "pd"},
    ]
    series = write_dicom_series(tmp_path / "dicom" / "a" / "series", SHAPE, patient_id="a", modality="MR")
    assert series_datalist(tmp_path / "dicom", "MR") == [{"image": str(series), "subject": "a"}]
    with pytest.raises(DatasetError, match="has no CT volume"):
        lidc_datalist(tmp_path / "dicom")


def test_lidc_folder(tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "LIDC-IDRI-0007" / "study" / "ct", SHAPE, patient_id="LIDC-IDRI-0007")
    write_dicom_series(tmp_path / "LIDC-IDRI-0007" / "study" / "radiograph", (9, 9, 1), modality="DX", series="2")
    anonymous = write_dicom_series(tmp_path / "patient-8" / "study" / "ct", SHAPE, patient_id="")
    nifti = write_nifti_phantom(tmp_path / "nifti" / "case.nii.gz", SHAPE)
    (tmp_path / "INDEX.csv").write_text("a,b")
    assert lidc_datalist(tmp_path) == [
        {"image": str(series), "subject": "LIDC-IDRI-0007"},
        {"image": str(nifti), "subject": "nifti"},
        {"image": str(anonymous), "subject": "patient-8"},
    ]
    assert lidc_datalist([anonymous]) == [{"image": str(anonymous), "subject": "ct"}]


def test_a_folder_without_ct_volumes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"absent is not a folder: a dataset folder with NIfTI files, or folders with"
    ):
        lidc_datalist([tmp_path / "absent"])
    (tmp_path / "INDEX.csv").write_text("a,b")
    with pytest.raises(DatasetError, match=r"has no CT volume: NIfTI files, or folders with one DICOM series each"):
        lidc_datalist(tmp_path)


def test_volumes_to_super_resolve(tmp_path: Path) -> None:
    files = [write_nifti_phantom(tmp_path / "in put" / name, SHAPE) for name in ("a.nii.gz", "b.nii")]
    (tmp_path / "in put" / "notes.txt").write_text("")
    series = write_dicom_series(tmp_path / "series", SHAPE)
    named = zip([*files, series], ("a", "b", "series"), strict=True)
    items = [{"image": str(path), "name": name} for path, name in named]
    assert volume_datalist(tmp_path / "in put") == items[:2]
    assert volume_datalist(str(files[1])) == items[1:2]
    assert volume_datalist(series) == items[2:]
    assert volume_datalist([tmp_path / "in put", str(series)]) == items


def test_a_guide_belongs_to_one_case(tmp_path: Path) -> None:
    paths = [write_nifti_phantom(tmp_path / name / f"{name}.nii", SHAPE) for name in ("t1", "t2", "t3")]
    expected = [{"image": str(paths[1]), "name": "t2", "guide": str(paths[0])}]
    assert volume_datalist(paths[1], guide=paths[0]) == expected
    assert volume_datalist(paths[:2], guide=paths[0]) == expected
    assert volume_datalist(paths[0], guide=paths[0])[0]["guide"] == str(paths[0])
    with pytest.raises(SettingError, match=r"the input has 2 cases, but .*t1\.nii can guide one image only; give one"):
        volume_datalist(paths[1:], guide=paths[0])


def test_nothing_to_super_resolve(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent does not exist: a NIfTI file, a folder with a DICOM series, a zip"):
        volume_datalist(tmp_path / "absent")
    with pytest.raises(DatasetError, match=r"contains no case: NIfTI files \(.*\), folders with the slices of a DICOM"):
        volume_datalist(tmp_path)


def test_volumes_are_those_of_the_command(tmp_path: Path) -> None:
    for name in ("b/t2.nii", "a.zip", "out/b/t2_sr.nii.gz", "out/a_sr_uncertainty.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = volume_datalist(tmp_path, tmp_path / "out")
    assert [item["name"] for item in found] == ["a", "b/t2"]
    (tmp_path / "c.mnc").touch()
    with pytest.raises(DatasetError, match=r"c\.mnc has an unsupported format"):
        volume_datalist(tmp_path)
    (tmp_path / "d.nii").symlink_to("nowhere")
    with pytest.raises(DatasetError, match=r"convert it; and 1 more such problems: miar sr names all and does the"):
        volume_datalist(tmp_path)


# ------------------------------------------------------------------------------------------------ splits


def items_of(patients: int) -> list[dict[str, str]]:
    return [{"image": f"{p}/{k}.nii", "subject": f"patient-{p}"} for p in range(patients) for k in range(1 + p % 3)]


@given(st.integers(3, 60), st.integers(0, 5))
def test_sections_are_disjoint_and_cover_all_patients(patients: int, seed: int) -> None:
    items = items_of(patients)
    sections = [split_by_patient(items, section, seed=seed) for section in SECTIONS]
    assert sorted(chain(*sections), key=items.index) == items
    subjects = [{item["subject"] for item in section} for section in sections]
    assert sum(map(len, subjects)) == patients
    for count, share in zip(map(len, subjects), (0.7, 0.1, 0.2), strict=True):
        assert abs(count - share * patients) <= 1.5


def test_split_does_not_depend_on_the_order_of_files() -> None:
    items = items_of(20)
    section = split_by_patient(items, "test", seed=1)
    assert split_by_patient(items[::-1], "test", seed=1) == section[::-1]
    assert split_by_patient(items, "test", seed=2) != section


def test_other_ratios() -> None:
    sizes = [len({i["subject"] for i in split_by_patient(items_of(10), s, ratios=(2, 2, 1))}) for s in SECTIONS]
    assert sizes == [4, 4, 2]


def test_too_few_patients() -> None:
    with pytest.raises(
        DatasetError, match=r"the section 'training' is empty with 2 patients in the dataset: at least one"
    ):
        split_by_patient(items_of(2), "training")


def test_split_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = {"training": ["patient-0", "patient-3"], "validation": ["patient-77"], "test": ["dicom/patient-1", "gone"]}
    path = tmp_path / "split.json"
    path.write_text(json.dumps(names))
    items = items_of(5)
    assert {i["subject"] for i in split_by_patient(items, "training", split_file=path)} == {"patient-0", "patient-3"}
    with caplog.at_level(logging.WARNING):
        assert {i["subject"] for i in split_by_patient(items, "test", split_file=path)} == {"patient-1"}
    assert f"{path}: subjects of section test without volume: gone" in caplog.text
    with pytest.raises(DatasetError, match=r"the section 'validation' is empty with 5 patients"):
        split_by_patient(items, "validation", split_file=path)


def test_section_that_does_not_exist() -> None:
    with pytest.raises(DatasetError, match=r"no section 'train' in the split: give one of training, validation, test"):
        split_by_patient(items_of(9), "train")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"training": [], "test": []}'])
def test_split_files_that_cannot_be_used(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        DatasetError, match=r"split\.json cannot be used \(\w+: .*\): a JSON file with lists of subjects"
    ):
        split_by_patient(items_of(9), "test", split_file=path)


def test_real_splits(real_data: Path) -> None:
    for items, folder in [
        (brats_datalist(real_data / "brain"), real_data / "brain"),
        (lidc_datalist([real_data / "chest", real_data / "dicom"]), real_data / "chest"),
    ]:
        names = json.loads((folder / "split.json").read_text())
        for section in SECTIONS:
            found = split_by_patient(items, section, split_file=folder / "split.json")
            assert {item["subject"] for item in found} == {Path(name).name for name in names[section]}


def test_a_patient_in_two_sections_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"training": ["a", "b"], "validation": ["c"], "test": ["d", "folder/b"]}))
    items = [{"image": name, "subject": name} for name in "abcd"]
    with pytest.raises(DatasetError, match=r"split\.json lists b for training and for test: .* list each patient"):
        split_by_patient(items, "test", split_file=file)
