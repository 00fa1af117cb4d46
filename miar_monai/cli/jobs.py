"""Planning of ``miar sr``: the request of the user, the result files of each case, and checks before the work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from miar_monai.data.atomic_write import check_name, refuse_to_overwrite
from miar_monai.data.cases import Case
from miar_monai.data.io import check_output_folder, volume_stem
from miar_monai.errors import OutputError, SettingError
from miar_monai.visualize.preview import check_preview

__all__ = ["Job", "Request", "ResultFiles", "check_outputs", "check_writable", "list_jobs"]

Job = tuple[Case, Path]
"""A case and the file of its result, or for DICOM output the folder of its series."""

_NOT_FOLDERS = {
    ".7z", ".bmp", ".bz2", ".csv", ".dcm", ".dicom", ".gif", ".gz", ".h5", ".hdr", ".html", ".ima", ".img", ".jpeg",
    ".jpg", ".json", ".mat", ".md", ".mgh", ".mgz", ".mha", ".mhd", ".mnc", ".nhdr", ".npy", ".npz", ".nrrd", ".par",
    ".pdf", ".png", ".rar", ".raw", ".tar", ".tgz", ".tif", ".tiff", ".tsv", ".txt", ".xz", ".zip", ".zst",
}  # fmt: skip
"""Suffixes by which an output is meant to be a file, unlike that of a folder such as out.v2."""


@dataclass(frozen=True)
class Request:
    """The arguments of ``miar sr``, see its ``--help``; None stands for the default of the bundle or the command."""

    source: Path
    output: Path | None = None
    series: str = ""
    select: tuple[str, ...] = ()
    out_format: str = "nifti"
    model: str = "brats"
    device: str = "auto"
    lookahead_tokens: int | None = None
    fidelity: float | None = None
    blur: float | str | None = None
    with_preview: bool = False
    uncertainty: bool = False
    report_file: Path | None = None
    part: tuple[int, int] | None = None
    skip_existing: bool = False
    overwrite: bool = False
    quiet: bool = False
    debug: bool = False

    @property
    def as_dicom(self) -> bool:
        """Whether results are DICOM series."""
        return self.out_format == "dicom"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of inference that replace those of the bundle."""
        settings: dict[str, Any] = {
            "lookahead_tokens": self.lookahead_tokens,
            "fidelity": self.fidelity,
            "blur": self.blur,
        }
        if self.uncertainty:
            settings["uncertainty"] = True
        return {name: value for name, value in settings.items() if value is not None}


class ResultFiles(NamedTuple):
    """The files of one result.

    Attributes:
        image: the super-resolved image; for DICOM output a folder.
        preview: the picture, or None.
        uncertainty: the map of the expected error, or None; for DICOM output a folder.
    """

    image: Path
    preview: Path | None
    uncertainty: Path | None

    @classmethod
    def of(cls, image: Path, preview: bool, uncertainty: bool) -> ResultFiles:
        """Return the files of a result, named after its image.

        Example:
            >>> files = ResultFiles.of(Path("out/a_sr.nii.gz"), preview=True, uncertainty=True)
            >>> files.preview.as_posix(), files.uncertainty.as_posix()
            ('out/a_sr.png', 'out/a_sr_uncertainty.nii.gz')
        """
        stem = volume_stem(image)
        picture = image.with_name(f"{stem}.png") if preview else None
        return cls(
            image, picture, image.with_name(f"{stem}_uncertainty{image.name[len(stem) :]}") if uncertainty else None
        )

    @property
    def auxiliary(self) -> dict[str, Path]:
        """The files other than the image, by their kind."""
        files = {"preview": self.preview, "uncertainty": self.uncertainty}
        return {kind: path for kind, path in files.items() if path is not None}

    @property
    def volumes(self) -> list[Path]:
        """The image and the map, without the picture."""
        return [path for path in (self.image, self.uncertainty) if path is not None]


def list_jobs(request: Request, cases: list[Case], single: bool) -> list[Job]:
    """Return each case with its target; results of an earlier run among the cases are left out.

    Args:
        request: the request.
        cases: those of its source.
        single: whether the source is itself the only case, and not a folder of cases.

    Raises:
        SettingError: if the output does not suit the source or the format, or is the input.
    """
    targets = _targets(request, cases, single)
    volumes = [ResultFiles.of(target, preview=False, uncertainty=True).volumes for target in targets]
    for case, paths in zip(cases, volumes, strict=True):
        for path in paths:
            if not case.problem and os.path.exists(path) and path.samefile(case.source):
                raise SettingError(f"{path} is the input, which is never changed; give another output.")
    resolved = cache(Path.resolve)  # there may be 100,000 files in one folder
    results = {resolved(path.parent) / path.name for paths in volumes for path in paths}
    jobs = zip(cases, targets, strict=True)
    return [(case, target) for case, target in jobs if resolved(case.source.parent) / case.source.name not in results]


def _targets(request: Request, cases: Sequence[Case], single: bool) -> list[Path]:
    """Return the file of each case's result, or for DICOM output the folder of its series."""
    source, output = request.source, request.output
    if output is not None and not output.is_dir():
        if output.name.lower().endswith((".nii", ".nii.gz")):
            if not single:
                raise SettingError(f"{source} is a folder of cases, so the output must be a folder, not {output}.")
            if request.as_dicom:
                raise SettingError(f"a DICOM series is written to a folder, not to {output}: give a folder.")
            return [output]
        if output.suffix.lower() in _NOT_FOLDERS:
            raise SettingError(
                f"{output} must be a .nii or .nii.gz file, or a folder: {output.suffix} files are not written; give"
                " another output."
            )
    folder = output or (Path() if single else Path(f"{Path(os.path.abspath(source)).name}_sr"))
    suffix = "" if request.as_dicom else ".nii.gz"
    return [folder / case.name.with_name(f"{case.name.name}_sr{suffix}") for case in cases]


def check_outputs(request: Request, targets: Sequence[Path]) -> None:
    """Check before the work that the report and the results with some targets can be written.

    Raises:
        ConfigurationError: if a preview cannot be drawn.
        OutputError: if a file cannot be written, or would overwrite something.
    """
    if request.with_preview:
        check_preview()
    for path, may_be_folder in _outputs(request, targets):
        check_name(path)
        check_output_folder(path.parent)
        if path.is_dir() and not may_be_folder:
            raise OutputError(f"{path} is a folder: a file is written there; give another name.")
        check_writable(path, request.overwrite)


def _outputs(request: Request, targets: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield all files of a run, and whether they are folders of DICOM series."""
    for target in targets:
        files = ResultFiles.of(target, request.with_preview, request.uncertainty)
        for path in files.volumes:
            yield path, request.as_dicom
        if files.preview is not None:
            yield files.preview, False
    if request.report_file is not None:
        yield request.report_file, False


def check_writable(path: Path, overwrite: bool) -> None:
    """Check that a result has a valid name and, unless ``overwrite`` is True, that it does not exist yet.

    Raises:
        OutputError: if one of them does not hold.
    """
    if overwrite:
        check_name(path)
    else:
        refuse_to_overwrite(path)
