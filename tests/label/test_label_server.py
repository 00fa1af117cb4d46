from __future__ import annotations

import gzip
import importlib.util
import json
import shutil
import stat
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
import requests
from conftest import IMAGES, SHAPE, fill_studies
from helpers.bundle_runs import TOKENS
from helpers.phantoms import write_dicom_series, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle
from servers import Server, label_server, miar

from miar_monai.data.dicom_grid import LPS_TO_RAS
from miar_monai.data.geometry import fov_corners
from miar_monai.data.io import read_volume
from miar_monai.inference.bundle import find_bundle
from miar_monai.inference.resolver import SuperResolver
from miar_monai.monailabel_app.task import SuperResolutionTask

GREEDY = {"lookahead_tokens": 0}


def nifti(response: requests.Response) -> nib.Nifti1Image:
    assert response.status_code == 200, response.text
    packed = response.content[:2] == b"\x1f\x8b"
    image = nib.Nifti1Image.from_bytes(gzip.decompress(response.content) if packed else response.content)
    assert image.get_data_dtype() == np.float32
    return image


def read_nrrd(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels (X, Y, Z) and the RAS+ affine, with a reader that is independent of the writer."""
    voxels, header = nrrd.read(str(path))
    assert header["space"] == "left-posterior-superior"
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = header["space directions"].T, header["space origin"]
    return voxels, LPS_TO_RAS @ affine


def slicer_client(url: str, folder: Path) -> Any:
    """Return the client of the 3D Slicer plugin, a copy of a stand-alone module of MONAI Label."""
    path = Path(importlib.util.find_spec("monailabel").origin).parent / "client" / "client.py"
    spec = importlib.util.spec_from_file_location("slicer_client", path)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports cgi
        spec.loader.exec_module(module)
    return module.MONAILabelClient(url, tmpdir=str(folder), client_id="user-xyz")


def test_info_lists_both_models_and_their_settings(server: Server) -> None:
    info = server.get("/info/").json()
    assert set(info["models"]) == {"miar_brats", "miar_lidc"}
    assert info["labels"] == []
    assert info["trainers"] == {}
    for model in info["models"].values():
        assert (model["type"], model["labels"], model["dimension"]) == ("others", [], 3)
        assert {"device", "lookahead_tokens", "fidelity", "blur"} <= set(model["config"])
        assert (model["config"]["uncertainty"], model["config"]["save_image"]) == (False, False)


@pytest.mark.parametrize(
    ("model", "image", "settings"),
    [
        ("brats", "head0", {}),
        ("lidc", "head1", GREEDY),
        ("brats", "sheared", {"lookahead_tokens": 0, "fidelity": 1, "blur": 0.5}),
    ],
)
def test_the_result_is_that_of_the_command(
    server: Server, studies: Path, tmp_path: Path, model: str, image: str, settings: dict[str, float]
) -> None:
    result = nifti(server.infer(f"miar_{model}", image, result_extension=".nii", **settings))
    (source,) = studies.glob(f"{image}.nii*")
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    written = nib.load(miar("sr", source, "-o", tmp_path, "--model", model, "--device", "cpu", *options))
    assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))
    assert np.array_equal(result.affine, written.affine)
    assert result.shape == (4 * SHAPE[0], 4 * SHAPE[1], SHAPE[2])
    lr = nib.load(source)
    assert np.allclose(fov_corners(result.affine, result.shape), fov_corners(lr.affine, lr.shape), atol=1e-4)


@pytest.mark.parametrize("spacing", ["1,1,0.75", [1, 1, 0.75]])
def test_a_grid_can_be_requested(server: Server, studies: Path, tmp_path: Path, spacing: str | list[float]) -> None:
    result = nifti(server.infer("miar_brats", "head0", result_extension=".nii", spacing=spacing, factor="", **GREEDY))
    (source,) = studies.glob("head0.nii*")
    options = ("--spacing", "1,1,0.75", "--lookahead-tokens", "0")
    written = nib.load(miar("sr", source, "-o", tmp_path, "--model", "brats", "--device", "cpu", *options))
    assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))
    assert np.array_equal(result.affine, written.affine)
    assert result.shape == (SHAPE[0], SHAPE[1], 2 * SHAPE[2])
    bell = server.infer(
        "miar_brats", "head0", result_extension=".nii", spacing=spacing, slice_profile="gaussian", **GREEDY
    )
    options = (*options, "--slice-profile", "gaussian")
    other = nib.load(miar("sr", source, "-o", tmp_path / "bell.nii", "--model", "brats", "--device", "cpu", *options))
    assert np.array_equal(np.asarray(nifti(bell).dataobj), np.asarray(other.dataobj))
    assert not np.array_equal(np.asarray(other.dataobj), np.asarray(written.dataobj))
    answer = server.infer("miar_brats", "head0", factor=2, spacing=1)
    assert answer.status_code == 400
    assert "factor and spacing are given, but only one of" in answer.json()["detail"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the client does not close its files
def test_requests_of_3d_slicer(server: Server, studies: Path, tmp_path: Path) -> None:
    client = slicer_client(server.url, tmp_path)
    config = client.info()["models"]["miar_brats"]["config"]
    chosen = {name: value[0] if isinstance(value, list) else value for name, value in config.items()}
    params = {**chosen, **GREEDY, "result_extension": ".nrrd", "result_dtype": "uint8"}
    assert Path(client.next_sample("random", {})["path"]).parent == studies

    file, answer = client.infer("miar_brats", "sheared", params)
    voxels, affine = read_nrrd(file)
    expected = SuperResolver("brats", "cpu", **GREEDY).volume(read_volume(studies / "sheared.nii"))
    assert voxels.dtype == np.float32  # instead of the requested uint8
    assert np.array_equal(voxels, expected.array)
    assert np.allclose(affine, expected.affine, atol=1e-6)
    assert answer["kind"] == "image"
    assert answer["after"]["shape"] == list(voxels.shape)
    assert answer["settings"]["lookahead_tokens"] == 0

    sent = write_nifti_phantom(tmp_path / "own.nii.gz", SHAPE, seed=3)  # equals head3
    session = client.create_session(str(sent))["session_id"]
    in_session, _ = client.infer("miar_brats", "", params, session_id=session)
    by_file, _ = client.infer("miar_brats", "", params, file=str(sent))
    by_id, _ = client.infer("miar_brats", "head3", params)
    assert Path(in_session).read_bytes() == Path(by_file).read_bytes() == Path(by_id).read_bytes()
    client.remove_session(session)


def test_requests_of_ohif(server: Server, studies: Path, tmp_path: Path) -> None:
    params = {"result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}
    response = server.infer("miar_brats", "head2", result_extension=".nrrd", **params, **GREEDY)
    assert response.headers["content-type"] == "application/octet-stream"
    (tmp_path / "sr.nrrd").write_bytes(response.content)
    expected = SuperResolver("brats", "cpu", **GREEDY).volume(read_volume(studies / "head2.nii.gz"))
    assert np.array_equal(read_nrrd(tmp_path / "sr.nrrd")[0], np.rint(expected.array))
    assert "<title>" in server.get("/ohif/").text
    assert server.infer("miar_brats", "head2", output="dicom_seg", label_info=[{"name": "x"}]).status_code == 400


def test_eight_simultaneous_requests_are_not_mixed_up(server: Server, studies: Path) -> None:
    jobs = [(("brats", "lidc")[i // 4], IMAGES[i % 4], 0.1 * i) for i in range(8)]

    def ask(job: tuple[str, str, float]) -> nib.Nifti1Image:
        return nifti(server.infer(f"miar_{job[0]}", job[1], result_extension=".nii", fidelity=job[2], **GREEDY))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, jobs))
    resolvers = {model: SuperResolver(model, "cpu", **GREEDY) for model in ("brats", "lidc")}
    for (model, image, fidelity), result in zip(jobs, results, strict=True):
        resolver = resolvers[model].with_settings(fidelity=fidelity)
        expected = np.rint(resolver.volume(read_volume(studies / f"{image}.nii.gz")).array)
        assert np.array_equal(np.asarray(result.dataobj), expected)
    assert len({result.to_bytes() for result in results}) == 8


@pytest.mark.parametrize(
    ("model", "image", "params", "status", "sentence"),
    [
        ("miar_brats", "unknown", {}, 404, "there is no image 'unknown'"),
        ("miar_brats", "a" * 5000, {}, 404, "there is no image"),
        ("miar_heart", "head0", {}, 404, "there is no model 'miar_heart': this server has miar_brats, miar_lidc."),
        ("miar_brats", "head0", {"fidelity": 7}, 400, "fidelity is 7, but it must lie between 0 and 1"),
        ("miar_brats", "head0", {"fidelity": "high"}, 400, "fidelity is 'high'"),
        (
            "miar_brats",
            "head0",
            {"slice_profile": "bell"},
            400,
            "must be one of slr, gaussian, box; correct the setting",
        ),
        ("miar_brats", "head0", {"lookahead_tokens": 1.5}, 400, "must be a whole number"),
        ("miar_brats", "head0", {"blur": "a lot"}, 400, "a number of LR voxels or 'auto' is needed"),
        ("miar_brats", "head0", {"device": "abacus"}, 400, "there is no device 'abacus'"),
        ("miar_brats", "head0", {"device": 5}, 400, "there is no device '5'"),
        ("miar_brats", "head0", {"result_extension": ".exe"}, 400, "must be one of .nii.gz, .nii, .nrrd"),
        ("miar_brats", "head0", {"save_image": "maybe"}, 400, "save_image is 'maybe', but it must be true or false"),
        ("miar_brats", "head0", {"uncertainty": "true"}, 400, "uncertainty is 'true', but it must be true or false"),
        ("miar_brats", "head0", {"uncertainty": 1}, 400, "uncertainty is 1, but it must be true or false"),
        ("miar_brats", "head0", {"guide": "unknown"}, 404, "there is no image 'unknown'"),
        ("miar_lidc", "head0", {"guide": "head1"}, 400, "a guide is given, but this model was trained without one"),
        ("miar_brats", __file__, {}, 400, "cannot be read as an image"),
    ],
)
def test_a_bad_request_is_answered_in_one_sentence(
    server: Server, model: str, image: str, params: dict[str, object], status: int, sentence: str
) -> None:
    response = server.infer(model, image, **params)
    assert response.status_code == status
    assert sentence in response.json()["detail"]
    assert server.get("/info/").status_code == 200


@pytest.mark.parametrize(
    "setting", ["$__import__('pathlib').Path('{}').touch()", {"_target_": "pathlib.Path.touch", "self": "{}"}, "@alpha"]
)
def test_settings_are_not_executed_as_code(server: Server, tmp_path: Path, setting: str | dict[str, str]) -> None:
    trace = tmp_path / "trace"
    value = json.loads(json.dumps(setting).replace("{}", str(trace)))
    response = server.infer("miar_brats", "head0", blur=value)
    assert response.status_code == 400
    assert "a number or a word is needed" in response.json()["detail"]
    assert not trace.exists()


def test_a_dicom_folder_and_its_zip_file_give_the_result_of_the_command(server: Server, tmp_path: Path) -> None:
    series = write_dicom_series(tmp_path / "ct", SHAPE)
    result = nifti(server.infer("miar_lidc", str(series), result_extension=".nii", **GREEDY))
    options = ("--model", "lidc", "--device", "cpu", "--lookahead-tokens", "0")
    written = nib.load(miar("sr", series, "-o", tmp_path, *options))
    assert np.array_equal(np.asarray(result.dataobj), np.asarray(written.dataobj))
    assert np.array_equal(result.affine, written.affine)
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", series)
    assert server.infer("miar_lidc", packed, result_extension=".nii", **GREEDY).content == result.to_bytes()


def test_results_are_saved_as_new_images_and_replace_none(server: Server, studies: Path) -> None:
    before = (studies / "head1.nii.gz").read_bytes()
    names = [
        server.infer("miar_brats", "head1", output="json", save_image=True, **settings).json()["image"]
        for settings in (GREEDY, {**GREEDY, "fidelity": 1})
    ]
    assert names == ["head1_sr", "head1_sr2"]
    first, second = (nifti(server.get(f"/datastore/image?image={name}")) for name in names)
    expected = nifti(server.infer("miar_brats", "head1", result_extension=".nii", **GREEDY))
    assert np.array_equal(np.asarray(first.dataobj), np.asarray(expected.dataobj))
    assert not np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    assert (studies / "head1.nii.gz").read_bytes() == before
    info = server.get(f"/datastore/image/info?image={names[0]}").json()
    assert info["super_resolved_from"] == "head1"
    assert "fidelity 0.25" in info["derivation"]
    for name in names:
        (studies / f"{name}.nii.gz").unlink()


@pytest.mark.parametrize(("model", "image"), [("brats", "head2"), ("lidc", "sheared")])
def test_the_uncertainty_is_saved_and_does_not_change_the_result(
    server: Server, studies: Path, tmp_path: Path, model: str, image: str
) -> None:
    answer = server.infer(f"miar_{model}", image, "json", save_image=True, uncertainty=True, **GREEDY).json()
    assert (answer["image"], answer["uncertainty_image"]) == (f"{image}_sr", f"{image}_sr_uncertainty")
    (source,) = studies.glob(f"{image}.nii*")
    options = ("--model", model, "--device", "cpu", "--lookahead-tokens", "0", "--report", tmp_path / "report.json")
    miar("sr", source, "-o", tmp_path, "--uncertainty", *options)
    for key in ("image", "uncertainty_image"):
        saved = nifti(server.get(f"/datastore/image?image={answer[key]}"))
        written = nib.load(tmp_path / f"{answer[key]}.nii.gz")
        assert np.array_equal(np.asarray(saved.dataobj), np.asarray(written.dataobj))
        assert np.array_equal(saved.affine, written.affine)
        assert server.get(f"/datastore/image/info?image={answer[key]}").json()["super_resolved_from"] == image
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    for name in ("expected_absolute_error", "warnings"):
        assert answer[name] == case[name]
    not_in_hu = [warning for warning in case["warnings"] if "HU" in warning]
    assert bool(not_in_hu) == (model == "lidc")
    without = nifti(server.infer(f"miar_{model}", image, result_extension=".nii", **GREEDY))
    assert np.array_equal(
        np.asarray(nifti(server.get(f"/datastore/image?image={image}_sr")).dataobj), np.asarray(without.dataobj)
    )
    for key in ("image", "uncertainty_image"):
        (studies / f"{answer[key]}.nii.gz").unlink()


def test_without_saving_the_response_has_the_mean_and_maximum_of_the_uncertainty(server: Server, studies: Path) -> None:
    before = sorted(studies.iterdir())
    answer = server.infer("miar_brats", "head3", "json", uncertainty=True, **GREEDY).json()
    expected = SuperResolver("brats", "cpu", uncertainty=True, **GREEDY).volume(read_volume(studies / "head3.nii.gz"))
    assert answer["settings"]["uncertainty"] is True
    assert answer["expected_absolute_error"]["mean"] == pytest.approx(expected.uncertainty.mean(), rel=1e-5)
    assert answer["expected_absolute_error"]["maximum"] == expected.uncertainty.max()
    assert not {"image", "uncertainty_image"} & set(answer)
    assert sorted(studies.iterdir()) == before
    answer = server.infer("miar_brats", "head3", "json", **GREEDY).json()
    assert (answer["settings"]["uncertainty"], answer["expected_absolute_error"]) == (False, None)


def test_a_map_is_not_combined_with_another_result(server: Server, studies: Path) -> None:
    def save(uncertainty: bool) -> str:
        answer = server.infer("miar_brats", "head0", "json", save_image=True, uncertainty=uncertainty, **GREEDY)
        return str(answer.json()["image"])

    assert save(uncertainty=True) == "head0_sr"
    requests.delete(f"{server.url}/datastore/?id=head0_sr", timeout=30).raise_for_status()
    map_before = (studies / "head0_sr_uncertainty.nii.gz").read_bytes()
    assert [save(uncertainty) for uncertainty in (False, True)] == ["head0_sr2", "head0_sr3"]
    assert (studies / "head0_sr_uncertainty.nii.gz").read_bytes() == map_before
    saved = {path.name for path in studies.glob("head0_*")}
    assert saved == {f"head0_{name}.nii.gz" for name in ("sr_uncertainty", "sr2", "sr3", "sr3_uncertainty")}
    for name in saved:
        (studies / name).unlink()


def test_a_batch_saves_all_results_and_continues_after_a_failure(app: Path, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    for i, name in enumerate(("a", "c")):
        write_nifti_phantom(studies / f"{name}.nii.gz", SHAPE, seed=i)
    (studies / "b.nii.gz").write_bytes(b"not a volume")
    with label_server(app, studies, tmp_path / "server", "models", "brats").running() as server:
        for _ in range(2):  # the second batch skips the results of the first
            url = f"{server.url}/batch/infer/miar_brats?images=all&run_sync=true"
            params = {**GREEDY, "max_workers": 1, "uncertainty": True}
            requests.post(url, json=params, timeout=120).raise_for_status()
        assert set(server.get("/info/").json()["models"]) == {"miar_brats"}
    names = {path.name for path in studies.glob("*.nii.gz")}
    results = [f"{name}_{result}" for name in ("a", "c") for result in ("sr", "sr2")]
    maps = [f"{result}_uncertainty" for result in results]
    assert names == {f"{name}.nii.gz" for name in ("a", "b", "c", *results, *maps)}


def test_killed_during_inference_and_restarted(app: Path, tmp_path: Path) -> None:
    studies = fill_studies(tmp_path / "studies")
    server = label_server(app, studies, tmp_path / "server")
    server.start()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(server.infer, "miar_brats", "head0", save_image=True)
        while "Infer Request" not in server.log:
            pass
        server.kill()
        with pytest.raises(requests.ConnectionError):
            job.result()
    assert not list(studies.glob("*_sr*"))
    with server.running():
        result = nifti(server.infer("miar_brats", "head0", result_extension=".nii", **GREEDY))
    expected = SuperResolver("brats", "cpu", **GREEDY).volume(read_volume(studies / "head0.nii.gz"))
    assert np.array_equal(np.asarray(result.dataobj), np.rint(expected.array))


def test_other_users_cannot_read_the_result(studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    request = {"image": str(studies / "head0.nii.gz"), "device": "cpu", **GREEDY}
    file, _ = SuperResolutionTask(find_bundle("brats"))(request)
    assert list(tmp_path.iterdir()) == [Path(file)]
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600


def test_a_model_with_tokens_takes_their_settings(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bundle = write_tiny_bundle(tmp_path / "tiny", TOKENS)
    task, source = SuperResolutionTask(bundle), studies / "head0.nii.gz"
    results = []
    for tokens in (0, 2):
        request = {"image": str(source), "device": "cpu", "lookahead_tokens": tokens}
        file, answer = task(request)
        assert answer["settings"]["lookahead_tokens"] == tokens
        expected = SuperResolver(bundle, "cpu", lookahead_tokens=tokens).volume(read_volume(source))
        results.append(np.asarray(nib.load(file).dataobj))
        assert np.array_equal(results[-1], np.rint(expected.array))
    assert not np.array_equal(*results)


def test_the_response_is_complete_and_temporary_files_are_removed(server: Server, tmp_path: Path) -> None:
    response = server.infer("miar_brats", "head0", output="all", **GREEDY)
    boundary = response.headers["content-type"].split("boundary=")[1].encode()
    parts = [part for part in response.content.split(b"--" + boundary) if b"application/octet-stream" in part]
    name = parts[0].split(b'filename="')[1].split(b'"')[0].decode()
    packed = parts[0].split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
    assert nib.Nifti1Image.from_bytes(gzip.decompress(packed)).shape == (4 * SHAPE[0], 4 * SHAPE[1], SHAPE[2])
    assert name.startswith("miar-")  # the pattern of left_behind
    assert not server.left_behind()
