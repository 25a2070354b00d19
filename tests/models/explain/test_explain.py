"""Recorded attention, rollout, relevance; that the formulas equal the official code is in tests/golden."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from pretrain.models.backbones.vit import ViT
from pretrain.models.explain.recording import recorded_attention
from pretrain.models.explain.rollout import relevance, rollout

IMAGES = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT((24, 32), 8, 3, 24, 3, 3, 2.0, num_registers=1, pos_embed="learned", rel_pos_bias="per_block").eval()


def test_recording_sees_every_block_and_changes_nothing(vit: ViT):
    before = vit(IMAGES)
    with recorded_attention(vit) as maps:
        during = vit(IMAGES)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(3)]
    assert all(m.shape == (2, 3, 14, 14) for m in maps.values())
    torch.testing.assert_close(during, before, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(maps["blocks.2.attn"], vit.last_attention(IMAGES))
    maps.clear()
    assert torch.equal(vit(IMAGES), before)
    assert not maps


def test_recording_ends_when_the_forward_pass_fails(vit: ViT):
    with pytest.raises(ValueError, match="images must be"), recorded_attention(vit):
        vit(IMAGES[:, :2])
    assert all(block.attn.fused_attn for block in vit.blocks)


def test_a_model_of_timm_is_recorded_too():
    model = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    images = torch.randn(1, 3, 160, 160)
    with recorded_attention(model) as maps:
        out = model.forward_features(images)
    torch.testing.assert_close(out, model.forward_features(images), atol=1e-5, rtol=1e-5)
    assert torch.allclose(torch.stack([m.sum(-1) for m in maps.values()]), torch.ones(()))


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention layer"), recorded_attention(nn.Linear(2, 2)):
        pass


def test_rollout_shares_sum_to_one_and_uniform_attention_gives_uniform_shares():
    maps = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(4)]
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(2, 5))
    uniform = torch.full((1, 2, 4, 4), 0.25)
    torch.testing.assert_close(rollout([uniform])[0], torch.full((4, 4), 0.125) + torch.eye(4) / 2)


def test_relevance_counts_only_what_raised_the_score(vit: ViT):
    with recorded_attention(vit) as recorded:
        score = vit(IMAGES)[:, 0, 0].sum()
    maps = list(recorded.values())
    gradients: list[Tensor] = list(torch.autograd.grad(score, maps))
    assert (relevance(maps, gradients) >= 0).all()
    against = [-g.abs() for g in gradients]
    torch.testing.assert_close(relevance(maps, against), torch.eye(14).expand(2, -1, -1))
    torch.testing.assert_close(
        relevance(maps, gradients)[:1], relevance([m[:1] for m in maps], [g[:1] for g in gradients])
    )


def test_maps_over_windows_and_missing_gradients_are_refused():
    square = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="windows and pooled tokens"):
        rollout([square, torch.ones(4, 1, 2, 2)])
    with pytest.raises(ValueError, match="2 maps need as many gradients"):
        relevance([square, square], [square])
    with pytest.raises(ValueError, match="one of 2 blocks, got 2"):
        rollout([square, square], start=2)
