"""The command ``miar sr``."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import click

from miar_monai.cli import options

__all__ = ["sr"]

_EXAMPLES = f"""\b
Examples:
  miar sr scan.nii.gz                         writes scan_sr.nii.gz here
  miar sr scan.nii.gz --isotropic             all axes get the smallest voxel spacing
  miar sr scan.nii.gz --spacing 0.5,0.5,1     or --spacing 1, --factor 2, --factor 1,1,5
  miar sr dicom_series/ -o result.nii.gz --preview
  miar sr scan.nii.gz --html --uncertainty    also a page to look at, scan_sr.html
  miar sr study.zip -o results --model chest_ct --report run.json
  miar sr patients/ -o results                every case in the folder
  miar sr patients/ -o results --skip-existing   only cases without a result, after an interruption
  torchrun --nproc_per_node=4 -m miar_monai sr patients/ -o results
                                              shared by four processes, each with a GPU of its own
  miar sr scan.nii.gz --labels seg.nii.gz     also writes scan_sr_labels.nii.gz
  miar sr scan.mgz -o thin.nrrd               from and to the formats of FreeSurfer, 3D Slicer and ITK
  miar sr dicom_series/ --out-format dicom    writes the series dicom_series_sr/

{options.EXIT_CODES}"""


@click.command(epilog=_EXAMPLES)
@click.argument("source", metavar="INPUT", type=click.Path(exists=True, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="A file (.nii.gz, .nii, .mgz, .mgh, .nrrd or .mha), or a folder. [default: <name>_sr.nii.gz here; for a folder"
    " of cases, <name>_sr/]",
)
@click.option("--series", default="", metavar="UID", help="SeriesInstanceUID, for a DICOM folder with several series.")
@click.option(
    "--select",
    multiple=True,
    metavar="KEYWORD=VALUE",
    callback=options.conditions_option,
    help="Slices to use from a DICOM series with several volumes (echoes, phases, b-values, time points) or stacks: "
    "EchoTime=80, StackID=2, or EchoTime=#2 for the second value at each position. May be given several times.",
)
@click.option(
    "--out-format",
    type=click.Choice(["nifti", "nrrd", "mgz", "mha", "dicom"]),
    default="nifti",
    show_default=True,
    help="Format of results in a folder; a file has that of its suffix. dicom writes a derived series, a folder"
    " <name>_sr, in the study of INPUT, which must be a DICOM series.",
)
@click.option("--isotropic", is_flag=True, help="Give all axes the smallest voxel spacing of INPUT.")
@click.option(
    "--spacing",
    callback=options.numbers_option,
    metavar="MM[,MM,MM]",
    help="Voxel spacing of the result in millimeters: one number, or three (left-right, posterior-anterior,"
    " inferior-superior).",
)
@click.option(
    "--factor",
    callback=options.numbers_option,
    metavar="F[,F,F]",
    help="How many times finer the axes become, likewise: 1 to 8, whole or not. [default: 4 in the axial plane]",
)
@click.option(
    "--slice-thickness",
    type=float,
    metavar="MM",
    help="Thickness of the slices of INPUT, if it is not their distance. [default: of the DICOM headers]",
)
@click.option(
    "--slice-profile",
    type=click.Choice(["slr", "gaussian", "box"]),
    help="Profile of the slices of INPUT: that of selective pulses (Shinnar-Le Roux) in MRI, a Gaussian as in helical"
    " CT, or a box. [default: bundle's]",
)
@options.model
@options.device
@options.inference_settings
@click.option(
    "--blur",
    metavar="auto|VOXELS",
    callback=options.number_option,
    help="Blur of INPUT, as a standard deviation in its voxels; auto measures it. [default: bundle's]",
)
@click.option(
    "--acquired-spacing",
    callback=options.numbers_option,
    metavar="MM[,MM,MM]",
    help="Voxel spacing that the scanner acquired, if it interpolated INPUT: for all axes with closer voxels, or for "
    "left-right, posterior-anterior and inferior-superior. INPUT is brought back to it first.",
)
@click.option(
    "--guide",
    type=click.Path(exists=True, path_type=Path),
    help="Another contrast of the same patient, such as the T1 of a T2, on any grid: a file, a folder with a DICOM "
    "series, or a zip file.",
)
@click.option(
    "--labels",
    type=click.Path(exists=True, path_type=Path),
    help="A label map of INPUT, such as a segmentation, in a file: carried to the voxels of the result as"
    " <name>_sr_labels.nii.gz, with smooth borders and the same volumes.",
)
@click.option("--preview", "with_preview", is_flag=True, help="Also draw a picture of each result, <name>_sr.png.")
@click.option(
    "--html",
    "with_page",
    is_flag=True,
    help="Also write a page that shows INPUT and result in a browser, without a network: <name>_sr.html.",
)
@click.option(
    "--uncertainty",
    is_flag=True,
    help="Also write the expected absolute error per voxel, in the units of INPUT: <name>_sr_uncertainty.nii.gz.",
)
@click.option(
    "--samples",
    type=int,
    metavar="N",
    help="Also draw N samples, at least 2, of what the true image may be, and write the mean, the standard deviation"
    " and the limits of a 90 % interval of each voxel: <name>_sr_mean.nii.gz, _std, _p05, _p95. The model must sample.",
)
@click.option("--seed", type=int, metavar="SEED", help="Seed of the samples. [default: bundle's, 0]")
@click.option("--save-samples", is_flag=True, help="Also write the samples: <name>_sr_sample_01.nii.gz, ...")
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    metavar="JSON",
    callback=options.json_file,
    help="Write model, settings, versions, geometry and warnings to a .json file.",
)
@click.option(
    "--part",
    metavar="I/N",
    callback=options.part_of_folder,
    help="Process the I-th of N parts of a folder: for job arrays, each job with a report of its own.",
)
@click.option("--skip-existing", is_flag=True, help="Skip cases that have a result: resume after an interruption.")
@options.overwrite
@options.quiet
@options.debug
@click.pass_context
def sr(context: click.Context, **arguments: Any) -> None:
    """Super-resolve INPUT: four times in the axial plane, or to the voxels that you ask for.

    INPUT is a file (NIfTI, MGH, NRRD, MetaImage or enhanced DICOM), a folder with one DICOM series, a zip file of
    either, or a folder of such cases. The result covers the same field of view, in the units of the input.
    """
    from miar_monai.cli.jobs import Request
    from miar_monai.cli.runner import run

    request = Request(**arguments, debug=context.meta["miar.debug"])
    _print_warnings(context, request.quiet)
    if run(request):
        context.exit(3)


def _print_warnings(context: click.Context, quiet: bool) -> None:
    """Print the warnings of this package to stderr until the command ends; with ``quiet``, errors only."""
    package_logger, handler = logging.getLogger("miar_monai"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.ERROR if quiet else logging.WARNING)
    context.call_on_close(partial(package_logger.removeHandler, handler))
    package_logger.addHandler(handler)
