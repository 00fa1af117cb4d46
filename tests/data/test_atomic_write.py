from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from miar_monai.data.atomic_write import atomic_file, atomic_folder
from miar_monai.errors import OutputError


def test_a_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_file(path) as part:
        part.write_text("half")
        assert part.name == path.name
        assert not path.exists()
    assert path.read_text() == "half"
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_no_files_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path, overwrite=True) as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["mkdir", "rmtree"])
def test_an_interruption_while_the_temporary_folder_is_made_or_removed_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = Path if name == "mkdir" else shutil
    original, done = getattr(owner, name), []

    def interrupted(path: Path, *args: Any, **options: Any) -> None:
        if name == "mkdir" or done:  # the folder is made, and not removed
            original(path, *args, **options)
        if path != tmp_path and not done:
            done.append(path)
            raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.txt") as part:
        part.write_text("complete")
    assert done
    assert [file.name for file in tmp_path.iterdir()] == ([] if name == "mkdir" else ["a.txt"])


def test_files_are_replaced_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"allow overwriting"), atomic_file(path):
        pytest.fail("the block must not run")
    with atomic_file(path, overwrite=True) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_an_error_names_the_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    wanted = r"file/a\.txt cannot be written \(.*give another output folder"
    with pytest.raises(OutputError, match=wanted), atomic_file(tmp_path / "file" / "a.txt"):
        pytest.fail("the block must not run")


def test_a_folder_appears_complete_and_replaces_another_only_if_allowed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a"
    with atomic_folder(path) as part:
        (part / "1").touch()
        assert not path.exists()
    with pytest.raises(OutputError, match="exists already"), atomic_folder(path):
        pytest.fail("the block must not run")

    def fail() -> None:
        with atomic_folder(path, overwrite=True) as part:
            (part / "2").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [file.name for file in path.iterdir()] == ["1"]
    with atomic_folder(path, overwrite=True) as part:
        (part / "2").touch()
    assert [file.name for file in path.iterdir()] == ["2"]
    assert [file.name for file in path.parent.iterdir()] == ["a"]
