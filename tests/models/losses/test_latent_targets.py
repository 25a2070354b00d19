from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.backbones.vit import ViT
from pretrain.models.losses.latent_targets import (
    average_layers,
    cosine,
    instance_norm,
    last_layers,
    layer_norm,
    target_std,
)


@given(scale=st.floats(0.5, 100), shift=st.floats(-10, 10), seed=st.integers(0, 1000))
def test_norms_do_not_see_scale_and_shift_of_what_they_norm(scale: float, shift: float, seed: int):
    tokens = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed))
    for norm in (layer_norm, instance_norm):
        torch.testing.assert_close(norm(tokens * scale + shift), norm(tokens), atol=1e-3, rtol=1e-3)


def test_a_layer_norm_is_by_token_and_an_instance_norm_by_channel_of_an_image():
    tokens = torch.randn(3, 50, 40)
    assert layer_norm(tokens).mean(2).abs().max() < 1e-5 < layer_norm(tokens).mean(1).abs().max()
    assert instance_norm(tokens).mean(1).abs().max() < 1e-5 < instance_norm(tokens).mean(2).abs().max()


def test_every_layer_counts_the_same_however_large_it_is():
    small, large = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    mean = average_layers([small, 100 * large], "layer")
    torch.testing.assert_close(mean, (layer_norm(small) + layer_norm(large)) / 2, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(average_layers([small, large], "none"), (small + large) / 2)


@pytest.mark.parametrize("norm", ["layer", "instance", "none"])
@pytest.mark.parametrize("autocast", [True, False])
def test_targets_are_fp32_in_and_out_of_autocast(norm: Any, autocast: bool):
    tokens = torch.randn(2, 6, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert average_layers([tokens, tokens], norm).dtype == torch.float32


def test_the_spread_of_targets_is_zero_when_all_are_the_same():
    same = torch.randn(1, 1, 8).expand(4, 5, 8)
    assert target_std(same) < 1e-6
    assert abs(target_std(torch.randn(1000, 5, 8)) - 1) < 0.05


def test_the_cosine_of_a_prediction_with_itself_is_one():
    tokens = torch.randn(2, 6, 8)
    assert cosine(tokens, 3 * tokens).item() == pytest.approx(1.0)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_what_a_feed_forward_branch_adds_is_the_difference_it_makes(layer_scale: float | None):
    torch.manual_seed(0)
    vit = ViT((16, 16), 8, 3, 16, 3, 2, layer_scale=layer_scale).eval()
    images = torch.randn(2, 3, 16, 16)
    branches = last_layers(vit, images, 2, "ffn")
    outputs = last_layers(vit, images, 2, "block")
    block = vit.blocks[2]
    before = vit.layers(images, [1])[0]
    attended = before + block.ls1(block.attn(block.norm1(before)))
    torch.testing.assert_close(branches[1], (outputs[1] - attended[:, 1:]), atol=1e-5, rtol=1e-5)
    assert [tokens.shape for tokens in branches] == [(2, 4, 16)] * 2
    assert not block.ls2._forward_hooks, "the hooks are gone"
