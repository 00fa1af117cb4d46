"""What a browser draws of the page of a real volume, and the reference that it is compared with.

    PYTHONPATH=tests python -m helpers.page_pictures

draws the reference, ``tests/visualize/page.png``, again, after a change that is meant. The input is the ICBM152 brain
of ``miar demo`` at a quarter of its resolution, the result the brain itself, and the map their absolute difference. No
model takes part, so new weights leave the reference as it is.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from benchmarks.browser import browser
from miar_monai.cli.demo import degrade, template
from miar_monai.data.io import read_volume
from miar_monai.visualize.page import write_page

if TYPE_CHECKING:
    from benchmarks.browser import Browser
    from miar_monai.data.volume import Volume

REFERENCE = Path(__file__).parents[1] / "visualize" / "page.png"

STATES = {"result": (100, 0), "input": (0, 0), "map": (100, 1)}
"""The states of the page by their names: the place of the slider, and the number of the overlay."""

WINDOW = (700, 600)
"""Width and height of the window in pixels."""

_SHRINKING = 3  # what another version of Chromium draws a pixel aside remains similar


def brain_pair(folder: Path) -> tuple[Volume, Volume]:
    """Return 40 slices of the brain at a quarter of its resolution, and as they are with a map of the difference."""
    sr, lr = map(read_volume, degrade(template(), folder))
    repeated = np.repeat(np.repeat(lr.array, 4, axis=0), 4, axis=1)
    return lr, sr._replace(uncertainty=abs(repeated - sr.array))


_POSITION = re.compile(r"([\d.]+) mm (right|left), ([\d.]+) mm (anterior|posterior), ([\d.]+) mm (superior|inferior)")


def place(page: Browser) -> tuple[float, float, float]:
    """Return the position of the crosshair that the page states, in millimeters of RAS+."""
    text = page.value("position.textContent")
    found = _POSITION.match(text)
    assert found, text
    x, right, y, front, z, up = found.groups()
    signs = (right == "right", front == "anterior", up == "superior")
    left, back, down = (float(mm) * (1 if sign else -1) for mm, sign in zip((x, y, z), signs, strict=True))
    return left, back, down


def choose_planes(page: Browser, planes: int) -> None:
    """Show the axial (0), the coronal (1) or the sagittal plane (2), or all (3)."""
    page.value(f"planes.value = '{planes}'; planes.dispatchEvent(new Event('change')); 1")


def choose(page: Browser, state: str) -> None:
    """Bring the page into one of its `STATES`."""
    share, number = STATES[state]
    page.value(f"share.value = {share}; overlay.selectedIndex = {number}; share.dispatchEvent(new Event('input')); 1")


def drawn(page: Browser, state: str) -> np.ndarray:
    """Return the picture of a state of the page, shrunk by averaging, (rows, columns, 3), in levels from 0 to 255."""
    choose(page, state)
    return np.asarray(Image.fromarray(page.picture().astype(np.uint8)).reduce(_SHRINKING), dtype=np.float32)


def reference() -> dict[str, np.ndarray]:
    """Return the pictures of the reference by the names of their states."""
    pictures = np.asarray(Image.open(REFERENCE), dtype=np.float32)
    return dict(zip(STATES, np.split(pictures, len(STATES)), strict=True))


def main() -> None:
    """Draw the reference: the pictures of all states, one below the other."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, browser(Path(folder, "profile")) as chromium:
        chromium.open(write_page(Path(folder, "page.html"), *brain_pair(Path(folder))), *WINDOW)
        pictures = np.concatenate([drawn(chromium, state) for state in STATES])
    Image.fromarray(pictures.astype(np.uint8)).save(REFERENCE, optimize=True)


if __name__ == "__main__":
    main()
