from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.models.teachers.ema import EMA


def test_the_average_is_kept_in_buffers_and_called_like_the_source():
    source = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    ema, x = EMA(source), torch.randn(5, 4)
    assert not list(ema.parameters())
    assert {n.removeprefix("average."): t.shape for n, t in ema.state_dict().items()} == {
        n: t.shape for n, t in source.state_dict().items()
    }
    assert torch.equal(ema(x), source(x))
    assert not ema(x).requires_grad


def test_update_is_the_weighted_mean():
    source = nn.Linear(4, 3)
    ema = EMA(source)
    before = ema.average.weight.clone()
    with torch.no_grad():
        source.weight.add_(1.0)
    ema.update(source, 0.9)
    torch.testing.assert_close(ema.average.weight, 0.9 * before + 0.1 * source.weight)
    assert torch.equal(ema.average.bias, source.bias)


def test_updates_that_bf16_would_round_away_are_kept():
    source = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        source.weight.fill_(1.0)
    ema = EMA(source)
    with torch.no_grad():
        source.weight.fill_(2.0)
    for _ in range(100):
        ema.update(source, 0.9999)
    assert ema.average.weight.dtype == torch.float32
    assert ema.average.weight.item() == pytest.approx(2 - 0.9999**100, rel=1e-4)


def test_momentum_one_keeps_and_zero_copies():
    source = nn.Linear(2, 2)
    ema, before = EMA(source), source.weight.detach().clone()
    with torch.no_grad():
        source.weight.add_(1.0)
    ema.update(source, 1.0)
    assert torch.equal(ema.average.weight, before)
    ema.update(source, 0.0)
    torch.testing.assert_close(ema.average.weight, source.weight.detach())


def test_a_momentum_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match="momentum must be in"):
        EMA(nn.Linear(1, 1)).update(nn.Linear(1, 1), 1.5)


def test_state_round_trip_is_exact():
    source = nn.Linear(3, 3)
    ema, other = EMA(source), EMA(nn.Linear(3, 3))
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.average.weight, ema.average.weight)
