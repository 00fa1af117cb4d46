"""What ``miar sr`` does: which files become which, what is done to each case, and said about it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miar_monai.data.cases import Case, unpacked
from miar_monai.data.dicom_source import source_headers
from miar_monai.data.dicom_writer import check_series_folder, write_series
from miar_monai.data.io import Volume, parts_to_save, read_volume, write_volume
from miar_monai.data.outputs import ResultPaths, check_output, result_path
from miar_monai.errors import ImageError, sentence_for_user
from miar_monai.inference.report import case_report, derivation, warnings_said, what_is_said
from miar_monai.visualize.preview import check_preview, preview

if TYPE_CHECKING:
    from pydicom import Dataset

    from miar_monai.inference.resolver import SuperResolver

__all__ = ["Job", "Work", "check_outputs", "do_all", "list_jobs"]

Job = tuple[Case, Path]
"""A case, and the file of its result; as DICOM, the folder of its series."""

_NO_FOLDERS = {
    ".7z", ".bmp", ".bz2", ".csv", ".dcm", ".dicom", ".gif", ".gz", ".h5", ".hdr", ".html", ".ima", ".img", ".jpeg",
    ".jpg", ".json", ".mat", ".md", ".mgh", ".mgz", ".mha", ".mhd", ".mnc", ".nhdr", ".npy", ".npz", ".nrrd", ".par",
    ".pdf", ".png", ".rar", ".raw", ".tar", ".tgz", ".tif", ".tiff", ".tsv", ".txt", ".xz", ".zip", ".zst",
}  # fmt: skip
"""Endings of files that a user may expect, whereas an output named out.v2 is a folder."""


def list_jobs(cases: list[Case], source: Path, output: Path | None, single: bool, as_dicom: bool) -> list[Job]:
    """Return each case with the file of its result; as DICOM, with the folder of its series.

    A result that an earlier run left among the cases is none of them.
    """
    named = output is not None and output.name.lower().endswith((".nii", ".nii.gz")) and not os.path.isdir(output)
    if named and not single:
        raise click.UsageError(f"{source} is a folder of cases, so the output must be a folder, not {output}.")
    if named and as_dicom:
        raise click.UsageError(f"a DICOM series is written to a folder, not to {output}: give a folder.")
    if output is not None and not named and output.suffix.lower() in _NO_FOLDERS and not os.path.isdir(output):
        raise click.UsageError(
            f"{output} must be a .nii or .nii.gz file, or a folder: {output.suffix} files are not written; give another"
            " output."
        )
    if named:
        assert output is not None
        targets = [output]
    else:
        folder = output or (Path() if single else Path(f"{Path(os.path.abspath(source)).name}_sr"))
        ending = "" if as_dicom else ".nii.gz"
        targets = [result_path(case.source, folder, name=case.name, ending=ending) for case in cases]
    for case, target in zip(cases, targets, strict=True):
        for path in ResultPaths.of(target)[:2]:
            if not case.problem and os.path.exists(path) and path.samefile(case.source):
                raise click.UsageError(f"{path} is the input, which is never changed; give another output.")
    folder_of = cache(Path.resolve)  # there may be 100,000 files in one
    results = {folder_of(path.parent) / path.name for target in targets for path in ResultPaths.of(target)[:2]}
    jobs = zip(cases, targets, strict=True)
    return [(case, target) for case, target in jobs if folder_of(case.source.parent) / case.source.name not in results]


def check_outputs(
    results: list[ResultPaths],
    with_uncertainty: bool,
    report_file: Path | None,
    with_preview: bool,
    overwrite: bool,
    as_dicom: bool,
) -> None:
    """Refuse what cannot be written before the work is done."""
    if with_preview:
        check_preview()
    for paths in results:
        check_output(paths.image, overwrite, as_dicom)
        if with_uncertainty:
            check_output(paths.uncertainty, overwrite, as_dicom)
        if with_preview:
            check_output(paths.preview, overwrite)
    if report_file:
        check_output(report_file, overwrite)


class Work:
    """What is done to each case, and said about it."""

    def __init__(
        self,
        make_resolver: Callable[[], SuperResolver],
        as_dicom: bool,
        with_preview: bool,
        overwrite: bool,
        skip_existing: bool,
        quiet: bool,
        series: str = "",
        select: tuple[str, ...] = (),
    ) -> None:
        self.make_resolver = make_resolver
        self.series = series
        self.select = select
        self.as_dicom = as_dicom
        self.with_preview = with_preview
        self.overwrite = overwrite
        self.skip_existing = skip_existing
        self.quiet = quiet

    @cached_property
    def resolver(self) -> SuperResolver:
        """What super-resolves the cases; made when it is first asked for, since that takes seconds."""
        return self.make_resolver()

    @cached_property
    def seconds_per_tile(self) -> float:
        """How long a tile takes on a CPU; 0 where nobody waits for that."""
        return self.resolver.seconds_per_tile() if self.resolver.device.type == "cpu" and not self.quiet else 0.0

    def say(self, text: str) -> None:
        """Print to stderr; stdout is for the paths of results."""
        if text and not self.quiet:
            click.echo(text, err=True)

    def do(self, case: Case, target: Path) -> dict[str, Any]:
        """Super-resolve a case and return its report."""
        if case.problem:
            raise ImageError(case.problem)
        if self.skip_existing and os.path.exists(target):
            return {"input": str(case.source), "output": str(target), "skipped": True}
        redo = self.overwrite or self.skip_existing  # what lies beside no result was left by a killed run
        paths = ResultPaths.of(target)
        check_output(target, self.overwrite, self.as_dicom)
        volume, headers = self._read(case)
        pictures = [paths.preview] if self.with_preview else []
        maps = [paths.uncertainty] if self.resolver.settings.get("uncertainty") else []
        for picture in pictures:
            check_output(picture, redo)
        for path in maps:
            check_output(path, redo, self.as_dicom)
        for folder in [target, *maps] if self.as_dicom else []:
            check_series_folder(folder, headers, self.overwrite or (redo and folder != target))
        if self.seconds_per_tile:
            seconds = self.seconds_per_tile * self.resolver.num_tiles(volume)
            self.say(f"{' x '.join(map(str, volume.array.shape))} voxels: about {_duration(seconds)} on the CPU")
        start = time.perf_counter()
        with warnings_said() as said:
            prepared = self.resolver.prepared(volume)
            result = self.resolver.volume(volume, prepared)
        seconds = time.perf_counter() - start
        for picture in pictures:
            preview(volume, result, picture, redo)
        self._write(result, target, headers, redo)
        beside = {what: path for what, paths in (("preview", pictures), ("uncertainty", maps)) for path in paths}
        device, warnings = self.resolver.device, [*prepared.warnings, *said]
        source, limits = str(case.source), prepared.limits
        report = case_report(
            source, target, volume, result, prepared.assumed, seconds, device, warnings, beside, limits
        )
        self.say(what_is_said(report, prepared.warnings))
        if not self.quiet:
            click.echo(str(target))
        return report

    def _read(self, case: Case) -> tuple[Volume, list[Dataset]]:
        """Return the volume of a case and, if the result is a series, the headers of its slices."""
        with unpacked(case.source) as path:
            volume = read_volume(path, self.series, self.select)
            return volume, source_headers(volume) if self.as_dicom else []

    def _write(self, result: Volume, target: Path, headers: list[Dataset], redo: bool) -> None:
        """Write a result after what goes beside it: a case is done when its result is there."""
        for volume, quantity in parts_to_save(result):
            path, overwrite = (ResultPaths.of(target).uncertainty, redo) if quantity else (target, self.overwrite)
            if self.as_dicom:
                write_series(path, volume, headers, derivation(self.resolver), overwrite, quantity)
            else:
                write_volume(path, volume, overwrite)


def do_all(work: Work, numbered: list[tuple[int, Job]], count: int, single: bool) -> dict[int, dict[str, Any]]:
    """Return the reports of cases, some of ``count``; a failure does not stop the others, unless it is a single one."""
    reports = {}
    for number, (case, target) in numbered:
        work.say("" if single else f"[{number + 1}/{count}] {case.source}")
        try:
            reports[number] = work.do(case, target)
        except Exception as error:
            debug = click.get_current_context().meta.get("miar.debug")
            if single or debug or isinstance(error, BrokenPipeError):
                raise
            reports[number] = {"input": str(case.source), "error": sentence_for_user(error)}
            click.echo(f"error: {sentence_for_user(error)}", err=True)
    return reports


def _duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
