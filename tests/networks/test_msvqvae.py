from __future__ import annotations

import pytest
import torch
from helpers.tiny import SCALES, started, tiny_slices, tiny_tokenizer

from miar_monai.errors import ConfigurationError

ENCODERS = ("learned", "cosine")


@pytest.mark.parametrize("encoder", ENCODERS)
def test_decoding_the_tokens_gives_the_reconstruction(encoder: str) -> None:
    tokenizer, images = started(tiny_tokenizer(encoder=encoder)).double().eval(), tiny_slices().double()
    output = tokenizer(images)
    tokens = tokenizer.encode(images)
    assert torch.equal(tokens, output.tokens)
    torch.testing.assert_close(tokenizer.decode(tokens), output.reconstruction)
    assert output.reconstruction.shape == images.shape


def test_prefixes_ignore_later_tokens() -> None:
    tokenizer = started(tiny_tokenizer()).double().eval()
    tokens = tokenizer.encode(tiny_slices().double())
    torch.testing.assert_close(tokenizer.decode(tokens, len(SCALES)), tokenizer.decode(tokens))
    for k, (_, last) in enumerate(tokenizer.schedule.bounds[:-1], start=1):
        other = tokens.clone()
        other[:, last:] = (other[:, last:] + 1) % tokenizer.quantizer.num_codes
        assert torch.equal(tokenizer.decode(other, k), tokenizer.decode(tokens, k))
        assert not torch.allclose(tokenizer.decode(other), tokenizer.decode(tokens))


def test_encoding_in_training_mode_changes_no_buffer() -> None:
    tokenizer = tiny_tokenizer().train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.encode(tiny_slices())
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_unquantized_reconstruction_does_not_use_the_codebook() -> None:
    tokenizer, images = started(tiny_tokenizer()).eval(), tiny_slices()
    before = tokenizer.reconstruct_unquantized(images)
    tokenizer.quantizer.codebook.zero_()
    assert torch.equal(tokenizer.reconstruct_unquantized(images), before)
    assert torch.equal(before, tokenizer.decoder(tokenizer.encoder(images)))


def test_a_learned_encoder_is_initialized_as_the_cosine_transform_which_has_no_parameters() -> None:
    learned, cosine = (tiny_tokenizer(encoder=encoder).encoder for encoder in ENCODERS)
    images = tiny_slices()
    assert torch.equal(learned(images), cosine(images))
    assert not torch.allclose(started(learned)(images), cosine(images))
    assert not list(cosine.parameters())
    assert not cosine.state_dict()
    assert not cosine(images).requires_grad


def test_unknown_encoder_is_refused() -> None:
    with pytest.raises(ConfigurationError) as caught:
        tiny_tokenizer(encoder="fixed")
    assert str(caught.value) == "encoder is 'fixed', but it must be 'learned' or 'cosine'; correct the setting."


@pytest.mark.parametrize("encoder", ENCODERS)
def test_all_parameters_get_gradients(encoder: str) -> None:
    tokenizer = started(tiny_tokenizer(encoder=encoder)).train()
    output = tokenizer(tiny_slices())
    ((output.reconstruction * torch.randn(4, 1, 40, 40)).sum() + output.quantizer_loss).backward()
    without_gradient = [
        name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not without_gradient
