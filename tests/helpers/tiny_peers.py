"""The peers: real, and small."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

RCAN: dict[str, Any] = {"num_groups": 1, "num_blocks": 1, "channels": 16}
SWINIR: dict[str, Any] = {"embed_dim": 8, "depths": [2], "num_heads": [2]}
MHCA: dict[str, Any] = {"channels": 8, "num_blocks": 1}
DISC_UNET: dict[str, Any] = {
    "channels": [32, 32, 32], "num_res_blocks": 1, "num_attention_levels": 1, "head_channels": 16
}  # fmt: skip
DIFFMSR: dict[str, Any] = {
    "channels": 16, "num_groups": 1, "num_blocks": 1, "num_heads": 2, "side": 4, "num_prior_blocks": 1
}  # fmt: skip
VAE: dict[str, Any] = {"channels": [32, 32, 32], "num_res_blocks": 1}
DENOISER: dict[str, Any] = {"channels": [32, 32], "num_res_blocks": 1, "head_channels": 32}


def shrink_peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the peers sizes that a test has time for, and return their module; skip where their packages are missing."""
    for name in ("spandrel", "einops"):
        pytest.importorskip(name, reason=f"{name} is not installed; the peers need the extra bench")
    from benchmarks.peers import diffmsr, disc_diff, mhca, networks

    for name, sizes in (
        ("swinir", SWINIR),
        ("rcan", RCAN),
        ("rcan_through_plane", RCAN),
        ("Denoiser", DENOISER),
        ("vae", VAE),
    ):
        monkeypatch.setattr(networks, name, partial(getattr(networks, name), **sizes))
    monkeypatch.setattr(mhca, "MHCA", partial(mhca.MHCA, **MHCA))
    monkeypatch.setattr(mhca, "MMHCA", partial(mhca.MMHCA, **MHCA))
    monkeypatch.setattr(diffmsr, "DiffMSR", partial(diffmsr.DiffMSR, **DIFFMSR))
    tiny = partial(disc_diff.DisCDiff, disc_diff.DisCUNet(**DISC_UNET), sampling_steps=2)
    monkeypatch.setattr(disc_diff, "DisCDiff", tiny)
    monkeypatch.setattr(networks, "LatentDiffusion", partial(networks.LatentDiffusion, sampling_steps=2))
    return networks
