"""Another program on prepared volumes, one after the other: time, and results by the names of the inputs.

    python -m benchmarks.run_program --input_dir runs/thick --output_dir runs/eclare [--only _5_0] [--minutes 9]
    python -m benchmarks.run_program --input_dir runs/thick --output_dir runs/miar \
        --command "miar sr {input} -o {folder}/sr.nii.gz --factor 1,1,{spacing} --slice-thickness {thickness} \
            --slice-profile slr"

runs ECLARE, or any other command, on the files that ``benchmarks.thick_slices`` wrote. Volumes with a result
are skipped, so that a run can be continued. Writes ``<name>.nii.gz``, rounded to 12 bits, and a row of ``seconds.csv``
for each volume, from the start of the program to its end; the output of the program goes to ``<name>.log``.

ECLARE (GPL-3) runs as a program in an environment of its own, never as a part of this one: ``pip install
eclare==1.0.1``, or without a network ``pip install --no-deps --target site <wheels>`` of eclare 1.0.1, radifox-utils
1.0.3, sigpy-lite, transforms3d and nibabel beside PyTorch, SciPy, Matplotlib and tqdm. Here it is told the thickness of
the slices and the profile that ``benchmarks.thick_slices`` gives them by default, that of a Shinnar-Le Roux pulse;
without ``--relative-slice-thickness`` it estimates their profile (ESPRESO), which takes longer. It loads
its training patches in as many processes as PyTorch has threads, at most 8, so leave OMP_NUM_THREADS unset.
"""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import fire
import nibabel as nib
import numpy as np

from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.outputs import check_output_folder
from miar_monai.errors import ConfigurationError, DatasetError, report_errors_in_one_sentence

ECLARE = (
    "run-eclare --in-fpath {input} --out-dir {folder} --relative-slice-thickness {relative_thickness}"
    " --relative-slice-profile-type rf-pulse-slr --gpu-id {gpu}"
)
_LEVELS = 4095  # a thousandth of a dB at 30 dB, and files of a third of the size
_NAME = re.compile(r".+_(?P<thickness>[\d.]+)_(?P<gap>[\d.]+)")


def values(path: Path) -> dict[str, str]:
    """Return the values of a command's placeholders that follow from a prepared file: its slices.

    Raises:
        DatasetError: if the name does not end with thickness and gap.
    """
    stem = path.name.removesuffix(".nii.gz")
    match = _NAME.fullmatch(stem)
    if match is None:
        raise DatasetError(
            f"{path} must be named <name>_<thickness>_<gap>.nii.gz; write it by benchmarks.thick_slices."
        )
    thickness, gap = float(match["thickness"]), float(match["gap"])
    pixel = min(nib.Nifti1Image.from_filename(path).header.get_zooms()[:3])
    return {
        "input": shlex.quote(str(path.resolve())),
        "thickness": f"{thickness:g}",
        "spacing": f"{thickness + gap:g}",
        "relative_thickness": f"{thickness / pixel:.6g}",  # in pixels
        "factor": f"{(thickness + gap) / pixel:.6g}",
    }


def run(path: Path, command: str, output_dir: Path, gpu: int) -> float:
    """Run a command on one file, keep its result, and return the seconds that it took.

    Args:
        path: the prepared file.
        command: with placeholders ``{folder}`` (where its only ``.nii.gz`` is expected), ``{gpu}`` and those of
            `values`.
        output_dir: folder of the result and of the program's output.
        gpu: index of the GPU, -1 for none.

    Raises:
        DatasetError: if the program fails, or does not write exactly one ``.nii.gz``.
    """
    given = values(path)
    log = output_dir / path.name.replace(".nii.gz", ".log")
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as file:
        try:
            words = shlex.split(command.format(**given, folder=folder, gpu=gpu))
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigurationError(
                f"the command {command!r} cannot be used ({error}): the placeholders are {{input}}, {{folder}}, "
                "{gpu}, {thickness}, {spacing}, {relative_thickness} and {factor}; correct it."
            ) from error
        start = time.perf_counter()
        try:
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        except OSError as error:
            raise ConfigurationError(
                f"{words[0]} cannot be run ({error.strerror}): the program is needed; install it, or give --command."
            ) from error
        seconds = time.perf_counter() - start
        results = sorted(Path(folder).glob("*.nii.gz"))
        if code or len(results) != 1:
            raise DatasetError(
                f"{words[0]} ended with status {code} and {len(results)} results for {path}, but one result is needed;"
                f" see {log}."
            )
        image = nib.Nifti1Image.from_filename(results[0])
        array = image.get_fdata()
        step = max(float(np.ptp(array)), np.finfo(float).tiny) / _LEVELS
        smaller = nib.Nifti1Image(np.rint(array / step) * step, image.affine, dtype=np.int16)  # scaled by nibabel
        with atomic_file(output_dir / path.name, overwrite=True) as part:
            nib.save(smaller, part)
    return seconds


def main(
    input_dir: str,
    output_dir: str,
    command: str = ECLARE,
    only: str = "",
    gpu: int = 0,
    minutes: float = float("inf"),
) -> None:
    """Run a program on all prepared volumes that have no result yet.

    Args:
        input_dir: folder of the files.
        output_dir: folder of the results.
        command: see `run`; ECLARE by default.
        only: text that the names contain, such as ``_5_0``.
        gpu: index of the GPU, -1 for none.
        minutes: no volume is started after that.

    Raises:
        DatasetError: if there is no file, or the program fails.
    """
    check_output_folder(output_dir)
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(Path(input_dir).glob("*.nii.gz")) if only in path.name]
    if not paths:
        raise DatasetError(f"{input_dir} has no {only}*.nii.gz; write it by benchmarks.thick_slices.")
    table, start = Path(output_dir, "seconds.csv"), time.perf_counter()
    for path in paths:
        if Path(output_dir, path.name).exists():
            continue
        if time.perf_counter() - start > 60 * minutes:
            print("the minutes are over; call again for the rest")
            return
        seconds = run(path, command, Path(output_dir), gpu)
        new = not table.exists()
        with table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([*([("name", "seconds")] if new else []), (path.name.removesuffix(".nii.gz"), seconds)])
        print(f"{path.name}: {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    report_errors_in_one_sentence()
    fire.Fire(main)
