"""Damaged and hostile files: the command prints one sentence or writes a complete result.

``MIAR_FUZZ_CASES`` is the number of files, 90 by default. Case ``n`` is the same in each run, so failures can be
reproduced by number.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.enhanced import frames, of_mr, orientation, write_enhanced
from helpers.phantoms import write_brats_folder, write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle

from miar_monai.cli.main import main
from miar_monai.data.io import read_volume, write_volume

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of libraries, about damaged files
    pytest.mark.timeout(3600),
]

CASES = int(os.environ.get("MIAR_FUZZ_CASES", "90"))
SECONDS, BYTES = 60, 3 * 2**30  # limits of a case, in addition to the memory of the process
SHAPE = (9, 7, 3)
HOSTILE = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"../")
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1e308, 10**30, "", "../../x", "$1/0", "@nothing", [], [[]], {}, {"a": 1})

Rng = np.random.Generator


def damaged(content: bytes, rng: Rng) -> bytes:
    """Truncate, flip bits, or overwrite, remove or insert a few bytes; every second time near the start of the file."""
    end = min(len(content), 400) if rng.random() < 0.5 else len(content)
    kind, data = rng.integers(5), bytearray(content)
    if kind == 0:
        return bytes(data[: rng.integers(end + 1)])
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(max(min(end, len(data)), 1)))
        if kind in (1, 2) and data:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 3:
            what = HOSTILE[rng.integers(len(HOSTILE))]
            data[at : at + len(what)] = what
        elif rng.random() < 0.5:
            del data[at : at + int(rng.integers(1, 9))]
        else:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
    return bytes(data)


def replaced(content: bytes, rng: Rng) -> bytes:
    """Replace a value of a JSON file."""
    tree = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    node, key = places[rng.integers(len(places))]
    node[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(tree).encode()


def damage(path: Path, rng: Rng) -> None:
    """Damage the content of a file, or the archive or text itself."""
    content, inside = path.read_bytes(), rng.random() < 0.5
    if path.suffix == ".gz" and inside:
        content = gzip.compress(damaged(gzip.decompress(content), rng))
    elif path.suffix == ".zip" and inside:
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
            names = old.namelist()
            hit = names[rng.integers(len(names))]
            for name in names:
                new.writestr(name, damaged(old.read(name), rng) if name == hit else old.read(name))
        content = packed.getvalue()
    elif path.suffix == ".json" and inside:
        content = replaced(content, rng)
    else:
        content = damaged(content, rng)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a bundle and valid files of each kind."""
    root = tmp_path_factory.mktemp("originals")
    write_tiny_bundle(root / "bundle")
    write_nifti_phantom(root / "nii" / "scan.nii", SHAPE)
    write_nifti_phantom(root / "gz" / "scan.nii.gz", SHAPE, dtype=np.float32)
    write_dicom_series(root / "dicom" / "scan", SHAPE)
    write_enhanced(root / "enhanced" / "scan.dcm", frames(1, orientation(20), edit=of_mr))
    for ending in ("nrrd", "mha", "mgz"):
        (root / ending).mkdir()
        write_volume(root / ending / f"scan.{ending}", read_volume(root / "nii" / "scan.nii"))
    write_nifti_phantom(root / "guide" / "guide.nii", SHAPE, seed=1)
    write_nifti_phantom(root / "labels" / "labels.nii", SHAPE, dtype=np.uint8, high=3)
    written = [root / "view" / f"scan{part}.nii" for part in ("", "_sr", "_sr_uncertainty")]
    for path in written:
        write_nifti_phantom(path, SHAPE)
    made = ["--model", str(root / "bundle"), "--device", "cpu", "--report", str(root / "view" / "run.json")]
    options = [*made, "--uncertainty", "--overwrite", "--quiet", "-o", str(written[1])]
    assert CliRunner().invoke(main, ["sr", str(written[0]), *options]).exit_code == 0
    (root / "zip").mkdir()
    with zipfile.ZipFile(root / "zip" / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(root / "nii" / "scan.nii", "study/scan.nii")
    (root / "series").mkdir()
    shutil.make_archive(str(root / "series" / "scan"), "zip", root / "dicom", "scan")
    write_brats_folder(root / "evaluate" / "data", 3, (12, 9, 4), ("t2",))
    split = {"training": ["BraTS_00000"], "validation": ["BraTS_00001"], "test": ["BraTS_00002"]}
    (root / "evaluate" / "split.json").write_text(json.dumps(split))
    return root


def command_on_scan(folder: Path, originals: Path, kind: str, rng: Rng) -> list[str]:
    """Copy an input, damage it, and return the command that processes it."""
    shutil.copytree(originals / kind, folder / "in")
    files = sorted(path for path in (folder / "in").rglob("*") if path.is_file())
    damage(files[rng.integers(len(files))], rng)
    (source,) = (folder / "in").iterdir()
    options = ["--out-format", "dicom"] if kind in ("dicom", "enhanced") and rng.random() < 0.5 else []
    if rng.random() < 0.3:
        options.append("--uncertainty")
    return ["sr", str(source), "--model", str(originals / "bundle"), *options, *run_options(folder)]


def run_options(folder: Path) -> list[str]:
    return ["--device", "cpu", "-o", str(folder / "out"), "--quiet"]


def command_on_companion(folder: Path, originals: Path, kind: str, rng: Rng) -> list[str]:
    """Do the same with a guide or a label map of a valid scan."""
    shutil.copytree(originals / "nii", folder / "in")
    (companion,) = (originals / kind).iterdir()
    path = Path(shutil.copy(companion, folder / companion.name))
    damage(path, rng)
    given = ["--model", str(originals / "bundle"), f"--{kind}", str(path)]
    return ["sr", str(folder / "in" / "scan.nii"), *given, *run_options(folder)]


def command_on_view(folder: Path, originals: Path, kind: str, rng: Rng) -> list[str]:
    """Do the same with one of the files of a page."""
    shutil.copytree(originals / kind, folder / "in")
    names = ("scan.nii", "scan_sr.nii", "scan_sr_uncertainty.nii", "run.json")
    scan, result, error, report = paths = [folder / "in" / name for name in names]
    damage(paths[rng.integers(len(paths))], rng)
    given = ["--map", str(error), "--report", str(report), "-o", str(folder / "out" / "page.html")]
    return ["view", str(scan), str(result), *given]


def command_on_bundle(folder: Path, originals: Path, kind: str, rng: Rng) -> list[str]:
    """Do the same with a config of a bundle."""
    shutil.copytree(originals / "nii", folder / "in")
    shutil.copytree(originals / "bundle", folder / "bundle")
    damage(folder / "bundle" / "configs" / f"{kind}.json", rng)
    report = str(folder / "out" / "run.json")
    given = ["--model", str(folder / "bundle"), "--report", report]
    return ["sr", str(folder / "in" / "scan.nii"), *given, *run_options(folder)]


def command_on_split(folder: Path, originals: Path, kind: str, rng: Rng) -> list[str]:
    """Do the same with a split file."""
    shutil.copytree(originals / "evaluate", folder / "in")
    damage(folder / "in" / "split.json", rng)
    files = {"--split-file": folder / "in" / "split.json", "--model": originals / "bundle"}
    given = [str(x) for pair in files.items() for x in pair]
    return ["evaluate", str(folder / "in" / "data"), *given, *run_options(folder)]


KINDS: dict[str, Callable[[Path, Path, str, Rng], list[str]]] = {
    "nii": command_on_scan,
    "gz": command_on_scan,
    "nrrd": command_on_scan,
    "mha": command_on_scan,
    "mgz": command_on_scan,
    "dicom": command_on_scan,
    "enhanced": command_on_scan,
    "zip": command_on_scan,
    "series": command_on_scan,
    "guide": command_on_companion,
    "labels": command_on_companion,
    "view": command_on_view,
    "inference": command_on_bundle,
    "metadata": command_on_bundle,
    "split": command_on_split,
}


@contextmanager
def limits() -> Iterator[None]:
    """Limit the time and the memory of a block."""

    def stop(*_: object) -> None:
        raise TimeoutError("a case took too long")

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BYTES, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_case(folder: Path, parts: list[str]) -> int:
    """Run a command in a folder for its results only; return its exit code."""
    before = contents(folder)
    with limits():
        result = CliRunner().invoke(main, parts)
    left = {name: content for name, content in contents(folder).items() if not name.startswith("out/")}
    assert left == before, "something else than the output was written"
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert "unexpected" not in result.output, result.output
    written = sorted((folder / "out").rglob("*"))
    if result.exit_code == 0:
        for path in written:
            if path.name.endswith(".nii.gz"):
                assert np.isfinite(nib.load(path).get_fdata()).all()
    else:
        assert result.exit_code in (1, 2), result.output  # 2: a setting out of range, here in a damaged config
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: "), last
        assert last.endswith("."), last
        assert not written, written
    return result.exit_code


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_one_sentence_or_a_complete_result(
    kind: str, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    codes, failures = [], []
    for n in range(max(CASES // len(KINDS), 1)):
        folder = tmp_path / "case"
        (folder / "cwd").mkdir(parents=True)
        monkeypatch.chdir(folder / "cwd")
        parts = KINDS[kind](folder, originals, kind, np.random.default_rng([n, *kind.encode()]))
        try:
            codes.append(check_case(folder, parts))
        except AssertionError as error:
            failures.append(f"case {n} of {kind}: {str(error).splitlines()[0]}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
        for path in tmp_path.iterdir():
            failures.append(f"case {n} of {kind} left {path} behind")
            shutil.rmtree(path)
    assert not failures, "\n".join(failures)
    assert {1, 2} & {*codes}, "no case did any damage"
