"""Pictures of the page in a browser, compared with a reference, `helpers.page_pictures`.

They are compared after shrinking, by the mean absolute difference in levels of 255, so that edges and letters which
another version of Chromium or of its software renderer draws a little differently do not matter. Each mistake of
`SCRIPT_MISTAKES` and `VOLUME_MISTAKES`, made on purpose, exceeds the tolerance more than twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures of the browser are read by Pillow, of the extra demo")
pytest.importorskip("nilearn", reason="the brain is part of nilearn, of the extra demo")

from helpers.page_pictures import WINDOW, brain_pair, choose, choose_planes, drawn, place, reference

from benchmarks.browser import CHROMIUM, browser
from miar_monai.visualize import page as page_module
from miar_monai.visualize.page import write_page

if TYPE_CHECKING:
    from benchmarks.browser import Browser
    from miar_monai.data.volume import Volume

TOLERANCE = 0.8  # levels of 255; a shift by a pixel of the screen makes 1.0 to 2.3
BRIGHT = 0.55  # of the window: tissue, but not the letters of the directions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def moved(volume: Volume, *millimeters: float) -> Volume:
    affine = volume.affine.copy()
    affine[:3, 3] += millimeters
    return volume._replace(affine=affine)


def flipped(volume: Volume, axis: int) -> Volume:
    assert volume.uncertainty is not None
    return volume._replace(array=np.flip(volume.array, axis), uncertainty=np.flip(volume.uncertainty, axis))


def swapped(volume: Volume) -> Volume:
    """Exchange two axes of the voxels, but not of their positions."""
    return volume._replace(array=volume.array.swapaxes(0, 1))


Change = Callable[["Volume", "Volume"], tuple["Volume", "Volume"]]
SCRIPT_MISTAKES = {
    "the left of the patient on the left": ("isRadiologicalConvention: true", "isRadiologicalConvention: false"),
    "the nose on the right": ("sagittalNoseLeft: true", "sagittalNoseLeft: false"),
    "a window wider by a tenth": ("cal_max: high", "cal_max: 1.1 * high"),
    "a wider window of the input": ("cal_max: high", "cal_max: index === INPUT ? 1.1 * high : high"),
    "a slider that runs backwards": ("opacity = 1 - share", "opacity = share"),
}
VOLUME_MISTAKES: dict[str, Change] = {
    "an input aside by half a voxel": lambda lr, sr: (moved(lr, 2, 0, 0), sr),
    "a result aside by two voxels": lambda lr, sr: (lr, moved(sr, 0, 2, 0)),
    "a result flipped from left to right": lambda lr, sr: (lr, flipped(sr, 0)),
    "a result flipped from front to back": lambda lr, sr: (lr, flipped(sr, 1)),
    "a result upside down": lambda lr, sr: (lr, flipped(sr, 2)),
    "an input with swapped axes": lambda lr, sr: (swapped(lr), sr),
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; install it (apt install chromium)")
    with browser(tmp_path_factory.mktemp("picture") / "profile") as found:
        yield found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Volume, Volume]:
    return brain_pair(tmp_path_factory.mktemp("brain"))


def differences(chromium: Browser, page: Path) -> dict[str, float]:
    """Return the mean absolute difference of each state of a page from the reference."""
    chromium.open(page, *WINDOW)
    return {state: float(abs(drawn(chromium, state) - picture).mean()) for state, picture in reference().items()}


def test_the_page_looks_as_the_reference(chromium: Browser, pair: tuple[Volume, Volume], tmp_path: Path) -> None:
    found = differences(chromium, write_page(tmp_path / "a.html", *pair))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("mistake", SCRIPT_MISTAKES)
def test_mistakes_of_the_script_are_seen(
    mistake: str, chromium: Browser, pair: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = SCRIPT_MISTAKES[mistake]
    folder = Path(shutil.copytree(str(files("miar_monai.visualize") / "viewer"), tmp_path / "viewer"))
    script = (folder / "page.js").read_text(encoding="utf-8")
    assert script.count(right) == 1
    (folder / "page.js").write_text(script.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(page_module, "files", lambda _: tmp_path)
    found = differences(chromium, write_page(tmp_path / "a.html", *pair))
    assert max(found.values()) > 2 * TOLERANCE, found


@pytest.mark.parametrize("mistake", VOLUME_MISTAKES)
def test_mistakes_of_the_volumes_are_seen(
    mistake: str, chromium: Browser, pair: tuple[Volume, Volume], tmp_path: Path
) -> None:
    found = differences(chromium, write_page(tmp_path / "a.html", *VOLUME_MISTAKES[mistake](*pair)))
    assert max(found.values()) > 2 * TOLERANCE, found


def ends(marked: np.ndarray) -> np.ndarray:
    """Return the first and the last marked row and column, (2, 2)."""
    return np.array([np.flatnonzero(marked.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)])


def test_the_crosshair_is_at_the_millimeters_that_the_page_states(
    chromium: Browser, pair: tuple[Volume, Volume], tmp_path: Path
) -> None:
    _, sr = pair
    chromium.open(write_page(tmp_path / "a.html", *pair), *WINDOW)
    white = chromium.value("white.valueAsNumber")
    for key, times in (("ArrowLeft", 23), ("ArrowDown", 31), ("PageUp", 7)):
        for _ in range(times):
            chromium.press(key)
    position = place(chromium)
    i, j, k = np.rint(np.linalg.inv(sr.affine) @ [*position, 1])[:3].astype(int)
    for plane, (across, down), cut in ((0, (0, 1), np.s_[:, :, k]), (1, (0, 2), np.s_[:, j]), (2, (1, 2), np.s_[i])):
        choose_planes(chromium, plane)
        chromium.press("c")
        rows, columns = ends(chromium.picture().max(axis=2) > BRIGHT * 255)
        chromium.press("c")
        picture = chromium.picture()
        orange = picture[..., 0] - picture[..., 2] > 60
        sums = orange.sum(axis=0), orange.sum(axis=1)
        found = [np.flatnonzero(line > line.max() / 2).mean() for line in sums]
        tissue = ends(sr.array[cut] > BRIGHT * white)
        for axis, pixel, (first, last), (low, high) in zip((across, down), found, (columns, rows), tissue, strict=True):
            share = (pixel + 0.5 - first) / (last + 1 - first)  # from the right, anterior and superior
            borders = sr.affine[axis, axis] * np.array([low - 0.5, high + 0.5]) + sr.affine[axis, 3]
            millimeters = borders.max() - share * np.ptp(borders)
            assert millimeters == pytest.approx(position[axis], abs=0.5), (plane, axis)


def test_the_input_is_coarser_and_the_map_is_in_color(
    chromium: Browser, pair: tuple[Volume, Volume], tmp_path: Path
) -> None:
    chromium.open(write_page(tmp_path / "a.html", *pair), *WINDOW)
    choose_planes(chromium, 0)
    chromium.press("c")
    steps: dict[str, int] = {}
    colored: dict[str, float] = {}
    for state in ("result", "input", "map"):
        choose(chromium, state)
        picture = chromium.picture()
        (top, bottom), (left, right) = ends(picture[..., 0] > BRIGHT * 255)
        steps[state] = int((abs(np.diff(picture[top:bottom, left:right, 0], axis=1)) > 2).sum(axis=1).max())
        colored[state] = float((np.ptp(picture, axis=2) > 30).mean())
    assert 20 < steps["input"] <= 196 / 4  # borders between voxels, of 196 mm
    assert steps["result"] > 2 * steps["input"]
    assert colored["map"] > 0.1
    assert max(colored["result"], colored["input"]) == 0
