"""The training benchmark times the loaders of the bundles."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.bench_training import STAGES, batch_ms, loader

pytest.importorskip("nilearn", reason="the extra `demo` is not installed")
BUNDLES = Path(__file__).parents[2] / "bundles"


@pytest.mark.parametrize("bundle", ["miar_brats", "miar_lidc"])
def test_the_loaders_yield_batches_for_a_training_step(bundle: str) -> None:
    first, second = ([*loader(str(BUNDLES / bundle), config, 2, 0, 3)] for config in STAGES.values())
    assert len(first) == len(second) == 3
    for batch in first:
        assert batch["image"].shape == (2, 1, 256, 256)
    for batch in second:
        assert batch["image"].shape == (2, 1, 64, 64)
        assert batch["label"].shape == (2, 1, 256, 256)
        assert batch["label"].std() > 0.05


def test_prefetched_batches_are_not_timed() -> None:
    def batches() -> object:
        for i in range(6):
            time.sleep(0.05 * (i > 2))
            yield i

    assert 50 <= batch_ms(batches(), skip=3) < 500
    assert batch_ms(batches(), skip=1) < batch_ms(batches(), skip=3)
