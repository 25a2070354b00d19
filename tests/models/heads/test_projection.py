from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.models.heads.projection import DINOHead, Prototypes


def test_prototypes_equal_torchs_weight_norm():
    torch.manual_seed(0)
    ours = Prototypes(6, 10, unit_length=False)
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2.0)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10, bias=False), dim=0)
    theirs.parametrizations.weight.original0.data.copy_(ours.weight_g)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight_v)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("unit_length", [True, False])
def test_unit_length_prototypes_have_a_frozen_gain(unit_length: bool):
    prototypes = Prototypes(6, 10, unit_length=unit_length)
    assert prototypes.weight_g.requires_grad is not unit_length
    torch.testing.assert_close(prototypes.weight().norm(dim=1), torch.ones(10))


@pytest.mark.parametrize(
    ("nlayers", "names"), [(1, ["mlp"]), (2, ["mlp.0", "mlp.2"]), (3, ["mlp.0", "mlp.2", "mlp.4"])]
)
def test_layers_carry_the_official_names(nlayers: int, names: list[str]):
    head = DINOHead(8, 16, nlayers=nlayers, hidden_dim=12, bottleneck_dim=4)
    assert [
        n.removesuffix(".weight") for n, _ in head.named_parameters() if n.startswith("mlp") and "weight" in n
    ] == names
    assert head(torch.randn(3, 8)).shape == (3, 16)
    torch.testing.assert_close(head.bottleneck(torch.randn(3, 8)).norm(dim=1), torch.ones(3))


def test_batch_norm_comes_after_each_hidden_layer():
    head = DINOHead(8, 16, hidden_dim=12, bottleneck_dim=4, use_bn=True)
    kinds = [type(layer).__name__ for layer in head.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]


def test_a_head_without_layers_is_refused():
    with pytest.raises(ValueError, match="nlayers must be at least 1"):
        DINOHead(8, 16, nlayers=0)


def test_the_bottleneck_is_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert DINOHead(8, 16, hidden_dim=12, bottleneck_dim=4).bottleneck(torch.randn(3, 8)).dtype == torch.float32
