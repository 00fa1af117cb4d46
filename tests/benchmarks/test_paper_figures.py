from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drawings import shown_images
from helpers.phantoms import head
from scipy import ndimage

from benchmarks.paper_figures import codebook_map, layer_wise, training_curves
from miar_monai.errors import OutputError
from miar_monai.visualize.drawing import displayed

pytest.importorskip("matplotlib")


def test_reconstructions_and_truth_are_drawn_above_the_curves_of_the_tokenizers(
    tmp_path: Path, drawn: list[Any]
) -> None:
    truth = head((40, 32, 3))[..., 1]
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
