"""The README's example runs, and the files it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_prints_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    exec(compile(code, "README.md", "exec"), {})
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_links_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\((.*?)\)", README) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_configs_that_commands_name_exist() -> None:
    named = set(re.findall(r"\$BUNDLE/configs/(\w+\.json)", README))
    assert {"train_stage1.json", "train.json", "evaluate.json", "multi_gpu_train.json"} <= named
    for bundle in ("miar_brats", "miar_lidc"):
        assert [name for name in named if not (ROOT / "bundles" / bundle / "configs" / name).is_file()] == []
