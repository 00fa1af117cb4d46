"""The page of a result: what it contains."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.html_page import Page
from hypothesis import given
from hypothesis import strategies as st
from nibabel.affines import apply_affine

from miar_monai.data.io import Volume
from miar_monai.errors import ExistsError, ImageError, SettingError
from miar_monai.visualize.page import MAX_PAGE_VOXELS, _as_levels, check_page, write_page

TILTED = np.array([[-1.9, 0.3, 0, 70], [0.2, 2, 0.1, -50], [0, 0.4, 3, -20], [0, 0, 0, 1]])


def pair(dtype: str = "int16", affine: np.ndarray = TILTED) -> tuple[Volume, Volume]:
    """Return an input of 13 x 11 x 5 voxels, dark at its borders, and a result twice as fine in two axes."""
    rng = np.random.default_rng(0)
    array = np.zeros((13, 11, 5), np.float32)
    array[3:10, 4:9, 1:] = rng.uniform(100, 900, (7, 5, 4))
    if np.dtype(dtype).kind in "iu":
        array = array.round()
    lr = Volume(array, affine, np.dtype(dtype), Path("scan & co.nii.gz"))
    fine = np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)
    finer = affine @ np.diag([0.5, 0.5, 1, 1])
    finer[:3, 3] = apply_affine(affine, [-0.25, -0.25, 0])
    return lr, Volume(fine, finer, np.dtype(dtype), Path("scan_sr.nii.gz"), uncertainty=fine / 10)


def written(lr: Volume, sr: Volume, folder: Path, **more: object) -> tuple[str, Page]:
    text = write_page(folder / "a.html", lr, sr, overwrite=True, **more).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_both_volumes_are_in_the_page_with_their_values_and_positions(dtype: str, tmp_path: Path) -> None:
    lr, sr = pair(dtype)
    _, page = written(lr, sr, tmp_path)
    step = 0.0 if dtype.endswith("int16") else np.percentile(lr.array, 99.8) / 4096 / 2 * 1.001
    for key, volume, tolerance in (("input", lr, step), ("result", sr, step), ("map-1", sr, 90 / 256 / 2)):
        expected = volume.array if key != "map-1" else sr.uncertainty
        image = page.volume(key)
        assert image.get_data_dtype() == np.dtype("<i2")
        found = np.asarray(image.get_fdata())
        places = np.argwhere(np.ones(found.shape, bool))
        indices = apply_affine(np.linalg.inv(volume.affine) @ image.affine, places)
        assert abs(indices - indices.round()).max() < 1e-5
        inside = tuple(indices.round().astype(int).T)
        assert abs(found.ravel() - expected[inside]).max() <= tolerance + 1e-9
        rest = expected.copy()
        rest[inside] = 0
        assert not rest.any()  # what is cropped has no content
    assert page.volume("input").shape == (9, 7, 5)
    assert page.volume("result").shape == (18, 14, 5)


@given(
    low=st.floats(-4000, 4000),
    width=st.floats(1e-3, 1e6),
    dtype=st.sampled_from(["int16", "uint16", "int32", "float32"]),
)
def test_values_are_kept_within_the_quantization(low: float, width: float, dtype: str) -> None:
    array = np.linspace(low, low + width, 60).reshape(3, 4, 5)
    array = array.round() if dtype != "float32" else array
    levels, slope, inter = _as_levels(array, np.dtype(dtype), width / 4096)
    assert levels.dtype == np.int16
    exact = dtype != "float32" and array.max() - array.min() < 2**16
    error = abs(levels * slope + inter - array).max()
    assert error <= (1e-6 if exact else slope / 2 + 1e-6 * abs(array).max())
    assert exact or slope <= max(width, 1) / 4095


def test_the_page_asks_for_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    text, page = written(*pair(), tmp_path)
    page.assert_loads_nothing(num_scripts=2)
    assert not {"img", "a"} & {tag for tag, _ in page.elements}
    assert not re.search(r'\son\w+="', text[: text.index("<script")])


def test_the_page_says_in_words_what_it_shows(tmp_path: Path) -> None:
    lr, sr = pair()
    warnings, facts = ["dark <b>and</b> noisy"], {"Model": "miar & co"}
    text, page = written(lr, sr, tmp_path, facts=facts, warnings=warnings)
    assert "<li>dark &lt;b&gt;and&lt;/b&gt; noisy</li>" in text
    assert "<dt>Model</dt><dd>miar &amp; co</dd>" in text
    assert "<title>scan_sr.nii.gz: super-resolved from scan &amp; co.nii.gz</title>" in text
    assert '<th scope="row">Input</th><td>13 × 11 × 5</td>' in text
    assert '<th scope="row">Result</th><td>26 × 22 × 5</td>' in text
    assert f"<td>{lr.array.min():.5g} to {lr.array.max():.5g}</td>" in text
    (canvas,) = [found for tag, found in page.elements if tag == "canvas"]
    assert (canvas["role"], canvas["aria-describedby"]) == ("img", "volumes")
    assert "BSD 2-Clause License" in text
    plain, _ = written(lr, sr._replace(uncertainty=None), tmp_path)
    assert "Warnings" not in plain
    assert 'id="map-1"' not in plain
    assert "Window (units of the input)" in text
    assert "Window (HU)" in written(lr._replace(modality="CT"), sr, tmp_path)[0]


def test_maps_are_named_with_their_units_and_values(tmp_path: Path) -> None:
    lr, sr = pair()
    sampled = {"mean": sr.array, "std": sr.array / 20, "p05": sr.array, "p95": sr.array}
    text, page = written(lr._replace(modality="CT"), sr._replace(sampled=sampled), tmp_path)
    names = ["expected error", "standard deviation of samples"]
    assert [layer["name"] for layer in json.loads(page.texts["settings"])["volumes"]] == ["result", "input", *names]
    assert re.findall(r'<option value="\d">([a-z ]{9,})</option>', text) == names
    assert "<legend>Overlay (HU)</legend>" in text
    (rows,) = page.tables
    assert [row[0] for row in rows] == ["Volume", "Input", "Result", "Expected error", "Standard deviation of samples"]
    assert page.volume("map-2").get_fdata().max() == pytest.approx(sr.array.max() / 20, rel=1e-2)
    other = sr._replace(array=sr.array - 500, path=Path("</script>.nii"))
    text, page = written(lr, sr, tmp_path, maps={"</script>.nii": other})
    (layer,) = json.loads(page.texts["settings"])["volumes"][2:]
    assert layer["name"] == "</script>.nii"
    assert layer["window"][0] == -500 < layer["window"][1]
    assert '<option value="2">&lt;/script&gt;.nii</option>' in text
    assert 'id="map-1"' not in written(lr, sr, tmp_path, maps={})[0]


def test_the_window_is_that_of_the_input(tmp_path: Path) -> None:
    lr, sr = pair()
    _, page = written(lr, sr, tmp_path)
    settings = json.loads(page.texts["settings"])
    windows = {volume["name"]: volume["window"] for volume in settings["volumes"]}
    assert windows["input"] == windows["result"] == [0, pytest.approx(np.percentile(lr.array, 99.8))]
    assert settings["oriented"] is True
    assert json.loads(written(lr._replace(space=0), sr, tmp_path)[1].texts["settings"])["oriented"] is False
    assert presets(page) == [(0, pytest.approx(np.percentile(lr.array, 99.8), rel=1e-4))]
    sparse = lr._replace(array=np.zeros_like(lr.array))
    sparse.array[5, 5, 2] = 7
    padded = sparse._replace(array=np.pad(sparse.array, [(0, 9)] * 3))
    assert np.percentile(padded.array, 99.8) == 0
    assert json.loads(written(padded, sr, tmp_path)[1].texts["settings"])["volumes"][0]["window"] == [0, 7]


def presets(page: Page) -> list[tuple[float, ...]]:
    values = (found["value"] or "" for tag, found in page.elements if tag == "option")
    return [tuple(map(float, value.split(" "))) for value in values if " " in value]


def test_a_ct_has_the_usual_windows_and_no_padding_in_its_own(tmp_path: Path) -> None:
    lr, sr = pair()
    hounsfield = np.where(lr.array > 0, lr.array / 5 - 60, -1000).round()  # soft tissue in air
    hounsfield[:, :, 0] = -2048
    image = lr._replace(array=hounsfield.astype(np.float32))
    for ct, stated in ((image._replace(modality="CT"), True), (image, True), (image._replace(modality="MR"), False)):
        text, page = written(ct, sr, tmp_path)
        assert ("Window (HU)" in text) is stated
        own, *usual = presets(page)
        assert own == (-1024 if stated else -2048, pytest.approx(np.percentile(hounsfield, 99.8), rel=1e-4))
        assert usual == ([(-1350, 150), (-160, 240), (-500, 1300)] if stated else [])


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    lr, sr = pair()
    far = sr._replace(affine=sr.affine + np.array([[0, 0, 0, 500]] + 3 * [[0, 0, 0, 0]]))
    with pytest.raises(
        ImageError, match=r"scan_sr.nii.gz and scan & co.nii.gz have no position in millimeters in common"
    ):
        write_page(tmp_path / "far.html", lr, far)
    check_page((MAX_PAGE_VOXELS, 1, 1))
    with pytest.raises(SettingError, match=f"the result has {MAX_PAGE_VOXELS}x2x1 voxels, but a page holds at most"):
        check_page((MAX_PAGE_VOXELS, 2, 1))
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(ExistsError):
        write_page(tmp_path / "mine.html", lr, sr)
    assert os.listdir(tmp_path) == ["mine.html"]
    assert (tmp_path / "mine.html").read_text() == "mine"


@pytest.mark.slow
def test_a_brain_of_155_slices_is_a_page_of_15_megabytes_at_most(real_data: Path, tmp_path: Path) -> None:
    from miar_monai.data.io import read_volume
    from miar_monai.transforms.degrade import degrade_volume

    hr = read_volume(real_data / "brain" / "BraTS2021_01484" / "BraTS2021_01484_t2.nii.gz")
    assert hr.array.shape == (240, 240, 155)
    lr = degrade_volume(hr, [4, 4, 1])
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 5, hr.array.shape).astype(np.float32) * (hr.array > 0)
    spread = np.sqrt(rng.chisquare(3, hr.array.shape) / 3).astype(np.float32)  # of 4 independent samples
    maps = {"uncertainty": hr.array / 20 + noise, "sampled": {"std": hr.array / 20 * spread}}
    for dtype in (hr.dtype, np.dtype(np.float32)):  # noise in the last digits is what cannot be compressed
        sr = hr._replace(array=hr.array + noise, dtype=dtype, **maps)
        assert write_page(tmp_path / "a.html", lr, sr, overwrite=True).stat().st_size <= 15e6
