"""The page of results: its tables and pictures, and what a browser does with them."""

from __future__ import annotations

import base64
import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miar_monai.degradation import Degradation
from miar_monai.errors import ExistsError
from miar_monai.evaluation import Row, SlicePictures, SuperResolutionEvaluation, write_results_page
from miar_monai.evaluation.page import MAX_METHODS

pytest.importorskip("PIL", reason="pictures are read by Pillow, of the extra demo")

from helpers.html_page import Page
from PIL import Image

from benchmarks.browser import CHROMIUM, browser

if TYPE_CHECKING:
    from benchmarks.browser import Browser

METHODS = ["nearest", "bicubic", "linear inverse", "MIAR", "MIAR, data-consistent"]
PATIENTS = ("b & co", "a<1>", "patient 10")


@pytest.fixture(scope="module")
def measured() -> tuple[SuperResolutionEvaluation, SlicePictures]:
    """Return the evaluation of three patients with two contrasts, and their pictures."""
    evaluation, pictures = SuperResolutionEvaluation(Degradation(), ["PSNR", "SSIM"]), SlicePictures()
    generator = torch.Generator().manual_seed(0)
    for subject in PATIENTS:
        for contrast in ("t2", "t1"):
            hr = torch.rand((5, 1, 24, 36), generator=generator)
            lr, sr = Degradation()(hr), hr + 0.1 * torch.rand(hr.shape, generator=generator)
            evaluation(lr, sr, hr, subject, range(10, 15), 12.5, contrast)
            pictures.add(subject, contrast, 12, lr[2:3], evaluation.estimates(lr[2:3], sr[2:3]), hr[2:3])
    return evaluation, pictures


def written(measured: tuple[SuperResolutionEvaluation, SlicePictures], folder: Path, **more: Any) -> tuple[str, Page]:
    evaluation, pictures = measured
    path = write_results_page(folder / "a.html", "A & B", evaluation.rows, ["PSNR", "SSIM"], pictures, **more)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_the_tables_have_the_numbers_of_the_csv_by_patient(
    measured: tuple[SuperResolutionEvaluation, SlicePictures], tmp_path: Path
) -> None:
    _, page = written(measured, tmp_path)
    with measured[0].write_rows(tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    t2, t1, everything, patients, *sections = page.tables
    for table, some in ((t1, "t1"), (t2, "t2"), (everything, "")):
        assert [line[0] for line in table] == ["method", *METHODS]
        for method, psnr, *_ in table[1:]:
            wanted = [float(row["PSNR"]) for row in rows if row["method"] == method and some in ("", row["contrast"])]
            assert psnr == f"{np.mean(wanted):.2f} ± {np.std(wanted, ddof=1):.2f}"
    assert patients[0] == ["patient", "contrast", "method", "PSNR ↑", "SSIM ↑", "ms per slice"]
    keys = [tuple(line[:3]) for line in patients[1:]]
    order = [(subject, contrast) for subject in sorted(PATIENTS) for contrast in ("t1", "t2")]
    assert keys == [(*key, method) for key in order for method in METHODS]
    for subject, contrast, method, psnr, ssim, milliseconds in patients[1:]:
        own = [row for row in rows if (row["subject"], row["contrast"], row["method"]) == (subject, contrast, method)]
        for text, name, decimals in ((psnr, "PSNR", 2), (ssim, "SSIM", 4)):
            values = [float(row[name]) for row in own]
            assert text == f"{np.mean(values):.{decimals}f} ± {np.std(values, ddof=1):.{decimals}f}"
        assert milliseconds == ("12.5" if method == "MIAR" else "–")
    assert len(sections) == len(order)
    for (subject, contrast), table in zip(order, sections, strict=True):
        assert table[0][-2:] == ["worst slice (PSNR)", "best slice (PSNR)"]
        for method, *_, worst, best in table[1:]:
            of_slice = {
                row["slice"]: float(row["PSNR"])
                for row in rows
                if (row["subject"], row["contrast"], row["method"]) == (subject, contrast, method)
            }
            ends = [choose(of_slice, key=of_slice.__getitem__) for choose in (min, max)]
            assert [worst, best] == [f"{end}: {of_slice[end]:.2f}" for end in ends]


def test_the_page_asks_for_nothing_and_its_links_lead_somewhere(
    measured: tuple[SuperResolutionEvaluation, SlicePictures], tmp_path: Path
) -> None:
    text, page = written(measured, tmp_path, notes=["one <note>"])
    page.assert_loads_nothing(num_scripts=1)
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    links = {(found["href"] or "")[1:] for tag, found in page.elements if tag == "a"}
    assert links == {"all", *(f"patient-{i}" for i in range(1, 7))}
    assert links < set(ids)
    assert "<title>A &amp; B</title>" in text
    assert "<li>one &lt;note&gt;</li>" in text
    assert "<h2>a&lt;1&gt;, t1</h2>" in text


def pictures_of(page: Page) -> dict[str, np.ndarray]:
    found = {}
    for tag, attributes in page.elements:
        if tag == "img":
            source = attributes["src"] or ""
            file = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
            found[attributes["alt"] or ""] = np.asarray(Image.open(io.BytesIO(file)))
    return found


def test_pictures_have_the_window_of_the_truth_and_the_right_of_the_patient_on_the_left(tmp_path: Path) -> None:
    hr = torch.zeros(1, 1, 40, 24)
    hr[..., 30:, 20:] = 0.5  # high indices of RAS+: right and anterior
    pictures = SlicePictures()
    estimates = {"brighter": hr + 0.25, "not a number": hr * float("nan"), "infinite": hr + float("inf")}
    pictures.add("a", None, 3, hr[..., ::4, ::4], estimates, hr)
    pictures.add("a", None, 4, hr, {}, hr)  # the second volume of the patient
    rows: list[Row] = [{"subject": "a", "slice": 3, "method": "brighter", "PSNR": 12.0}]
    path = write_results_page(tmp_path / "a.html", "A", rows, ["PSNR"], pictures)
    found = pictures_of(Page(path.read_text(encoding="utf-8")))
    assert list(found) == [f"{title}, slice 3 of a" for title in ("low resolution", *estimates, "truth")]
    low, brighter, nan, infinite, truth = found.values()
    assert truth.dtype == np.uint8
    assert truth.shape == (24, 40)
    assert low.shape == (6, 10)
    assert (truth[:4, :10] == 255).all()  # anterior is above, the right of the patient on the left
    assert truth.astype(int).sum() == 255 * 40
    assert set(np.unique(brighter)) == {130, 255}  # 0.25 of 0.5 in 64 gray levels, and the rest is clipped
    assert not nan.any()
    assert (infinite == 255).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_pictures_of_any_size_are_valid_png_files(rows: int, columns: int, seed: int) -> None:
    pictures, hr = SlicePictures(), torch.rand(1, 1, columns, rows, generator=torch.Generator().manual_seed(seed))
    pictures.add("a", None, 0, hr, {}, hr)
    image = np.asarray(Image.open(io.BytesIO(pictures.slices["a", ""].pictures["truth"])))
    truth = hr[0, 0].numpy().T[::-1, ::-1]
    low, high = truth.min(), max(np.percentile(truth, 99.8), truth.min() + 1e-9)
    assert image.shape == (rows, columns)
    if rows * columns > 1:
        assert abs(image / 255 - ((truth - low) / (high - low)).clip(0, 1)).max() <= 0.5 / 63 + 0.51 / 255


def test_a_page_of_12_patients_has_10_megabytes_at_most(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures, rows = SlicePictures(), []
    many = [f"method {i}" for i in range(MAX_METHODS + 3)]
    for i in range(12):
        hr = torch.rand(1, 1, 256, 256, generator=generator)  # noise, which cannot be compressed
        pictures.add(f"p{i}", "t2", 0, hr[..., ::4, ::4], dict.fromkeys(many, hr), hr)
        rows += [{"subject": f"p{i}", "contrast": "t2", "slice": 0, "method": name, "PSNR": 30.0} for name in many]
    path = write_results_page(tmp_path / "a.html", "A", rows, ["PSNR"], pictures)
    page = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size <= 10e6
    assert sum(tag == "img" for tag, _ in page.elements) == 12 * (MAX_METHODS + 2)
    assert len(page.tables[1]) == 1 + 12 * len(many)


def test_values_that_are_not_finite_have_their_places(tmp_path: Path) -> None:
    values = {"exact": [float("inf")] * 2, "none": [float("nan")] * 2, "some": [float("nan"), 20.0]}
    rows: list[Row] = [
        {"subject": "a", "slice": i, "method": method, "PSNR": value}
        for method, pair in values.items()
        for i, value in enumerate(pair)
    ]
    text, page = written_rows(rows, ["PSNR"], tmp_path)
    assert page.tables[2][1:] == [
        ["exact", "–", "0: ∞", "1: ∞"], ["none", "–", "–", "–"], ["some", "20.00", "1: 20.00", "1: 20.00"]
    ]  # fmt: skip
    assert 'data-value="Infinity"' in text
    _, page = written_rows([{"subject": "a", "slice": 0, "method": "m"}], [], tmp_path / "no metrics")
    assert page.tables[2] == [["method"], ["m"]]


def test_the_worst_slice_follows_the_direction_of_the_metric(tmp_path: Path) -> None:
    rows: list[Row] = [{"subject": "a", "slice": i, "method": "m", "LPIPS": i / 10} for i in range(3)]
    _, page = written_rows(rows, ["LPIPS"], tmp_path)
    assert page.tables[2] == [
        ["method", "LPIPS ↓", "worst slice (LPIPS)", "best slice (LPIPS)"],
        ["m", "0.1000 ± 0.1000", "2: 0.2000", "0: 0.0000"],
    ]


def written_rows(rows: list[Row], metrics: list[str], folder: Path) -> tuple[str, Page]:
    text = write_results_page(folder / "a.html", "A", rows, metrics, SlicePictures()).read_text(encoding="utf-8")
    return text, Page(text)


def test_an_existing_page_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("mine")
    with pytest.raises(ExistsError):
        write_results_page(tmp_path / "a.html", "A", [], [], SlicePictures())
    assert os.listdir(tmp_path) == ["a.html"]
    assert (tmp_path / "a.html").read_text() == "mine"


@pytest.fixture(scope="module")
def shown(
    measured: tuple[SuperResolutionEvaluation, SlicePictures], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; install it (apt install chromium)")
    folder = tmp_path_factory.mktemp("page")
    written(measured, folder)
    with browser(folder / "profile") as found:
        found.open(folder / "a.html")
        yield found


@pytest.mark.timeout(300)
class TestInABrowser:
    """The page in headless Chromium."""

    @staticmethod
    def column(page: Browser, index: int, visible: bool = False) -> list[str]:
        rows = "Array.from(patients.tBodies[0].rows)" + (".filter((row) => row.checkVisibility())" if visible else "")
        return page.value(f"{rows}.map((row) => row.cells[{index}].textContent)")

    def test_it_is_drawn_without_a_request_or_a_message(self, shown: Browser) -> None:
        assert shown.value("document.body.dataset.state") == "ready"
        assert shown.messages == []
        assert [url for url in shown.requests if not url.startswith(("file:///", "data:"))] == []
        assert sum(url.startswith("file:") for url in shown.requests) == 1
        sizes = shown.value("Array.from(document.images, (image) => [image.naturalWidth, image.naturalHeight])")
        assert sizes == 6 * [[6, 9], *([[24, 36]] * 6)]
        assert shown.value("Array.from(document.images).every((image) => image.width / image.height === 24 / 36)")

    def test_a_column_is_sorted_by_the_keyboard_alone(self, shown: Browser) -> None:
        shown.value("patients.tHead.rows[0].cells[3].querySelector('button').focus()")
        for order, sign in (("ascending", 1), ("descending", -1)):
            shown.press("Enter", "\r")
            assert shown.value("patients.tHead.rows[0].cells[3].getAttribute('aria-sort')") == order
            values = [float(text.split(" ")[0]) for text in self.column(shown, 3)]
            assert len(values) == 30
            assert values == sorted(values, key=lambda value: sign * value)
            assert len(set(values)) > 1
        assert shown.value("document.querySelectorAll('[aria-sort]').length") == 1

    def test_missing_numbers_are_last_in_both_orders(self, shown: Browser) -> None:
        for _ in range(2):
            shown.value("patients.tHead.rows[0].cells[5].querySelector('button').click()")
            assert self.column(shown, 5) == 6 * ["12.5"] + 24 * ["–"]

    def test_text_is_sorted_as_a_reader_expects(self, shown: Browser) -> None:
        shown.value("patients.tHead.rows[0].cells[0].querySelector('button').click()")
        assert self.column(shown, 0) == [name for name in ("a<1>", "b & co", "patient 10") for _ in range(10)]

    def test_one_method_can_be_chosen(self, shown: Browser) -> None:
        shown.value("method.value = 'MIAR'; method.dispatchEvent(new Event('change')); 1")
        assert self.column(shown, 2, visible=True) == 6 * ["MIAR"]
        shown.value("method.value = ''; method.dispatchEvent(new Event('change')); 1")
        assert len(self.column(shown, 2, visible=True)) == 30

    def test_a_link_leads_to_the_patient(self, shown: Browser) -> None:
        shown.value("document.querySelector('nav a[href=\"#patient-5\"]').click()")
        shown.wait_for("Math.abs(document.getElementById('patient-5').getBoundingClientRect().top) < innerHeight / 2")
        assert shown.value("document.querySelector('#patient-5 h2').textContent") == "patient 10, t1"
