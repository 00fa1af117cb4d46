"""The command ``miar``: super-resolve files, look after models and the installation.

PyTorch and MONAI are imported by the commands that need them, so that ``miar info`` and ``--help`` answer at once.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

import miar_monai
from miar_monai.cli.doctor import check_device, check_packages, check_weights, devices, installed
from miar_monai.data.atomic_write import atomic_file
from miar_monai.errors import MiarError, SettingError, find_miar_error, sentence_for_user
from miar_monai.inference.bundle import find_bundle, locate_bundle, metadata, models, number_or_text, weights_path

__all__ = ["main"]

_EXIT_CODES = """\b
Exit codes:
  0  all done
  1  failure; one sentence on stderr says what to do
  2  wrong use of the command: an option, a file, a device or a model that there is not, a setting out of range
  3  some cases of a folder failed and are listed; the others are done
"""
_SR_EXAMPLES = f"""\b
Examples:
  miar sr scan.nii.gz                         writes scan_sr.nii.gz here
  miar sr dicom_series/ -o result.nii.gz --preview
  miar sr study.zip -o results --model lidc --report run.json
  miar sr patients/ -o results                every case in the folder
  miar sr patients/ -o results --skip-existing   what is missing of it, after an interruption
  torchrun --nproc_per_node=4 -m miar_monai.cli.main sr patients/ -o results
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
            click.echo(f"error: {sentence_for_user(error)}", err=True)
            ctx.exit(2 if isinstance(find_miar_error(error), SettingError) else 1)


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["miar.debug"] = value


_debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
_model = click.option(
    "--model",
    default="brats",
    show_default=True,
    metavar="brain_mri|chest_ct|PATH",
    help="The bundle: brain_mri (or brats), chest_ct (or lidc), or its folder, whose configs are run as programs.",
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


def _conditions(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what selects no slices of any series before a model is loaded."""
    if value:
        from miar_monai.data.dicom_select import parse_conditions

        parse_conditions(value)
    return value


def _json_file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Let a report have a name that no input and no result has: it replaces a file with ``--overwrite``."""
    if value is not None and value.suffix.lower() != ".json":
        raise click.BadParameter(f"{str(value)!r} is no .json file.")
    return value


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
@click.argument("source", metavar="INPUT", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A .nii or .nii.gz file, or a folder. [default: <name>_sr.nii.gz here; for a folder of cases, <name>_sr/]",
)
@click.option(
    "--series", default="", metavar="UID", help="Which series, of a DICOM folder that holds several: SeriesInstanceUID."
)
@click.option(
    "--select",
    multiple=True,
    metavar="KEYWORD=VALUE",
    callback=_conditions,
    help="Which slices, of a DICOM series that holds several volumes (echoes, b-values, time points): EchoTime=80, "
    "or EchoTime=#2 for the second value at each position. May be given several times.",
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
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    metavar="JSON",
    callback=_json_file,
    help="Write what was done, a .json file.",
)
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
    series: str,
    select: tuple[str, ...],
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
    from miar_monai.cli.jobs import Work, check_outputs, do_all, list_jobs
    from miar_monai.data.cases import find_cases
    from miar_monai.data.outputs import ResultPaths
    from miar_monai.inference.processes import part_of, processes
    from miar_monai.inference.report import run_report
    from miar_monai.inference.resolver import SuperResolver

    if overwrite and skip_existing:
        raise click.UsageError("--overwrite and --skip-existing exclude each other: give one of them.")
    _say_warnings(click.get_current_context(), quiet)
    with processes() as all_of_us:
        cases = find_cases(source)
        single = len(cases) == 1 and cases[0].source == source
        if series and not single:
            raise click.UsageError(f"{source} is a folder of cases, and a series is one of a single DICOM folder.")
        as_dicom = out_format == "dicom"
        jobs = list_jobs(cases, source, output, single, as_dicom)
        results = [ResultPaths.of(target) for _, target in jobs] if single and not skip_existing else []
        check_outputs(results, uncertainty, report_file, with_preview, overwrite, as_dicom)
        jobs = part_of(jobs, part[0] - 1, part[1]) if part else jobs
        all_of_us.wait()  # with the first result until all have looked at the folder
        settings = {"lookahead_tokens": lookahead_tokens, "fidelity": fidelity, "blur": number_or_text(blur)}
        settings["uncertainty"] = uncertainty or None
        given = {name: value for name, value in settings.items() if value is not None}
        progress = not quiet and all_of_us.rank == 0
        make_resolver = partial(SuperResolver, model, device, progress=progress, **given)
        work = Work(make_resolver, as_dicom, with_preview, overwrite, skip_existing, quiet, series, select)
        if not single:  # a single case is read first, since a wrong file is found at once
            _ = work.resolver
        mine = part_of(list(enumerate(jobs)), all_of_us.rank, all_of_us.size)
        reports = all_of_us.gather(do_all(work, mine, len(jobs), single and all_of_us.size == 1))
        failed = [report["input"] for report in reports if "error" in report]
        if all_of_us.rank == 0:
            if report_file is not None:
                with atomic_file(report_file, overwrite) as file:
                    file.write_text(json.dumps(run_report(work.resolver, reports), indent=2) + "\n", encoding="utf-8")
            if skipped := sum("skipped" in report for report in reports):
                work.say(f"{skipped} of {len(jobs)} cases had a result already")
            if failed:
                click.echo(f"{len(failed)} of {len(jobs)} cases failed: {', '.join(failed)}", err=True)
        all_of_us.wait()  # for the report: torchrun ends all when one ends with an error
    if failed:
        click.get_current_context().exit(3)


def _say_warnings(context: click.Context, quiet: bool) -> None:
    """Let the warnings of this package look like those of the command while it runs, or leave them unsaid."""
    ours, on_stderr = logging.getLogger("miar_monai"), logging.StreamHandler()
    on_stderr.setFormatter(logging.Formatter("warning: %(message)s"))
    on_stderr.setLevel(logging.ERROR if quiet else logging.WARNING)
    context.call_on_close(partial(ours.removeHandler, on_stderr))
    ours.addHandler(on_stderr)


@main.command(epilog="\b\nExample:\n  miar info")
@_debug
def info() -> None:
    """Say which versions and models are installed, and where."""
    click.echo(f"miar {miar_monai.__version__} in {Path(miar_monai.__file__).parent}")
    for name in ("torch", "monai", "numpy", "nibabel", "itk"):
        click.echo(f"  {name:8} {installed(name) or 'not installed'}")
    for model in models():
        try:
            bundle, origin = locate_bundle(model)
            about = metadata(bundle)
        except MiarError as error:
            click.echo(f"{model}: {error}")
            continue
        weights = weights_path(bundle)
        size = f"{weights.stat().st_size / 1e6:.0f} MB" if weights.is_file() else "missing: train the bundle first"
        click.echo(f"{model}: {about.get('name')}, version {about.get('version')}, in {bundle} (from {origin})")
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
            click.echo(f"problem  {what}: {sentence_for_user(error)}")

    check("packages", check_packages)
    for device in devices():
        check(f"device {device}", partial(check_device, device))
    for model in models():
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

    from miar_monai.inference.resolver import choose_device

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
    # the workflow logs every step, and errors, which the command says itself, in the words of Python
    click.get_current_context().call_on_close(partial(logging.disable, logging.root.manager.disable))
    logging.disable(logging.CRITICAL if quiet else logging.INFO)
    run(config_file=config, **{name: value for name, value in given.items() if value is not None})
    if not quiet:
        click.echo((output / "metrics.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(prog_name="miar")
