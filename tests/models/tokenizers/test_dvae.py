from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.tokenizers.dvae import Codes, ConvEncoder, gumbel, gumbel_softmax, kl_to_uniform, num_halvings


def test_the_encoder_is_called_like_a_vit_without_a_class_token():
    encoder = ConvEncoder((16, 24), 4, 3, 8)
    images = torch.randn(2, 3, 16, 24)
    assert encoder(images).shape == (2, 24, 8) and encoder.grid_size == (4, 6)
    torch.testing.assert_close(encoder(images)[:, 7], encoder.map(images)[:, :, 1, 1])
    torch.testing.assert_close(encoder.forward_cls(images), encoder(images).mean(1))
    assert not encoder.class_token and encoder.num_prefix_tokens == 0


@pytest.mark.parametrize("size", [(8, 8), (16, 4)])
def test_codes_give_back_a_picture_of_the_size_of_the_image(size: tuple[int, int]):
    encoder = ConvEncoder((16, 16), 4, 5, 8)
    codes = Codes(encoder, 7, 6)
    images = torch.randn(2, 5, *size)
    ids = codes.to_logits(encoder.map(images)).argmax(1)
    weights = torch.nn.functional.one_hot(ids, 7).permute(0, 3, 1, 2).float()
    assert codes.decode(ids).shape == images.shape
    torch.testing.assert_close(codes.decode(ids), codes.decode_mixture(weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [0, 1, 3, 12])
def test_a_patch_that_is_no_power_of_two_is_named(patch: int):
    with pytest.raises(ValueError, match=f"patch_size {patch}: .* power of two"):
        num_halvings(patch)


def test_images_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="sides that are multiples of 4"):
        ConvEncoder((16, 16), 4)(torch.randn(1, 3, 18, 16))


def test_gumbel_numbers_have_their_mean_and_deviation_and_are_finite_at_both_ends():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    numbers = gumbel(uniform)
    assert abs(numbers.mean().item() - 0.5772) < 0.01 and abs(numbers.std().item() - math.pi / math.sqrt(6)) < 0.01
    assert gumbel(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_the_relaxed_choice_picks_codes_with_their_probabilities():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).view(1, 3, 1).expand(1, 3, 20_000)
    noise = torch.rand(1, 3, 20_000, generator=torch.Generator().manual_seed(0))
    chosen = gumbel_softmax(logits, noise, temperature=0.5, straight_through=True)
    torch.testing.assert_close(chosen.mean((0, 2)), torch.tensor([0.7, 0.2, 0.1]), atol=0.015, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 5), st.integers(0, 99))
def test_a_hard_choice_has_the_gradient_of_the_soft_one(temperature: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits, noise = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, 3, generator=generator)
    asked, gradients = torch.randn(2, 5, 3, generator=generator), []
    for hard in (False, True):
        x = logits.clone().requires_grad_()
        weights = gumbel_softmax(x, noise, temperature=temperature, straight_through=hard)
        torch.testing.assert_close(weights.sum(1), torch.ones(2, 3))
        (weights * asked).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_the_divergence_is_zero_for_even_choices_and_log_k_for_certain_ones():
    assert kl_to_uniform(torch.zeros(2, 8, 3)).item() == pytest.approx(0, abs=1e-5)
    certain = torch.zeros(2, 8, 3)
    certain[:, 0] = 100
    assert kl_to_uniform(certain).item() == pytest.approx(6 * math.log(8), rel=1e-5)
