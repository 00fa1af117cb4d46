from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.tiny import TOKENIZER, started, tiny_miar, tiny_slices, tiny_tokenizer
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.data import DataLoader, Dataset
from monai.handlers import ValidationHandler
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from monai.transforms import Compose, EnsureTyped, RandFlipd, RandGaussianNoised
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from miar_monai.degradation import Degradation
from miar_monai.errors import CheckpointError, ConfigurationError, OutputError
from miar_monai.networks import MSVQVAE
from miar_monai.networks.linear import Interpolation, NoConsistency
from miar_monai.networks.weights import load_weights, save_weights
from miar_monai.training import (
    EMA,
    EpochSeed,
    LossLogger,
    MIARTrainer,
    TimeBudget,
    TokenizerEvaluator,
    TokenizerTrainer,
    WarmupCosine,
)
from miar_monai.training.checkpoints import attach_checkpoints
from miar_monai.training.losses import MIARObjective, ReconstructionLoss, adaptive_weight

HR = tiny_slices()
LR = Degradation()(HR)
RECONSTRUCTION = ReconstructionLoss(l1=1.0, l2=1.0, perceptual=0.0)


def batches(*images: Tensor, augment: bool = False, batch_size: int = 4) -> DataLoader:
    """Return a loader of HR slices for stage 1, or of LR and HR slices for stage 2."""
    keys = ["image", "label"][: len(images)]
    items = [dict(zip(keys, row, strict=True)) for row in zip(*images, strict=True)]
    random = [RandFlipd(keys, prob=0.5, spatial_axis=0), RandGaussianNoised("image", prob=0.5, std=0.05)]
    transform = Compose([*(random if augment else []), EnsureTyped(keys, track_meta=False)])
    return DataLoader(Dataset(items, transform), batch_size=batch_size, shuffle=augment)


def tokenizer_trainer(network: MSVQVAE, loader: DataLoader, max_epochs: int, **options: Any) -> TokenizerTrainer:
    discriminator = PatchDiscriminator(spatial_dims=2, channels=8, in_channels=1, num_layers_d=2)
    return TokenizerTrainer(
        "cpu",
        max_epochs,
        loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), lr=4e-3, betas=(0.5, 0.9)),
        reconstruction=RECONSTRUCTION,
        discriminator=discriminator,
        discriminator_optimizer=torch.optim.Adam(discriminator.parameters(), lr=1e-4),
        **options,
    )


def miar_trainer(
    loader: DataLoader, max_epochs: int, encoder: str = "learned", lr_encoder: str = "initialized", **options: Any
) -> MIARTrainer:
    tokenizer = tiny_tokenizer(encoder=encoder).eval()
    tokenizer.quantizer.initialize_codebook(tokenizer.encoder(HR))
    network = tiny_miar(lr_encoder=lr_encoder)
    network.load_tokenizer(tokenizer)
    objective = MIARObjective(network, tokenizer, RECONSTRUCTION, num_neighbors=3, **options)
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=3e-3)
    return MIARTrainer("cpu", max_epochs, loader, objective, optimizer)


def psnr(network: MSVQVAE) -> float:
    evaluator = TokenizerEvaluator("cpu", batches(HR), network)
    evaluator.run()
    return evaluator.state.metrics["psnr"]


def losses(trainer: Any) -> list[dict[str, float]]:
    """Collect the losses of each iteration."""
    history: list[dict[str, float]] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def _(engine: Any) -> None:
        history.append({name: value.item() for name, value in engine.state.output[0].items()})

    return history


@pytest.mark.usefixtures("unbounded")
def test_the_system_of_the_paper_learns_to_give_what_its_tokenizer_gives() -> None:
    tokenizer = started(tiny_tokenizer(encoder="learned")).eval()
    tokenizer.quantizer.initialize_codebook(tokenizer.encoder(HR))
    network = tiny_miar(
        lr_encoder="initialized", front_end=Interpolation(), decoder_inputs=(), back_end=NoConsistency()
    )
    network.load_tokenizer(tokenizer)
    objective = MIARObjective(network, tokenizer, RECONSTRUCTION, 0.0, num_neighbors=3, image_weight=0.0)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    trainer = MIARTrainer("cpu", 160, batches(LR, HR), objective, optimizer)
    decoder, history = copy.deepcopy(network.decoder.state_dict()), losses(trainer)
    ceiling = tokenizer(HR).reconstruction

    def error() -> float:
        return (network.eval()(LR) - ceiling).square().mean().item()

    before = error()
    trainer.run()
    assert history[-1]["token_loss"] < history[0]["token_loss"] / 10
    assert error() < before / 10
    assert all(torch.equal(value, decoder[name]) for name, value in network.decoder.state_dict().items())


@pytest.mark.parametrize(("encoder", "gain"), [("learned", 0.0), ("cosine", 3.0)])
def test_the_tokenizer_overfits_four_slices(encoder: str, gain: float) -> None:
    network = tiny_tokenizer(num_codes=64, dropout=0.0, encoder=encoder)
    evaluator = TokenizerEvaluator("cpu", batches(HR), network)
    evaluator.run()
    # an untrained decoder cannot do better, whatever its codebook learns: its images have no other frequencies
    codec = evaluator.state.metrics["psnr_unquantized"]
    trainer = tokenizer_trainer(network, batches(HR), max_epochs=260, adversarial_start_epoch=241)
    schedule = WarmupCosine(trainer.optimizer, warmup_steps=1, total_steps=260, final_lr=1e-4)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    history, reached = losses(trainer), []
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=240), lambda: reached.append(psnr(network)))
    trainer.run()
    assert history[239]["reconstruction_loss"] < history[0]["reconstruction_loss"] / 2
    assert reached[0] > codec + gain
    assert psnr(network) > codec + gain
    assert "discriminator_loss" not in history[239]
    assert {"generator_loss", "discriminator_loss"} <= set(history[240])
    assert all(torch.tensor(list(parts.values())).isfinite().all() for parts in history)


@pytest.mark.usefixtures("unbounded")
@pytest.mark.parametrize(("encoder", "lr_encoder"), [("learned", "initialized"), ("cosine", "light")])
def test_miar_overfits_four_slices(encoder: str, lr_encoder: str) -> None:
    options = {"encoder": encoder, "lr_encoder": lr_encoder, "self_correction": 0.0}
    trainer = miar_trainer(batches(LR, HR), max_epochs=160, **options)
    network = trainer.objective.network

    def error() -> float:
        return (network.eval()(LR) - HR).square().mean().item()

    before, history = error(), losses(trainer)
    linear = network.degradation.for_lr(LR).A_dagger(LR, 1e-3)
    assert before == pytest.approx((linear - HR).square().mean().item(), rel=1e-4)
    trainer.run()
    assert history[-1]["token_loss"] < history[0]["token_loss"] / 3
    assert history[-1]["token_accuracy"] > 0.8
    assert error() < before / 2.5


def test_the_adversarial_loss_starts_at_its_epoch() -> None:
    trainer = tokenizer_trainer(tiny_tokenizer(), batches(HR), max_epochs=3, adversarial_start_epoch=3)
    start = {name: p.detach().clone() for name, p in trainer.discriminator.named_parameters()}
    changed = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def _(engine: Any) -> None:
        now = trainer.discriminator.named_parameters()
        changed.append(sum(not torch.equal(p, start[name]) for name, p in now))

    trainer.run()
    assert changed[:2] == [0, 0]
    assert changed[2] >= len(start) - 1  # at first both hinges pull the last bias equally hard, in opposite directions


def test_generator_and_discriminator_are_updated_by_their_own_losses() -> None:
    trainer = tokenizer_trainer(tiny_tokenizer(dropout=0.0), batches(HR), max_epochs=2, max_grad_norm=1e9)
    before = []
    copied = Events.ITERATION_STARTED(once=2)
    trainer.add_event_handler(copied, lambda: before.append(copy.deepcopy((trainer.network, trainer.discriminator))))
    trainer.run()
    (network, discriminator), adversarial = before[0], PatchAdversarialLoss(criterion="hinge")
    adversarial.activation = torch.nn.Identity()  # MONAI's squashes the logits
    output = network(HR)
    image_loss = RECONSTRUCTION(output.reconstruction, HR)
    generator_loss = adversarial(discriminator(output.reconstruction)[-1], target_is_real=True, for_discriminator=False)
    weight = adaptive_weight(image_loss, generator_loss, network.decoder.conv_out.weight)
    (image_loss + output.quantizer_loss + 0.4 * weight * generator_loss).backward()
    discriminator.zero_grad()
    real = adversarial(discriminator(HR)[-1], target_is_real=True, for_discriminator=True)
    fake = adversarial(discriminator(output.reconstruction.detach())[-1], target_is_real=False, for_discriminator=True)
    (0.5 * (real + fake)).backward()
    for expected, trained in ((network, trainer.network), (discriminator, trainer.discriminator)):
        for p, q in zip(expected.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)


def test_gradients_are_clipped() -> None:
    options = {"max_grad_norm": 1e-3, "adversarial_weight": 0.0}
    trainer = tokenizer_trainer(tiny_tokenizer(), batches(HR), max_epochs=1, **options)
    trainer.run()
    norm = torch.stack([p.grad.norm() for p in trainer.network.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_mixed_precision_trains_with_parameters_in_full_precision() -> None:
    trainer = tokenizer_trainer(tiny_tokenizer(), batches(HR), max_epochs=2, amp=True)
    history = losses(trainer)
    trainer.run()
    assert all(torch.tensor(list(parts.values())).isfinite().all() for parts in history)
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_evaluator_reports_prefixes_bypass_and_codes() -> None:
    network = tiny_tokenizer().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluator = TokenizerEvaluator("cpu", batches(HR, batch_size=3), network)  # the last batch is smaller
    evaluator.run()
    metrics = evaluator.state.metrics

    def expected(image: Tensor) -> float:
        return (-10 * (image.clamp(0, 1) - HR).square().mean(dim=(1, 2, 3)).log10()).mean().item()

    with torch.no_grad():
        tokens = network.encode(HR)
        assert metrics["psnr"] == pytest.approx(expected(network.decode(tokens)), rel=1e-4)
        assert metrics["psnr_prefix_2"] == pytest.approx(expected(network.decode(tokens, 2)), rel=1e-4)
        assert metrics["psnr_unquantized"] == pytest.approx(expected(network.reconstruct_unquantized(HR)), rel=1e-4)
    seen = [len(tokens_k.unique()) for tokens_k in network.schedule.split(tokens)]
    assert [metrics[f"codes_scale_{k}"] for k in range(4)] == seen
    assert metrics["codes_used"] == pytest.approx(len(tokens.unique()) / TOKENIZER["num_codes"])
    assert evaluator.state.best_metric == metrics["psnr"]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_evaluator_runs_again_from_zero() -> None:
    evaluator = TokenizerEvaluator("cpu", batches(HR), tiny_tokenizer())
    evaluator.run()
    first = dict(evaluator.state.metrics)
    evaluator.run()
    assert evaluator.state.metrics == first


class Interrupted(Exception):
    """Interrupts an epoch."""


def stage_one(max_epochs: int) -> tuple[TokenizerTrainer, dict[str, Any]]:
    trainer = tokenizer_trainer(
        tiny_tokenizer(), batches(HR, augment=True, batch_size=2), max_epochs, adversarial_start_epoch=2
    )
    schedule = WarmupCosine(trainer.optimizer, warmup_steps=2, total_steps=8, final_lr=1e-4)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: schedule.step())
    objects = {
        "network": trainer.network,
        "optimizer": trainer.optimizer,
        "discriminator": trainer.discriminator,
        "discriminator_optimizer": trainer.discriminator_optimizer,
        "schedule": schedule,
    }
    return trainer, objects


def stage_two(max_epochs: int) -> tuple[MIARTrainer, dict[str, Any]]:
    torch.manual_seed(1)  # a tokenizer comes from its file, equal in every run
    loader = batches(LR, HR, augment=True, batch_size=2)
    trainer = miar_trainer(loader, max_epochs, self_correction=0.5)
    return trainer, {"network": trainer.objective.network, "optimizer": trainer.optimizer}


def train(
    make: Callable, folder: Path, max_epochs: int = 4, kill_at: int | None = None, resume: bool = False, seed: int = 0
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    torch.manual_seed(seed)
    trainer, objects = make(max_epochs)
    EpochSeed(7).attach(trainer)
    attach_checkpoints(trainer, objects, folder, resume=resume)
    history = losses(trainer)

    @trainer.on(Events.ITERATION_STARTED)
    def _(engine: Any) -> None:
        if engine.state.iteration == kill_at:
            raise Interrupted

    try:
        trainer.run()
    except Interrupted:
        assert kill_at is not None
    return {name: value.clone() for name, value in objects["network"].state_dict().items()}, history


@pytest.mark.parametrize("make", [stage_one, stage_two])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make: Callable, tmp_path: Path) -> None:
    expected, whole = train(make, tmp_path / "whole")
    train(make, tmp_path / "cut", kill_at=6)  # in the middle of the third of four epochs
    found, rest = train(make, tmp_path / "cut", resume=True, seed=99)
    assert rest == whole[4:]
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_finished_run_is_not_restarted(tmp_path: Path) -> None:
    expected, _ = train(stage_one, tmp_path, max_epochs=2)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found, rest = train(stage_one, tmp_path, max_epochs=2, resume=True)
    assert not rest
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    train(stage_one, tmp_path, max_epochs=1)
    _, rest = train(stage_one, tmp_path, max_epochs=3, resume=True)
    assert len(rest) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2.pt", "checkpoint_3.pt"]  # the newest two


def test_resuming_in_an_empty_folder_starts_a_new_run(tmp_path: Path) -> None:
    _, history = train(stage_one, tmp_path / "new" / "folder", max_epochs=1, resume=True)
    assert len(history) == 2


def test_epochs_differ_and_seeds_differ(tmp_path: Path) -> None:
    trainer, _ = stage_two(1)
    seen = []
    for epoch in (1, 2, 1):
        trainer.state.epoch = epoch
        EpochSeed(7)(trainer)
        seen.append(next(iter(trainer.data_loader))["image"])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    EpochSeed(8)(trainer)
    assert not torch.equal(next(iter(trainer.data_loader))["image"], seen[0])


def _train_on(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    stage1 = tokenizer_trainer(tiny_tokenizer(), batches(HR[rank::2]), max_epochs=2, adversarial_start_epoch=2)
    stage1.network, stage1.discriminator = DDP(stage1.network), DDP(stage1.discriminator)
    stage2 = miar_trainer(batches(LR[rank::2], HR[rank::2]), max_epochs=3)
    stage2.objective = DDP(stage2.objective)
    for trainer in (stage1, stage2):
        EpochSeed(7).attach(trainer)
        trainer.run()
    save_weights(stage1.network, folder / f"tokenizer_{rank}.pt", half=False)
    torch.save(stage1.discriminator.state_dict(), folder / f"discriminator_{rank}.pt")
    save_weights(stage2.objective, folder / f"objective_{rank}.pt", half=False)
    dist.destroy_process_group()


def test_two_processes_stay_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_train_on, (tmp_path,), nprocs=2)
    for name in ("tokenizer", "discriminator", "objective"):
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pt") for rank in range(2))
        own = ("running_mean", "running_var")  # batch statistics of each process; the first one's count
        assert all(torch.equal(value, second[key]) for key, value in first.items() if not key.endswith(own))
    load_weights(tiny_tokenizer(), tmp_path / "tokenizer_1.pt", "train first.")  # the wrapper has left no trace


def test_a_used_folder_is_not_overwritten(tmp_path: Path) -> None:
    train(stage_one, tmp_path, max_epochs=1)
    trainer, objects = stage_one(1)
    with pytest.raises(OutputError) as caught:
        attach_checkpoints(trainer, objects, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds the checkpoint of another run (checkpoint_1.pt); add --resume True to continue it, or choose"
        " another --output_dir."
    )


def test_a_damaged_checkpoint_is_reported(tmp_path: Path) -> None:
    train(stage_one, tmp_path, max_epochs=1)
    file = tmp_path / "checkpoint_1.pt"
    file.write_bytes(file.read_bytes()[:1000])
    trainer, objects = stage_one(1)
    with pytest.raises(CheckpointError, match=r"checkpoint_1\.pt cannot be continued \(.*\); it belongs to another"):
        attach_checkpoints(trainer, objects, tmp_path, resume=True)


def test_a_checkpoint_of_another_network_is_reported(tmp_path: Path) -> None:
    train(stage_one, tmp_path, max_epochs=1)
    trainer, objects = stage_one(1)
    objects["network"] = tiny_tokenizer(num_codes=13)
    with pytest.raises(CheckpointError, match=r"use the configuration it was made with, or delete it\."):
        attach_checkpoints(trainer, objects, tmp_path, resume=True)


def test_a_checkpoint_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    trainer, objects = stage_one(1)
    with pytest.raises(OutputError, match=r"file/run cannot be written \(.*\); choose another --output_dir\."):
        attach_checkpoints(trainer, objects, tmp_path / "file" / "run")


@pytest.mark.parametrize("half", [True, False])
def test_weights_are_unchanged_by_saving_and_loading(half: bool, tmp_path: Path) -> None:
    network, file = tiny_tokenizer(), tmp_path / "new" / "model.pt"
    save_weights(network, file, half=half)
    twin = load_weights(tiny_tokenizer(), file, "train first.")
    for name, value in twin.state_dict().items():
        expected = network.state_dict()[name]
        learned = name in dict(network.named_parameters())  # the codebook is not: it stays exact
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected.half().float() if half and learned else expected)
    assert os.listdir(file.parent) == ["model.pt"]


def test_half_weights_stay_finite(tmp_path: Path) -> None:
    network = tiny_tokenizer()
    network.quantizer.ema_sum.fill_(1e5)  # a code for the background: many uses a step
    save_weights(network, tmp_path / "model.pt", half=True)
    twin = load_weights(tiny_tokenizer(), tmp_path / "model.pt", "train first.")
    assert all(value.isfinite().all() for value in twin.state_dict().values())


def test_a_failed_write_keeps_the_existing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.pt"
    save_weights(tiny_tokenizer(), file)
    before = file.read_bytes()
    with pytest.raises(OutputError, match=r"model\.pt cannot be written \(.*\): a folder with write permission"):
        save_weights(tiny_tokenizer(), file / "model.pt")

    def full_disk(state: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OutputError, match="no space left on device"):
        save_weights(tiny_tokenizer(), file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_codebook_of_another_size_is_refused() -> None:
    objective = MIARObjective(tiny_miar(), tiny_tokenizer(), ReconstructionLoss(perceptual=0.0))
    trainer = MIARTrainer("cpu", 1, batches(HR), objective, torch.optim.SGD(objective.parameters(), 0.1))
    with pytest.raises(ConfigurationError, match=r"call network\.load_tokenizer\(tokenizer\) before training"):
        trainer.run()


def test_unreadable_weights_are_reported(tmp_path: Path) -> None:
    file, hint = tmp_path / "model.pt", "run train_stage1.json first."
    with pytest.raises(CheckpointError) as caught:
        load_weights(tiny_tokenizer(), file, hint)
    assert str(caught.value) == f"there are no weights at {file}; run train_stage1.json first."
    save_weights(tiny_tokenizer(), file)
    with pytest.raises(CheckpointError, match=r"model\.pt belongs to another network \(.*\); use the configuration it"):
        load_weights(tiny_miar(), file, hint)
    with pytest.raises(CheckpointError, match="belongs to another network"):
        load_weights(tiny_tokenizer(num_codes=13), file, hint)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.pt is not a readable checkpoint \(.*\); run train_stage1\.json"):
        load_weights(tiny_tokenizer(), file, hint)
    torch.save([1, 2, 3], file)
    with pytest.raises(CheckpointError, match="belongs to another network"):
        load_weights(tiny_tokenizer(), file, hint)


def test_losses_are_logged_as_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tokenizer_trainer(tiny_tokenizer(), batches(HR, batch_size=1), max_epochs=2, adversarial_start_epoch=2)
    history = losses(trainer)
    LossLogger(interval=3).attach(trainer)
    with caplog.at_level(logging.INFO, logger="miar_monai.training"):
        trainer.run()
    lines = [record.getMessage() for record in caplog.records if record.name == "miar_monai.training.handlers"]
    assert [line.split(":")[0] for line in lines] == [
        f"epoch {epoch}/2, iteration {i}" for epoch, i in ((1, 3), (1, 4), (2, 6), (2, 8))
    ]
    assert f"quantizer_loss {sum(parts['quantizer_loss'] for parts in history[:3]) / 3:.4f}" in lines[0]
    assert trainer.state.metrics["quantizer_loss"] == pytest.approx(
        sum(parts["quantizer_loss"] for parts in history[6:]) / 2, rel=1e-5
    )


def test_the_learning_rate_warms_up_and_decays() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = WarmupCosine(optimizer, warmup_steps=4, total_steps=20, final_lr=0.5)
    rates = []
    for _ in range(25):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(torch.tensor(rates[:4]), torch.tensor([0.5, 1.0, 1.5, 2.0]))
    assert max(rates) == pytest.approx(2.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(1.25)  # half way
    assert rates[20:] == pytest.approx([0.5] * 5)


def test_time_budget_ends_within_an_epoch_and_keeps_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = miar_trainer(batches(LR, HR, batch_size=1), max_epochs=50)
    budget = TimeBudget(minutes=1.0, free_iterations=2)
    clock, ended, rates = [0.0], [], []
    monkeypatch.setattr("miar_monai.training.handlers.time.monotonic", lambda: clock[0])
    schedule = WarmupCosine(trainer.optimizer, warmup_steps=1, total_steps=10**6, final_lr=1e-4, budget=budget)
    budget.attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED)
    def _(engine: Any) -> None:
        clock[0] += 10.0
        schedule.step()
        rates.append(schedule.get_last_lr()[0])

    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: ended.append(engine.state.iteration))
    trainer.run()
    # ten seconds an iteration, the first two free: the minute is over at the eighth, and the epoch of four as well
    assert trainer.state.iteration == 8
    assert ended == [4, 8]
    assert trainer.state.max_epochs == 2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("seconds", "batches_seen", "epochs", "message"),
    [
        # a step of the training, one of the validation (of three batches), and the limit is 60 s
        ((5.0, 5.0), [3, 1], 2, "the metrics are those of 1 of 3 batches"),  # 4 x 5 + 3 x 5 + 4 x 5 + 5 = 60
        ((15.0, 1.0), [], 1, "the last validation is skipped"),  # 4 x 15 = 60
        ((5.0, 40.0), [1], 1, "the metrics are those of 1 of 3 batches"),  # 4 x 5 + 40 = 60
        ((5.0, 13.5), [3], 1, ""),  # 4 x 5 + 3 x 13.5 > 60
    ],
)
def test_the_time_limit_includes_validation(
    seconds: tuple[float, float],
    batches_seen: list[int],
    epochs: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("miar_monai.training.handlers.time.monotonic", lambda: clock[0])
    network = tiny_tokenizer()
    evaluator = TokenizerEvaluator("cpu", batches(HR[:3], batch_size=1), network)
    trainer = tokenizer_trainer(network, batches(HR, batch_size=1), max_epochs=50, adversarial_weight=0.0)
    seen: list[int] = []

    def pass_time(_: Engine, step: float) -> None:
        clock[0] += step

    for engine, step in ((trainer, seconds[0]), (evaluator, seconds[1])):
        engine.add_event_handler(Events.ITERATION_COMPLETED, pass_time, step)
    ValidationHandler(1, evaluator).attach(trainer)
    TimeBudget(minutes=1.0, validator=evaluator).attach(trainer)
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(engine.state.iteration))
    with caplog.at_level(logging.INFO, logger="miar_monai.training"):
        trainer.run()
    assert trainer.state.epoch == trainer.state.max_epochs == epochs
    assert trainer.state.iteration == 4 * epochs
    assert (message in caplog.text) if message else "the time is over" not in caplog.text
    assert clock[0] < 60 + max(seconds)
    assert seen == batches_seen


def test_without_a_limit_the_time_budget_changes_nothing() -> None:
    trainer = miar_trainer(batches(LR, HR), max_epochs=3)
    budget = TimeBudget()
    budget.attach(trainer)
    trainer.run()
    assert trainer.state.iteration == 3
    assert budget.progress == 0


def test_a_resumed_run_has_the_rest_of_the_time() -> None:
    first, second = TimeBudget(minutes=2.0), TimeBudget(minutes=2.0)
    first.load_state_dict({"seconds": 30.0})
    second.load_state_dict(first.state_dict())
    assert second.progress == 0.25
    second.attach(Engine(lambda *_: None))
    assert second.progress == 0.25


def test_a_resumed_run_without_time_keeps_its_weights() -> None:
    trainer = miar_trainer(batches(LR, HR), max_epochs=3)
    before = copy.deepcopy(trainer.objective.state_dict())
    budget = TimeBudget(minutes=2.0)
    budget.load_state_dict({"seconds": 120.0})
    budget.attach(trainer)
    trainer.run()
    assert trainer.state.iteration == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.objective.state_dict().items())


def test_a_budget_of_no_time_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_minutes is 0, but it must lie between"):
        TimeBudget(0)


def test_the_moving_average_equals_that_of_ignite() -> None:
    network = tiny_tokenizer(dropout=0.0)
    averages = [handler(network, momentum=0.1) for handler in (EMA, EMAHandler)]
    trainer = tokenizer_trainer(network, batches(HR), max_epochs=5)
    for name, ema in zip(("ours", "theirs"), averages, strict=True):
        ema.attach(trainer, name=name)
    trainer.run()
    ours, theirs = (ema.ema_model.state_dict() for ema in averages)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)
    assert not torch.equal(ours["decoder.conv_out.weight"], network.decoder.conv_out.weight)
    assert torch.equal(ours["quantizer.codebook"], network.quantizer.codebook)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_trains_like_an_eager_one() -> None:
    histories = []
    for graphs in (False, True):
        torch.manual_seed(0)
        trainer = miar_trainer(batches(LR, HR), max_epochs=8, self_correction=0.0)
        trainer.objective.cuda()
        trainer.optimizer.param_groups[0].update(capturable=True, lr=torch.tensor(1e-3, device="cuda"))
        trainer.state.device, trainer.cuda_graphs = torch.device("cuda"), graphs
        trainer._graphed_step = trainer.graphed(trainer._step)
        history = losses(trainer)
        trainer.run()
        histories.append([parts["loss"] for parts in history])
    assert histories[1] == pytest.approx(histories[0], rel=2e-2)
    assert histories[1][-1] < histories[1][0]


def test_validation_metrics_are_written_to_the_same_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    network = tiny_tokenizer()
    evaluator = TokenizerEvaluator("cpu", batches(HR), network)
    trainer = tokenizer_trainer(network, batches(HR, batch_size=2), max_epochs=2, adversarial_weight=0.0)
    ValidationHandler(1, evaluator).attach(trainer)
    LossLogger(1, tmp_path, evaluator).attach(trainer)
    trainer.run()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("psnr")
    assert [event.step for event in found] == [2, 4]
    assert found[-1].value == pytest.approx(evaluator.state.metrics["psnr"])
