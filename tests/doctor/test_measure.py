"""What the doctor measures is what it says it is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.doctor.measure import (
    WeightSamples,
    attention_entropy,
    average_distance,
    block_norms,
    layer_measures,
    rank_me,
    spreads,
)
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.teachers.ema import EMA


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rank_me_of_equal_orthogonal_directions_is_their_number(rank: int):
    features = torch.eye(8)[torch.arange(24) % rank]
    assert rank_me(features) == pytest.approx(rank, rel=1e-3)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_rank_me_is_that_of_the_singular_values_and_does_not_see_scale_or_rotation(seed: int):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(features)
    shares = values / values.sum()
    expected = float((-(shares * shares.log()).sum()).exp())
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    assert rank_me(features) == pytest.approx(expected, rel=1e-3)
    assert rank_me(100 * features @ rotation) == pytest.approx(expected, rel=1e-3)


def test_rank_me_of_no_features_at_all_is_a_number():
    assert math.isfinite(rank_me(torch.zeros(4, 3)))


def test_spreads_are_1_for_random_directions_and_0_for_one_direction_of_any_length():
    assert spreads(torch.randn(4000, 64))["std_median"] == pytest.approx(1.0, abs=0.05)
    alike = spreads(torch.randn(1, 64) * torch.rand(50, 1).add(0.1))
    assert alike["std_max"] < 1e-6
    one = torch.zeros(100, 4)
    one[:, 0], one[:, 1] = 1, torch.linspace(-1, 1, 100)
    assert spreads(one)["std_min"] == 0 and spreads(one)["std_max"] > 0.5


def test_attention_entropy_is_0_for_one_token_and_1_for_all_alike_and_reads_the_class_token_alone():
    attention = torch.full((2, 3, 5, 5), 0.2)
    attention[:, :, 0] = torch.eye(5)[4]
    assert attention_entropy(attention, class_token=True) == pytest.approx(0.0)
    assert attention_entropy(attention, class_token=False) == pytest.approx(0.8)
    assert attention_entropy(attention[:, :, 1:2].expand(-1, -1, 5, -1), class_token=True) == pytest.approx(1.0)


def test_gradients_are_summed_by_block_wherever_the_blocks_are():
    norms = {"encoder.blocks.0.attn.qkv.weight": 3.0, "encoder.blocks.0.mlp.fc1.bias": 4.0, "head.weight": 9.0}
    norms |= {"decoder.blocks.10.norm1.weight": 2.0, "model.layers.1.blocks.0.norm.bias": 1.0}
    assert block_norms(norms) == {
        "encoder.blocks.0": 5.0, "decoder.blocks.10": 2.0, "model.layers.1.blocks.0": 1.0
    }  # fmt: skip


def test_a_change_is_relative_to_the_weights_before_and_vectors_and_zeros_do_not_count():
    weight, zero = torch.ones(30, 40), torch.zeros(3, 3)
    samples = WeightSamples({"a": weight, "bias": torch.ones(5), "zero": zero})
    weight.mul_(1.5)
    zero.add_(1.0)
    assert samples.change() == pytest.approx([0.5])
    weight.sub_(0.15)
    assert samples.change() == pytest.approx([0.1, 0.0])


def test_large_matrices_are_sampled_over_their_whole_length():
    weight = torch.ones(100, 1000)
    samples = WeightSamples({"w": weight})
    weight[50:] = 2.0
    assert samples.change() == pytest.approx([math.sqrt(0.5)], rel=0.05)


def test_the_distance_of_an_average_is_over_what_it_follows():
    source = nn.Linear(4, 3, bias=False)
    average = EMA(source)
    assert average_distance([(average, source)]) == 0
    with torch.no_grad():
        source.weight.mul_(2.0)
    assert average_distance([(average, source)]) == pytest.approx(0.5)
    average.update(source, 0.5)
    assert average_distance([(average, source)]) == pytest.approx(0.25)
    assert average_distance([]) is None


def test_every_layer_is_measured_by_name():
    torch.manual_seed(0)
    general = {"kind": "general", "places": "blocks.0.attn", "branches": ["external", "none"], "choice": "hard"}
    backbone = ViT((16, 16), 8, 3, 16, 2, 2, 4.0, ffn="topk", ffn_topk=0.125, attention=[general]).eval()
    backbone.blocks[0].attn.strength.data.fill_(-0.5)  # type: ignore[union-attr]
    found = layer_measures(backbone, torch.randn(3, 3, 16, 16))
    assert found["active/blocks.0.mlp"] == found["active/blocks.1.mlp"] == pytest.approx(0.125)
    assert 0 < found["hoyer/blocks.1.mlp"] < 1 and 0 <= found["dead/blocks.1.mlp"] <= 0.875
    assert {name for name in found if name.startswith("keys_90/")} == {"keys_90/blocks.0.attn", "keys_90/blocks.1.attn"}
    router = {name.removeprefix("router/blocks.0.attn/"): v for name, v in found.items() if name.startswith("router/")}
    expected = {"p/external": 0.5, "p/none": 0.5, "winner": 0.5, "entropy": 1.0, "use/external": 0.25}
    assert router == pytest.approx(expected), "of a hard choice, the shares before it"


def test_a_network_without_tokens_is_measured_too():
    assert (
        layer_measures(
            TimmBackbone("resnet18", (32, 32), layers=[1] * 4, channels=[8] * 4).eval(), torch.zeros(2, 3, 32, 32)
        )
        == {}
    )
