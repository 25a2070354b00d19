from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.models.heads.projection import Prototypes
from pretrain.models.losses import sinkhorn
from pretrain.models.losses.sinkhorn import sinkhorn_center
from tests.models.losses.peak_memory import peak_bytes


def draw(rows: int, prototypes: int, seed: int, *, dim: int = 8) -> tuple[Tensor, Prototypes]:
    torch.manual_seed(seed)
    layer = Prototypes(dim, prototypes, unit_length=False)
    with torch.no_grad():
        layer.weight_v.normal_()
    return F.normalize(torch.randn(rows, dim), dim=-1), layer


def plain(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """Caron et al. 2020, listing 1: scale prototypes, then rows; [n, K] to [n, K]."""
    q = (logits / temp).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def assigned(rows: Tensor, layer: Prototypes, temp: float, iterations: int) -> Tensor:
    with torch.no_grad():
        center = sinkhorn_center(rows, layer, temp=temp, iterations=iterations)
        return ((layer(rows) - center) / temp).softmax(-1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    prototypes=st.integers(2, 40),
    chunk=st.integers(1, 50),
    kept=st.sampled_from([0, 2**23]),
    iterations=st.integers(1, 4),
    temp=st.floats(0.04, 0.5),
    seed=st.integers(0, 2**31),
)
def test_softmax_around_its_centre_is_the_assignment_of_the_definition(
    rows, prototypes, chunk, kept, iterations, temp, seed
):
    given_rows, layer = draw(rows, prototypes, seed)
    with torch.no_grad():
        expected = plain(layer(given_rows).double(), temp, iterations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinkhorn, "CHUNK", {"cpu": chunk})
        patch.setattr(sinkhorn, "KEPT_LOGITS", kept)
        got = assigned(given_rows, layer, temp, iterations)
    torch.testing.assert_close(got, expected.float(), atol=2e-5, rtol=2e-4)


def test_with_many_iterations_every_prototype_gets_the_same_share():
    rows, layer = draw(64, 10, 0)
    share = assigned(rows, layer, 0.5, 200).sum(0)
    torch.testing.assert_close(share, torch.full((10,), 6.4), atol=1e-3, rtol=0)


def test_identical_rows_use_all_prototypes_alike():
    """Where an average centre would leave a collapsed teacher sharp, Sinkhorn-Knopp has it undecided."""
    rows, layer = draw(1, 10, 0)
    torch.testing.assert_close(assigned(rows.expand(6, -1), layer, 0.05, 3), torch.full((6, 10), 0.1))


def test_logits_that_would_overflow_are_assigned_all_the_same():
    rows, layer = draw(4, 6, 0)
    with torch.no_grad():
        layer.weight_g.fill_(50.0)
    assert assigned(rows, layer, 0.05, 3).isfinite().all()


def test_no_rows_are_no_error():
    rows, layer = draw(0, 6, 0)
    assert sinkhorn_center(rows, layer, temp=0.1).shape == (6,)


def test_without_an_iteration_there_is_no_assignment():
    rows, layer = draw(2, 6, 0)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        sinkhorn_center(rows, layer, temp=0.1, iterations=0)


def test_at_65536_prototypes_it_takes_less_than_a_fifth_of_the_memory_of_the_logits():
    rows, layer = draw(256, 65536, 0, dim=16)
    ours = peak_bytes(lambda: sinkhorn_center(rows, layer, temp=0.07))
    with torch.no_grad():
        whole = peak_bytes(lambda: plain(layer(rows), 0.07, 3))
    assert whole > 256 * 65536 * 4
    assert ours < whole / 5
