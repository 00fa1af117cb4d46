"""The figure of the page, drawn by a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("nilearn", reason="the brain is part of nilearn, of the extra demo")

from helpers.tiny_bundle import write_tiny_bundle
from PIL import Image

from benchmarks import viewer_figure as module
from benchmarks.browser import CHROMIUM
from benchmarks.viewer_figure import viewer_figure
from miar_monai.errors import ConfigurationError, ExistsError


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; install it (apt install chromium)")
def test_the_whole_page_is_drawn_with_the_overlay(tmp_path: Path) -> None:
    bundle, picture = write_tiny_bundle(tmp_path / "bundle"), tmp_path / "out" / "viewer.png"
    assert viewer_figure(str(picture), str(bundle), "cpu", num_slices=3) == picture
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    assert pixels.shape[0] > 1000  # pixels of the screen, which the page exceeds
    assert pixels.shape[1] == 1200
    colored = pixels.max(axis=2) - pixels.min(axis=2) > 60
    assert colored[: len(colored) // 2].mean() > 0.05  # more than the crosshair, by the overlay
    assert [path.name for path in picture.parent.iterdir()] == ["viewer.png"]
    with pytest.raises(ExistsError):
        viewer_figure(str(picture), str(bundle), "cpu", num_slices=3)


def test_without_a_browser_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHROMIUM", None)
    with pytest.raises(ConfigurationError, match=r"^there is no Chromium on the PATH"):
        viewer_figure(str(tmp_path / "viewer.png"))
    assert not list(tmp_path.iterdir())
