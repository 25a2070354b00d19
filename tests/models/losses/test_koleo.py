from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.core import distributed
from pretrain.models.losses.koleo import COINCIDENT, koleo_loss


def test_it_is_minus_the_mean_log_distance_to_the_nearest_other():
    angles = torch.tensor([0.0, 0.5, 2.0])
    features = 3 * torch.stack([angles.cos(), angles.sin()], dim=1)
    chords = [2 * math.sin(gap / 2) for gap in (0.5, 0.5, 1.5)]
    expected = -sum(math.log(chord) for chord in chords) / 3
    assert koleo_loss(features).item() == pytest.approx(expected, abs=1e-5)


def test_following_its_gradient_spreads_the_features():
    torch.manual_seed(0)
    features = (torch.randn(8, 6) * 0.05 + torch.randn(6)).requires_grad_()
    before = koleo_loss(features)
    before.backward()
    with torch.no_grad():
        assert koleo_loss(features - 1e-3 * features.grad) < before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_duplicates_give_a_finite_loss_and_no_gradient_of_their_own(dtype: torch.dtype):
    torch.manual_seed(0)
    one = torch.randn(1, 6)
    features = torch.cat([one, one, torch.randn(2, 6)]).to(dtype).requires_grad_()
    loss = koleo_loss(features)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss < -math.log(COINCIDENT)
    assert features.grad.isfinite().all() and features.grad.norm() < 10
    same = one.expand(4, -1).clone().requires_grad_()
    koleo_loss(same).backward()
    assert not same.grad.any()


def test_several_neighbours_count_alike():
    rows = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    distances = torch.cdist(rows, rows).fill_diagonal_(9.0).sort(dim=1).values[:, :3]
    torch.testing.assert_close(koleo_loss(rows, neighbours=3), -distances.log().mean(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 7 images at a time to find nearest neighbours, got 6"):
        koleo_loss(rows, neighbours=6)


def test_a_group_of_ranks_is_searched_alone(monkeypatch: pytest.MonkeyPatch):
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda _: F.normalize(rows, dim=1).unflatten(0, (4, 2)))
    found = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append(koleo_loss(rows[2 * rank : 2 * rank + 2], scope="all", group=4))
    for group in range(2):
        together = koleo_loss(rows[4 * group : 4 * group + 4])
        torch.testing.assert_close(torch.stack(found[2 * group : 2 * group + 2]).mean(), together)


def test_it_is_computed_in_fp32_under_autocast():
    torch.manual_seed(0)
    features = torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo_loss(features), koleo_loss(features.clone()))
        low = koleo_loss(features)
    assert torch.equal(low, koleo_loss(features))


def test_zero_features_are_no_division_by_zero():
    assert koleo_loss(torch.zeros(3, 4)).isfinite()


@pytest.mark.parametrize("scope", ["rank", "all"])
def test_one_image_has_no_neighbour(scope):
    with pytest.raises(ValueError, match=r"at least 2 images .*got 1; .*koleo_weight: 0"):
        koleo_loss(torch.ones(1, 4), scope=scope)


def test_the_length_of_a_feature_does_not_matter():
    torch.manual_seed(0)
    features = torch.randn(5, 4)
    torch.testing.assert_close(koleo_loss(features), koleo_loss(features * torch.rand(5, 1).add(0.1)))
