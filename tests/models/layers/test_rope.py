from __future__ import annotations

import math

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3, apply_rot_embed_cat

from pretrain.models.layers.attention import Attention
from pretrain.models.layers.rope import NUM_DRAWN, Rope, keep_tokens, moved_axes, rotate


@pytest.mark.parametrize("grid", [(3, 5), (14, 14)])
def test_rotations_are_timms_of_dinov3(grid: tuple[int, int]):
    other = RotaryEmbeddingDinoV3(16, temperature=100.0, feat_shape=list(grid), rotate_half=True).get_embed()
    torch.manual_seed(0)
    x = torch.randn(2, 4, grid[0] * grid[1], 16)
    torch.testing.assert_close(rotate(x, Rope().table(grid, 16)), apply_rot_embed_cat(x, other, half=True))


def test_tokens_without_a_place_are_not_turned_and_no_length_changes():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3 + 20, 8)
    turned = rotate(x, Rope().table((4, 5), 8, num_prefix=3))
    assert torch.equal(turned[:, :, :3], x[:, :, :3])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[:, :, 3:], x[:, :, 3:])


def test_scores_depend_on_the_way_between_two_patches_alone():
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    everywhere = torch.stack([q, k])[None, :, None].expand(1, 2, 20, 8)
    turned = rotate(everywhere, Rope().table((4, 5), 8))[0]
    scores = (turned[0] @ turned[1].T).unflatten(0, (4, 5)).unflatten(2, (4, 5))
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1], atol=1e-3)


def test_kept_tokens_keep_their_own_rotation():
    torch.manual_seed(0)
    table, tokens = Rope().table((2, 3), 8, num_prefix=1), torch.tensor([[0, 4, 2], [0, 1, 6]])
    x = torch.randn(2, 2, 7, 8)
    index = tokens[:, None, :, None].expand(2, 2, 3, 8)
    torch.testing.assert_close(
        rotate(x.gather(2, index), keep_tokens(table, tokens)), rotate(x, table).gather(2, index)
    )


def test_another_grid_samples_the_same_square():
    fine, coarse = Rope().table((6, 6), 8), Rope().table((2, 2), 8)
    torch.testing.assert_close(fine[:, 0, 0, 7], coarse[:, 0, 0, 0])  # the middle of the first three by three


def test_a_part_of_the_tokens_is_turned_as_in_the_whole():
    torch.manual_seed(0)
    attention, x, table = Attention(16, 2), torch.randn(2, 7, 16), Rope().table((2, 3), 8, num_prefix=1)
    torch.testing.assert_close(
        attention(x, slice(2, 5), None, table), attention(x, slice(None), None, table)[:, 2:5], atol=1e-6, rtol=1e-5
    )


def test_bf16_queries_are_turned_in_fp32():
    x = torch.randn(1, 1, 4, 8)
    table = Rope().table((2, 2), 8)
    low = rotate(x.bfloat16(), table)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, rotate(x.bfloat16().float(), table).bfloat16())


def test_a_head_of_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="head dimension 6 is not a multiple of 4"):
        Rope().table((2, 2), 6)


def test_moved_coordinates_are_those_of_another_grid():
    still = moved_axes(torch.full((3, NUM_DRAWN), 0.5), shift=0.2, jitter=2.0, rescale=3.0)
    assert torch.equal(still, torch.tensor([0.0, 1.0]).expand(3, 2, 2))
    whole, half = Rope().table((4, 4), 8), Rope().table((4, 4), 8, axes=torch.tensor([[0.0, 0.5], [0.0, 0.5]]))
    torch.testing.assert_close(half, Rope().table((8, 8), 8).unflatten(3, (8, 8))[:, :, :, 2:6, 2:6].flatten(3, 4))
    lower = Rope().table((4, 4), 8, axes=torch.tensor([[0.5, 1.0], [0.0, 1.0]]))  # by one row
    torch.testing.assert_close(lower[:, :, :, :12], whole[:, :, :, 4:])


def test_what_moves_coordinates_stays_in_its_range_and_is_symmetric():
    torch.manual_seed(0)
    drawn = torch.rand(4000, NUM_DRAWN)
    offset, factor = moved_axes(drawn, shift=0.2, jitter=2.0, rescale=3.0).unbind(-1)
    assert offset.abs().max() <= 0.2 and offset.std() > 0.1 and (offset[:, 0] != offset[:, 1]).any()
    assert factor.log().abs().max() <= math.log(6.0) + 1e-6 and abs(float(factor.log().mean())) < 0.03
    one = moved_axes(drawn, shift=None, jitter=None, rescale=3.0)
    assert not one[..., 0].any() and torch.equal(one[:, 0, 1], one[:, 1, 1])


def test_periods_between_two_are_geometric_and_the_shorter_side_can_be_the_unit():
    periods = Rope(periods=(0.5, 32.0)).periods_of(16)
    torch.testing.assert_close(periods, torch.tensor([0.5, 2.0, 8.0, 32.0]))
    wide = Rope(normalize="max").table((2, 4), 8)
    torch.testing.assert_close(wide, Rope().table((4, 4), 8)[:, :, :, :8])
