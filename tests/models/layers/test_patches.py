from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.layers.patches import gather_pixels, normalize_patches, patchify, split_by_noise, unpatchify


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_unpatchify_undoes_patchify(rows: int, columns: int, channels: int, patch: int):
    images = torch.randn(2, channels, rows * patch, columns * patch)
    vectors = patchify(images, patch)
    assert vectors.shape == (2, rows * columns, patch * patch * channels)
    assert torch.equal(unpatchify(vectors, patch, (rows, columns)), images)


def test_channels_run_fastest_in_a_patch_vector():
    images = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    assert patchify(images, 2)[0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]


def test_a_product_with_the_pixels_is_the_convolution():
    images, weight = torch.randn(2, 3, 16, 24), torch.randn(5, 3, 8, 8)
    expected = F.conv2d(images, weight, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(
        gather_pixels(images, 8).flatten(2) @ weight.flatten(1).T, expected, atol=1e-4, rtol=1e-4
    )


def test_gathering_by_index_equals_indexing_everything():
    images, index = torch.randn(2, 3, 16, 24), torch.tensor([[5, 0], [2, 2]])
    everything = patchify(images, 8)
    for image in range(2):
        assert torch.equal(patchify(images, 8, index)[image], everything[image, index[image]])


def test_patches_are_normalized_by_the_unbiased_variance():
    vectors = torch.randn(2, 3, 48) * 4 + 1
    normalized, mean, std = normalize_patches(vectors)
    torch.testing.assert_close(normalized.var(-1, correction=1), torch.ones(2, 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normalized * std + mean, vectors, atol=1e-5, rtol=1e-5)


def test_a_patch_of_one_colour_does_not_divide_by_zero():
    normalized, _, _ = normalize_patches(torch.full((1, 1, 12), 0.5))
    assert torch.equal(normalized, torch.zeros(1, 1, 12))


@given(st.integers(2, 30), st.data())
def test_the_split_is_a_partition_by_noise(patches: int, data: st.DataObject):
    kept = data.draw(st.integers(1, patches - 1))
    noise = torch.rand(3, patches)
    keep, masked = split_by_noise(noise, kept)
    assert torch.equal(torch.cat([keep, masked], 1).sort(1).values, torch.arange(patches).expand(3, -1))
    assert (noise.gather(1, keep).amax(1) <= noise.gather(1, masked).amin(1)).all()
