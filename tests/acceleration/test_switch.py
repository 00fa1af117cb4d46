"""The environment variable that selects the accelerations."""

from __future__ import annotations

import pytest

from miar_monai import acceleration
from miar_monai.errors import SettingError


@pytest.mark.parametrize(
    ("value", "graphs", "kernels"),
    [
        (None, True, True),
        ("all", True, True),
        ("graphs", True, False),
        ("kernels", False, True),
        ("none", False, False),
    ],
)
def test_each_value_enables_its_accelerations(
    value: str | None, graphs: bool, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIAR_ACCELERATION", raising=False)
    if value is not None:
        monkeypatch.setenv("MIAR_ACCELERATION", value)
    assert (acceleration.graphs(), acceleration.kernels()) == (graphs, kernels)


def test_an_unknown_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIAR_ACCELERATION", "0")
    with pytest.raises(SettingError) as caught:
        acceleration.graphs()
    assert str(caught.value) == (
        "MIAR_ACCELERATION is '0', but it must be one of all, graphs, kernels, none; correct or unset it."
    )
