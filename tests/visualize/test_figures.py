from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.drawings import shown_images
from helpers.phantoms import head
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miar_monai.errors import ConfigurationError, OutputError
from miar_monai.visualize.drawing import displayed, scale_bar_mm
from miar_monai.visualize.figures import enlarged_panels, marked_panels, sharpest_square, side_by_side

pytest.importorskip("matplotlib")


@pytest.fixture
def panels(phantom: Tensor) -> dict[str, np.ndarray]:
    hr = torch.nn.functional.pad(phantom[0, ..., 3], (0, 1, 0, 3)).numpy()
    lr = hr.reshape(10, 4, 8, 4).mean((1, 3))
    return {"LR": lr, "nearest": lr.repeat(4, 0).repeat(4, 1), "truth": hr}


def read(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def test_the_picture_is_drawn_without_a_display_and_inputs_are_kept(
    panels: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    before = {title: image.copy() for title, image in panels.items()}
    path = side_by_side(panels, tmp_path / "figures" / "a.png", spacing=(0.9, 1.1), unit="HU")
    image = read(path)
    assert image.shape[1] > 1000
    assert 0.05 < np.mean(image < 0.9) < 0.95  # neither blank nor solid
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert all(np.array_equal(before[title], panels[title]) for title in panels)


def test_the_picture_depends_on_every_panel(panels: dict[str, np.ndarray], tmp_path: Path) -> None:
    pictures = [side_by_side(panels, tmp_path / "all.png")]
    for title in ("LR", "nearest"):
        changed = panels | {title: np.flip(panels[title], 0) * 0.5}
        pictures.append(side_by_side(changed, tmp_path / f"{title}.png"))
    drawn = [path.read_bytes() for path in pictures]
    assert len(set(drawn)) == 3


def test_a_picture_is_not_replaced_unless_allowed(panels: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"a\.png exists already"):
        side_by_side(panels, path)
    assert path.read_bytes() == b"mine"
    side_by_side(panels, path, overwrite=True)
    assert path.read_bytes() != b"mine"


def test_a_picture_without_errors_to_show_is_drawn_too(panels: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert side_by_side({"truth": panels["truth"]}, tmp_path / "one.png").is_file()


def test_enlarged_panels_depend_on_every_image_and_difference(panels: dict[str, np.ndarray], tmp_path: Path) -> None:
    images = {title: image for title, image in panels.items() if title != "LR"}
    differences = {"error": abs(images["nearest"] - images["truth"])}
    pictures = [enlarged_panels(images, differences, tmp_path / "all.png", columns=2)]
    changed = images | {"nearest": np.flip(images["nearest"], 0) * 0.5}
    pictures.append(enlarged_panels(changed, differences, tmp_path / "image.png", columns=2))
    flipped = {"error": np.flip(differences["error"], 0)}
    pictures.append(enlarged_panels(images, flipped, tmp_path / "difference.png", columns=2))
    assert len({path.read_bytes() for path in pictures}) == 3
    with pytest.raises(ConfigurationError, match=r"there is no panel 'HR'"):
        enlarged_panels(images, differences, tmp_path / "a.png", 2, truth="HR")


def test_a_missing_truth_is_refused(panels: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no panel 'HR', only \['LR', 'nearest', 'truth'\]"):
        side_by_side(panels, tmp_path / "a.png", truth="HR")


def test_anterior_is_up_and_the_right_of_the_patient_is_on_the_left() -> None:
    image = np.zeros((37, 31))
    image[36, 30] = 1  # the far end of R and of A in a RAS volume
    assert displayed(image).shape == (31, 37)
    assert displayed(image)[0, 0] == 1


@given(st.floats(10, 900))
def test_the_scale_bar_is_round_and_fits(width: float) -> None:
    length = scale_bar_mm(width)
    assert str(length).rstrip("0") in ("1", "2", "5")
    assert width / 10 < length <= width / 4 or length == 1


@given(st.integers(0, 25), st.integers(0, 19))
def test_the_sharpest_square_holds_the_edges_wherever_they_are(x: int, y: int) -> None:
    image = np.zeros((37, 31))
    image[x : x + 12, y : y + 12] = 1
    found = sharpest_square(image, 16)
    assert all(0 <= first <= size - 16 for first, size in zip(found, image.shape, strict=True))
    assert image[found[0] : found[0] + 16, found[1] : found[1] + 16].sum() == image.sum()


def test_the_color_bars_take_the_place_of_the_error_of_the_truth(
    panels: dict[str, np.ndarray], tmp_path: Path, drawn: list[Any]
) -> None:
    side_by_side(panels, tmp_path / "a.png", unit="HU")
    labels = [ax.get_xlabel() for axes in drawn[0].axes for ax in axes.child_axes]
    assert labels == ["intensity (HU)", "|error| (HU)"]
    assert len(shown_images(drawn[0])) == 3 + 3 + 1  # whole, enlarged, and the one error of the size of the truth


@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_pictures_fit_a_web_page_even_if_they_are_noisy(suffix: str, rng: np.random.Generator, tmp_path: Path) -> None:
    from matplotlib.image import imread

    clean = head((256, 256, 3))[..., 1]
    noisy = [clean + 0.03 * (clean > 0) * rng.standard_normal(clean.shape) for _ in range(6)]
    panels = {f"method {i}": image for i, image in enumerate(noisy[:5])}
    path = side_by_side({**panels, "truth": noisy[5]}, tmp_path / f"a{suffix}")
    assert path.is_file()
    if suffix == ".png":
        assert imread(path).shape[1] == 1350
        assert path.stat().st_size < 300_000


def test_marked_panels_have_squares_where_they_are(tmp_path: Path, drawn: list[Any]) -> None:
    hr = np.zeros((40, 30))
    squares = {"method": {"red": [(0, 0), (30, 20)], "blue": [(10, 5)]}}
    images = {"truth": hr, "method": hr + 1, "other": hr}
    path = marked_panels(images, squares, 10, tmp_path / "new" / "a.png", columns=2, spacing=(2.0, 1.0))
    assert path.is_file()
    (figure,) = drawn
    assert [len(ax.lines) for ax in figure.axes[:3]] == [0, 3, 0]
    lines = [(line.get_color(), line.get_xydata()) for line in figure.axes[1].lines]
    assert [(color, *xy.min(axis=0), *xy.max(axis=0)) for color, xy in lines] == [
        ("red", 60, 0, 80, 10),  # the far left of the patient: X is mirrored
        ("red", 0, 20, 20, 30),
        ("blue", 40, 5, 60, 15),
    ]
    assert [ax.get_xlim() for ax in figure.axes[:3]] == [(0, 80)] * 3
    with pytest.raises(ConfigurationError, match=r"there is no panel 'HR'"):
        marked_panels(images, squares, 10, tmp_path / "b.png", 2, truth="HR")
    with pytest.raises(OutputError, match="exists already"):
        marked_panels(images, squares, 10, path, 2)
