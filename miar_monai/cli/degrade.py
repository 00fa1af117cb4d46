"""``miar degrade``: make thick slices and coarse pixels."""

from __future__ import annotations

from pathlib import Path

import click

from miar_monai.cli import options

__all__ = ["degrade"]

_EXAMPLES = """\b
Examples:
  miar degrade scan.nii.gz                                4 times coarser in the axial plane, as in the paper
  miar degrade scan.nii.gz --factor 1,1,5 --profile gaussian --blur 0       slices 5 times as thick
  miar degrade scan.nii.gz --spacing 1,1,5 --thickness 0.8 --profile gaussian --blur 0
                                                          slices of 4 mm, 5 mm apart
"""


@click.command(epilog=f"{_EXAMPLES}\n\n{options.EXIT_CODES}")
@click.argument("source", metavar="SCAN", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File; its suffix is its format. [default: <SCAN>_lr.nii.gz]",
)
@click.option(
    "--factor",
    callback=options.numbers_option,
    metavar="F[,F,F]",
    help="Voxel size relative to that of SCAN: one number, or three (left-right, posterior-anterior,"
    " inferior-superior). [default: 4 in the axial plane]",
)
@click.option(
    "--spacing",
    callback=options.numbers_option,
    metavar="MM[,MM,MM]",
    help="Voxel spacing in millimeters, instead of --factor.",
)
@click.option(
    "--profile",
    type=click.Choice(["bicubic", "slr", "gaussian", "box"]),
    default="bicubic",
    show_default=True,
    help="Point spread function of a voxel.",
)
@click.option(
    "--thickness",
    type=float,
    default=1.0,
    show_default=True,
    help="Full width at half maximum of the profile (not for bicubic), relative to the voxel spacing.",
)
@click.option(
    "--blur",
    type=float,
    default=1.0,
    show_default=True,
    help="Standard deviation of the blur, in new voxels.",
)
@click.option(
    "--noise",
    type=float,
    default=0.0,
    show_default=True,
    help="Standard deviation of noise, over the range.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@options.overwrite
@options.debug
def degrade(
    source: Path,
    output: Path | None,
    factor: tuple[float, ...] | None,
    spacing: tuple[float, ...] | None,
    profile: str,
    thickness: float,
    blur: float,
    noise: float,
    seed: int,
    overwrite: bool,
) -> None:
    """Resample SCAN to larger voxels, with the degradation of the training data.

    Center, orientation and units stay the same. The path of the result is printed.
    """
    from miar_monai.data.cases import read_case
    from miar_monai.data.formats import check_output_suffix
    from miar_monai.data.io import write_volume
    from miar_monai.data.outputs import check_output, result_path
    from miar_monai.transforms.degrade import degrade_volume

    if factor and spacing:
        raise click.UsageError("--factor and --spacing are given, but only one of them is possible; leave one out.")
    output = output or result_path(source, "", postfix="lr")
    check_output_suffix(output)
    check_output(output, overwrite)
    volume = read_case(source)
    grid = volume.grid
    if spacing:
        wanted = grid.by_voxel_axis(spacing)
        factors = [round(new / old, 6) for new, old in zip(wanted, grid.spacing.tolist(), strict=True)]
    elif factor:
        factors = list(grid.by_voxel_axis(factor))
    else:
        factors = list(grid.by_voxel_axis([1.0 if axis == grid.normal_axis else 4.0 for axis in range(3)]))
    coarse = degrade_volume(volume, factors, profile, thickness, blur, noise, seed)
    click.echo(write_volume(output, coarse, overwrite))
