from __future__ import annotations

import json
import re
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
)
from helpers.phantoms import write_brats_folder, write_nifti_phantom
from helpers.tiny import tiny_slices
from helpers.tiny_peers import DENOISER, DIFFMSR, DISC_UNET, MHCA, RCAN, SWINIR, VAE
from torch import Tensor, nn

from benchmarks.peers import diffmsr, disc_diff, mhca
from benchmarks.peers.loading import GUIDED, THROUGH_PLANE, TITLES
from benchmarks.peers.networks import (
    NOISE,
    Denoiser,
    LatentDiffusion,
    Reconstruction,
    rcan,
    rcan_through_plane,
    swinir,
    vae,
)
from benchmarks.peers.objectives import (
    AutoencoderObjective,
    DiffusionObjective,
    DisCObjective,
    GuidedObjective,
    PriorObjective,
    RegressionObjective,
)
from benchmarks.peers.off_the_shelf import GrayImages, load_off_the_shelf, read_ncnn
from benchmarks.thick_slices import ThickSlices
from miar_monai.cli.workflow import read_config
from miar_monai.data.io import Volume
from miar_monai.degradation import Degradation
from miar_monai.errors import CheckpointError, ConfigurationError
from miar_monai.networks.weights import load_weights

OVERLAYS = Path(__file__).parents[2] / "benchmarks" / "peers"
TINY: dict[str, dict[str, Any]] = {
    "swinir": {f"network_def#{key}": value for key, value in SWINIR.items()},
    "rcan": {f"network_def#{key}": value for key, value in RCAN.items()},
    THROUGH_PLANE: {f"network_def#{key}": value for key, value in RCAN.items()},
    "mhca": {f"network_def#{key}": value for key, value in MHCA.items()},
    "mmhca": {f"network_def#{key}": value for key, value in MHCA.items()},
    "diffmsr_stage1": {f"network_def#{key}": value for key, value in DIFFMSR.items()},
    "diffmsr": {f"network_def#{key}": value for key, value in DIFFMSR.items()},
    "disc_diff": {
        "network_def#sampling_steps": 2,
        "network_def#unet": {"_target_": "benchmarks.peers.disc_diff.DisCUNet", **DISC_UNET},
    },
    "vae": {f"network_def#{key}": value for key, value in VAE.items()},
    "ldm": {
        **{f"vae_def#{key}": value for key, value in VAE.items()},
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
    network = LatentDiffusion(vae(**VAE), Denoiser(**DENOISER), sampling_steps=3, **options).eval()
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
    autoencoder, hr = vae(**VAE).requires_grad_(False), tiny_slices()
    means = autoencoder.encode(hr)[0]
    scale_factor = 1 / means.std(dim=(0, 2, 3))[:, None, None]
    latents = means * scale_factor
    network = LatentDiffusion(autoencoder, Oracle(latents, scale_factor), sampling_steps=7)  # type: ignore[arg-type]
    lr = Degradation()(hr)
    assert DiffusionObjective(network)(lr, hr)["loss"] < 1e-8
    torch.testing.assert_close(network(lr), Reconstruction(autoencoder)(hr), atol=1e-4, rtol=0)


def test_latents_have_unit_variance_once_their_scale_is_measured() -> None:
    network, hr = LatentDiffusion(vae(**VAE), Denoiser(**DENOISER)), tiny_slices()
    with pytest.raises(ConfigurationError, match=r"call network\.measure_scale"):
        DiffusionObjective(network).prepare()
    network.measure_scale(hr)
    DiffusionObjective(network).prepare()
    spread = network.vae.encode(hr)[0].std(dim=(0, 2, 3))
    assert spread.max() > 1.5 * spread.min()
    torch.testing.assert_close(network.encode(hr).std(dim=(0, 2, 3), unbiased=False), torch.ones(12))
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
            "mhca": lambda: mhca.MHCA(**MHCA),
            THROUGH_PLANE: lambda: rcan_through_plane(4, **RCAN),
        }[peer]()
        objective = RegressionObjective(network, nn.L1Loss())
    objective.prepare()
    trained = [name for name, p in objective.named_parameters() if p.requires_grad]
    assert not any("vae" in name for name in trained)
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


def guided_objective(peer: str) -> nn.Module:
    """Return the objective of a tiny guided peer."""
    torch.manual_seed(0)
    if peer == "mmhca":
        return GuidedObjective(mhca.MMHCA(**MHCA), nn.L1Loss())
    if peer == "disc_diff":
        return DisCObjective(disc_diff.DisCDiff(disc_diff.DisCUNet(**DISC_UNET)))
    return PriorObjective(diffmsr.DiffMSR(**DIFFMSR), stage=2 if peer == "diffmsr" else 1)


@pytest.mark.parametrize("peer", [*GUIDED, "diffmsr_stage1"])
def test_training_lowers_the_loss_of_guided_peers(peer: str) -> None:
    hr = tiny_slices(4, 64)
    lr, guide = Degradation()(hr), hr.max() - hr
    objective = guided_objective(peer)
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)

    def loss() -> Tensor:
        torch.manual_seed(0)  # the same noise and times
        return objective(lr, hr, guide)["loss"]

    before = loss().item()
    for step in range(25):
        torch.manual_seed(1 + step)
        optimizer.zero_grad()
        objective(lr, hr, guide)["loss"].backward()
        optimizer.step()
    idle = {name.split(".")[1] for name, p in objective.named_parameters() if p.grad is None}
    assert idle == {"diffmsr": {"true_prior"}, "diffmsr_stage1": {"condition", "denoiser"}}.get(peer, set())
    assert loss().item() < 0.9 * before


def test_training_lowers_the_loss_of_the_autoencoder() -> None:
    hr = tiny_slices(4, 64)
    objective = AutoencoderObjective(vae(**VAE), nn.L1Loss())
    optimizer = torch.optim.Adam(objective.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        parts = objective(hr)
        assert parts["divergence"] >= 0
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_guided_networks_have_the_sizes_of_the_papers() -> None:
    counts = [sum(p.numel() for p in network.parameters()) for network in (mhca.MHCA(), mhca.MMHCA())]
    assert counts == [4_307_073, 4_276_481]  # of the released networks, without the heads that they never call
    network = diffmsr.DiffMSR()
    inference = [p.numel() for name, p in network.named_parameters() if not name.startswith("true_prior.")]
    assert sum(inference) / 1e6 == pytest.approx(5.5, rel=0.05)
    unet = disc_diff.DisCUNet().to("meta")
    assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(78.8, rel=0.05)


@pytest.mark.parametrize("peer", [*GUIDED])
@pytest.mark.parametrize("size", [(9, 14), (16, 16)])
def test_guided_networks_take_any_size_and_hear_lr_and_guide(peer: str, size: tuple[int, int]) -> None:
    network: Any = guided_objective(peer).network
    if peer == "disc_diff":
        nn.init.normal_(network.unet.unet.out[2].conv.weight, std=0.05)  # MONAI initializes it with zeros
        network.sampling_steps = 2
    network.eval()
    lr, guide = torch.rand(2, 1, *size), torch.rand(2, 1, 4 * size[0], 4 * size[1])
    with torch.no_grad():
        sr = network(lr, guide)
        assert sr.shape == guide.shape
        torch.testing.assert_close(network(lr[1:], guide[1:]), sr[1:])  # in any batch
        assert not torch.allclose(network(lr, guide.flip(-1)), sr)
        assert not torch.allclose(network(lr.flip(-1), guide), sr)


def test_windows_of_diffmsr_hold_neighbors_with_all_their_channels() -> None:
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    x = torch.stack([rows, columns, rows * 12 + columns])[None].float()
    cut = diffmsr.windows(x, 4)
    assert cut.shape == (6, 16, 3)
    assert cut[1].tolist() == [[r, c, r * 12 + c] for r in range(4) for c in range(4, 8)]
    torch.testing.assert_close(diffmsr.from_windows(cut, 4, x.shape), x)


def test_permuted_attention_folds_blocks_of_two_by_two_into_keys() -> None:
    attention = diffmsr._PermutedAttention(4, side=4, num_heads=1)
    for bias in (attention.out.bias, attention.key_value.bias, attention.bias):
        nn.init.zeros_(bias)  # keys are equal below, so that the result is the mean of the values
    nn.init.eye_(attention.out.weight)
    with torch.no_grad():
        attention.key_value.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]))  # the value is the first channel
    x = torch.rand(1, 4, 4, 4)
    means = [x[0, 0, i::2, j::2].mean() for i in range(2) for j in range(2)]  # over the blocks, by place in a block
    torch.testing.assert_close(attention(x)[0], torch.stack(means)[:, None, None].expand(4, 4, 4))


def test_a_perfect_prior_comes_out_of_the_denoiser() -> None:
    denoiser, prior = diffmsr.PriorDenoiser(), torch.rand(3, diffmsr.PRIOR)
    denoiser.network.forward = lambda x: prior  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(denoiser(denoiser.noisy(prior), prior), prior)


def ncnn_bytes(network: nn.Module) -> bytes:
    """Return the convolutions of a network as ncnn stores them in half precision."""
    parts = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach().numpy().astype("<f2").tobytes()
            assert layer.bias is not None
            bias = layer.bias.detach().numpy().astype("<f4").tobytes()
            parts += [(0x01306B47).to_bytes(4, "little"), weight, b"\0" * (-len(weight) % 4), bias]
    return b"".join(parts)


def test_ncnn_files_hold_the_convolutions_in_order(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 1))  # odd numbers of weights

    true, path = network(), tmp_path / "x.bin"
    path.write_bytes(ncnn_bytes(true))
    for p, q in zip(read_ncnn(path, network()).parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-3)
    for damaged in (path.read_bytes() + b"more", path.read_bytes()[:-4], b"....."):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not have the convolutions of this network"):
            read_ncnn(path, network())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # spandrel uses a deprecated call
def test_networks_for_photographs_are_applied_to_gray_images(tmp_path: Path) -> None:
    from spandrel.architectures.DAT import DAT
    from spandrel.architectures.ESRGAN import ESRGAN

    esrgan = ESRGAN(num_filters=64, num_blocks=23, scale=4)
    (tmp_path / "realesrgan-x4plus.bin").write_bytes(ncnn_bytes(esrgan))
    dat = DAT(
        img_size=64, in_chans=3, embed_dim=60, split_size=[8, 32], depth=[18], num_heads=[6], expansion_factor=2,
        resi_connection="3conv", upscale=4, upsampler="pixelshuffledirect",
    )  # fmt: skip
    torch.save({"params": dat.state_dict()}, tmp_path / "DAT_light_x4.pth")
    loaded, missing = load_off_the_shelf(str(tmp_path))
    assert sorted(loaded) == ["DAT-light, zero-shot", "Real-ESRGAN, zero-shot"]
    assert missing == []
    lr = torch.rand(2, 1, 12, 10)
    with torch.no_grad():
        for network in loaded.values():
            assert network(lr).shape == (2, 1, 48, 40)
        torch.testing.assert_close(loaded["Real-ESRGAN, zero-shot"](lr), GrayImages(esrgan)(lr), atol=2e-2, rtol=0)
    assert sum(p.numel() for p in esrgan.parameters()) == 16_697_987


def test_absent_photograph_networks_are_listed(tmp_path: Path) -> None:
    assert load_off_the_shelf(None) == ({}, [])
    loaded, missing = load_off_the_shelf(str(tmp_path))
    assert loaded == {}
    assert missing[0] == "DAT-light, zero-shot is left out: DAT_light_x4.pth not found in --off_the_shelf."


def train(name: str, peer: str, folder: Path, **settings: Any) -> Finished:
    """Train a tiny peer as in the README of the peers, with two iterations per epoch."""
    tokenizers = {f"tokenizer_def#{key}": value for key, value in TOKENIZER.items()}
    settings_file = folder / "settings.json"
    settings_file.write_text(json.dumps({**ONE_STEP, "epoch_length": 2, **tokenizers, **TINY[peer], **settings}))
    overlays = ["guided", peer] if peer in (*GUIDED, "diffmsr_stage1") else [peer]
    files = [config(name, "train"), *(str(OVERLAYS / f"{overlay}.json") for overlay in overlays)]
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
    if peer == "ldm":
        missing = train(dataset, peer, tmp_path)
        assert missing.returncode == 1
        assert "train the autoencoder first" in missing.sentence
        autoencoder = train(dataset, "vae", tmp_path)
        assert autoencoder.returncode == 0, autoencoder.stderr
        assert "ssim" in autoencoder.stdout
    network = {
        "swinir": lambda: swinir(**SWINIR),
        "rcan": lambda: rcan(**RCAN),
        "mhca": lambda: mhca.MHCA(**MHCA),
        THROUGH_PLANE: lambda: rcan_through_plane(**RCAN),
        "ldm": lambda: Denoiser(**DENOISER),
    }[peer]()
    check_training(dataset, peer, tmp_path, network, {"vae", "vae.pt"} if peer == "ldm" else set())


@pytest.mark.slow
@pytest.mark.parametrize("peer", [*GUIDED])
def test_guided_overlays_train(peer: str, tmp_path: Path) -> None:
    write_brats_folder(tmp_path / "data", 4, (40, 36, 6), contrasts=("t1", "t2"))
    before = set()
    if peer == "diffmsr":
        missing = train("miar_brats", peer, tmp_path)
        assert "train its first stage before" in missing.sentence
        first = train("miar_brats", "diffmsr_stage1", tmp_path)
        assert first.returncode == 0, first.stderr
        before = {"diffmsr_stage1", "diffmsr_stage1.pt"}
    network = {
        "mmhca": lambda: mhca.MMHCA(**MHCA),
        "disc_diff": lambda: disc_diff.DisCDiff(disc_diff.DisCUNet(**DISC_UNET)),
        "diffmsr": lambda: diffmsr.DiffMSR(**DIFFMSR),
    }[peer]()
    check_training("miar_brats", peer, tmp_path, network, before)


def check_training(name: str, peer: str, folder: Path, network: nn.Module, others: set[str]) -> None:
    """Train a tiny peer, check what it writes beside ``others``, load its weights, and resume it."""
    out = folder / "out"
    done = train(name, peer, folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1/1, iteration 2: .*\bloss \d", done.stdout)
    assert "ssim" in done.stdout
    assert {path.name for path in out.iterdir()} - others == {peer, f"{peer}.pt"}
    assert [path.name for path in (out / peer).glob("*.pt")] == ["checkpoint_1.pt"]
    assert list((out / peer).glob("events.out.tfevents.*"))
    load_weights(network, out / f"{peer}.pt", hint="")
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())
    resumed = train(name, peer, folder, resume=True, max_epochs=2)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"epoch 2/2, iteration 4: .*\bloss \d", resumed.stdout)
