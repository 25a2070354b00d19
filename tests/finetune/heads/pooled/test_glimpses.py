"""The classifier by glimpses; that it equals the official code is in tests/golden."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.heads.pooled.glimpse_head import GlimpseHead, normal
from finetune.heads.pooled.glimpses import GlimpseNetwork, cut, glimpse_loss, retina
from pretrain.models.backbones.vit import ViT

IMAGES = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))


def test_a_square_is_around_its_location_and_zero_outside_of_the_image():
    at = torch.tensor([[0.0, 0.0], [-1.0, -1.0], [1.0, 1.0]])  # centre, upper left, lower right
    squares = cut(IMAGES, at, 4)
    assert torch.equal(squares[0], IMAGES[0, :, 2:6, 4:8])
    assert torch.equal(squares[1, :, 2:, 2:], IMAGES[1, :, :2, :2]) and not squares[1, :, :2].any()
    assert torch.equal(squares[2, :, :2, :2], IMAGES[2, :, -2:, -2:]) and not squares[2, :, 2:].any()
    assert cut(IMAGES, at, 5).shape == (3, 2, 5, 5)  # an odd side at the very edge too


def test_scales_show_more_at_less_detail():
    patches = retina(IMAGES, torch.zeros(3, 2), size=2, count=3, factor=2)
    assert patches.shape == (3, 3, 2, 2, 2)
    torch.testing.assert_close(patches[:, 2].mean((2, 3)), IMAGES[:, :, :, 2:10].mean((2, 3)))
    with pytest.raises(ValueError, match="a patch of 3 pixels cannot be averaged to 2"):
        retina(IMAGES, torch.zeros(3, 2), size=2, count=2, factor=1.5)


def test_a_rewarded_location_becomes_likelier_and_an_unrewarded_one_less_likely():
    noise, eye = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1)), torch.eye(2)
    for rewarded in (True, False):
        torch.manual_seed(0)
        network = GlimpseNetwork(4, 2, num_glimpses=3, glimpse_hidden=8, location_hidden=8, std=0.2)
        torch.nn.init.zeros_(network.baseline.weight)
        torch.nn.init.constant_(network.baseline.bias, 0.0 if rewarded else 0.5)

        def encode(at: Tensor) -> Tensor:
            return torch.cat([at, at.square()], dim=1)

        look = network(encode, torch.zeros(2, 2), noise)
        answers = look.log_probabilities.argmax(1)
        losses = glimpse_loss(look, eye[answers if rewarded else 1 - answers])
        assert bool((losses["reward"] == float(rewarded)).all())
        sums = torch.stack([glimpse.log_pi for glimpse in look.glimpses]).sum()
        likelier = torch.autograd.grad(sums, list(network.locator.parameters()), retain_graph=True)
        gradients = torch.autograd.grad(losses["reinforce"], list(network.locator.parameters()))
        along = -sum((a * b).sum() for a, b in zip(likelier, gradients, strict=True))
        assert (along > 0) == rewarded


def test_evaluation_starts_at_the_centre_and_draws_nothing():
    torch.manual_seed(0)
    backbone = ViT((16, 16), 8, 3, 24, 1, 3).eval()
    head = GlimpseHead(backbone, 5, count=2, scales=2, hidden=8, std=0.5).eval()
    images = torch.randn(2, 3, 16, 16)
    middle = torch.full((2, *head.noise), 0.5)
    assert torch.equal(head(backbone, images), head(backbone, images))
    torch.testing.assert_close(head(backbone, images), head.look(backbone, images, middle).log_probabilities)
    drawn = head.look(backbone, images, torch.rand(2, *head.noise))
    assert (drawn.log_probabilities - head(backbone, images)).abs().max() > 1e-4


def test_uniform_numbers_become_normal_ones():
    found = normal(torch.linspace(0, 1, 10001)[:-1])
    assert torch.isfinite(found).all()
    assert abs(float(found.mean())) < 0.01 and abs(float(found.std()) - 1) < 0.01


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square images with an even side, not 16 x 24"):
        GlimpseHead(ViT((16, 24), 8, 3, 24, 1, 3), 5, count=2, scales=1, hidden=8, std=0.1)
