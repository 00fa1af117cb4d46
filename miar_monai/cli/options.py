"""Options and texts that several commands share, and checks of option values."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = [
    "EXIT_CODES",
    "conditions_option",
    "debug",
    "device",
    "html_file",
    "inference_settings",
    "json_file",
    "model",
    "number_option",
    "numbers_option",
    "overwrite",
    "part_of_folder",
    "quiet",
    "split_file",
]

EXIT_CODES = """\b
Exit codes:
  0  all done
  1  failure; one sentence on stderr says what to do
  2  wrong use: an option, file, device or model that does not exist, or a setting out of range
  3  some cases of a folder failed and are listed; the others are done
  130  interrupted by Ctrl-C; nothing is half-written
"""


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta["miar.debug"] = value


debug = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
model = click.option(
    "--model",
    default="brats",
    show_default=True,
    metavar="brain_mri|chest_ct|PATH",
    help="brain_mri (or brats), chest_ct (or lidc), or the folder of a bundle. Bundle configs can run Python code: "
    "only use bundles that you trust.",
)
device = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]|mps", help="Device of the network."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace existing results.")
quiet = click.option("--quiet", is_flag=True, help="Print errors only.")
split_file = click.option(
    "--split-file", type=click.Path(path_type=Path), help="JSON file with the patients of each section."
)


def inference_settings(command: Callable) -> Callable:
    """Add the settings of inference that several commands have."""
    for option in (
        click.option("--fidelity", type=float, help="0, most perceptual, to 1, most faithful. [default: bundle's]"),
        click.option(
            "--lookahead-tokens",
            type=int,
            metavar="K",
            help="Tokens of a scale that may take their second choice; 2^K candidates. Without effect on an estimator. "
            "[default: bundle's]",
        ),
    ):
        command = option(command)
    return command


def part_of_folder(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Return the two numbers of ``I/N``."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", value)
    part, parts = (int(number) for number in match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise click.BadParameter(f"{value!r} must be of the form I/N with 1 <= I <= N, such as 1/8 or 8/8.")
    return part, parts


def conditions_option(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse malformed conditions on DICOM slices before a model is loaded."""
    if value:
        from miar_monai.data.dicom_select import parse_conditions

        parse_conditions(value)
    return value


def json_file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Accept only .json files, so that ``--overwrite`` cannot replace an image by the report."""
    if value is not None and value.suffix.lower() != ".json":
        raise click.BadParameter(f"{str(value)!r} must be a .json file.")
    return value


def html_file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Accept only .html files, so that ``--overwrite`` cannot replace an image by a page."""
    if value is not None and value.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{str(value)!r} must be an .html file.")
    return value


def number_option(_: click.Context, __: click.Parameter, value: str | None) -> Any:
    """Return a number if the text is one, and the text otherwise."""
    from miar_monai.inference.bundle import number_or_text

    return number_or_text(value)


def numbers_option(_: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Return one or three positive numbers, separated by commas."""
    from miar_monai.data.grid_request import axis_values

    return axis_values(str(option.name).replace("_", "-"), value)
