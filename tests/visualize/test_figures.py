from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.phantoms import head
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from miar_monai.errors import ConfigurationError, OutputError
from miar_monai.visualize.figures import (
    codebook_map,
    displayed,
    layer_wise,
    scale_bar_mm,
    sharpest_square,
    side_by_side,
    training_curves,
)

pytest.importorskip("matplotlib")


@pytest.fixture
def panels(phantom: Tensor) -> dict[str, np.ndarray]:
    hr = torch.nn.functional.pad(phantom[0, ..., 3], (0, 1, 0, 3)).numpy()
    lr = hr.reshape(10, 4, 8, 4).mean((1, 3))
    return {"LR": lr, "nearest": lr.repeat(4, 0).repeat(4, 1), "truth": hr}


def read(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that gets every figure that is saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def shown_images(figure: Any) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for ax in figure.axes for image in ax.get_images()]


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


def test_the_truth_must_be_there(panels: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no panel is called 'HR', only \['LR', 'nearest', 'truth'\]"):
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


def test_what_the_truth_has_no_error_for_holds_the_color_bars(
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


def test_layers_stand_beside_the_truth_and_above_the_curve_of_their_tokenizer(
    panels: dict[str, np.ndarray], tmp_path: Path, drawn: list[Any]
) -> None:
    truth = panels["truth"]
    rows = {
        name: {f"{k} scales": ndimage.gaussian_filter(truth, blur / k) for k in (1, 3, 4)}
        for name, blur in (("with dropout", 3.0), ("without", 5.0))
    }
    psnr = {"with dropout": [14.0, 18, 20, 21], "without": [13.0, 15, 19, 22]}
    path = layer_wise(rows, truth, psnr, tmp_path / "a.png")
    figure = drawn[0]
    expected = [image for row in rows.values() for image in row.values()] + [truth]
    for shown, image in zip(shown_images(figure), expected, strict=True):
        np.testing.assert_array_equal(shown, displayed(image))
    captions = [caption for row in rows.values() for caption in row]
    assert [ax.get_xlabel() for ax in figure.axes] == [*captions, "truth", "number of scales"]
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()] == [*rows, "mean PSNR (dB)"]
    for line, (name, values) in zip(figure.axes[-1].get_lines(), psnr.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 2, 3, 4], values], 1))
    assert len({image.get_clim() for ax in figure.axes for image in ax.get_images()}) == 1  # one scale of grays
    with pytest.raises(OutputError, match="exists already"):
        layer_wise(rows, truth, psnr, path)


def test_codes_are_colored_by_use_and_unused_ones_are_gray(
    rng: np.random.Generator, tmp_path: Path, drawn: list[Any]
) -> None:
    points = rng.standard_normal((7, 2))
    counts = np.array([[0, 5, 1, 0, 0, 0, 1], [0, 3, 9, 0, 1, 0, 1], [0, 1, 0, 2, 80, 0, 1]])
    codebook_map(points, counts, (1, 2, 4), tmp_path / "a.png")
    left, right = drawn[0].axes[:2]
    used = [1, 2, 3, 4, 6]
    for ax, colors in ((left, [9, 10, 2, 81, 3]), (right, [0, 1, 2, 2, 0])):
        gray, colored = ax.collections
        np.testing.assert_array_equal(gray.get_offsets(), points[[0, 5]])
        np.testing.assert_array_equal(colored.get_offsets(), points[used])
        np.testing.assert_array_equal(colored.get_array(), colors)
    assert left.get_title() == "5 of 7 codes in use"
    assert [text.get_text() for text in drawn[0].axes[3].get_xticklabels()] == ["1", "2", "4"]


def test_curves_have_a_row_for_each_stage_and_the_color_of_their_run(tmp_path: Path, drawn: list[Any]) -> None:
    steep, flat = ([1, 2, 3], [1.0, 0.2, 0.05]), ([1, 2, 3], [0.5, -0.1, 0.02])
    runs = {
        "first": {"stage 1": {"loss": steep, "PSNR": ([2], [30.0])}, "stage 2": {"token loss": flat}},
        "second": {"stage 1": {"loss": flat}},
        "third": {"stage 1": {"loss": steep}},
    }
    training_curves(runs, tmp_path / "a.png")
    figure = drawn[0]
    found = {(ax.get_ylabel(), ax.get_title()): [line.get_color() for line in ax.get_lines()] for ax in figure.axes}
    assert found == {("stage 1", "loss"): ["C0", "C1", "C2"], ("", "PSNR"): ["C0"], ("stage 2", "token loss"): ["C0"]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    np.testing.assert_array_equal(figure.axes[0].get_lines()[1].get_xydata(), np.transpose(flat))


def test_only_wide_ranges_of_positive_values_are_logarithmic(tmp_path: Path, drawn: list[Any]) -> None:
    values = {"wide": [1, 0.05], "narrow": [1, 0.5], "signed": [1, -0.05]}
    training_curves({"run": {"stage": {name: ([1, 2], y) for name, y in values.items()}}}, tmp_path / "a.png")
    scales = {ax.get_title(): ax.get_yscale() for ax in drawn[0].axes}
    assert scales == {"wide": "log", "narrow": "linear", "signed": "linear"}
    assert not drawn[0].legends  # one run needs no key
