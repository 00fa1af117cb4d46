"""Folders with links, halves of pairs, other formats and long names: every case is processed or reported."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.phantoms import head, write_dicom_series, write_nifti_phantom

from miar_monai.cli.main import main
from miar_monai.data.cases import find_cases, unpacked
from miar_monai.errors import DatasetError, ImageError

SHAPE = (11, 9, 2)


@pytest.fixture
def root(elsewhere: None, tmp_path: Path) -> Path:
    """Return an empty folder of cases; results are written to another one."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def sr(bundle: Path, *parts: object) -> Result:
    result = CliRunner().invoke(main, ["sr", "--model", str(bundle), "--device", "cpu", *map(str, parts)])
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output
    return result


def found(root: Path) -> dict[str, str]:
    """Return the problems of all cases by relative path."""
    return {case.source.relative_to(root).as_posix(): case.problem for case in find_cases(root)}


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders_and_files_that_are_links_are_cases(bundle: Path, root: Path) -> None:
    scan = write_nifti_phantom(root.parent / "store" / "sub-1" / "t2.nii.gz", SHAPE)
    series = write_dicom_series(root.parent / "store" / "ct", SHAPE)
    (root / "sub-1").symlink_to(scan.parent)
    (root / "sub-2").symlink_to(series)
    (root / "sub-3.nii.gz").symlink_to(scan)
    (root / "sub-4.nii.gz").symlink_to(scan)  # one object of git-annex, two scans
    result = sr(bundle, root)
    assert result.exit_code == 0, result.output
    made = sorted(path.relative_to("in_sr").as_posix() for path in Path("in_sr").rglob("*.nii.gz"))
    assert made == ["sub-1/t2_sr.nii.gz", "sub-2_sr.nii.gz", "sub-3_sr.nii.gz", "sub-4_sr.nii.gz"]
    (root.parent / "link").symlink_to(root)
    assert len(find_cases(root.parent / "link")) == 4


def test_links_are_not_followed_in_circles_or_twice(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(root / "sub-1" / "t2.nii", root.parent / "other" / "x.nii")
    for link, target in {"sub-1/up": "..", "sub-1/me": ".", "out": "../..", "loop": "loop", "a": "b", "b": "a"}.items():
        (root / link).symlink_to(target)
    problems = found(root)
    assert problems.pop("sub-1/t2.nii") == ""
    (problem,) = problems.values()  # of links to themselves
    assert "in: a, b, loop cannot be opened" in problem
    assert caplog.text == ""
    for link in ("loop", "a", "b"):
        (root / link).unlink()
    (root / "latest").symlink_to("sub-1")  # its name comes first
    (root / "other").symlink_to(root.parent / "other")
    assert found(root) == {"sub-1/t2.nii": "", "other/x.nii": ""}
    (record,) = caplog.records
    assert record.getMessage() == f"{root}/latest and {root}/sub-1 are the same folder: its cases are processed once."


PROBLEMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a.nii.gz": (lambda path: path.symlink_to(".git/annex/objects/x"), "is a broken link"),
    "a.zip": (lambda path: path.symlink_to("nowhere"), "is a broken link"),
    "sub-02": (lambda path: path.symlink_to("nowhere"), "in: sub-02 cannot be opened"),
    "1.2.840.113619": (lambda path: path.symlink_to("nowhere"), "in: 1.2.840.113619 cannot be opened"),
    "a.hdr": (Path.touch, "is half of a pair: a.img is needed"),
    "A.IMG": (Path.touch, "is half of a pair: A.hdr is needed"),
    "a.nii.xz": (Path.touch, "has an unsupported format (.nii.xz)"),
    "a.PAR": (Path.touch, "has an unsupported format (.par)"),
    "a+orig.BRIK.gz": (Path.touch, "has an unsupported format (.brik.gz)"),
    "a.tar.gz": (Path.touch, "is an archive in an unsupported format"),
    "a.7z": (Path.touch, "is an archive in an unsupported format"),
    "a.dcm": (Path.touch, "in contains files that are named like DICOM slices but are not DICOM (a.dcm)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_files_that_look_like_cases_are_reported(name: str, root: Path) -> None:
    touch(root / "good.nii")
    PROBLEMS[name][0](root / name)
    problems = found(root)
    assert problems.pop("good.nii") == ""
    (problem,) = problems.values()
    assert problem.startswith(str(root))
    assert PROBLEMS[name][1] in problem
    assert problem.endswith(".")


@pytest.mark.parametrize("name", ["notes.txt", "sub-1.json", "sub-1.bval", "table.tsv", "picture.png", ".hidden.nii"])
def test_other_files_are_ignored(name: str, root: Path) -> None:
    touch(root / "good.nii", root / name, root / ".git" / "x.mgz")
    (root / f"link.{name}").symlink_to("nowhere")
    if name != ".hidden.nii":
        assert found(root) == {"good.nii": ""}


def test_the_exit_code_is_3_and_the_report_names_the_problems(bundle: Path, root: Path) -> None:
    write_nifti_phantom(root / "sub-1.nii", SHAPE)
    (root / "sub-2.nii.gz").symlink_to("nowhere")
    result = sr(bundle, root, "--report", "run.json", "--skip-existing")
    assert result.exit_code == 3
    assert f"error: {root}/sub-2.nii.gz is a broken link" in result.stderr
    assert result.stderr.splitlines()[-1] == f"1 of 2 cases failed: {root}/sub-2.nii.gz"
    assert [("error" in case, case["input"]) for case in json.loads(Path("run.json").read_text())["cases"]] == [
        (False, str(root / "sub-1.nii")),
        (True, str(root / "sub-2.nii.gz")),
    ]


def test_results_are_named_after_links(bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dicom_series(root / "1.2.840", SHAPE)
    (root.parent / "patient").symlink_to(root / "1.2.840")
    (root.parent / "cases").symlink_to(root)
    write_nifti_phantom(root / "a.nii", SHAPE).rename(root / ".nii")
    assert sr(bundle, root.parent / "patient").stdout == "patient_sr.nii.gz\n"
    assert sr(bundle, root.parent / "cases").stdout == "cases_sr/1.2.840_sr.nii.gz\n"
    assert sr(bundle, root / ".nii").stdout == "nii_sr.nii.gz\n"
    monkeypatch.chdir(root / "1.2.840")
    assert sr(bundle, ".", "-o", "..").stdout == "../1.2.840_sr.nii.gz\n"


def test_a_pair_is_one_case(bundle: Path, root: Path) -> None:
    pair = nib.Nifti1Pair(head(SHAPE).astype(np.float32), np.eye(4))
    nib.save(pair, root / "a.img")
    assert sorted(path.name for path in root.iterdir()) == ["a.hdr", "a.img"]
    assert found(root) == {"a.hdr": ""}
    result = sr(bundle, root)
    assert result.exit_code == 0, result.output
    assert result.stdout == "in_sr/a_sr.nii.gz\n"


def test_slices_of_any_name_are_a_series(root: Path) -> None:
    series = write_dicom_series(root / "series", SHAPE)
    for i, path in enumerate(sorted(series.iterdir())):
        path.rename(path.with_name(f"I{i}.img"))
    assert found(root) == {"series": ""}


def test_a_series_with_unreadable_slices_is_reported(bundle: Path, root: Path) -> None:
    series = write_dicom_series(root / "series", SHAPE)
    (series / "slice999.dcm").symlink_to(".git/annex/objects/x")
    assert "series: slice999.dcm cannot be opened (broken links" in found(root)["series"]
    alone = sr(bundle, series)
    assert alone.exit_code == 1
    assert "slice999.dcm cannot be opened" in alone.stderr


def test_a_pipe_is_reported_without_waiting(root: Path) -> None:
    os.mkfifo(root / "pipe.nii.gz")
    (case,) = (case for case in find_cases(root) if case.source.name == "pipe.nii.gz")
    assert "it is not a regular file" in case.problem


def test_a_folder_that_cannot_be_listed_is_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(root / "open" / "a.nii", root / "closed" / "b.nii")
    scandir, iterdir = os.scandir, Path.iterdir

    def refuse(path: object) -> None:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) or scandir(path))
    monkeypatch.setattr(Path, "iterdir", lambda self: refuse(self) or iterdir(self))
    problems = found(root)
    assert problems.pop("open/a.nii") == ""
    assert problems == {
        "closed": f"{root}/closed cannot be read (Permission denied): permission to read it is needed; change the"
        " permission or remove the file."
    }


def test_cases_with_the_same_name_are_reported_and_others_processed(bundle: Path, root: Path) -> None:
    write_nifti_phantom(root / "a.nii", SHAPE)
    write_nifti_phantom(root / "a.nii.gz", SHAPE)
    write_nifti_phantom(root / "b.nii", SHAPE)
    result = sr(bundle, root)
    assert (result.exit_code, result.stdout) == (3, "in_sr/b_sr.nii.gz\n")
    assert f"{root}/a.nii and {root}/a.nii.gz would have results of the same name" in result.stderr
    assert "2 of 3 cases failed" in result.stderr


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--skip-existing",), ("--uncertainty", "--preview")])
def test_a_name_that_is_too_long_for_the_result_is_reported(options: tuple[str, ...], bundle: Path, root: Path) -> None:
    long = write_nifti_phantom(root / f"{'x' * 247}.nii", SHAPE)
    write_nifti_phantom(root / "short.nii", SHAPE)
    result = sr(bundle, root, *options)
    assert (result.exit_code, result.stdout) == (3, "in_sr/short_sr.nii.gz\n")
    assert "cannot be written (File name too long): a shorter name is needed" in result.stderr
    alone = sr(bundle, long, *options)
    assert (alone.exit_code, alone.stdout) == (1, "")
    assert alone.stderr.count("File name too long") == 1
    assert sr(bundle, long, "-o", "short.nii").exit_code == 0
    refused = sr(bundle, root / "short.nii", "-o", "x" * 300)
    assert refused.exit_code == 1
    assert "File name too long" in refused.stderr


@pytest.mark.parametrize("name", ["out.v2", "2021.03.04", "results.final/deep.er"])
def test_an_output_with_a_dot_is_a_folder(name: str, bundle: Path, root: Path) -> None:
    scan = write_nifti_phantom(root / "scan.nii", SHAPE)
    assert sr(bundle, scan, "-o", name).stdout == f"{name}/scan_sr.nii.gz\n"
    assert sr(bundle, root, "-o", name, "--overwrite").stdout == f"{name}/scan_sr.nii.gz\n"


@pytest.mark.parametrize("name", ["out.dcm", "out.PNG", "out.mhd", "out.nii.bz2", "out.nhdr", "out.vtk", "out.zip"])
def test_an_output_of_another_format_is_refused(name: str, bundle: Path, root: Path) -> None:
    refused = sr(bundle, write_nifti_phantom(root / "scan.nii", SHAPE), "-o", name)
    assert refused.exit_code == 2
    suffixes = ".nii.gz, .nii, .mgz, .mgh, .nrrd or .mha"
    sentence = f"{name} is not the name of a volume that can be written: a {suffixes} file, or a folder, is needed"
    assert sentence in refused.stderr
    Path(name).mkdir()
    assert sr(bundle, root / "scan.nii", "-o", name).stdout == f"{name}/scan_sr.nii.gz\n"


def test_an_invalid_file_is_refused_before_weights_are_loaded(
    bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miar_monai.inference.resolver.load_weights", lambda *_: pytest.fail("weights were loaded"))
    good = write_nifti_phantom(root / "good.nii.gz", SHAPE)
    cut = root / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[:-9])
    refused = sr(bundle, cut)
    assert refused.exit_code == 1
    assert refused.stderr.startswith(f"error: {cut} ")


def test_zip_files_may_contain_pairs_and_problems_are_reported(root: Path) -> None:
    nib.save(nib.Nifti1Pair(head(SHAPE).astype(np.float32), np.eye(4)), root / "a.img")
    packed = Path(shutil.make_archive("pair", "zip", root))
    with unpacked(packed) as path:
        assert path.name == "a.hdr"
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("deep/a.vff", b"x")
    with pytest.raises(ImageError, match=r"^other\.zip/deep/a\.vff has an unsupported format"), unpacked("other.zip"):
        pass


def test_a_folder_without_a_case_is_refused(root: Path) -> None:
    touch(root / "notes.txt", root / ".hidden" / "a.nii")
    with pytest.raises(DatasetError, match="contains no case"):
        find_cases(root)
