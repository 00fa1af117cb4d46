from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.bundle_runs import BUNDLES, NAMES

from miar_monai.cli.build_bundles import render
from miar_monai.cli.compose_configs import NETWORKS, OVERLAYS, WORKFLOWS, composed_files, write_configs
from miar_monai.errors import ConfigurationError

CHOSEN = {"evaluate", "inference"}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Write the shared layers and the source of a bundle, and return the folder of the bundle."""
    shutil.copytree(BUNDLES / "common", tmp_path / "common")
    (tmp_path / "miar_knee").mkdir()
    shutil.copy(BUNDLES / "miar_brats" / "source.json", tmp_path / "miar_knee")
    return tmp_path / "miar_knee"


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_are_up_to_date(name: str) -> None:
    files = composed_files(BUNDLES / name)
    assert {path for path in files if path.suffix == ".json"} == {*(BUNDLES / name / "configs").glob("*.json")}
    outdated = [str(path) for path, text in files.items() if path.read_text(encoding="utf-8") != text]
    assert outdated == [], "run make bundles"


def test_each_shared_layer_is_used() -> None:
    layers = {layer for names in (WORKFLOWS | OVERLAYS).values() for layer in names}
    layers = layers - {"network"} | {*NETWORKS}
    assert {path.stem for path in (BUNDLES / "common").glob("*.json")} == layers


def test_only_changed_files_are_written(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render(str(sources.parent))
    assert [*map(Path, capsys.readouterr().out.split())] == [*composed_files(sources)]
    assert write_configs(sources) == []
    config = sources / "configs" / "train.json"
    config.write_text("{}")
    assert write_configs(sources) == [config]


def test_a_section_changes_the_workflows_of_its_layer(sources: Path) -> None:
    source = sources / "source.json"
    own = json.loads(source.read_text())
    before = {path.stem: json.loads(text) for path, text in composed_files(sources).items() if path.suffix == ".json"}
    own["prediction"] = {"fidelity": 0.5, "+inferer": {"damping": 0.01}}
    source.write_text(json.dumps(own))
    after = {path.stem: json.loads(text) for path, text in composed_files(sources).items() if path.suffix == ".json"}
    assert {name for name in before if before[name] != after[name]} == {"evaluate", "inference"}
    assert after["evaluate"]["fidelity"] == 0.5
    assert after["evaluate"]["inferer"] == {**before["evaluate"]["inferer"], "damping": 0.01}


@pytest.mark.parametrize("workflow", ["train", "train_stage1", "evaluate", "inference"])
def test_settings_come_first_and_steps_last(workflow: str) -> None:
    keys = [*json.loads((BUNDLES / "miar_lidc" / "configs" / f"{workflow}.json").read_text())]
    components = ["load_transforms", "datalist", "initialize", "run"]
    assert keys[:4] == ["imports", "bundle_root", "dataset_dir", "output_dir"]
    assert [key for key in keys if key in components] == components
    setting = {"train": "teacher_forcing", "train_stage1": "l1_weight", "evaluate": "metrics", "inference": "blur"}
    assert keys.index(setting[workflow]) < keys.index("load_transforms")


def test_the_source_chooses_the_network_of_evaluation_and_inference(sources: Path) -> None:
    source = sources / "source.json"
    own = json.loads(source.read_text())
    training = {"train", "train_stage1"}  # of the networks with tokens, whatever is shipped
    for network, target, with_sizes in (("estimator", "Estimator", training), ("miar", "MIAR", training | CHOSEN)):
        source.write_text(json.dumps({**own, "network": network}))
        files = {path.stem: text for path, text in composed_files(sources).items()}
        configs = {workflow: json.loads(files[workflow]) for workflow in WORKFLOWS}
        for workflow in CHOSEN:
            assert configs[workflow]["network_def"]["_target_"] == f"miar_monai.networks.{target}"
        assert {workflow for workflow, content in configs.items() if "tokenizer_sizes" in content} == with_sizes
    source.write_text(json.dumps({**own, "network": "unet"}))
    with pytest.raises(ConfigurationError, match=r"source\.json has the network 'unet': estimator or miar is needed"):
        composed_files(sources)


def test_sources_that_cannot_be_used_are_named(sources: Path) -> None:
    source = sources / "source.json"
    for text, sentence in (
        ('{"trian": {}}', r"source\.json has a section 'trian': the name of a layer in .*common is needed; correct it"),
        ('{"train": {"no#where": 1}}', r"'no#where' in the sources of .*miar_knee cannot be merged"),
        ('{"train": {"+datalists": {}}}', r"'\+datalists' in the sources of .*miar_knee cannot be merged"),
        ('{"train": {"+datalist": [1]}}', r"'\+datalist' in the sources of .*miar_knee cannot be merged"),
        ("[]", r"source\.json cannot be read \(it is a list\): a JSON object is needed"),
    ):
        source.write_text(text)
        with pytest.raises(ConfigurationError, match=sentence):
            composed_files(sources)
    source.unlink()
    with pytest.raises(ConfigurationError, match=r"source\.json cannot be read"):
        composed_files(sources)
