"""``miar view``: a page that shows a result beside its input."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from miar_monai.cli import options

if TYPE_CHECKING:
    from miar_monai.data.volume import Volume

__all__ = ["view"]

_EXAMPLES = """\b
Examples:
  miar view scan.nii.gz scan_sr.nii.gz                     writes scan_sr.html here
  miar view scan.nii.gz scan_sr.nii.gz --map scan_sr_uncertainty.nii.gz --report run.json
"""


@click.command(epilog=f"{_EXAMPLES}\n\n{options.EXIT_CODES}")
@click.argument("lr", metavar="LR", type=click.Path(path_type=Path))
@click.argument("sr", metavar="SR", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    callback=options.html_file,
    help="An .html file. [default: <SR>.html here]",
)
@click.option(
    "--map",
    "map_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Map on the voxels of SR, as an overlay: <name>_sr_uncertainty.nii.gz, <name>_sr_std.nii.gz. Can be repeated.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    metavar="JSON",
    help="Report of the run that made SR, by miar sr --report: the page then names the model and the warnings.",
)
@options.overwrite
@options.debug
def view(
    lr: Path, sr: Path, output: Path | None, map_files: tuple[Path, ...], report_file: Path | None, overwrite: bool
) -> None:
    """Write a page that shows the input LR and the result SR in a browser, in three planes, with a slider between them.

    The page is one file and needs no network. LR and SR are files, or folders with a DICOM series. The path of the page
    is printed.
    """
    from miar_monai.data.cases import read_case
    from miar_monai.data.formats import case_stem
    from miar_monai.data.outputs import check_output
    from miar_monai.visualize.page import write_page

    output = output or Path(f"{case_stem(sr)}.html")
    check_output(output, overwrite)
    facts, warnings = _reported(report_file, sr) if report_file else ({}, [])
    volume, result = read_case(lr), read_case(sr)
    maps = _maps([read_case(file) for file in map_files], result)
    click.echo(write_page(output, volume, result, facts, warnings, overwrite, maps))


def _maps(volumes: Sequence[Volume], sr: Volume) -> dict[str, Volume]:
    """Return maps on the voxels of a result by what they show; a second one of a kind by the name of its file."""
    from miar_monai.data.geometry import corner_distance
    from miar_monai.data.volume import quantity_in
    from miar_monai.errors import GeometryError

    maps: dict[str, Volume] = {}
    for volume in volumes:
        if volume.array.shape != sr.array.shape or corner_distance(volume.affine, sr.affine, sr.array.shape) > 0.01:
            raise GeometryError(
                f"{volume.path} has other voxels than {sr.path}: a map on the voxels of the result is needed; give that"
                " of this result."
            )
        quantity = quantity_in(volume)
        maps[volume.path.name if quantity in maps else quantity] = volume
    return maps


def _reported(file: Path, sr: Path) -> tuple[dict[str, str], list[str]]:
    """Return what a report says of the case whose result has the name of SR, and its warnings."""
    from miar_monai.errors import ConfigurationError, in_one_sentence
    from miar_monai.inference.report import case_facts

    advice = "a file that miar sr --report wrote is needed; give another one, or leave the option out."
    with in_one_sentence(ConfigurationError, f"{file} is not the report of a run", advice):
        report = json.loads(file.read_text(encoding="utf-8"))
        for case in report["cases"]:
            if "after" in case and Path(case["output"]).name == sr.name:  # not a case that failed or was skipped
                return case_facts(case, report["model"]), list(case["warnings"])
    raise ConfigurationError(
        f"{file} has no case with the result {sr.name}: the report of the run that wrote it is needed; give that one,"
        " or leave the option out."
    )
