"""The hidden units of feed-forward networks: sparsity of known units, and the penalty with recomputed activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.activations import ActivationPenalty, PenaltyKind, feed_forwards, hoyer_square, l1, observed
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.ffn import build_ffn


def units_of(ffn: nn.Module, units: Tensor) -> None:
    """Let the hidden units of `ffn` be these: its first layer is an identity."""
    ffn.fc1 = nn.Identity()
    ffn(units)


def test_sparsity_of_known_units():
    ffn = build_ffn("relu2", 4, 4)
    with observed(ffn) as seen:
        units_of(ffn, torch.tensor([[[1.0, -1.0, -2.0, -3.0], [2.0, 2.0, -1.0, -1.0]], [[1.0, 1.0, -1.0, -1.0]] * 2]))
        units_of(ffn, torch.tensor([[[-1.0, -1.0, -1.0, -1.0]]]))
    found = seen[""].sparsity
    assert found.active == pytest.approx((0.25 + 3 * 0.5 + 0) / 5)
    two_of_four = (2 - 2**0.5) / (2 - 1)
    assert found.hoyer == pytest.approx((1 + 3 * two_of_four + 1) / 5)
    assert found.dead == 0.5 and found.images == 3


def test_units_without_zeros_are_active_above_one_percent_of_the_rms():
    ffn = build_ffn("mlp", 4, 4)
    ffn.act = nn.Identity()
    with observed(ffn) as seen:
        units_of(ffn, torch.tensor([[[2.0, -2.0, 0.014, 0.015]]]))  # their RMS is 1.414
    assert seen[""].sparsity.active == 0.75


def test_units_of_timms_networks_are_seen():
    for name, size in (("convnext_atto", 32), ("vit_tiny_patch16_224", 32), ("eva02_tiny_patch14_224", 28)):
        network = TimmBackbone(name, (size, size)).eval()
        with observed(network) as seen, torch.no_grad():
            network(torch.randn(2, 3, size, size))
        assert len(seen) >= 12 and all(0 < of.sparsity.active <= 1 for of in seen.values())


def test_penalties_of_known_units():
    assert l1(torch.tensor([[1.0, -3.0, 0.0, 0.0]])).tolist() == [1.0]
    one, equal = torch.tensor([[0.0, 5.0, 0.0, 0.0]]), torch.tensor([[-2.0, 2.0, 2.0, 2.0]])
    assert hoyer_square(one).tolist() == [0.25] and hoyer_square(equal).tolist() == [1.0]
    nothing = torch.zeros(1, 4, requires_grad=True)
    hoyer_square(nothing).sum().backward()
    assert nothing.grad is not None and nothing.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["l1", "hoyer"])
def test_recomputed_activations_give_the_same_penalty_and_gradient(kind: PenaltyKind):
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = ViT((16, 16), 8, 3, 16, 2, 2, 2.0)
        backbone.set_checkpointing(recompute)
        penalty = ActivationPenalty(feed_forwards(backbone), kind)
        with penalty.gathered() as terms:
            out = backbone(torch.randn(2, 3, 16, 16))
        assert [count for _, count in terms.values()] == [10, 10]
        value = torch.stack([total / count for total, count in terms.values()]).sum()
        (out.square().mean() + value).backward()
        found.append([value.detach(), *(p.grad for p in backbone.parameters() if p.grad is not None)])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_network_without_feed_forward_is_refused():
    with pytest.raises(ValueError, match="no feed-forward network"):
        ActivationPenalty(feed_forwards(ViT((16, 16), 8, 3, 16, 2, 2, ffn="identity")), "l1")
