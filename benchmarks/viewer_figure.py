"""The figure of the page that ``miar sr --html`` writes, in headless Chromium; ``make viewer-figure`` draws it.

    python -m benchmarks.viewer_figure [--output docs/images/viewer.png] [--model brats] [--device auto] \
        [--num_slices 60] [--overwrite True]

The input is the ICBM152 brain of ``miar demo`` at a quarter of its resolution, the overlay its expected error. Needs
the extra demo and Chromium; a CPU takes about a minute.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.browser import CHROMIUM, browser
from miar_monai.cli.demo import degrade, template
from miar_monai.cli.jobs import Request
from miar_monai.cli.runner import run
from miar_monai.data.atomic_write import atomic_file
from miar_monai.data.outputs import check_output
from miar_monai.errors import ConfigurationError, report_errors_in_one_sentence
from miar_monai.inference.bundle import check_switches

__all__ = ["viewer_figure"]


def viewer_figure(
    output: str = "docs/images/viewer.png",
    model: str = "brats",
    device: str = "auto",
    num_slices: int = 60,
    overwrite: bool = False,
) -> Path:
    """Draw the whole page of the ICBM152 brain, with the expected error as an overlay.

    Args:
        output: the PNG.
        model: as in `miar_monai.inference.resolver.super_resolve`.
        device: as there.
        num_slices: central axial slices of the brain.
        overwrite: replace an existing picture.

    Raises:
        ConfigurationError: if there is no Chromium.
    """
    check_switches(overwrite=overwrite)
    if CHROMIUM is None:
        raise ConfigurationError(
            "there is no Chromium on the PATH, but the figure is what it draws of the page; install it (apt install"
            " chromium)."
        )
    check_output(output, overwrite)
    with TemporaryDirectory() as folder:
        _, low_resolution = degrade(template(), folder, num_slices)
        scan = low_resolution.rename(Path(folder, "icbm152.nii.gz"))
        result = Path(folder, "icbm152_sr.nii.gz")
        run(Request(scan, result, model=model, device=device, uncertainty=True, with_page=True, quiet=True))
        with browser(Path(folder, "profile")) as chromium:
            chromium.open(result.with_name("icbm152_sr.html"))
            chromium.press("e")
            picture = chromium.whole_page()
    with atomic_file(output, overwrite) as part:
        part.write_bytes(picture)
    return Path(output)


if __name__ == "__main__":
    import fire

    report_errors_in_one_sentence()
    fire.Fire(viewer_figure)
