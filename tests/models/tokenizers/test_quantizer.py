from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.models.tokenizers.quantizer import Quantizer, kmeans, nearest, perplexity


def features(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(num_codes: int = 6, dim: int = 4, **settings: object) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(num_codes, dim, **{"kmeans_init": False, "decay": 0.9} | settings)  # pyright: ignore[reportArgumentType]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_every_feature_takes_the_code_of_least_distance(rows: int, codes: int, seed: int):
    vectors, book = features(seed, rows, 3), features(seed + 1, codes, 3)
    distance = torch.cdist(vectors, book)
    chosen = distance.gather(1, nearest(vectors, book)[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1), atol=1e-3, rtol=1e-3)


def test_the_gradient_of_the_codes_is_that_of_the_features():
    of, z = quantizer(), features(1, 5, 4)
    asked = features(2, 5, 4)
    gradients = []
    for take in (lambda x: of(x).codes, lambda x: F.normalize(x, dim=-1)):
        given_z = z.clone().requires_grad_()
        (take(given_z) * asked).sum().backward()
        gradients.append(given_z.grad)
    torch.testing.assert_close(*gradients)


def test_the_loss_pulls_features_to_codes_and_not_codes_to_features():
    of, z = quantizer(beta=0.25), features(1, 5, 4).requires_grad_()
    done = of(z)
    expected = 0.25 * (F.normalize(z.detach(), dim=-1) - of.codebook[done.ids]).square().mean()
    torch.testing.assert_close(done.loss, expected)
    assert not list(of.parameters()) and done.loss.requires_grad


def test_the_codebook_of_a_step_is_that_from_before_it():
    of, z = quantizer().train(), features(1, 30, 4)
    before = of.codebook.clone()
    of.remember(of(z))
    assert torch.equal(of.codebook, before)
    of.update()
    assert not torch.equal(of.codebook, before)
    torch.testing.assert_close(of.codebook.norm(dim=1), torch.ones(6))


def test_codes_that_nothing_takes_keep_their_place():
    of = quantizer()
    z = of.codebook[:2].repeat(3, 1)
    before = of.codebook.clone()
    of.remember(of(z))
    of.update()
    torch.testing.assert_close(of.codebook, before)
    torch.testing.assert_close(of.cluster_size, torch.tensor([0.3, 0.3, 0, 0, 0, 0]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=4))
def test_micro_batches_move_the_codes_as_the_whole_batch_does(sizes: list[int]):
    books = []
    for pieces in ([sum(sizes)], sizes):
        of = quantizer()
        for piece in features(3, sum(sizes), 4).split(pieces):
            of.remember(of(piece))
        of.update()
        books.append((of.codebook, of.cluster_size))
    torch.testing.assert_close(books[0], books[1])


def test_a_skipped_step_leaves_no_trace():
    of = quantizer(kmeans_init=True).train()
    noise = torch.rand(30, generator=torch.Generator().manual_seed(0))
    of.remember(of(torch.full((30, 4), float("nan")), noise))
    of.discard()
    of.update()
    assert not of.initted.item() and not of.codebook.any() and not of.cluster_size.any()
    of.remember(of(features(1, 30, 4), noise))
    of.update()
    assert of.initted.item() and of.codebook.isfinite().all()


def test_the_first_batch_gives_the_codes_and_no_later_one():
    of = quantizer(kmeans_init=True).train()
    z, noise = features(1, 50, 4), torch.rand(50, generator=torch.Generator().manual_seed(0))
    centres, counts = kmeans(F.normalize(z, dim=-1), noise, 6)
    done = of(z, noise)
    torch.testing.assert_close(of.beta * F.mse_loss(F.normalize(z, dim=-1), centres[done.ids]), done.loss)
    assert counts.sum() == 50
    of.remember(done)
    of.update()
    after = of.codebook.clone()
    of(features(2, 50, 4))  # needs no noise any more
    assert torch.equal(of.codebook, after)


def test_a_start_by_k_means_without_its_numbers_is_named():
    with pytest.raises(ValueError, match="the codebook is initialized by k-means: give the noise"):
        quantizer(kmeans_init=True)(features(1, 5, 4))


def test_k_means_finds_clusters_that_lie_apart():
    truth = F.normalize(torch.eye(4), dim=-1)
    vectors = F.normalize(truth.repeat_interleave(10, 0) + 0.01 * features(0, 40, 4), dim=-1)
    noise = torch.ones(40)
    noise[[0, 10, 20, 30]] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    centres, counts = kmeans(vectors, noise, 4)
    assert (centres * truth).sum(1).min() > 0.999 and counts.tolist() == [10] * 4


def test_k_means_of_fewer_vectors_than_centres_still_gives_centres():
    centres, _ = kmeans(F.normalize(features(0, 3, 4), dim=-1), torch.rand(3), 8)
    assert centres.shape == (8, 4) and centres.isfinite().all()


def test_perplexity_counts_codes_that_share_the_load():
    assert perplexity(torch.tensor([1.0, 1.0, 0.0, 0.0])).item() == pytest.approx(2)
    assert perplexity(torch.tensor([5.0, 0.0])).item() == pytest.approx(1)


def test_usage_is_of_recent_steps():
    of = quantizer(num_codes=4, decay=0.5)
    _, used = of.usage(torch.tensor([0, 1, 1]))
    assert used.item() == 0.5
    of.observe(torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert of.usage(torch.tensor([0]))[1].item() == 0.5
