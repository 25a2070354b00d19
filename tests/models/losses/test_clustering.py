from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.models.losses import clustering
from pretrain.models.losses.clustering import OnlineClustering, unit


def balanced(logits: Tensor, *, iterations: int) -> Tensor:
    """Sinkhorn-Knopp over the first axis, written down."""
    shares = logits.double().exp()
    for _ in range(iterations):
        shares = shares / shares.sum(dim=0, keepdim=True)
        shares = shares / shares.sum(dim=2, keepdim=True)
    return shares.float()


def case(**options: object) -> tuple[OnlineClustering, Tensor]:
    torch.manual_seed(0)
    layer = OnlineClustering(6, 5, target_temp=0.3, pred_temp=0.5, **options)  # pyright: ignore[reportArgumentType]
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer, unit(torch.randn(7, 4, 6))


@pytest.mark.parametrize("positionwise", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions_at_a_time", [1, 3, 4])
def test_loss_and_gradients_are_those_of_the_definition(
    positionwise: bool, bias: bool, positions_at_a_time: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(clustering.LOGITS, "cpu", 7 * 5 * positions_at_a_time)
    layer, rows = case(positionwise=positionwise, bias=bias)
    rows.requires_grad_()
    logits = rows @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    seen = logits if positionwise else logits.flatten(0, 1)[:, None]
    shares = balanced(seen.detach() / 0.3, iterations=3).reshape(logits.shape)
    expected = -(shares * (logits / 0.5).log_softmax(-1)).sum(-1).mean()
    parameters = [rows, *layer.parameters()]
    masses = layer.masses(rows)
    found = layer.loss(rows, masses)
    torch.testing.assert_close(layer.assign(rows.detach(), masses), shares)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.entropy, -torch.xlogy(shares, shares).sum(-1).mean())
    mean = shares.mean(0)
    torch.testing.assert_close(found.mean_entropy, -torch.xlogy(mean, mean).sum(-1).mean())
    for a, b in zip(
        torch.autograd.grad(found.loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_every_cluster_has_the_same_mass_at_every_position():
    layer, rows = case(iterations=100)
    shares = layer.assign(rows, layer.masses(rows))
    torch.testing.assert_close(shares.sum(0), torch.full((4, 5), 7 / 5), atol=1e-4, rtol=1e-4)


def test_balance_at_each_position_keeps_clusters_from_standing_for_positions():
    layer, _ = case()
    everywhere = unit(torch.randn(1, 4, 6)).expand(7, -1, -1)  # the same image seven times
    torch.testing.assert_close(layer.assign(everywhere, layer.masses(everywhere)), torch.full((7, 4, 5), 0.2))
    layer.positionwise = False
    shares = layer.assign(everywhere, layer.masses(everywhere))
    assert float((shares - 0.2).abs().max()) > 0.1
