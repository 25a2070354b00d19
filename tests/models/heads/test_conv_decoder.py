from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models.heads.conv_decoder import ConvDecoder

KEEP, HIDDEN = torch.tensor([[1, 4, 11]]), torch.tensor([[0, 2, 3, 5, 6, 7, 8, 9, 10]])


def decoder(**changes: Any) -> ConvDecoder:
    torch.manual_seed(0)
    given = {"in_dim": 8, "embed_dim": 8, "depth": 2, "kernel": 3, "groups": 4, "grid_size": (3, 4), "noise_std": 0.5}
    return ConvDecoder(**(given | changes))


def test_a_prediction_is_that_of_the_plain_convolutions_over_the_grid():
    of = decoder(noise_std=0.0)
    visible = torch.randn(1, 3, 8)
    grid = torch.zeros(1, 12, 8)
    grid[0, KEEP[0]] = visible[0]
    x = grid.reshape(1, 3, 4, 8).permute(0, 3, 1, 2)
    for layer in of.layers:
        y = layer(x)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        x = x + torch.nn.functional.gelu(y)
    expected = of.proj(x.permute(0, 2, 3, 1).reshape(1, 12, 8))[:, HIDDEN[0]]
    torch.testing.assert_close(of(visible, KEEP, HIDDEN, torch.rand(1, 12)), expected)


def test_the_order_of_the_visible_patches_does_not_matter():
    of = decoder()
    visible, uniforms, turn = torch.randn(1, 3, 8), torch.rand(1, 12), [2, 0, 1]
    turned = of(visible[:, turn], KEEP[:, turn], HIDDEN, uniforms)
    torch.testing.assert_close(turned, of(visible, KEEP, HIDDEN, uniforms))


def test_noise_comes_from_the_batch_and_not_from_the_process():
    of, other = decoder(), decoder()
    torch.manual_seed(5)
    assert torch.equal(of.noise, other.noise) and "noise" not in of.state_dict()
    visible, uniforms = torch.randn(1, 3, 8), torch.rand(1, 12)
    first = of(visible, KEEP, HIDDEN, uniforms)
    assert torch.equal(first, of(visible, KEEP, HIDDEN, uniforms))
    assert not torch.allclose(first, of(visible, KEEP, HIDDEN, (uniforms + 0.5) % 1))
    assert torch.isfinite(of(visible, KEEP, HIDDEN, torch.full((1, 12), 1.0))).all(), "a float32 below 1 rounds to 1"


def test_the_noise_is_normal_with_the_deviation_asked_for():
    assert decoder().noise.mean().abs() < 0.02 and abs(decoder().noise.std() - 1) < 0.02


def test_a_wider_decoder_adds_its_input_from_the_second_layer_on():
    of = decoder(embed_dim=16, groups=4)
    assert of(torch.randn(1, 3, 8), KEEP, HIDDEN, torch.rand(1, 12)).shape == (1, 9, 8)
    assert [layer.weight.shape[1] * 4 for layer in of.layers] == [8, 16]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"groups": 3}, r"objective\.decoder_groups: 3 does not divide the widths 8"),
        ({"kernel": 2}, r"objective\.decoder_kernel: 2 is even"),
    ],
)
def test_impossible_convolutions_are_refused(changes: dict, problem: str):
    with pytest.raises(ValueError, match=problem):
        decoder(**changes)
