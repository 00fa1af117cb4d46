from __future__ import annotations

import pytest
import torch
from helpers.tiny import started
from scipy.fft import dctn, idctn
from torch import nn

from miar_monai.networks.autoencoder import (
    AttentionBlock,
    CosineEncoder,
    Decoder,
    Encoder,
    ResidualBlock,
    cosine_patches,
    zero_conv,
)
from miar_monai.networks.lr_encoder import LightLREncoder, TokenizerLREncoder

CHANNELS = (8, 8, 16)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def without_gradient(module: nn.Module) -> list[str]:
    """Return the names of the parameters without a gradient."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_cosine_patches_are_orthonormal_and_sorted_by_frequency() -> None:
    patches = cosine_patches(16, 4)
    torch.testing.assert_close(patches.flatten(1) @ patches.flatten(1).T, torch.eye(16))
    torch.testing.assert_close(patches[0], torch.full((4, 4), 0.25))
    crossings = [(p.sign().diff(dim=0) != 0).sum() + (p.sign().diff(dim=1) != 0).sum() for p in patches]
    assert crossings[0] < crossings[1] < crossings[-1] == max(crossings)
    assert torch.equal(cosine_patches(20, 4)[:16], patches)
    assert not cosine_patches(20, 4)[16:].any()


def test_before_training_encoder_and_decoder_are_a_cosine_transform_and_its_inverse() -> None:
    x = images(2, 1, 24, 40)
    whole = Decoder(1, 64, CHANNELS, 1)(Encoder(1, 64, CHANNELS, 1)(x.float())).double()
    torch.testing.assert_close(whole, x, rtol=0, atol=1e-5)
    low = Decoder(1, 1, CHANNELS, 1)(Encoder(1, 1, CHANNELS, 1)(x.float())).double()
    means = nn.functional.avg_pool2d(x, 8).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    torch.testing.assert_close(low, means, rtol=0, atol=1e-5)


def lowest(stride: int) -> list[tuple[int, int]]:
    """Return the frequencies of a patch in the order of a stable sort by magnitude."""
    frequencies = [(u, v) for u in range(stride) for v in range(stride)]
    return sorted(frequencies, key=lambda uv: uv[0] ** 2 + uv[1] ** 2)


@pytest.mark.parametrize(("stride", "latent_channels"), [(4, 6), (8, 12)])
def test_cosine_encoder_keeps_the_lowest_frequencies_of_each_patch(stride: int, latent_channels: int) -> None:
    x = images(2, 1, 3 * stride, 5 * stride)
    patches = x[:, 0].unfold(1, stride, stride).unfold(2, stride, stride)  # (B, h, w, f, f)
    transformed = dctn(patches.numpy(), norm="ortho", axes=(3, 4))
    expected = torch.stack([torch.from_numpy(transformed[..., u, v]) for u, v in lowest(stride)[:latent_channels]], 1)
    result = CosineEncoder(1, latent_channels, stride).double()(x)
    torch.testing.assert_close(result, 4 / stride * expected, rtol=0, atol=1e-5)


def test_cosine_encoder_averages_the_channels_of_the_image() -> None:
    x = images(2, 2, 24, 40)
    one, two = (CosineEncoder(channels, 12, stride=8).double() for channels in (1, 2))
    assert two(x).shape == (2, 12, 3, 5)
    torch.testing.assert_close(two(x), one(x.mean(dim=1, keepdim=True)))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_all_frequencies_reconstruct_the_image(patch_size: int) -> None:
    stride = 4 * patch_size
    encoder = CosineEncoder(1, stride**2, stride).double()
    decoder = Decoder(1, stride**2, CHANNELS, 1, patch_size).double()
    x = images(2, 1, 3 * stride, 5 * stride)
    torch.testing.assert_close(decoder(encoder(x)), x, rtol=0, atol=1e-5)


def test_before_training_a_decoder_is_the_inverse_cosine_transform_times_its_gains() -> None:
    f, decoder = images(2, 6, 3, 5), Decoder(2, 6, CHANNELS, 1).double()
    coefficients = torch.zeros(2, 3, 5, 8, 8, dtype=torch.float64)
    for channel, (u, v) in enumerate(lowest(8)[:6]):
        coefficients[..., u, v] = 2 * f[:, channel]  # latents of images in [0, 1] are scaled by 1/2
    patches = torch.from_numpy(idctn(coefficients.numpy(), norm="ortho", axes=(3, 4)))  # (B, h, w, f, f)
    expected = patches.transpose(2, 3).reshape(2, 24, 40)
    torch.testing.assert_close(decoder(f), expected[:, None].expand(-1, 2, -1, -1), rtol=0, atol=1e-5)
    with torch.no_grad():
        decoder.gain[:, 1] = torch.arange(6.0)
    gained = decoder(f)
    torch.testing.assert_close(gained[:, 0], expected, rtol=0, atol=1e-5)
    weighted = decoder(f * torch.arange(6.0).view(-1, 1, 1))[:, 0]
    torch.testing.assert_close(gained[:, 1], weighted, rtol=0, atol=1e-5)
    assert not torch.allclose(started(decoder)(f)[:, 0], expected, rtol=0, atol=1e-2)


def test_attention_is_equivariant_to_permutations() -> None:
    block, x = AttentionBlock(8).double(), images(2, 8, 5, 3)
    order = torch.randperm(15)
    shuffled = block(x.flatten(2)[..., order].unflatten(2, (5, 3)))
    torch.testing.assert_close(shuffled.flatten(2), block(x).flatten(2)[..., order])


def test_attention_depends_on_every_position() -> None:
    block = AttentionBlock(8).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x)[0, :, 0, 0], images(1, 8, 3, 5))
    assert (jacobian.abs().amax(dim=(0, 1, 2)) > 0).all()


@pytest.mark.parametrize("out_channels", [8, 16])
def test_residual_block_with_a_zero_last_layer_is_its_shortcut(out_channels: int) -> None:
    block, x = ResidualBlock(8, out_channels).double(), images(2, 8, 7, 5)
    assert not torch.allclose(block(x), block.shortcut(x))
    block.conv2 = zero_conv(out_channels, out_channels).double()
    assert torch.equal(block(x), block.shortcut(x))


def test_encoder_and_decoder_have_mirrored_grids_and_all_parameters_get_gradients() -> None:
    encoder = started(Encoder(1, 4, CHANNELS, 1)).double()
    decoder = started(Decoder(2, 4, CHANNELS, 1, 2, (4, 8, 0))).double()
    x = images(2, 1, 24, 40)  # not square
    maps = encoder.features(x)
    assert [tuple(h.shape[1:]) for h in maps] == [(8, 12, 20), (8, 6, 10), (16, 3, 5)]
    f = encoder(x)
    torch.testing.assert_close(f, encoder.latent(x, maps[-1]))
    y = decoder(f, {0: nn.functional.pixel_unshuffle(x, 2), 1: maps[1]})
    assert y.shape == (2, 2, 24, 40)
    (y * torch.randn_like(y)).sum().backward()
    assert not without_gradient(encoder)
    assert not without_gradient(decoder)


def test_untrained_skips_do_not_change_the_output() -> None:
    plain, skipping = started(Decoder(1, 4, CHANNELS, 1)).double(), Decoder(1, 4, CHANNELS, 1, 2, (1, 0, 5)).double()
    missing, unexpected = skipping.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("skips") for name in missing)
    assert not unexpected
    f, skips = images(1, 4, 3, 5), {0: images(1, 1, 12, 20), 2: images(1, 5, 3, 5)}
    assert torch.equal(skipping(f, skips), plain(f))
    nn.init.ones_(skipping.skips["2"].weight)
    assert not torch.allclose(skipping(f, skips), plain(f))
    torch.testing.assert_close(skipping(f), plain(f))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patch_size_scales_the_stride_and_the_output_has_the_input_size(patch_size: int) -> None:
    encoder, decoder = Encoder(1, 4, CHANNELS, 1, patch_size), Decoder(1, 4, CHANNELS, 1, patch_size)
    x = torch.randn(1, 1, 4 * patch_size * 3, 4 * patch_size * 5)
    assert encoder(x).shape == (1, 4, 3, 5)
    assert decoder(encoder(x)).shape == x.shape


def test_samples_of_a_batch_are_independent() -> None:
    encoder, x = started(Encoder(1, 4, CHANNELS, 1)).double(), images(3, 1, 8, 16)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


def test_tokenizer_lr_encoder_applies_the_tokenizers_encoder_to_the_linear_estimate() -> None:
    encoder = started(Encoder(1, 4, (8, 16, 16), 1)).double()
    linear = images(2, 1, 24, 40)
    f_lr, skip = TokenizerLREncoder(encoder, skip_level=1)(linear, torch.randn(2, 2, 1, 1))
    torch.testing.assert_close(f_lr, encoder(linear))
    torch.testing.assert_close(skip, encoder.features(linear)[1])
    assert skip.shape[2:] == (6, 10)


def test_all_parameters_of_the_light_encoder_get_gradients() -> None:
    encoder = started(LightLREncoder(4, channels=(8, 16), num_blocks=2)).double()
    f_lr, skip = encoder(images(2, 1, 24, 40), torch.randn(2, 2, 1, 1))
    assert f_lr.shape == (2, 4, 3, 5)
    assert skip.shape == (2, 8, 6, 10)
    ((f_lr * torch.randn_like(f_lr)).sum() + skip.square().sum()).backward()
    assert not without_gradient(encoder)
