"""The page of a result as a browser shows it: controls, keys and mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from nibabel.affines import apply_affine

pytest.importorskip("PIL", reason="pictures of the browser are read by Pillow, of the extra demo")

from helpers.page_pictures import choose_planes, place

from benchmarks.browser import CHROMIUM, browser
from miar_monai.data.io import Volume
from miar_monai.visualize.page import write_page

if TYPE_CHECKING:
    from benchmarks.browser import Browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Return a browser with the page of a phantom: bright on the patient's right, fine stripes in the result only."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; install it (apt install chromium)")
    folder = tmp_path_factory.mktemp("page")
    fine = np.zeros((64, 48, 20), np.float32)
    fine[4:32, 4:44, 2:18] = 400
    fine[32:60, 4:44, 2:18] = 800
    fine[4:60:2, 4:44, 2:18] += 200
    coarse = fine.reshape(16, 4, 12, 4, 20).mean(axis=(1, 3))
    affine = np.diag([1.0, 1, 2, 1])
    affine[:3, 3] = -31.5, -23.5, -19
    coarser = affine @ np.diag([4.0, 4, 1, 1])
    coarser[:3, 3] = apply_affine(affine, [1.5, 1.5, 0])
    lr = Volume(coarse, coarser, np.dtype(np.int16), Path("scan.nii.gz"))
    sr = Volume(fine, affine, np.dtype(np.int16), Path("scan_sr.nii.gz"), uncertainty=fine / 10)
    sr = sr._replace(sampled={"std": 20 + fine[::-1] / 20, "mean": fine})
    page = write_page(folder / "scan_sr.html", lr, sr)
    with browser(folder / "profile") as found:
        found.open(page)
        yield found


def mouse(page: Browser, kind: str, **params: object) -> None:
    page.command("Input.dispatchMouseEvent", type=kind, x=600, y=400, **params)


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestInABrowser:
    """The page in headless Chromium."""

    def test_it_is_drawn_without_a_request_or_a_message(self, shown: Browser) -> None:
        assert shown.value("document.body.dataset.state") == "ready"
        assert shown.messages == []
        picture = shown.picture()
        assert (picture.max(axis=2) > 100).mean() > 0.05
        local = ("file:///", "data:", "about:", "blob:")
        assert [url for url in shown.requests if not url.startswith(local)] == []
        assert sum(url.startswith("file:") for url in shown.requests) == 1

    def test_the_right_of_the_patient_is_on_the_left(self, shown: Browser) -> None:
        choose_planes(shown, 0)
        picture = shown.picture()[..., 2]  # without the orange crosshair
        middle = picture.shape[1] // 2
        left, right = picture[:, :middle], picture[:, middle:]
        assert np.mean(left[left > 20]) > 1.5 * np.mean(right[right > 20])
        choose_planes(shown, 3)

    def test_the_slider_and_the_key_change_between_input_and_result(self, shown: Browser) -> None:
        result = shown.picture()
        pictures = {}
        for share in (0, 50):
            shown.value(f"share.value = {share}; share.dispatchEvent(new Event('input')); 1")
            pictures[share] = shown.picture()
        assert abs(pictures[0] - result).max() > 20
        assert abs(pictures[50] - (pictures[0] + result) / 2).max() <= 4  # a linear blend, in 8 bits
        shown.press("f")
        assert shown.value("share.value") == "0"
        assert abs(shown.picture() - pictures[0]).max() <= 1
        shown.press("f")
        assert shown.value("share.value") == "100"
        assert abs(shown.picture() - result).max() <= 1
        shown.press("[")
        assert shown.value("share.value") == "90"
        shown.press("]")

    def test_the_maps_are_overlays_in_color_one_at_a_time(self, shown: Browser) -> None:
        chosen = "overlay.selectedOptions[0].textContent"

        def colored() -> float:
            picture = shown.picture()
            return float((picture.max(axis=2) - picture.min(axis=2) > 30).mean())

        before = colored()  # the crosshair
        shown.press("e")
        assert shown.value(chosen) == "expected error"
        assert colored() > before + 0.05
        shown.value("opacity.value = 0; opacity.dispatchEvent(new Event('input')); 1")
        assert colored() == pytest.approx(before, abs=0.005)
        shown.value("opacity.value = 60; opacity.dispatchEvent(new Event('input')); 1")
        error = shown.picture()
        shown.press("e")
        assert shown.value(chosen) == "standard deviation of samples"
        assert abs(shown.picture() - error).max() > 50
        shown.press("e")
        assert shown.value(chosen) == "none"
        assert colored() == pytest.approx(before, abs=0.005)

    def test_the_window_is_that_of_both_volumes(self, shown: Browser) -> None:
        before = {}
        for share in (100, 0):
            shown.value(f"share.value = {share}; share.dispatchEvent(new Event('input')); 1")
            before[share] = shown.picture()[..., 2].mean()
        white = shown.value("white.valueAsNumber")
        assert white == pytest.approx(900, abs=1)
        for share in (0, 100):
            shown.value(f"share.value = {share}; white.value = {2 * white}; white.dispatchEvent(new Event('input')); 1")
            assert shown.picture()[..., 2].mean() < 0.7 * before[share]
        shown.value(f"white.value = {white}; white.dispatchEvent(new Event('input')); 1")

    def test_the_crosshair_moves_in_millimeters(self, shown: Browser) -> None:
        for key in ("ArrowLeft", "ArrowUp", "PageUp"):  # from the center, between voxels, to one
            shown.press(key)
        start, picture = place(shown), shown.picture()
        steps = {"ArrowLeft": (1, 0, 0), "ArrowDown": (0, -1, 0), "PageUp": (0, 0, 2)}
        expected = np.array(start)
        for key, step in steps.items():
            shown.press(key)
            expected = expected + step
            assert place(shown) == pytest.approx(tuple(expected), abs=0.11)
        assert abs(shown.picture() - picture).max() > 50
        text = shown.value("position.textContent")
        assert re.search(r": input \d+, result \d+, expected error \d+, standard deviation of samples \d+", text), text

    def test_the_wheel_shows_other_slices_and_zooms_with_control(self, shown: Browser) -> None:
        choose_planes(shown, 0)
        shown.press("PageUp")  # from a border between voxels
        start, whole = place(shown), shown.picture()
        mouse(shown, "mouseWheel", deltaX=0, deltaY=120)
        assert [abs(after - before) for after, before in zip(place(shown), start, strict=True)] == [0, 0, 2]
        mouse(shown, "mouseWheel", deltaX=0, deltaY=-120)
        assert place(shown) == start
        assert abs(shown.picture() - whole).max() <= 1
        for _ in range(4):
            mouse(shown, "mouseWheel", deltaX=0, deltaY=-120, modifiers=2)
        assert place(shown) == start
        larger = shown.picture()
        assert (larger.max(axis=2) > 50).sum() > 1.5 * (whole.max(axis=2) > 50).sum()
        before, after = (
            np.flatnonzero((found[..., 0] - found[..., 2] > 80).mean(axis=0) > 0.3) for found in (whole, larger)
        )
        assert after.mean() == pytest.approx(before.mean(), abs=2)  # the crosshair stays where it is, as thin as it was
        assert 1 <= len(after) <= 4
        for _ in range(4):
            shown.press("-")
        assert abs(shown.picture() - whole).max() <= 1
        shown.press("+")
        assert abs(shown.picture() - whole).max() > 20
        shown.press("r")
        assert abs(shown.picture() - whole).max() <= 1
        choose_planes(shown, 3)

    def test_the_crosshair_can_be_hidden(self, shown: Browser) -> None:
        before = shown.picture()
        shown.press("c")
        assert (np.ptp(shown.picture(), axis=2) > 30).sum() < 0.1 * (np.ptp(before, axis=2) > 30).sum()
        shown.press("c")
        assert abs(shown.picture() - before).max() <= 1

    def test_nothing_but_the_fields_changes_the_window(self, shown: Browser) -> None:
        """NiiVue sets the window of the first volume alone after a double click, and has keys of its own."""
        mouse(shown, "mousePressed", button="left", clickCount=1)  # moves the crosshair
        mouse(shown, "mouseReleased", button="left", clickCount=1)
        white = shown.value("white.valueAsNumber")
        shown.value(f"white.value = {2 * white}; white.dispatchEvent(new Event('input')); 1")
        assert shown.value("preset.selectedIndex") == -1
        picture = shown.picture()
        for count in (1, 2):
            mouse(shown, "mousePressed", button="left", clickCount=count)
            mouse(shown, "mouseReleased", button="left", clickCount=count)
        for key in "hmv?":
            shown.press(key)
        assert abs(shown.picture() - picture).max() <= 1
        shown.value("preset.selectedIndex = 0; preset.dispatchEvent(new Event('input')); 1")
        assert shown.value("white.valueAsNumber") == white

    def test_the_ends_of_the_colors_are_those_of_the_map(self, shown: Browser) -> None:
        assert shown.value("bar.checkVisibility()") is False
        shown.press("e")
        assert shown.value("[bar.checkVisibility(), low.value, high.value]") == [True, "0", "100"]
        colors = re.findall(r"rgb\((\d+), (\d+), (\d+)\)", shown.value("colors.style.background"))
        levels = [sum(map(int, color)) for color in colors]
        assert len(levels) == 16
        assert levels == sorted(levels)  # from dark to bright
        shown.press("e")
        assert shown.value("low.value + ' ' + high.value") == "0 70"
        shown.press("e")

    def test_without_webgl_the_text_remains_and_says_why(self, shown: Browser) -> None:
        """The last one: the page does not come back."""
        broken = "HTMLCanvasElement.prototype.getContext = () => null"
        shown.command("Page.addScriptToEvaluateOnNewDocument", source=broken)
        shown.value("document.body.dataset.before = 1")
        shown.command("Page.reload")
        shown.wait_for("!document.body?.dataset.before && ['ready', 'failed'].includes(document.body?.dataset.state)")
        assert shown.value("document.body.dataset.state") == "failed"
        text = shown.value("message.textContent")
        assert text.startswith("The pictures cannot be drawn (")
        assert text.endswith("a browser with WebGL 2 is needed. The table describes the volumes.")
        assert shown.value("message.checkVisibility() && volumes.checkVisibility() && !view.checkVisibility()") is True
