"""The peers with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import nn

from miar_monai.cli.workflow import read_config
from miar_monai.errors import ConfigurationError
from miar_monai.networks.weights import load_weights

TITLES = {"swinir": "SwinIR", "rcan": "RCAN", "mhca": "MHCA", "ldm": "LDM-SR"}
"""The peers of the comparison table, with the titles of their rows."""

GUIDED = {"mmhca": "MMHCA, guided", "disc_diff": "DisC-Diff, guided", "diffmsr": "DiffMSR, guided"}
"""The peers of the table that need another contrast of the patient."""

THROUGH_PLANE = "rcan_through_plane"
"""The peer of `benchmarks.through_plane`."""


def peer_config(bundle: str, peer: str) -> ConfigParser:
    """Return the training config of a peer: that of the bundle with the overlay of the peer, and of the guide."""
    names = ("guided", peer) if peer in GUIDED else (peer,)
    return read_config(bundle, {}, *(Path(__file__).with_name(f"{name}.json") for name in names), workflow="train")


def peer_network(bundle: str, peer: str) -> Any:
    """Return a peer, untrained, as its overlay of the bundle's training describes it."""
    return peer_config(bundle, peer).get_parsed_content("network_def")


def load_peers(
    bundle: str, peers_dir: str | None, titles: Mapping[str, str] = TITLES
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the trained peers by the titles of their rows, and a sentence for each peer without weights.

    Args:
        bundle: folder of the bundle.
        peers_dir: folder with ``<peer>.pt``, and ``vae.pt`` for the latent diffusion model.
        titles: the peers, with the titles of their rows.

    Raises:
        ConfigurationError: if ``peers_dir`` is not a folder.
        CheckpointError: if weights are damaged or belong to another network.
    """
    if peers_dir is not None and not Path(peers_dir).is_dir():
        raise ConfigurationError(f"{peers_dir} is not a folder: the folder of the peers' weights is needed.")
    loaded, missing = {}, []
    for peer, title in titles.items():
        weights, autoencoder = (Path(peers_dir or "", f"{name}.pt") for name in (peer, "vae"))
        needed = [weights, autoencoder] if peer == "ldm" else [weights]
        absent = [path.name for path in needed if peers_dir is None or not path.is_file()]
        if absent:
            missing.append(f"{title} is left out: {' and '.join(absent)} not found; train it and give --peers_dir.")
            continue
        network = peer_network(bundle, peer)
        if peer == "ldm":
            load_weights(network.vae, autoencoder, "train the autoencoder again.")
        load_weights(network.denoiser if peer == "ldm" else network, weights, "train the peer again.")
        loaded[title] = network
    return loaded, missing
