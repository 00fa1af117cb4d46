"""The app with a real PACS: Orthanc with its DICOMweb plugin (Debian: orthanc, orthanc-dicomweb)."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from helpers.phantoms import write_dicom_series
from servers import Server, label_server, miar, orthanc_server

SHAPE = (48, 40, 2)
OPTIONS = ("--model", "lidc", "--device", "cpu", "--lookahead-tokens", "0")
GREEDY = {"lookahead_tokens": 0}


def program() -> str | None:
    return shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/bin")


def send(series: Path, orthanc: Server) -> None:
    for file in series.iterdir():
        requests.post(f"{orthanc.url}/instances", data=file.read_bytes(), timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if program() is None or not Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so").exists():
        pytest.skip("Orthanc with DICOMweb is not installed (Debian's packages orthanc and orthanc-dicomweb)")
    with orthanc_server(str(program()), tmp_path_factory.mktemp("pacs") / "orthanc").running() as server:
        yield server


@pytest.fixture(scope="module")
def series(orthanc: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a series in the PACS, with a tilted gantry."""
    folder = write_dicom_series(tmp_path_factory.mktemp("source") / "ct", SHAPE, step=(0, 0.4, 2.5))
    send(folder, orthanc)
    return folder


@pytest.fixture(scope="module")
def server(app: Path, orthanc: Server, series: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with label_server(app, f"{orthanc.url}/dicom-web", tmp_path_factory.mktemp("server")).running() as server:
        yield server
        assert server.process.poll() is None


def uid(series: Path) -> str:
    return str(pydicom.dcmread(next(series.iterdir()), stop_before_pixels=True).SeriesInstanceUID)


def by_height(series: Path) -> list[Path]:
    return sorted(series.iterdir(), key=lambda file: pydicom.dcmread(file).ImagePositionPatient[2])


def stored(orthanc: Server, series_uid: str) -> list[pydicom.Dataset]:
    """Return the slices of a series in the PACS, by position."""
    found = requests.post(f"{orthanc.url}/tools/lookup", data=series_uid, timeout=30).json()[0]["ID"]
    instances = orthanc.get(f"/series/{found}/instances").json()
    images = [pydicom.dcmread(io.BytesIO(orthanc.get(f"/instances/{i['ID']}/file").content)) for i in instances]
    return sorted(images, key=lambda image: image.ImagePositionPatient[2])


def test_a_series_of_the_pacs_gives_the_result_of_the_command(server: Server, series: Path, tmp_path: Path) -> None:
    response = server.infer("miar_lidc", uid(series), result_extension=".nii", result_dtype="uint8", **GREEDY)
    result = nib.Nifti1Image.from_bytes(response.content)
    written = nib.load(miar("sr", series, "-o", tmp_path, *OPTIONS))
    assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))
    assert np.array_equal(
        result.affine, written.affine
    )  # with the shear, which MONAI Label's conversion to NIfTI loses


def test_download_by_frame_gives_the_same(app: Path, orthanc: Server, series: Path, tmp_path: Path) -> None:
    frames = {"MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME": "true"}  # option of MONAI Label for PACS that do not send files
    with label_server(app, f"{orthanc.url}/dicom-web", tmp_path / "server", **frames).running() as server:
        response = server.infer("miar_lidc", uid(series), result_extension=".nii", **GREEDY)
    result = nib.Nifti1Image.from_bytes(response.content)
    written = nib.load(miar("sr", series, "-o", tmp_path, *OPTIONS))
    assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))
    assert np.array_equal(result.affine, written.affine)


def test_simultaneous_requests_for_one_series_are_complete(server: Server, series: Path, tmp_path: Path) -> None:
    written = nib.load(miar("sr", series, "-o", tmp_path, *OPTIONS))
    with ThreadPoolExecutor(8) as pool:
        ask = partial(server.infer, "miar_lidc", uid(series), result_extension=".nii", **GREEDY)
        answers = [job.result() for job in [pool.submit(ask) for _ in range(8)]]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        result = nib.Nifti1Image.from_bytes(answer.content)
        assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))


def test_slices_that_arrive_later_are_included(server: Server, orthanc: Server, tmp_path: Path) -> None:
    growing = write_dicom_series(tmp_path / "ct", (16, 14, 3), patient_id="GROWING")
    files = by_height(growing)
    shapes = []
    for part in (files[:2], files[2:]):
        for file in part:
            sent = requests.post(f"{orthanc.url}/instances", data=file.read_bytes(), timeout=30).json()
        shapes.append(server.infer("miar_lidc", uid(growing), "json", **GREEDY).json()["before"]["shape"])
    requests.delete(f"{orthanc.url}/series/{sent['ParentSeries']}", timeout=30).raise_for_status()
    assert shapes == [[16, 14, 2], [16, 14, 3]]


def test_a_saved_result_is_the_series_of_the_command(
    server: Server, orthanc: Server, series: Path, tmp_path: Path
) -> None:
    before = stored(orthanc, uid(series))
    new = [
        server.infer("miar_lidc", uid(series), output="json", save_image=True, **GREEDY).json()["image"]
        for _ in range(2)
    ]
    assert len({*new, uid(series)}) == 3
    images = stored(orthanc, new[0])
    folder = Path(miar("sr", series, "-o", tmp_path, "--out-format", "dicom", *OPTIONS))
    expected = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda image: image.ImagePositionPatient[2])
    assert len(images) == len(expected) == SHAPE[2]
    for image, other, source in zip(images, expected, before, strict=True):
        assert np.array_equal(image.pixel_array, other.pixel_array)
        for name in ("ImagePositionPatient", "PixelSpacing", "RescaleIntercept", "DerivationDescription", "Rows"):
            assert image[name].value == other[name].value
        assert image.StudyInstanceUID == source.StudyInstanceUID
        assert image.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert stored(orthanc, uid(series)) == before
    found = server.get("/datastore/?output=all").json()
    assert server.get("/info/").json()["datastore"]["total"] == 3, found  # new series are listed at once


def test_a_saved_uncertainty_is_the_series_of_the_command(
    server: Server, orthanc: Server, series: Path, tmp_path: Path
) -> None:
    answer = server.infer("miar_lidc", uid(series), "json", save_image=True, uncertainty=True, **GREEDY).json()
    folder = Path(miar("sr", series, "-o", tmp_path, "--out-format", "dicom", "--uncertainty", *OPTIONS))
    for key, written in (("image", folder), ("uncertainty_image", Path(f"{folder}_uncertainty"))):
        expected = sorted(map(pydicom.dcmread, written.iterdir()), key=lambda image: image.ImagePositionPatient[2])
        images = stored(orthanc, answer[key])
        assert len(images) == len(expected) == SHAPE[2]
        for image, other in zip(images, expected, strict=True):
            assert np.array_equal(image.pixel_array, other.pixel_array)
            for name in ("RescaleSlope", "SeriesDescription", "SeriesNumber", "DerivationDescription", "WindowWidth"):
                assert image.get(name) == other.get(name)
            assert image.StudyInstanceUID == other.StudyInstanceUID
    assert (images[0].SeriesDescription, images[0].SeriesNumber) == ("SR 4x expected error", 2001)
    error = np.stack([image.pixel_array * float(image.RescaleSlope) for image in images])
    assert float(images[0].RescaleIntercept) + error.max() == pytest.approx(
        answer["expected_absolute_error"]["maximum"], rel=1e-3
    )


@pytest.mark.usefixtures("orthanc")  # skips without Orthanc
def test_a_batch_skips_results_and_a_request_for_one_gets_a_warning(app: Path, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "ct", (16, 14, 2))
    written = Path(miar("sr", series, "-o", tmp_path, "--out-format", "dicom", *OPTIONS))
    pacs = orthanc_server(str(program()), tmp_path / "orthanc")
    server = label_server(app, f"{pacs.url}/dicom-web", tmp_path / "server")
    with pacs.running(), ExitStack() as stack:
        for folder in (series, written):  # before the server lists the PACS
            send(folder, pacs)
        stack.enter_context(server.running())
        for number in (2, 4):  # series before each batch, the original among them
            assert server.get("/info/").json()["datastore"]["total"] == number
            url = f"{server.url}/batch/infer/miar_lidc?images=all&run_sync=true"
            answer = requests.post(url, json={**GREEDY, "max_workers": 1, "uncertainty": True}, timeout=120).json()
            assert set(answer) == {uid(series)}
            saved = answer[uid(series)]["params"]
            assert stored(pacs, saved["uncertainty_image"])
        for image in (uid(written), saved["image"], saved["uncertainty_image"]):
            warnings = server.infer("miar_lidc", image, "json", **GREEDY).json()["warnings"]
            assert warnings[0] == "the image is already a super-resolved image: give the original."
        assert "result itself" not in str(server.infer("miar_lidc", uid(series), "json", **GREEDY).json()["warnings"])


def test_ohif_finds_the_series_through_the_server(server: Server, series: Path) -> None:
    study = pydicom.dcmread(next(series.iterdir()), stop_before_pixels=True).StudyInstanceUID
    studies = server.get("/proxy/dicom/qido/studies?limit=101&offset=0&fuzzymatching=false").json()
    assert [item["0020000D"]["Value"] for item in studies] == [[study]]
    listed = server.get(f"/proxy/dicom/qido/studies/{study}/series").json()
    assert uid(series) in {item["0020000E"]["Value"][0] for item in listed}


def test_ohif_shows_the_result_in_a_browser(server: Server, series: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian's package chromium)")
    assert server.infer("miar_lidc", uid(series), output="json", save_image=True, **GREEDY).status_code == 200
    study = pydicom.dcmread(next(series.iterdir()), stop_before_pixels=True).StudyInstanceUID
    flags = ["--headless", "--no-sandbox", "--no-first-run", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    disabled = [f"--disable-{name}" for name in ("background-networking", "component-update", "sync", "quic")]
    page = [f"{server.url}/ohif/viewer?StudyInstanceUIDs={study}", "--virtual-time-budget=60000", "--dump-dom"]
    command = [chromium, *flags, *disabled, f"--user-data-dir={tmp_path}", *page]
    for _ in range(3):  # virtual time ignores threads, such as decoding
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        if 'src="data:image/' in dom:
            break
    assert "SR 4x" in dom  # among the series
    assert "S:1001" in dom.replace(" ", "")
    assert "<canvas" in dom
    assert 'src="data:image/' in dom  # thumbnails of decoded images


@pytest.mark.parametrize("image", ["1.2.3", "..", "no uid"])
def test_a_series_that_is_not_in_the_pacs(server: Server, image: str) -> None:
    response = server.infer("miar_lidc", image)
    assert response.status_code in (400, 404)
    assert "no image" in response.json()["detail"] or "DICOM series" in response.json()["detail"]


def test_a_result_without_a_source_series_is_not_stored(server: Server, tmp_path: Path) -> None:
    volume = nib.Nifti1Image(np.random.default_rng(0).normal(size=(16, 16, 1)), np.eye(4))
    nib.save(volume, tmp_path / "a.nii")
    response = server.infer("miar_lidc", str(tmp_path / "a.nii"), save_image=True, **GREEDY)
    assert response.status_code == 400
    assert "is not a DICOM series" in response.json()["detail"]
    assert not server.left_behind()


def test_a_pacs_that_has_stopped(app: Path, series: Path, tmp_path: Path) -> None:
    pacs = orthanc_server(str(program()), tmp_path / "orthanc")
    with pacs.running(), label_server(app, f"{pacs.url}/dicom-web", tmp_path / "server").running() as server:
        pacs.stop()
        response = server.infer("miar_lidc", uid(series))
        assert response.status_code == 502
        assert "does not send the series" in response.json()["detail"]
