from __future__ import annotations

import torch

from pretrain.models.pictures.feature_pictures import gray_out, pca_rgb


def test_the_same_features_have_the_same_colours_in_every_map_and_call():
    features = torch.randn(2, 6, 10)
    first, second = pca_rgb([features, features], (2, 3), (4, 6))
    assert torch.equal(first, second) and torch.equal(first, pca_rgb([features], (2, 3), (4, 6))[0])
    assert first.dtype == torch.uint8 and first.shape == (2, 3, 4, 6)


def test_patches_of_four_kinds_have_four_colours():
    kinds = torch.eye(4).repeat_interleave(4, 0)[None] + 0.001 * torch.randn(1, 16, 4)
    (shown,) = pca_rgb([kinds], (4, 4), (4, 4))
    rows = shown[0].permute(1, 2, 0).int()
    for i in range(4):
        assert (rows[i] - rows[i, :1]).abs().max() < 20
        assert (rows[i] - rows[(i + 1) % 4]).abs().amax(-1).min() > 100


def test_what_was_not_predicted_is_gray():
    features = torch.randn(1, 6, 10)
    holes = features.clone()
    holes[0, 4] = float("nan")
    _, shown = pca_rgb([features, holes], (2, 3), (2, 3))
    assert (shown[0, :, 1, 1] == 128).all() and not (shown[0, :, 0, 0] == 128).all()


def test_equal_features_and_fewer_than_three_channels_are_no_error():
    assert pca_rgb([torch.ones(1, 4, 8)], (2, 2), (2, 2))[0].shape == (1, 3, 2, 2)
    assert pca_rgb([torch.randn(1, 4, 2)], (2, 2), (2, 2))[0].shape == (1, 3, 2, 2)


def test_hidden_patches_are_gray_and_pixels_beyond_the_grid_stay():
    images = torch.full((1, 3, 5, 9), 7, dtype=torch.uint8)
    shown = gray_out(images, torch.tensor([[True, False]]), 4)
    assert (shown[..., :4, :4] == 128).all() and (shown[..., 4:] == 7).all() and (shown[..., 4, :] == 7).all()
