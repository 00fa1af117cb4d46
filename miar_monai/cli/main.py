"""The command ``miar``: super-resolve files, inspect models and the installation.

PyTorch and MONAI are imported by the commands that need them, so that ``miar info`` and ``--help`` are fast.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

import miar_monai
from miar_monai._version import __version__
from miar_monai.cli import options
from miar_monai.cli.dataset_commands import evaluate, fit_uncertainty, training_range
from miar_monai.cli.degrade import degrade
from miar_monai.cli.doctor import check_device, check_packages, check_weights, devices
from miar_monai.cli.super_resolve import sr
from miar_monai.cli.view import view
from miar_monai.errors import MiarError, SettingError, find_miar_error, sentence_for_user
from miar_monai.inference.bundle import find_bundle, locate_bundle, metadata, models, weights_path
from miar_monai.inference.packages import installed_version

__all__ = ["main"]

_INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for a program that Ctrl-C ended


class _Commands(click.Group):
    """Commands whose errors are one sentence; ``--debug`` shows the traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # those of libraries are for developers
                return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click exits quietly when the reader of a pipe leaves, as in miar info | head -1
        except KeyboardInterrupt:
            click.echo("\ninterrupted: finished files are kept, and none is half-written.", err=True)
            context.exit(_INTERRUPTED)
        except Exception as error:
            if context.meta.get("miar.debug"):
                raise
            click.echo(f"error: {sentence_for_user(error)}", err=True)
            context.exit(2 if isinstance(find_miar_error(error), SettingError) else 1)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=options.EXIT_CODES,
)
@click.version_option(__version__, message="miar %(version)s")
def main() -> None:
    """Super-resolution of MRI and CT: thinner slices, finer pixels. For research, not for clinical use.

    No internet access: nothing is downloaded or uploaded.
    """


for _command in (sr, view, degrade, evaluate, fit_uncertainty, training_range):
    main.add_command(_command)


@main.command(epilog="\b\nExample:\n  miar info")
@options.debug
def info() -> None:
    """Print the versions of packages and models, and where they are."""
    click.echo(f"miar {__version__} in {Path(miar_monai.__file__).parent}")
    for name in ("torch", "monai", "numpy", "nibabel", "itk"):
        click.echo(f"  {name:8} {installed_version(name) or 'not installed'}")
    for model in models():
        try:
            bundle, origin = locate_bundle(model)
            about = metadata(bundle)
        except MiarError as error:
            click.echo(f"{model}: {error}")
            continue
        file = weights_path(bundle)
        size = f"{file.stat().st_size / 1e6:.0f} MB" if file.is_file() else "missing: train the bundle first"
        click.echo(f"{model}: {about.get('name')}, version {about.get('version')}, in {bundle} (from {origin})")
        click.echo(f"  weights  {size}")
        click.echo(f"  use      {about.get('intended_use')}")


@main.command(epilog="\b\nExample:\n  miar doctor")
@options.debug
@click.pass_context
def doctor(context: click.Context) -> None:
    """Try packages, devices and models; exit code 1 if one of them does not work."""
    problems = []

    def check(name: str, function: Callable[[], str]) -> None:
        try:
            click.echo(f"ok       {name}: {function()}")
        except Exception as error:
            problems.append(name)
            click.echo(f"problem  {name}: {sentence_for_user(error)}")

    check("packages", check_packages)
    for device in devices():
        check(f"device {device}", partial(check_device, device))
    for model in models():
        check(f"model {model}", partial(check_weights, model))
    if problems:
        click.echo(f"{len(problems)} problems: {', '.join(problems)}", err=True)
        context.exit(1)


@main.command(epilog="\b\nExample:\n  miar demo -o demo_output")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="demo_output",
    show_default=True,
    help="Folder of the results; the files of an earlier demo are replaced.",
)
@options.model
@options.device
@click.option("--lookahead-tokens", type=int, metavar="K", default=1, show_default=True, help="Of a model with tokens.")
@options.debug
def demo(output: Path, model: str, device: str, lookahead_tokens: int) -> None:
    """Degrade and super-resolve a brain template, and compare the result with the original.

    Needs the extra demo, which contains the template (ICBM152, a T1-weighted average of brains).
    """
    from miar_monai.cli.demo import run_demo, template
    from miar_monai.inference.resolver import SuperResolver

    brain = template()
    resolver = SuperResolver(model, device, lookahead_tokens=lookahead_tokens, progress=True)
    click.echo(
        f"Super-resolving 40 slices of the ICBM152 brain on {resolver.device}; two CPU cores need up to three minutes.",
        err=True,
    )
    result = run_demo(brain, resolver, output)
    click.echo(result.table.read_text(encoding="utf-8"))
    for name, path in result._asdict().items():
        click.echo(f"{name.replace('_', ' '):15} {path}")


@main.command(epilog="\b\nExamples:\n  miar label-app\n  cp -r $(miar label-app) my_app")
@options.debug
def label_app() -> None:
    """Print the folder of the MONAI Label app that serves both models."""
    click.echo(str(Path(miar_monai.__file__).parent / "monailabel_app"))


@main.group()
def weights() -> None:
    """Locate and verify the weights of a model."""


@weights.command("path", epilog="\b\nExample:\n  miar weights path --model brats")
@options.model
@options.debug
def weights_path_command(model: str) -> None:
    """Print where the weights of a model are, or belong."""
    click.echo(str(weights_path(find_bundle(model))))


@weights.command("verify", epilog="\b\nExample:\n  miar weights verify --model brats")
@options.model
@options.debug
def weights_verify(model: str) -> None:
    """Check that weights fit their network, are finite, and have the SHA-256 in the bundle's metadata.json, if any."""
    click.echo(check_weights(model))


if __name__ == "__main__":
    main(prog_name="miar")
