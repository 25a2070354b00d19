from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.heads.projection import mlp_head
from pretrain.models.losses.contrastive import contrastive_loss


@given(seed=st.integers(0, 99), count=st.integers(2, 6), temperature=st.floats(0.05, 2.0))
def test_the_loss_is_that_of_its_definition(seed: int, count: int, temperature: float):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, count, 5, generator=generator)
    loss, accuracy = contrastive_loss(query, key, temperature=temperature)
    terms, found = [], 0
    for i in range(count):
        scores = [torch.cosine_similarity(query[i], key[j], dim=0).item() / temperature for j in range(count)]
        terms.append(-scores[i] + math.log(sum(math.exp(score) for score in scores)))
        found += max(range(count), key=lambda j: scores[j]) == i
    assert loss.item() == pytest.approx(2 * temperature * sum(terms) / count, rel=1e-4, abs=1e-5)
    assert accuracy.item() == pytest.approx(found / count)


def test_lengths_do_not_matter_and_keys_get_no_gradient():
    query, key = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    loss, _ = contrastive_loss(query, key, temperature=0.2)
    scaled, _ = contrastive_loss(query * 3, key * 0.1, temperature=0.2)
    torch.testing.assert_close(scaled, loss)
    loss.backward()
    assert key.grad is None and query.grad is not None


def test_equal_queries_and_keys_collapse_to_the_logarithm_of_the_batch():
    same = F.normalize(torch.ones(8, 4), dim=1)
    loss, _ = contrastive_loss(same, same, temperature=0.5)
    assert loss.item() == pytest.approx(math.log(8))


def test_bf16_inputs_under_autocast_give_the_fp32_loss():
    query, key = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = contrastive_loss(query.bfloat16(), key.bfloat16(), temperature=0.2)
    assert low.dtype == torch.float32
    exact, _ = contrastive_loss(query.bfloat16().float(), key.bfloat16().float(), temperature=0.2)
    torch.testing.assert_close(low, exact)


def test_heads_are_linear_layers_without_bias_and_a_last_norm_without_scale():
    head = mlp_head(6, 5, 4, num_layers=3)
    assert [tuple(p.shape) for p in head.parameters()] == [(5, 6), (5,), (5,), (5, 5), (5,), (5,), (4, 5)]
    out = head(torch.randn(64, 6))
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(0, correction=0), torch.ones(4), atol=1e-2, rtol=0)
    plain = mlp_head(6, 5, 4, num_layers=2, last_norm=False)
    assert isinstance(plain[-1], torch.nn.Linear)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        mlp_head(6, 5, 4, num_layers=0)
