from __future__ import annotations

from pathlib import Path

import pytest

from miar_monai.data.outputs import ResultPaths, check_output, check_output_folder, refuse_to_overwrite, result_path
from miar_monai.errors import ExistsError, OutputError


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    refuse_to_overwrite(path)
    path.write_text("old")
    for check in (refuse_to_overwrite, check_output):
        with pytest.raises(ExistsError, match=r"a\.txt exists already and is left as it is: .* \(overwrite=True\)\.$"):
            check(path)
    check_output(path, overwrite=True)


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=rf"^{tmp_path} is a folder, but a file is to be written there: give another"):
        check_output(tmp_path, overwrite=True)
    check_output(tmp_path, overwrite=True, is_folder=True)


def test_a_folder_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wanted = r"results cannot be written to .*file/new: .*file is not a folder with write permission; give another"
    with pytest.raises(OutputError, match=wanted):
        check_output_folder(tmp_path / "file" / "new")
    with pytest.raises(OutputError, match=wanted):
        check_output(tmp_path / "file" / "new" / "a.txt")
    check_output(tmp_path / "new" / "folder" / "a.txt")
    assert not (tmp_path / "new").exists()


def test_names_must_be_valid(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written \(File name too long\): a shorter name is needed; "):
        check_output(tmp_path / ("a" * 300))


def test_results_of_one_case_lie_in_one_folder() -> None:
    file = ResultPaths.of(result_path("in/study.1.zip", "out"))
    assert file == (
        Path("out/study.1_sr.nii.gz"),
        Path("out/study.1_sr_uncertainty.nii.gz"),
        Path("out/study.1_sr.png"),
        Path("out/study.1_sr.html"),
        Path("out/study.1_sr_labels.nii.gz"),
    )
    folder = ResultPaths.of(result_path("in/series.4", "out", name=Path("b/series.4"), ending=""))
    assert folder[:2] == (Path("out/b/series.4_sr"), Path("out/b/series.4_sr_uncertainty"))
    assert folder.labels == Path("out/b/series.4_sr_labels.nii.gz")
