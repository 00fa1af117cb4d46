"""Commands that work on a data set: ``miar evaluate``, ``miar fit-uncertainty`` and ``miar training-range``."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miar_monai.cli import options
from miar_monai.inference.bundle import find_bundle

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["evaluate", "fit_uncertainty", "training_range"]

_dataset = click.argument("dataset", metavar="DATASET", type=click.Path(exists=True, path_type=Path))
_contrasts = click.option("--contrasts", metavar="C1,C2", help="Contrasts of a BraTS folder. [default: bundle's]")


@click.command(
    epilog=f"\b\nExample:\n  miar evaluate BraTS2021 -o runs/test --split-file split.json\n\n{options.EXIT_CODES}"
)
@click.argument("dataset", metavar="DATASET", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@options.model
@options.device
@options.inference_settings
@options.split_file
@options.overwrite
@options.quiet
@options.debug
@click.pass_context
def evaluate(
    context: click.Context, dataset: Path, output: Path, model: str, device: str, quiet: bool, **settings: Any
) -> None:
    """Degrade, super-resolve and measure the test patients of DATASET, as the bundle's evaluate.json does.

    python -m monai.bundle run has its other settings.
    """
    from monai.bundle import run

    from miar_monai.inference.devices import choose_device

    bundle = find_bundle(model)
    # the workflow logs each step, and also errors, which the command reports itself
    _disable_logging(context, logging.CRITICAL if quiet else logging.INFO)
    run(
        config_file=str(bundle / "configs" / "evaluate.json"),
        bundle_root=str(bundle),
        dataset_dir=str(dataset),
        output_dir=str(output),
        device=str(choose_device(device)),
        progress=not quiet,
        **{
            name: str(value) if isinstance(value, Path) else value
            for name, value in settings.items()
            if value is not None
        },
    )
    if not quiet:
        click.echo((output / "metrics.md").read_text(encoding="utf-8"))


@click.command(
    epilog="\b\nExample:\n  miar training-range BraTS2021 --model bundles/miar_brats --split-file split.json"
)
@_dataset
@options.model
@options.split_file
@_contrasts
@options.debug
def training_range(dataset: Path, model: str, split_file: Path | None, contrasts: str | None) -> None:
    """Measure the training patients of DATASET and print the training_range for the bundle's metadata.json.

    Inputs are compared with it at inference. Factors and spacings are those of all degradations that the network was
    trained with. All volumes of the section are read whole.
    """
    from miar_monai.cli.training_range import training_range

    bundle, config = _evaluate_config(model, dataset, split_file, contrasts, section="training")
    click.echo(json.dumps(training_range(bundle, config), indent=4))


@click.command(
    epilog="\b\nExample:\n  miar fit-uncertainty BraTS2021 --model bundles/miar_brats --split-file split.json"
)
@_dataset
@options.model
@options.device
@options.split_file
@_contrasts
@click.option("--every", type=click.IntRange(1), default=4, show_default=True, help="Use every n-th slice.")
@click.option("--num-slices", type=click.IntRange(1), help="Central slices of each volume. [default: bundle's]")
@options.debug
@click.pass_context
def fit_uncertainty(
    context: click.Context,
    dataset: Path,
    model: str,
    device: str,
    split_file: Path | None,
    contrasts: str | None,
    every: int,
    num_slices: int | None,
) -> None:
    """Fit the error model to the validation patients of DATASET and print it for the bundle's source.json.

    Also prints how well each predictor ranks the errors. Needs the extra bench (scikit-learn).
    """
    from miar_monai.cli.fit_uncertainty import fit_report
    from miar_monai.inference.devices import choose_device

    settings: dict[str, Any] = {"section": "validation", "device": str(choose_device(device)), "metrics": ["PSNR"]}
    if num_slices is not None:
        settings["num_slices"] = num_slices
    bundle, config = _evaluate_config(model, dataset, split_file, contrasts, **settings)
    _disable_logging(context, logging.WARNING)  # the fit adds noise, of which the inferer warns
    click.echo(fit_report(bundle, config, every))


def _disable_logging(context: click.Context, level: int) -> None:
    """Disable logging up to a level until the command ends."""
    context.call_on_close(partial(logging.disable, logging.root.manager.disable))
    logging.disable(level)


def _evaluate_config(
    model: str, dataset: Path, split_file: Path | None, contrasts: str | None, **settings: Any
) -> tuple[str, ConfigParser]:
    """Return the folder of a bundle and its ``evaluate.json`` for a data set."""
    from miar_monai.cli.workflow import read_config, with_contrasts

    bundle = str(find_bundle(model))
    settings = {"dataset_dir": str(dataset), "progress": False, **settings}
    if split_file is not None:
        settings["split_file"] = str(split_file)
    return bundle, read_config(bundle, with_contrasts(settings, contrasts.split(",") if contrasts else None))
