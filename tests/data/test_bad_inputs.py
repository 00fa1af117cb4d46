"""Errors for users: one sentence at the end of stderr, and no partial results."""

from __future__ import annotations

import gzip
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers.bundle_runs import Finished, arguments, quick_command, tiny_checkpoint
from helpers.phantoms import LPS_AFFINE, head, write_brats_folder, write_dicom_series, write_nifti_phantom

from miar_monai.data import formats
from miar_monai.data.datasets import SliceDataset
from miar_monai.data.io import read_volume
from miar_monai.errors import ImageError, find_miar_error

SHAPE = (20, 18, 6)


def check(done: Finished, *parts: str) -> None:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.sentence.startswith("error: ")
    for part in parts:
        assert part in done.sentence
    assert done.sentence.endswith(".")


def write(path: Path, array: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, LPS_AFFINE), path)
    return path


def not_finite(folder: Path) -> Path:
    array = head(SHAPE).astype(np.float32)
    array[3, 4, 5] = np.nan
    return write(folder / "nan.nii.gz", array)


def truncated(folder: Path) -> Path:
    path = write_nifti_phantom(folder / "cut.nii.gz", SHAPE)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def several_series(folder: Path) -> Path:
    write_dicom_series(folder / "series", (16, 16, 3), series="1", prefix="a")
    return write_dicom_series(folder / "series", (16, 16, 3), series="2", prefix="b")


def missing_slices(folder: Path) -> Path:
    path = write_dicom_series(folder / "series", (16, 16, 7))
    sorted(path.iterdir())[3].unlink()
    return path


def colors(folder: Path) -> Path:
    return write(folder / "rgb.nii.gz", np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def as_large_as(value: float, folder: Path) -> Path:
    return write(folder / "large.nii.gz", (value * head(SHAPE)).astype(np.float32))


VOLUMES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "nowhere", "nowhere does not exist: a NIfTI file, a folder with"),
    "empty folder": (empty, "contains no case: NIfTI files"),
    "4D": (lambda folder: write(folder / "t.nii.gz", np.ones((*SHAPE, 2), np.int16)), "has 4 dimensions (20 x 18 x 6"),
    "RGB": (colors, "the voxels are RGB colors"),
    "NaN": (not_finite, "1 voxels are NaN and 0 infinite"),
    "constant": (lambda folder: write(folder / "c.nii.gz", np.full(SHAPE, 7, np.int16)), "all 2160 voxels are 7"),
    "huge": (partial(as_large_as, 1e38), "the voxels range from 0 to 1e+38, outside of single precision"),
    "tiny": (partial(as_large_as, 1e-38), "the voxels range from 0 to 1e-38, outside of single precision"),
    "truncated": (truncated, "cut.nii.gz is truncated or damaged"),
    "several series": (several_series, "contains 2 DICOM series"),
    "missing slices": (missing_slices, "1 slice is missing"),
}


@pytest.mark.parametrize("case", VOLUMES)
def test_volumes_that_cannot_be_used(case: str, tmp_path: Path) -> None:
    make, sentence = VOLUMES[case]
    done = quick_command(
        *arguments(
            "miar_lidc", "inference", tmp_path,
            dataset_dir=make(tmp_path), output_dir=tmp_path / "out", checkpoint=tiny_checkpoint(tmp_path, "miar_lidc"),
        ),
        folder=tmp_path,
    )  # fmt: skip
    check(done, sentence)
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_used(tmp_path: Path) -> None:
    volume = write_nifti_phantom(tmp_path / "in.nii.gz", SHAPE)
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(other.read_bytes()[:100])
    sentences = {
        tmp_path / "none.pt": f"there are no weights at {tmp_path}/none.pt; give --checkpoint, or train first",
        other: "other.pt belongs to another network",
        damaged: "damaged.pt is not a readable checkpoint",
    }
    for checkpoint, sentence in sentences.items():
        done = quick_command(
            *arguments(
                "miar_lidc", "inference", tmp_path,
                dataset_dir=volume, output_dir=tmp_path / "out", checkpoint=checkpoint,
            ),
            folder=tmp_path,
        )  # fmt: skip
        check(done, sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["inference", "evaluate", "train_stage1", "train"])
def test_output_folders_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    data: Any = write_brats_folder(tmp_path / "data", 3, SHAPE, contrasts=("t2",))
    data = next(data.glob("*/*.nii.gz")) if kind == "inference" else data
    (tmp_path / "file").write_text("a file, not a folder")
    settings = {} if kind.startswith("train") else {"checkpoint": tiny_checkpoint(tmp_path)}
    done = quick_command(
        *arguments("miar_brats", kind, tmp_path, dataset_dir=data, output_dir=tmp_path / "file" / "out", **settings),
        folder=tmp_path,
    )
    check(done, f"results cannot be written to {tmp_path}/file/out: {tmp_path}/file is not a folder")
    assert (tmp_path / "file").read_text() == "a file, not a folder"


def test_results_are_replaced_only_on_request(tmp_path: Path) -> None:
    volume = write_nifti_phantom(tmp_path / "in.nii.gz", SHAPE)
    out = tmp_path / "out"
    out.mkdir()
    (out / "in_sr.nii.gz").write_text("mine")
    settings = {"dataset_dir": volume, "output_dir": out, "checkpoint": tiny_checkpoint(tmp_path)}
    done = quick_command(*arguments("miar_brats", "inference", tmp_path, **settings), folder=tmp_path)
    check(done, "in_sr.nii.gz exists already and is left as it is", "or allow overwriting (--overwrite True).")
    parts = arguments("miar_brats", "inference", tmp_path, overwrite="false", **settings)
    check(quick_command(*parts, folder=tmp_path), "overwrite is 'false', but it must be True or False")
    assert [path.name for path in out.iterdir()] == ["in_sr.nii.gz"]
    assert (out / "in_sr.nii.gz").read_text() == "mine"
    done = quick_command(*arguments("miar_brats", "inference", tmp_path, overwrite=True, **settings), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert nib.load(out / "in_sr.nii.gz").shape == (80, 72, 6)


@pytest.mark.parametrize("kind", ["evaluate", "train_stage1"])
def test_volumes_with_fewer_slices_than_requested(kind: str, tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 3, SHAPE, contrasts=("t2",))
    settings = {"num_slices": 40} | ({"checkpoint": tiny_checkpoint(tmp_path)} if kind == "evaluate" else {})
    done = quick_command(
        *arguments("miar_brats", kind, tmp_path, dataset_dir=data, output_dir=tmp_path / "o", **settings),
        folder=tmp_path,
    )
    check(done, "has 6 axial slices, but num_slices is 40")
    assert not (tmp_path / "o").exists()


def test_datasets_that_cannot_be_trained_on(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("miar_brats", "miar_lidc"):
        for folder, sentence in (("nowhere", "nowhere is not a folder"), ("empty", "empty has ")):
            done = quick_command(
                *arguments(name, "train_stage1", tmp_path, dataset_dir=tmp_path / folder, output_dir=tmp_path / "out"),
                folder=tmp_path,
            )
            check(done, f"{tmp_path / folder}", sentence)
    assert not (tmp_path / "out").exists()


def test_miar_needs_a_tokenizer(tmp_path: Path) -> None:
    data = write_brats_folder(tmp_path / "data", 3, SHAPE, contrasts=("t2",))
    done = quick_command(
        *arguments("miar_brats", "train", tmp_path, dataset_dir=data, output_dir=tmp_path / "out"), folder=tmp_path
    )
    check(done, "train the tokenizer first: python -m monai.bundle run training --config_file", "train_stage1.json")
    assert not (tmp_path / "out").exists()


def test_all_threads_have_ended_after_an_error() -> None:
    """A thread in C++ code at exit aborts the process after the error message."""

    def load(item: dict[str, str]) -> dict[str, torch.Tensor]:
        if item["image"] == "bad":
            raise ImageError("bad: all voxels are 7.")
        time.sleep(0.5)
        return {"image": torch.rand(1, 4, 4, 2)}

    items = [{"image": name} for name in ("bad", "a", "b", "c", "d", "e", "f")]
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError) as caught:
        SliceDataset(items, load, num_workers=4)
    assert str(find_miar_error(caught.value)) == "bad: all voxels are 7."
    assert not {thread for thread in threading.enumerate() if "TMonitor" not in repr(thread)} - before


def overwrite_header(path: Path, offset: int, content: bytes) -> Path:
    """Overwrite a part of an uncompressed or compressed NIfTI header."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        data = bytearray(file.read())
    data[offset : offset + len(content)] = content
    with opened(path, "wb") as file:
        file.write(data)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("offset", "content", "sentence"),
    [
        (40, struct.pack("<4h", 3, *[30000] * 3), "30000 x 30000 x 30000 voxels, but at most 536870912 are supported"),
        (40, struct.pack("<4h", 3, 700, 700, 700), "bytes, but its header declares 686000352"),
        (40, struct.pack("<h", 77), "cannot be read as NIfTI"),
        (70, struct.pack("<h", 16400), "(data code 16400 not recognized)"),
        (108, struct.pack("<f", 1e9), "bytes, but its header declares 10000"),
        (108, struct.pack("<f", float("nan")), "cannot be read as NIfTI"),
    ],
)
def test_a_header_with_wrong_sizes_is_refused_before_memory_is_allocated(
    suffix: str, offset: int, content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = overwrite_header(write_nifti_phantom(tmp_path / f"scan{suffix}", SHAPE), offset, content)
    tracemalloc.start()
    with pytest.raises(ImageError) as caught:
        read_volume(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(".")


def test_a_compressed_file_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_MAX_SURPLUS", 2**20)
    path = write_nifti_phantom(tmp_path / "bomb.nii.gz", SHAPE)
    with gzip.open(path, "ab") as file:
        file.write(bytes(2**22))
    with pytest.raises(ImageError, match=r"bomb\.nii\.gz is truncated or damaged \(it continues after the 4672 bytes"):
        read_volume(path)


def test_a_series_with_wrong_sizes_is_refused(tmp_path: Path) -> None:
    from pydicom import dcmread

    for path in write_dicom_series(tmp_path / "series", (16, 16, 3)).iterdir():
        image = dcmread(path)
        image.Rows = image.Columns = 65535
        image.save_as(path)
    with pytest.raises(
        ImageError, match=r"\.dcm declares 3 x 65535 x 65535 voxels, but at most 536870912 are supported"
    ):
        read_volume(tmp_path / "series")
