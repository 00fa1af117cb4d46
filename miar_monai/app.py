"""The command ``miar``: super-resolve files, look after models and the installation.

PyTorch and MONAI are imported by the commands that need them, so that ``miar info`` and ``--help`` answer at once.
"""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import miar_monai
from miar_monai.bundles import MODELS, find_bundle, metadata, number_or_text, weights_path
from miar_monai.doctor import check_device, check_packages, check_weights, devices, installed
from miar_monai.errors import MiarError, OutputError, find_miar_error
from miar_monai.files import refuse_to_overwrite, whole_file

if TYPE_CHECKING:
    from pydicom import Dataset

    from miar_monai.api import SuperResolver
    from miar_monai.cases import Case
    from miar_monai.io import Volume

    Job = tuple[Case, Path]

__all__ = ["main"]

_EXIT_CODES = """\b
Exit codes:
  0  all done
  1  failure; one sentence on stderr says what to do
  2  wrong use of the command
  3  some cases of a folder failed and are listed; the others are done
"""
_SR_EXAMPLES = f"""\b
Examples:
  miar sr scan.nii.gz                         writes scan_sr.nii.gz here
  miar sr dicom_series/ -o result.nii.gz --preview
  miar sr study.zip -o results --model lidc --report run.json
  miar sr patients/ -o results                every case in the folder
  miar sr patients/ -o results --skip-existing   what is missing of it, after an interruption
  torchrun --nproc_per_node=4 -m miar_monai.app sr patients/ -o results
                                              shared by four processes, each with a GPU of its own
  miar sr dicom_series/ --out-format dicom    writes the series dicom_series_sr/

{_EXIT_CODES}"""


class _Commands(click.Group):
    """Commands whose errors are one sentence; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of libraries, for their developers
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends quietly when nobody reads on, as in miar info | head -1
        except Exception as error:
            if ctx.meta.get("miar.debug"):
                raise
            click.echo(f"error: {_sentence(error)}", err=True)
            ctx.exit(1)


def _sentence(error: Exception) -> str:
    if found := find_miar_error(error):
        return str(found)
    reason = (str(error).strip() or "without a message").splitlines()[0]
    return f"unexpected {type(error).__name__} ({reason}); --debug shows where it happened: please report it."


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["miar.debug"] = value


_debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
_model = click.option(
    "--model",
    default="brats",
    show_default=True,
    metavar="brats|lidc|PATH",
    help="The bundle: brats for brain MRI, lidc for chest CT, or its folder. It is a program: trust it or leave it.",
)
_device = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]|mps", help="Where the network runs."
)
_overwrite = click.option("--overwrite", is_flag=True, help="Replace existing results.")
_quiet = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


def _fraction(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return the two numbers of ``I/N``."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", value)
    part, parts = (int(number) for number in found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise click.BadParameter(f"{value!r} is no part such as 1/8 or 8/8.")
    return part, parts


def _inference(command: Callable) -> Callable:
    """Add the settings of inference; what is not given is the bundle's."""
    for option in (
        click.option("--fidelity", type=float, help="0, most perceptual, to 1, most faithful. [default: bundle's]"),
        click.option(
            "--lookahead-tokens",
            type=int,
            metavar="K",
            help="Tokens of a scale that may take their second choice; 2^K candidates. [default: bundle's]",
        ),
    ):
        command = option(command)
    return command


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(miar_monai.__version__, message="miar %(version)s")
def main() -> None:
    """Fourfold super-resolution of MRI and CT slices. For research, not for clinical use.

    Nothing is asked of a network and nothing is sent.
    """


@main.command(epilog=_SR_EXAMPLES)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .nii or .nii.gz file, or a folder. [default: <name>_sr.nii.gz here; for a folder of cases, <name>_sr/]",
)
@click.option(
    "--out-format",
    type=click.Choice(["nifti", "dicom"]),
    default="nifti",
    show_default=True,
    help="dicom writes a derived series, a folder <name>_sr, in the study of INPUT, which must be a DICOM series.",
)
@_model
@_device
@_inference
@click.option(
    "--blur",
    metavar="auto|VOXELS",
    help="How far INPUT is blurred: standard deviation in its voxels; auto measures it. [default: bundle's]",
)
@click.option("--preview", "with_preview", is_flag=True, help="Draw a picture, <name>_sr.png, beside each result.")
@click.option(
    "--uncertainty",
    is_flag=True,
    help="Write the absolute error to expect of each voxel, in the units of INPUT: <name>_sr_uncertainty.nii.gz.",
)
@click.option("--report", "report_file", type=click.Path(path_type=Path), metavar="JSON", help="Write what was done.")
@click.option(
    "--part",
    metavar="I/N",
    callback=_fraction,
    help="Do the I-th of N parts of a folder's cases: for arrays of jobs, each with a report of its own.",
)
@click.option(
    "--skip-existing", is_flag=True, help="Leave out cases whose result is there: go on after an interruption."
)
@_overwrite
@_quiet
@_debug
def sr(
    source: Path,
    output: Path | None,
    out_format: str,
    model: str,
    device: str,
    lookahead_tokens: int | None,
    fidelity: float | None,
    blur: str | None,
    with_preview: bool,
    uncertainty: bool,
    report_file: Path | None,
    part: tuple[int, int] | None,
    skip_existing: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Super-resolve INPUT four times in the axial plane.

    INPUT is a NIfTI file, a folder with one DICOM series, a zip file of either, or a folder of such cases. The result
    covers the same field of view, in the units of the input.
    """
    from miar_monai.api import SuperResolver
    from miar_monai.cases import find_cases
    from miar_monai.parallel import part_of, processes
    from miar_monai.report import run_report

    if overwrite and skip_existing:
        raise click.UsageError("--overwrite and --skip-existing exclude each other: give one of them.")
    if quiet:
        _say_only_errors(click.get_current_context())
    with processes() as all_of_us:
        cases = find_cases(source)
        single = len(cases) == 1 and cases[0].source == source
        as_dicom = out_format == "dicom"
        jobs = _jobs(cases, source, output, single, as_dicom)
        targets = [target for _, target in jobs] if single and not skip_existing else []
        maps = [_uncertainty_map(target) for target in targets] if uncertainty else []
        _check_outputs(targets, maps, report_file, with_preview, overwrite, as_dicom)
        jobs = part_of(jobs, part[0] - 1, part[1]) if part else jobs
        all_of_us.wait()  # with the first result until all have looked at the folder
        settings = {"lookahead_tokens": lookahead_tokens, "fidelity": fidelity, "blur": number_or_text(blur)}
        settings["uncertainty"] = uncertainty or None
        given = {name: value for name, value in settings.items() if value is not None}
        resolver = SuperResolver(model, device, progress=not quiet and all_of_us.rank == 0, **given)
        work = _Work(resolver, as_dicom, with_preview, overwrite, skip_existing, quiet)
        mine = part_of(list(enumerate(jobs)), all_of_us.rank, all_of_us.size)
        reports = all_of_us.gather(_do_all(work, mine, len(jobs), single and all_of_us.size == 1))
        failed = [report["input"] for report in reports if "error" in report]
        if all_of_us.rank == 0:
            if report_file is not None:
                with whole_file(report_file, overwrite) as file:
                    file.write_text(json.dumps(run_report(resolver, reports), indent=2) + "\n", encoding="utf-8")
            if skipped := sum("skipped" in report for report in reports):
                work.say(f"{skipped} of {len(jobs)} cases had a result already")
            if failed:
                click.echo(f"{len(failed)} of {len(jobs)} cases failed: {', '.join(failed)}", err=True)
        all_of_us.wait()  # for the report: torchrun ends all when one ends with an error
    if failed:
        click.get_current_context().exit(3)


def _do_all(work: _Work, numbered: list[tuple[int, Job]], count: int, single: bool) -> dict[int, dict[str, Any]]:
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
            reports[number] = {"input": str(case.source), "error": _sentence(error)}
            click.echo(f"error: {_sentence(error)}", err=True)
    return reports


def _say_only_errors(context: click.Context) -> None:
    """Leave the warnings of this package unsaid while a command runs."""
    ours = logging.getLogger("miar_monai")
    context.call_on_close(partial(ours.setLevel, ours.level))
    ours.setLevel(logging.ERROR)


class _Work:
    """What is done to each case, and said about it."""

    def __init__(
        self,
        resolver: SuperResolver,
        as_dicom: bool,
        with_preview: bool,
        overwrite: bool,
        skip_existing: bool,
        quiet: bool,
    ) -> None:
        self.resolver = resolver
        self.as_dicom = as_dicom
        self.with_uncertainty = bool(resolver.settings.get("uncertainty"))
        self.with_preview = with_preview
        self.overwrite = overwrite
        self.skip_existing = skip_existing
        self.quiet = quiet
        self.seconds_per_tile = 0.0
        if resolver.device.type == "cpu" and not quiet:
            self.seconds_per_tile = resolver.seconds_per_tile()

    def say(self, text: str) -> None:
        """Print to stderr; stdout is for the paths of results."""
        if text and not self.quiet:
            click.echo(text, err=True)

    def do(self, case: Case, target: Path) -> dict[str, Any]:
        """Super-resolve a case and return its report."""
        from miar_monai.cases import opened
        from miar_monai.dicom_writer import check_series_folder, source_headers
        from miar_monai.io import read_volume
        from miar_monai.preview import preview
        from miar_monai.report import case_report, summary

        pictures, maps = [_picture(target)] * self.with_preview, [_uncertainty_map(target)] * self.with_uncertainty
        if self.skip_existing and target.exists():
            return {"input": str(case.source), "output": str(target), "skipped": True}
        redo = self.overwrite or self.skip_existing  # what lies beside no result was left by a killed run
        for file in [*([] if self.overwrite else [target]), *([] if redo else [*pictures, *maps])]:
            refuse_to_overwrite(file)
        with opened(case.source) as path:
            volume = read_volume(path)
            headers = source_headers(volume) if self.as_dicom else []
            for folder in [target, *maps] if self.as_dicom else []:
                check_series_folder(folder, headers, self.overwrite or (redo and folder != target))
        if self.seconds_per_tile:
            seconds = self.seconds_per_tile * self.resolver.num_tiles(volume)
            self.say(f"{' x '.join(map(str, volume.array.shape))} voxels: about {_duration(seconds)} on the CPU")
        start = time.perf_counter()
        told = self.resolver.input_degradation(volume)
        result = self.resolver.volume(volume, told)
        seconds = time.perf_counter() - start
        for picture in pictures:
            preview(volume, result, picture, redo)
        self._write(result, target, headers, redo)
        warnings = self.resolver.domain.warnings(volume, self.resolver.preprocessed(volume).numpy())
        report = case_report(str(case.source), target, volume, result, told, seconds, self.resolver.device, warnings)
        self.say("\n".join([summary(report), *(f"warning: {sentence}" for sentence in warnings)]))
        if not self.quiet:
            click.echo(str(target))
        return report

    def _write(self, result: Volume, target: Path, headers: list[Dataset], redo: bool) -> None:
        """Write a result after what goes beside it: a case is done when its result is there."""
        from miar_monai.dicom_writer import write_series
        from miar_monai.io import parts_to_save, write_nifti
        from miar_monai.report import derivation

        for volume, quantity in parts_to_save(result):
            path, overwrite = (_uncertainty_map(target), redo) if quantity else (target, self.overwrite)
            if self.as_dicom:
                write_series(path, volume, headers, derivation(self.resolver), overwrite, quantity)
            else:
                write_nifti(path, volume.array, volume.affine, volume.dtype, overwrite)


def _duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _jobs(cases: list[Case], source: Path, output: Path | None, single: bool, as_dicom: bool) -> list[Job]:
    """Return each case with the file of its result; as DICOM, with the folder of its series.

    A result that an earlier run left among the cases is none of them.
    """
    named = output is not None and output.name.lower().endswith((".nii", ".nii.gz")) and not output.is_dir()
    if named and not single:
        raise click.UsageError(f"{source} is a folder of cases, so the output must be a folder, not {output}.")
    if named and as_dicom:
        raise click.UsageError(f"a DICOM series is written to a folder, not to {output}: give a folder.")
    if output is not None and not named and output.suffix and not output.is_dir():
        raise click.UsageError(f"{output} must be a .nii or .nii.gz file, or a folder; make a folder with a dot first.")
    if named:
        assert output is not None
        targets = [output]
    else:
        folder = output or (Path() if single else Path(f"{source.resolve().name}_sr"))
        suffix = "" if as_dicom else ".nii.gz"
        targets = [folder / case.name.with_name(f"{case.name.name}_sr{suffix}") for case in cases]
    for case, target in zip(cases, targets, strict=True):
        if target.exists() and target.samefile(case.source):
            raise click.UsageError(f"{target} is the input, which is never changed; give another output.")
    folder_of = cache(Path.resolve)  # there may be 100,000 files in one
    results = {
        folder_of(path.parent) / path.name for target in targets for path in (target, _uncertainty_map(target))
    }
    jobs = zip(cases, targets, strict=True)
    return [(case, target) for case, target in jobs if folder_of(case.source.parent) / case.source.name not in results]


def _picture(target: Path) -> Path:
    from miar_monai.io import volume_stem

    return target.with_name(f"{volume_stem(target)}.png")


def _uncertainty_map(target: Path) -> Path:
    from miar_monai.io import volume_stem

    stem = volume_stem(target)
    return target.with_name(f"{stem}_uncertainty{target.name[len(stem) :]}")


def _check_outputs(
    targets: list[Path],
    maps: list[Path],
    report_file: Path | None,
    with_preview: bool,
    overwrite: bool,
    as_dicom: bool,
) -> None:
    """Refuse what cannot be written before the work is done."""
    from miar_monai.io import check_output_folder
    from miar_monai.preview import check_preview

    if with_preview:
        check_preview()
    pictures = [_picture(target) for target in targets] if with_preview else []
    for path in [*targets, *maps, *pictures, *([report_file] if report_file else [])]:
        check_output_folder(path.parent)
        if path.is_dir() and not (as_dicom and path in [*targets, *maps]):
            raise OutputError(f"{path} is a folder: a file is written there; give another name.")
        if not overwrite:
            refuse_to_overwrite(path)


@main.command(epilog="\b\nExample:\n  miar info")
@_debug
def info() -> None:
    """Say which versions and models are installed, and where."""
    click.echo(f"miar {miar_monai.__version__} in {Path(miar_monai.__file__).parent}")
    for name in ("torch", "monai", "numpy", "nibabel", "itk"):
        click.echo(f"  {name:8} {installed(name) or 'not installed'}")
    for model in MODELS:
        try:
            bundle = find_bundle(model)
            about = metadata(bundle)
        except MiarError as error:
            click.echo(f"{model}: {error}")
            continue
        weights = weights_path(bundle)
        size = f"{weights.stat().st_size / 1e6:.0f} MB" if weights.is_file() else "missing: train the bundle first"
        click.echo(f"{model}: {about.get('name')}, version {about.get('version')}, in {bundle}")
        click.echo(f"  weights  {size}")
        click.echo(f"  use      {about.get('intended_use')}")


@main.command(epilog="\b\nExample:\n  miar doctor")
@_debug
def doctor() -> None:
    """Check packages, devices and models by using them; exit code 1 if something does not work."""
    problems = []

    def check(what: str, look: Callable[[], str]) -> None:
        try:
            click.echo(f"ok       {what}: {look()}")
        except Exception as error:
            problems.append(what)
            click.echo(f"problem  {what}: {_sentence(error)}")

    check("packages", check_packages)
    for device in devices():
        check(f"device {device}", partial(check_device, device))
    for model in MODELS:
        check(f"model {model}", partial(check_weights, model))
    if problems:
        click.echo(f"{len(problems)} problems: {', '.join(problems)}", err=True)
        click.get_current_context().exit(1)


@main.command(epilog="\b\nExamples:\n  miar label-app\n  cp -r $(miar label-app) my_app")
@_debug
def label_app() -> None:
    """Print the folder of the MONAI Label app that serves both models."""
    click.echo(str(Path(miar_monai.__file__).parent / "monailabel_app"))


@main.group()
def weights() -> None:
    """Find and verify the weights of a model."""


@weights.command("path", epilog="\b\nExample:\n  miar weights path --model brats")
@_model
@_debug
def weights_path_command(model: str) -> None:
    """Print where the weights of a model are, or belong."""
    click.echo(str(weights_path(find_bundle(model))))


@weights.command("verify", epilog="\b\nExample:\n  miar weights verify --model brats")
@_model
@_debug
def weights_verify(model: str) -> None:
    """Check that weights fit their network, are finite, and have the SHA-256 that the bundle names, if it does."""
    click.echo(check_weights(model))


@main.command(epilog=f"\b\nExample:\n  miar evaluate BraTS2021 -o runs/test --split-file split.json\n\n{_EXIT_CODES}")
@click.argument("dataset", metavar="DATASET", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@_model
@_device
@_inference
@click.option("--split-file", type=click.Path(path_type=Path), help="JSON file with the patients of each section.")
@_overwrite
@_quiet
@_debug
def evaluate(
    dataset: Path,
    output: Path,
    model: str,
    device: str,
    lookahead_tokens: int | None,
    fidelity: float | None,
    split_file: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Degrade, super-resolve and measure the test patients of DATASET: the bundle's evaluate.json.

    For its other settings call python -m monai.bundle run on that file.
    """
    from monai.bundle import run

    from miar_monai.api import choose_device

    bundle = find_bundle(model)
    given: dict[str, Any] = {
        "bundle_root": str(bundle),
        "dataset_dir": str(dataset),
        "output_dir": str(output),
        "device": str(choose_device(device)),
        "overwrite": overwrite,
        "progress": not quiet,
        "split_file": split_file and str(split_file),
        "lookahead_tokens": lookahead_tokens,
        "fidelity": fidelity,
    }
    config = str(bundle / "configs" / "evaluate.json")
    run(config_file=config, **{name: value for name, value in given.items() if value is not None})
    if not quiet:
        click.echo((output / "metrics.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(prog_name="miar")
