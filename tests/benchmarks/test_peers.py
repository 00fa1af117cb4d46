from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.bundle_runs import (
    BUNDLES,
    NAMES,
    ONE_STEP,
    TOKENIZER,
    Finished,
    config,
    quick_command,
    tiny_tokenizer_file,
)
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny import started, tiny_slices, tiny_tokenizer
from helpers.tiny_peers import DENOISER, RCAN, SWINIR
from torch import Tensor, nn

from benchmarks.peers.loading import THROUGH_PLANE, TITLES
from benchmarks.peers.networks import NOISE, Denoiser, LatentDiffusion, rcan, rcan_through_plane, swinir
from benchmarks.peers.objectives import DiffusionObjective, RegressionObjective
from benchmarks.thick_slices import ThickSlices
from miar_monai.cli.workflow import read_config
from miar_monai.data.io import Volume
from miar_monai.degradation import Degradation
from miar_monai.errors import ConfigurationError
from miar_monai.networks.weights import load_weights

OVERLAYS = Path(__file__).parents[2] / "benchmarks" / "peers"
TINY: dict[str, dict[str, Any]] = {
    "swinir": {f"network_def#{key}": value for key, value in SWINIR.items()},
    "rcan": {f"network_def#{key}": value for key, value in RCAN.items()},
    THROUGH_PLANE: {f"network_def#{key}": value for key, value in RCAN.items()},
    "ldm": {
        "validate#evaluator#network#sampling_steps": 2,
        **{f"denoiser_def#{key}": value for key, value in DENOISER.items()},
    },
}


@pytest.fixture(autouse=True)
def _bench() -> None:
    for package in ("spandrel", "einops"):
        pytest.importorskip(package, reason=f"{package} is not installed; the peers need the extra bench")


def tiny_ldm(**options: Any) -> LatentDiffusion:
    """Return a network with a nonzero denoiser; the last layer of MONAI's is initialized with zeros."""
    tokenizer = tiny_tokenizer()
    network = LatentDiffusion(tokenizer, Denoiser(6, **DENOISER), sampling_steps=3, **options).eval()
    nn.init.normal_(network.denoiser.unet.out[2].conv.weight, std=0.05)
    network.measure_scale(tiny_slices(4, 64))
    return network


class Oracle(nn.Module):
    """A denoiser that returns the true velocity."""

    def __init__(self, latents: Tensor, scale_factor: Tensor) -> None:
        super().__init__()
        self.latents, self.scale_factor = latents, scale_factor
        self.latent_channels = latents.shape[1]

    def forward(self, x: Tensor, timesteps: Tensor, context: None = None) -> Tensor:
        noisy = x[:, : self.latent_channels]
        betas = torch.linspace(NOISE["beta_start"] ** 0.5, NOISE["beta_end"] ** 0.5, NOISE["num_train_timesteps"]) ** 2
        signal = torch.cumprod(1 - betas, dim=0)[timesteps.long()].view(-1, 1, 1, 1)
        noise = (noisy - signal.sqrt() * self.latents) / (1 - signal).sqrt()
        return signal.sqrt() * noise - (1 - signal).sqrt() * self.latents


def test_sizes_are_those_of_the_papers() -> None:
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in (swinir(), rcan(), Denoiser())]
    assert millions[0] == pytest.approx(11.9, abs=0.05)  # SwinIR, Table 1 of its supplement
    assert 4 < millions[1] < 6
    assert 15 < millions[2] < 25


@pytest.mark.parametrize("size", [(17, 22), (64, 64)])
def test_regression_networks_upscale_any_size_by_4_and_keep_their_input(size: tuple[int, int]) -> None:
    lr = torch.rand(2, 1, *size)
    before = lr.clone()
    for network in (swinir(**SWINIR), rcan(**RCAN)):
        assert network(lr).shape == (2, 1, 4 * size[0], 4 * size[1])
        assert torch.equal(lr, before)


@pytest.mark.parametrize("factor", [3, 5])
def test_the_through_plane_network_upscales_columns_only(factor: int) -> None:
    lr = torch.rand(2, 1, 17, 22)
    before = lr.clone()
    assert rcan_through_plane(factor, **RCAN)(lr).shape == (2, 1, 17, factor * 22)
    assert torch.equal(lr, before)


def test_the_through_plane_network_has_the_body_of_the_other() -> None:
    bodies = [
        {name: value.shape for name, value in network.state_dict().items() if not name.startswith("tail.0")}
        for network in (rcan(), rcan_through_plane())
    ]
    assert bodies[0] == bodies[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [3, 5])
def test_through_plane_training_degrades_columns_as_the_benchmark_does(name: str, factor: int, tmp_path: Path) -> None:
    settings = {"factor": factor, "device": "cpu"}
    training = read_config(
        str(BUNDLES / name), settings, OVERLAYS / f"{THROUGH_PLANE}.json", workflow="train"
    ).get_parsed_content("train#augmentation")
    case = ThickSlices.of(
        "p", "t2", factor, 0, Volume(np.ones((8, 7, 30), np.float32), np.eye(4), np.dtype("float32"), tmp_path)
    )
    for size in ((31, 45), (250, 161)):  # smaller and larger than a crop
        item = training({"image": torch.rand(1, *size)})
        side = 144 // factor * factor
        assert item["label"].shape == (1, side, side)
        assert item["image"].shape == (1, side, side // factor)
        torch.testing.assert_close(item["image"], case.degradation(item["label"]))


def test_latent_diffusion_repeats_itself_in_any_batch() -> None:
    network = tiny_ldm()
    lr = torch.rand(3, 1, 16, 24)
    sr = network(lr)
    assert sr.shape == (3, 1, 64, 96)
    torch.randn(5)
    assert torch.equal(network(lr), sr)
    torch.testing.assert_close(network(lr[1:2]), sr[1:2])
    assert not torch.allclose(sr[0], sr[1])  # the condition is heard
    network.seed = 1
    assert not torch.allclose(network(lr), sr)


def test_a_perfect_denoiser_has_no_loss_and_its_samples_are_the_truth() -> None:
    tokenizer, hr = started(tiny_tokenizer()), tiny_slices()
    scale_factor = 1 / tokenizer.encoder(hr).detach().std(dim=(0, 2, 3))[:, None, None]
    latents = tokenizer.encoder(hr).detach() * scale_factor
    network = LatentDiffusion(tokenizer, Oracle(latents, scale_factor), sampling_steps=7)  # type: ignore[arg-type]
    lr = Degradation()(hr)
    assert DiffusionObjective(network)(lr, hr)["loss"] < 1e-8
    torch.testing.assert_close(network(lr), tokenizer.reconstruct_unquantized(hr), atol=1e-4, rtol=0)


def test_latents_have_unit_variance_once_their_scale_is_measured() -> None:
    network, hr = LatentDiffusion(tiny_tokenizer(), Denoiser(6, **DENOISER)), tiny_slices()
    with pytest.raises(ConfigurationError, match=r"call network\.measure_scale"):
        DiffusionObjective(network).prepare()
    network.measure_scale(hr)
    DiffusionObjective(network).prepare()
    spread = network.tokenizer.encoder(hr).std(dim=(0, 2, 3))
    assert spread.max() > 2 * spread.min()
    torch.testing.assert_close(network.encode(hr).std(dim=(0, 2, 3), unbiased=False), torch.ones(6))
    assert network.encode(hr.bfloat16().float()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert network.encode(hr).dtype == torch.float32


@pytest.mark.parametrize("peer", [*TITLES, THROUGH_PLANE])
def test_training_lowers_the_loss(peer: str) -> None:
    hr = tiny_slices(4, 64)
    lr = Degradation((1, 4), 0)(hr) if peer == THROUGH_PLANE else Degradation()(hr)
    objective: RegressionObjective | DiffusionObjective
    if peer == "ldm":
        objective = DiffusionObjective(tiny_ldm())
    else:
        network = {
            "swinir": lambda: swinir(**SWINIR),
            "rcan": lambda: rcan(**RCAN),
            THROUGH_PLANE: lambda: rcan_through_plane(4, **RCAN),
        }[peer]()
        objective = RegressionObjective(network, nn.L1Loss())
    objective.prepare()
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    assert not any("tokenizer" in name for name in trained)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=2e-3)

    def loss() -> Tensor:
        torch.manual_seed(0)  # the same noise and times
        return objective.eval()(lr, hr)["loss"]

    before = loss().item()
    for step in range(25):
        torch.manual_seed(1 + step)
        optimizer.zero_grad()
        objective.train()(lr, hr)["loss"].backward()
        assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
        optimizer.step()
    assert loss().item() < 0.8 * before


def train(name: str, peer: str, folder: Path, **settings: Any) -> Finished:
    """Train a tiny peer as in the README of the peers, with two iterations per epoch."""
    tokenizers = {f"tokenizer_def#{key}": value for key, value in TOKENIZER.items()}
    settings_file = folder / "settings.json"
    settings_file.write_text(json.dumps({**ONE_STEP, "epoch_length": 2, **tokenizers, **TINY[peer], **settings}))
    files = [config(name, "train"), str(OVERLAYS / f"{peer}.json")]
    given = {
        "config_file": files, "args_file": settings_file, "bundle_root": BUNDLES / name,
        "dataset_dir": folder / "data", "output_dir": folder / "out",
    }  # fmt: skip
    return quick_command(
        "run", "training", *(part for key, value in given.items() for part in (f"--{key}", str(value))), folder=folder
    )


@pytest.fixture(params=NAMES)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Write four patients, and return the name of the bundle for them."""
    if request.param == "miar_brats":
        write_brats_folder(tmp_path / "data", 4, (40, 36, 6), contrasts=("t2",))
    else:
        for i in range(4):
            write_nifti_phantom(tmp_path / "data" / f"case{i}.nii.gz", (40, 36, 6), seed=i, low=-1000, high=400)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("peer", [*TITLES, THROUGH_PLANE])
def test_overlays_train_with_either_bundle(peer: str, dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if peer == "ldm":
        missing = train(dataset, peer, tmp_path)
        assert missing.returncode == 1
        assert "train the tokenizer first" in missing.sentence
        tiny_tokenizer_file(out, dataset)
    done = train(dataset, peer, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1, iteration 2: loss" in done.stdout
    assert "ssim" in done.stdout
    assert {path.name for path in out.iterdir()} - {"tokenizer.pt"} == {peer, f"{peer}.pt"}
    assert [path.name for path in (out / peer).glob("*.pt")] == ["checkpoint_1.pt"]
    assert list((out / peer).glob("events.out.tfevents.*"))
    network = {
        "swinir": lambda: swinir(**SWINIR),
        "rcan": lambda: rcan(**RCAN),
        THROUGH_PLANE: lambda: rcan_through_plane(**RCAN),
        "ldm": lambda: Denoiser(TOKENIZER["latent_channels"], **DENOISER),
    }[peer]()
    load_weights(network, out / f"{peer}.pt", hint="")
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    resumed = train(dataset, peer, tmp_path, resume=True, max_epochs=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "epoch 2/2, iteration 4: loss" in resumed.stdout
