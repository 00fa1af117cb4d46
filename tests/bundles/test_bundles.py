from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
import torch
from helpers.bundle_runs import (
    BUNDLES,
    NAMES,
    NETWORK,
    TOKENS,
    arguments,
    bundle_folder,
    config,
    has_estimator,
    network,
    parsed,
    quick_command,
    tiny,
    tiny_checkpoint,
    workflow,
)
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny_bundle import write_tiny_bundle
from monai.bundle import ConfigParser, ReferenceResolver, download, load
from monai.bundle.scripts import ckpt_export, verify_metadata, verify_net_in_out

from miar_monai import __version__
from miar_monai.cli.build_bundles import build, build_zip, bundle_files
from miar_monai.cli.compose_configs import OVERLAYS
from miar_monai.cli.doctor import check_weights
from miar_monai.degradation import Degradation
from miar_monai.errors import CheckpointError, ConfigurationError, OutputError, SettingError
from miar_monai.inference.bundle import ALIASES, check_command_line, check_switches, find_bundle, metadata

SCHEMA = Path(__file__).parent / "meta_schema_20240725.json"
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # raised inside PyTorch
ALL = (*NAMES, TOKENS)
WORKFLOWS = ("train", "train_stage1", "train_estimator", "inference", "evaluate")
PEERS = BUNDLES.parent / "benchmarks" / "peers"
CONFIGS: list[tuple[str, Path | None]] = [
    *((kind, None) for kind in WORKFLOWS),
    *(
        (name.removeprefix("multi_gpu_").removeprefix("paper_"), Path("configs", f"{name}.json"))
        for name in OVERLAYS
        if name != "train_posterior"
    ),
    ("train_estimator", Path("configs", "train_posterior.json")),
    *(("train", path) for path in sorted(PEERS.glob("*.json"))),
]


def read(name: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle_folder(name) / "configs" / file).read_text())
    return content


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_has_documents_and_licenses_and_no_code(name: str) -> None:
    files = {str(path.relative_to(BUNDLES / name)) for path in (BUNDLES / name).rglob("*") if path.is_file()}
    assert {"LICENSE", "configs/metadata.json", "docs/README.md", "docs/data_license.txt", "source.json"} <= files
    assert not any(path.endswith(".py") for path in files)
    assert [path for path in files if path.endswith(".pt")] == ["models/model.pt"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("kind", "overlay"), CONFIGS)
def test_references_and_overridden_ids_exist(kind: str, overlay: Path | None, name: str) -> None:
    parser, new = ConfigParser(), {"device_ids", "finalize", "validate#dataloader#sampler", "denoiser_def"}
    new |= {"side", "factor", "thickness", "train#planes"}  # of RCAN for thick slices
    new |= {"stage1_path", "vae_def", "vae_path"}  # of DiffMSR and LDM-SR, which start from another network
    new |= {"tokenizer_sizes", "selection", "score"}  # of the paper's system
    new |= {
        "guide_grid",
        "train#trainer#batch_keys",
        "validate#evaluator#prepare_batch",
        "datalist#contrasts",
    }  # of a guide
    new |= {
        "voxel_weight",
        "patch_weight",
        "feature_weight",
        "num_filters",
        "score",
        "objective_def#score",
    }  # of samples
    transforms = ("central_slices", "center_crop", "train#padding", "validate#central_slices")
    new |= {f"{transform}#allow_missing_keys" for transform in transforms}  # a guide can be missing
    parser.read_config(config(name, kind))
    if overlay:
        overlay = bundle_folder(name) / overlay
        overridden = {key.removeprefix("+") for key in json.loads(overlay.read_text())} - new
        assert [key for key in overridden if key not in parser] == []
        parser.read_config([config(name, kind), overlay])
    references = ReferenceResolver.find_refs_in_config(parser.get(), "")
    assert len(references) > 50
    assert [key for key in references if key not in parser] == []


@pytest.mark.parametrize("blur", [{}, {"blur_sigma": 2.0, "blur_on": "hr"}])
@pytest.mark.parametrize("name", ALL)
def test_the_network_inverts_the_simulated_degradation(name: str, blur: dict[str, Any]) -> None:
    assumed = [parsed(name, kind, "network_def", **blur).degradation for kind in ("train", "evaluate", "inference")]
    assert assumed == [Degradation(sigma=2.0, blur_on="hr") if blur else Degradation()] * 3
    assert parsed(name, "evaluate", "evaluation", **blur).degradation == assumed[0]
    for augmentation in ("train#augmentation", "validate#dataset#augmentation"):
        transforms = parsed(name, "train", augmentation, **blur, other_blur_prob=0, noise_prob=0)
        item = transforms({"image": torch.rand(1, 272, 272)})
        torch.testing.assert_close(item["image"], assumed[0](item["label"]))
        assert item["image"].shape[-1] * 4 == item["label"].shape[-1]


@pytest.mark.parametrize("name", ALL)
def test_metadata(name: str, tmp_path: Path) -> None:
    schema = shutil.copy(SCHEMA, tmp_path)
    verify_metadata(meta_file=str(bundle_folder(name) / "configs" / "metadata.json"), filepath=schema)
    content = read(name, "metadata.json")
    assert content["version"] == __version__
    assert __version__ in content["changelog"]
    assert next(iter(content["network_data_format"]["inputs"])) == "image"
    assert next(iter(content["network_data_format"]["outputs"])) == "pred"


@pytest.mark.parametrize("kind", WORKFLOWS[:3])
@pytest.mark.parametrize("name", ALL)
def test_properties_of_monai_bundles(name: str, kind: str, tmp_path: Path) -> None:
    for i in range(3):
        write_nifti_phantom(tmp_path / f"{i}.nii.gz", (20, 20, 3), seed=i)
    data = tmp_path
    if name == "miar_brats" and kind != "inference":
        data = write_brats_folder(tmp_path / "brats", 3, (20, 20, 3), ("t2",))
    run = workflow(name, kind, dataset_dir=str(data), output_dir=str(tmp_path / "out"))
    assert run.check_properties() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ALL)
def test_networks_have_the_formats_of_the_metadata(name: str) -> None:
    metadata, inference = config(name, "metadata"), config(name, "inference")
    verify_net_in_out("network_def", meta_file=metadata, config_file=inference, **_network_settings(name))
    formats = read(name, "metadata.json")["network_data_format"]
    (low, _), (high, _) = formats["inputs"]["image"]["spatial_shape"], formats["outputs"]["pred"]["spatial_shape"]
    low, high = (17, 68) if low == "*" else (low, high)  # any size
    assert network(name)(torch.rand(1, 1, low, low)).shape == (1, 1, high, high)


def test_a_traced_network_gives_the_same_tile(tmp_path: Path) -> None:
    ckpt_export(
        "network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tiny_checkpoint(tmp_path)),
        meta_file=str(BUNDLES / "miar_brats" / "configs" / "metadata.json"),
        config_file=config("miar_brats", "inference"),
        use_trace=True,
        input_shape=[1, 1, 64, 64],
        **_network_settings("miar_brats"),
    )
    tile = torch.rand(1, 1, 64, 64)
    assert torch.equal(torch.jit.load(tmp_path / "model.ts")(tile), network("miar_brats")(tile))


def _network_settings(name: str) -> dict[str, Any]:
    """Return the settings of the tiny network, without references to settings that the real one refers to."""
    sizes = {f"network_def#{key}": value for key, value in NETWORK.items()}
    return (tiny("inference", name) if has_estimator(name) else sizes) | {"device": "cpu"}


def test_zip_files_are_reproducible(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "miar_brats")
    (bundle / "configs" / "__pycache__").mkdir()
    (bundle / "models" / "checkpoint_1.pt").write_bytes(b"not shipped")
    path = build_zip(bundle, tmp_path / "a")
    assert path == tmp_path / "a" / f"miar_brats_v{__version__}.zip"
    for file in bundle.rglob("*"):
        file.touch()
    assert build_zip(bundle, tmp_path / "b").read_bytes() == path.read_bytes()
    names = zipfile.ZipFile(path).namelist()
    assert names == sorted(names)
    assert all(name.startswith("miar_brats/") for name in names)
    assert [name for name in names if name.endswith(".pt")] == ["miar_brats/models/model.pt"]
    with pytest.raises(OutputError, match="exists already and is left as it is"):
        build_zip(bundle, tmp_path / "a")


def test_build_skips_bundles_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundles" / "miar_brats")
    bare = tmp_path / "bundles" / "bare"
    shutil.copytree(bundle, bare, ignore=shutil.ignore_patterns("*.pt"))
    for _ in range(2):
        build(str(tmp_path / "dist"), str(tmp_path / "bundles"))
    path = str(tmp_path / "dist" / f"miar_brats_v{__version__}.zip")
    assert capsys.readouterr().out.split() == [path, path]
    assert f"skipped: {bare} has no models/model.pt" in caplog.text


def test_folders_that_are_not_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no configs/metadata\.json: the folder of a bundle is needed"):
        bundle_files(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no models/model\.pt: a bundle is shipped with its weights"):
        bundle_files(tmp_path)


def test_a_downloaded_bundle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = build_zip(write_tiny_bundle(tmp_path / "miar_brats"), tmp_path)
    folder = tmp_path / "downloaded"
    download(name="miar_brats", bundle_dir=str(folder), url=archive.as_uri(), progress=False)
    volume = write_nifti_phantom(tmp_path / "in.nii.gz", (20, 17, 2))
    parts = arguments("miar_brats", "inference", tmp_path, dataset_dir=volume, output_dir=tmp_path / "out")
    parts = ["run", "--config_file", str(folder / "miar_brats" / "configs" / "inference.json"), *parts[5:]]
    parts[parts.index("--bundle_root") + 1] = str(folder / "miar_brats")
    done = quick_command(*parts, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert nib.load(tmp_path / "out" / "in_sr.nii.gz").shape == (80, 68, 2)

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored at the end
    loaded = load("miar_brats", bundle_dir=str(folder), workflow_type="inference")
    expected = torch.load(folder / "miar_brats" / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert loaded.eval()(torch.rand(1, 1, 64, 64)).shape == (1, 1, 256, 256)


@pytest.mark.parametrize("value", ["false", "true", 0, None])
def test_switches_must_be_booleans(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^overwrite is .*, but it must be True or False; on the"):
        check_switches(amp=True, overwrite=value)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_weights_have_the_hash_of_the_metadata_and_fit(name: str) -> None:
    weights = BUNDLES / name / "models" / "model.pt"
    assert check_weights(str(BUNDLES / name)) == f"{weights} sha256 {metadata(BUNDLES / name)['weights_sha256']}"
    assert weights.stat().st_size < 60e6


RUN = ["/lib/monai/bundle/__main__.py", "run", "training"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--fidelty", "1"],
            "inference\\.json has no setting 'fidelty': the closest is 'fidelity'; correct the command",
        ),
        (["--fidelty=1"], "inference\\.json has no setting 'fidelty': the closest is 'fidelity'"),
        (["--inferrer#overlap", "0"], "inference\\.json has no setting 'inferrer': the closest is 'inferer'"),
        (["--zzz", "0"], "inference\\.json has no setting 'zzz': its settings are alpha, amp, "),
    ],
)
def test_unknown_settings_are_refused(options: list[str], sentence: str, name: str) -> None:
    file = ["--config_file", str(BUNDLES / name / "configs" / "inference.json")]
    for words in (RUN + options + file, RUN + file + options):
        with pytest.raises(SettingError, match=sentence):
            check_command_line(words)
    check_command_line(["miar", *options])
    check_command_line([*RUN, *options, "--args_file", "args.json"])


def test_settings_of_overlays_and_of_monai_are_accepted() -> None:
    files = [str(BUNDLES / NAMES[0] / "configs" / f"{file}.json") for file in ("train", "multi_gpu_train")]
    one = [f"--config_file={files[0]}", "--max_epochs", "-1", "--datalist#contrasts", "['t1']", "--meta_file=x"]
    check_command_line(RUN + one)
    check_command_line([*RUN, *one, "--output-dir", "x", "--", "--trace"])
    both = [*RUN, "--config_file", f"{files}"]
    check_command_line([*both, "--train#trainer#amp", "False"])
    with pytest.raises(SettingError, match="'epochs'"):
        check_command_line([*both, "--epochs", "1"])


@pytest.mark.parametrize("alias", ALIASES)
def test_models_have_names_by_anatomy_and_modality(alias: str) -> None:
    assert find_bundle(alias) == find_bundle(ALIASES[alias])
    assert json.loads((find_bundle(alias) / "configs" / "metadata.json").read_text())["task"]
    assert [*ALIASES] == ["brain_mri", "chest_ct"]
