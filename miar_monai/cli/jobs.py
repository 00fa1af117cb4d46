"""Planning of ``miar sr``: the request of the user, the result files of each case, and checks before the work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from miar_monai.data.cases import Case
from miar_monai.data.formats import OUTPUT_SUFFIXES, check_output_suffix, expected_format
from miar_monai.data.io import sample_maps
from miar_monai.data.outputs import ResultPaths, check_output, result_path, without_number
from miar_monai.errors import SettingError
from miar_monai.visualize.preview import check_preview

__all__ = ["ALWAYS_FILES", "Job", "Request", "auxiliary_outputs", "check_outputs", "list_jobs"]

Job = tuple[Case, Path]
"""A case and the file of its result, or for DICOM output the folder of its series."""

ALWAYS_FILES = ("preview", "page", "labels")
"""Kinds of auxiliary outputs that are files, also with DICOM output."""

_ENDINGS = {"nifti": ".nii.gz", "nrrd": ".nrrd", "mgz": ".mgz", "mha": ".mha", "dicom": ""}
"""Formats of results, and the endings of their names; a DICOM series is a folder."""

_NOT_FOLDERS = {
    ".7z", ".bmp", ".bz2", ".csv", ".dcm", ".dicom", ".gif", ".gipl", ".gz", ".h5", ".hdr", ".html", ".ima", ".img",
    ".jpeg", ".jpg", ".json", ".mat", ".md", ".mhd", ".mnc", ".nhdr", ".nifti", ".npy", ".npz", ".par", ".pdf", ".png",
    ".rar", ".raw", ".tar", ".tgz", ".tif", ".tiff", ".tsv", ".txt", ".vti", ".vtk", ".xz", ".zip", ".zst",
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
    guide: Path | None = None
    labels: Path | None = None
    factor: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None
    isotropic: bool = False
    slice_thickness: float | None = None
    slice_profile: str | None = None
    acquired_spacing: tuple[float, ...] | None = None
    with_preview: bool = False
    with_page: bool = False
    uncertainty: bool = False
    samples: int | None = None
    seed: int | None = None
    save_samples: bool = False
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
            "factor": self.factor,
            "spacing": self.spacing,
            "slice_thickness": self.slice_thickness,
            "slice_profile": self.slice_profile,
            "uncertainty": self.uncertainty or None,
            "samples": self.samples,
            "sampling_seed": self.seed,
            "save_samples": self.save_samples or None,
            "isotropic": self.isotropic or None,
        }
        return {name: value for name, value in settings.items() if value is not None}


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
    volumes = [ResultPaths.of(target).volumes for target in targets]
    for case, paths in zip(cases, volumes, strict=True):
        for path in paths:
            if not case.problem and os.path.exists(path) and path.samefile(case.source):
                raise SettingError(f"{path} is the input, which is never changed; give another output.")
    resolved = cache(Path.resolve)  # there may be 100,000 files in one folder
    results = {resolved(path.parent) / path.name for paths in volumes for path in paths}
    jobs = zip(cases, targets, strict=True)
    names = [(resolved(case.source.parent) / without_number(case.source.name), case, target) for case, target in jobs]
    return [(case, target) for path, case, target in names if path not in results]


def _targets(request: Request, cases: Sequence[Case], single: bool) -> list[Path]:
    """Return the file of each case's result, or for DICOM output the folder of its series."""
    source, output, ending = request.source, request.output, _ENDINGS[request.out_format]
    if output is not None and not os.path.isdir(output):  # `Path.is_dir` raises an error if the name is too long
        if output.name.lower().endswith(OUTPUT_SUFFIXES):
            if not single:
                raise SettingError(f"{source} is a folder of cases, so the output must be a folder, not {output}.")
            if request.as_dicom:
                raise SettingError(f"a DICOM series is written to a folder, not to {output}: give a folder.")
            if request.out_format != "nifti" and expected_format(output) != expected_format(f"a{ending}"):
                raise SettingError(
                    f"{output} has the suffix of another format than --out-format {request.out_format}: leave the "
                    "option out, or give a folder."
                )
            return [output]
        if output.suffix.lower() in _NOT_FOLDERS:
            check_output_suffix(output, ", or a folder,")
    folder = output or (Path() if single else Path(f"{Path(os.path.abspath(source)).name}_sr"))
    return [result_path(case.source, folder, name=case.name, ending=ending) for case in cases]


def auxiliary_outputs(request: Request, target: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files that are written in addition to a result, by their kind.

    Args:
        request: the request.
        target: the result.
        settings: those of the inference, which may be the bundle's: ``uncertainty``, ``samples``, ``save_samples``.

    Example:
        >>> request = Request(Path("a.nii.gz"), with_preview=True)
        >>> auxiliary_outputs(request, Path("out/a_sr.nii.gz"), {})["preview"].as_posix()
        'out/a_sr.png'
    """
    paths, outputs = ResultPaths.of(target), {}
    if request.with_preview:
        outputs["preview"] = paths.preview
    if request.with_page:
        outputs["page"] = paths.page
    if settings.get("uncertainty"):
        outputs["uncertainty"] = paths.uncertainty
    if request.labels is not None:
        outputs["labels"] = paths.labels
    maps = sample_maps(settings.get("samples") or 0, bool(settings.get("save_samples")))
    return outputs | {name: paths.sampled(name) for name in maps}


def check_outputs(request: Request, targets: Sequence[Path]) -> None:
    """Check before the work that the report and the results with some targets can be written.

    Raises:
        ConfigurationError: if a preview cannot be drawn.
        OutputError: if a file cannot be written, or would overwrite something.
    """
    if request.with_preview:
        check_preview()
    for target in targets:
        check_output(target, request.overwrite, request.as_dicom)
        for kind, path in auxiliary_outputs(request, target, request.settings).items():
            check_output(path, request.overwrite, request.as_dicom and kind not in ALWAYS_FILES)
    if request.report_file is not None:
        check_output(request.report_file, request.overwrite)
