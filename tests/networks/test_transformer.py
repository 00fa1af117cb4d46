from __future__ import annotations

import pytest
import torch
from helpers.tiny import CHANNELS, CODES, CONTEXT, SCALES, tiny_transformer
from torch import Tensor, nn

from miar_monai.errors import ConfigurationError
from miar_monai.networks import MIARTransformer
from miar_monai.networks.schedule import ScaleSchedule

TOKENS = sum(side**2 for side in SCALES)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def features(batch_size: int = 2) -> Tensor:
    return normal(batch_size, CONTEXT, SCALES[-1], SCALES[-1])


POSITIONS = pytest.mark.parametrize("positions", ["rotary", "learned"])


@POSITIONS
def test_cached_steps_equal_the_masked_forward(positions: str) -> None:
    transformer, inputs = tiny_transformer(positions=positions), normal(2, TOKENS - 1, CHANNELS)
    context = transformer.context(features())
    masked = transformer(inputs, context)
    cache, steps = None, []
    for k, (first, last) in enumerate(transformer.schedule.bounds):
        step_inputs = None if k == 0 else inputs[:, first - 1 : last - 1]
        logits, cache = transformer.step(step_inputs, k, context, cache)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), masked, rtol=0, atol=1e-10)


def test_scales_do_not_depend_on_finer_scales() -> None:
    scales = (1, 2, 3)
    transformer, schedule = tiny_transformer(scales), ScaleSchedule(scales)
    inputs, f_lr = normal(1, schedule.num_tokens - 1, CHANNELS), normal(1, CONTEXT, 3, 3)
    context = transformer.context(f_lr)
    jacobian = torch.autograd.functional.jacobian(lambda x: transformer(x, context)[0], inputs)  # (L, V, 1, L - 1, C)
    influence = jacobian.abs().amax(dim=(1, 2, 4))  # (L, L - 1)
    levels = schedule.levels()
    later = levels[1:][None, :] > levels[:, None]
    assert (influence[later] == 0).all()
    assert (influence[~later] > 0).all()


def test_every_scale_depends_on_the_whole_lr_image_and_no_other_sample() -> None:
    transformer, inputs = tiny_transformer((1, 2, 3)), normal(2, 13, CHANNELS)

    def logits(f_lr: Tensor) -> Tensor:
        return transformer(inputs, transformer.context(f_lr))[0, ::5].sum(dim=-1)  # a token of each scale, sample 0

    jacobian = torch.autograd.functional.jacobian(logits, normal(2, CONTEXT, 3, 3))  # (3, 2, C, 3, 3)
    assert (jacobian[:, 0].abs().amax(dim=1) > 0).all()
    assert (jacobian[:, 1] == 0).all()


@POSITIONS
def test_all_parameters_get_gradients(positions: str) -> None:
    transformer = tiny_transformer(positions=positions)
    logits = transformer(normal(2, TOKENS - 1, CHANNELS), transformer.context(features()))
    (logits * torch.randn_like(logits)).sum().backward()
    without_gradient = [
        name for name, p in transformer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not without_gradient


@POSITIONS
def test_positions_are_distinguished(positions: str) -> None:
    transformer, f_lr = tiny_transformer(positions=positions), features(1)
    inputs = normal(1, 1, CHANNELS).expand(1, TOKENS - 1, CHANNELS)  # the same everywhere
    last = transformer(inputs, transformer.context(f_lr))[0, transformer.levels == len(SCALES) - 1]
    assert torch.cdist(last, last).fill_diagonal_(1).min() > 1e-6


def test_without_rotation_and_embeddings_positions_are_not_distinguished() -> None:
    transformer, f_lr = tiny_transformer(positions="learned"), features(1)
    assert (transformer.table[0] == 1).all()
    assert (transformer.table[1] == 0).all()
    for embedding in (transformer.token_positions, transformer.context_positions):
        assert embedding is not None
        nn.init.zeros_(embedding.weight)
    inputs = normal(1, 1, CHANNELS).expand(1, TOKENS - 1, CHANNELS)
    last = transformer(inputs, transformer.context(f_lr))[0, transformer.levels == len(SCALES) - 1]
    torch.testing.assert_close(last, last[:1].expand_as(last))


def test_unknown_positions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="positions is 'x', but it must be 'rotary' or 'learned'; correct"):
        tiny_transformer(positions="x")


def test_scales_are_distinguished_by_their_embedding() -> None:
    transformer, inputs = tiny_transformer(), normal(1, TOKENS - 1, CHANNELS)
    context = transformer.context(features(1))
    before = transformer(inputs, context)
    transformer.level_embedding.weight.data[2] += 1.0
    changed = (transformer(inputs, context) - before).abs().amax(dim=(0, 2)) > 1e-9
    assert torch.equal(changed, transformer.levels >= 2)  # scale 3 depends on it through attention


def test_first_prediction_is_nearly_uniform() -> None:
    transformer = MIARTransformer(SCALES, CODES, CHANNELS, CONTEXT, dim=16, depth=2, num_heads=2)
    f_lr, inputs = features().float(), normal(2, TOKENS - 1, CHANNELS).float()
    probabilities = transformer(inputs, transformer.context(f_lr)).softmax(dim=-1)
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 1 / CODES), rtol=0, atol=0.01)


def test_context_of_another_grid_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size"):
        tiny_transformer().context(normal(1, CONTEXT, 3, 3))


def test_a_context_can_be_limited_to_its_first_samples() -> None:
    transformer, f_lr = tiny_transformer(), features(3)
    first, expected = transformer.context(f_lr).first(2), transformer.context(f_lr[:2])
    torch.testing.assert_close(first.start, expected.start)
    for a, b in zip(first.blocks, expected.blocks, strict=True):
        torch.testing.assert_close(a.key, b.key)
        torch.testing.assert_close(a.value, b.value)
