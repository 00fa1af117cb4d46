from __future__ import annotations

import pytest
import torch
from torch import nn

from miar_monai.networks.autoencoder import AttentionBlock, Decoder, Encoder, ResidualBlock, zero_conv
from miar_monai.networks.lr_encoder import LightLREncoder, TokenizerLREncoder, upsample_lr

CHANNELS = (8, 8, 16)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def silent(module: nn.Module) -> list[str]:
    """Return the parameters that got no gradient."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_attention_does_not_know_where_a_position_is() -> None:
    block, x = AttentionBlock(8).double(), images(2, 8, 5, 3)
    order = torch.randperm(15)
    shuffled = block(x.flatten(2)[..., order].unflatten(2, (5, 3)))
    torch.testing.assert_close(shuffled.flatten(2), block(x).flatten(2)[..., order])


def test_attention_sees_every_position() -> None:
    block = AttentionBlock(8).double()
    jacobian = torch.autograd.functional.jacobian(lambda x: block(x)[0, :, 0, 0], images(1, 8, 3, 5))
    assert (jacobian.abs().amax(dim=(0, 1, 2)) > 0).all()


@pytest.mark.parametrize("out_channels", [8, 16])
def test_residual_block_is_its_shortcut_where_its_last_layer_is_zero(out_channels: int) -> None:
    block, x = ResidualBlock(8, out_channels).double(), images(2, 8, 7, 5)
    assert not torch.allclose(block(x), block.shortcut(x))
    block.conv2 = zero_conv(out_channels, out_channels).double()
    assert torch.equal(block(x), block.shortcut(x))


def test_encoder_and_decoder_mirror_their_grids_and_every_parameter_learns() -> None:
    encoder, decoder = Encoder(1, 4, CHANNELS, 1).double(), Decoder(2, 4, CHANNELS, 1, 2, (4, 8, 0)).double()
    x = images(2, 1, 24, 40)  # not square
    maps = encoder.features(x)
    assert [tuple(h.shape[1:]) for h in maps] == [(8, 12, 20), (8, 6, 10), (16, 3, 5)]
    f = encoder(x)
    torch.testing.assert_close(f, encoder.latent(maps[-1]))
    y = decoder(f, {0: nn.functional.pixel_unshuffle(x, 2), 1: maps[1]})
    assert y.shape == (2, 2, 24, 40)
    (y * torch.randn_like(y)).sum().backward()
    assert not silent(encoder)
    assert not silent(decoder)


def test_new_skips_change_nothing_until_they_have_learned() -> None:
    plain, skipping = Decoder(1, 4, CHANNELS, 1).double(), Decoder(1, 4, CHANNELS, 1, 2, (1, 0, 5)).double()
    missing, unexpected = skipping.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("skips") for name in missing)
    assert not unexpected
    f, skips = images(1, 4, 3, 5), {0: images(1, 1, 12, 20), 2: images(1, 5, 3, 5)}
    assert torch.equal(skipping(f, skips), plain(f))
    nn.init.ones_(skipping.skips["2"].weight)
    assert not torch.allclose(skipping(f, skips), plain(f))
    torch.testing.assert_close(skipping(f), plain(f))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_make_the_stride_and_come_back_as_pixels(patch_size: int) -> None:
    encoder, decoder = Encoder(1, 4, CHANNELS, 1, patch_size), Decoder(1, 4, CHANNELS, 1, patch_size)
    x = torch.randn(1, 1, 4 * patch_size * 3, 4 * patch_size * 5)
    assert encoder(x).shape == (1, 4, 3, 5)
    assert decoder(encoder(x)).shape == x.shape


def test_samples_of_a_batch_do_not_mix() -> None:
    encoder, x = Encoder(1, 4, CHANNELS, 1).double(), images(3, 1, 8, 12)
    torch.testing.assert_close(encoder(x)[1:2], encoder(x[1:2]))


def test_lr_images_are_upsampled_on_the_cell_centered_grid() -> None:
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(7.0), indexing="ij")
    up = upsample_lr(torch.stack([rows, columns])[:, None].double(), 4)
    inside = slice(8, -8)  # away from the border a ramp stays a ramp, but for the ripple of torch's kernel (a = -0.75)
    expected = (torch.arange(36.0, dtype=torch.float64) + 0.5) / 4 - 0.5
    torch.testing.assert_close(up[0, 0, inside, 11], expected[inside], rtol=0, atol=0.05)
    torch.testing.assert_close(up[1, 0, 13, inside], expected[:28][inside], rtol=0, atol=0.05)


def test_tokenizer_lr_encoder_is_the_tokenizer_s_encoder_on_the_upsampled_image() -> None:
    encoder = Encoder(1, 4, (8, 16, 16), 1).double()
    lr = images(2, 1, 6, 10)
    f_lr, skip = TokenizerLREncoder(encoder, scale=4)(lr)
    up = upsample_lr(lr, 4)
    torch.testing.assert_close(f_lr, encoder(up))
    torch.testing.assert_close(skip, encoder.features(up)[1])
    assert skip.shape[2:] == lr.shape[2:]


def test_every_parameter_of_the_light_encoder_learns_once_its_blocks_have_started() -> None:
    encoder = LightLREncoder(4, channels=(8, 16), num_blocks=2).double()
    for block in encoder.body:
        nn.init.normal_(block.conv2.weight, std=0.1)
    f_lr, skip = encoder(images(2, 1, 6, 10))
    assert f_lr.shape == (2, 4, 3, 5)
    ((f_lr * torch.randn_like(f_lr)).sum() + skip.square().sum()).backward()
    assert not silent(encoder)
