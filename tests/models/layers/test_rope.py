from __future__ import annotations

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3, apply_rot_embed_cat

from pretrain.models.layers.attention import Attention
from pretrain.models.layers.rope import keep_tokens, rope_table, rotate


@pytest.mark.parametrize("grid", [(3, 5), (14, 14)])
def test_rotations_are_timms_of_dinov3(grid: tuple[int, int]):
    other = RotaryEmbeddingDinoV3(16, temperature=100.0, feat_shape=list(grid), rotate_half=True).get_embed()
    torch.manual_seed(0)
    x = torch.randn(2, 4, grid[0] * grid[1], 16)
    torch.testing.assert_close(rotate(x, rope_table(grid, 16)), apply_rot_embed_cat(x, other, half=True))


def test_tokens_without_a_place_are_not_turned_and_no_length_changes():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3 + 20, 8)
    turned = rotate(x, rope_table((4, 5), 8, num_prefix=3))
    assert torch.equal(turned[:, :, :3], x[:, :, :3])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(turned[:, :, 3:], x[:, :, 3:])


def test_scores_depend_on_the_way_between_two_patches_alone():
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    everywhere = torch.stack([q, k])[None, :, None].expand(1, 2, 20, 8)
    turned = rotate(everywhere, rope_table((4, 5), 8))[0]
    scores = (turned[0] @ turned[1].T).unflatten(0, (4, 5)).unflatten(2, (4, 5))
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1], atol=1e-3)


def test_kept_tokens_keep_their_own_rotation():
    torch.manual_seed(0)
    table, tokens = rope_table((2, 3), 8, num_prefix=1), torch.tensor([[0, 4, 2], [0, 1, 6]])
    x = torch.randn(2, 2, 7, 8)
    index = tokens[:, None, :, None].expand(2, 2, 3, 8)
    torch.testing.assert_close(
        rotate(x.gather(2, index), keep_tokens(table, tokens)), rotate(x, table).gather(2, index)
    )


def test_another_grid_samples_the_same_square():
    fine, coarse = rope_table((6, 6), 8), rope_table((2, 2), 8)
    torch.testing.assert_close(fine[:, 0, 0, 7], coarse[:, 0, 0, 0])  # the middle of the first three by three


def test_a_part_of_the_tokens_is_turned_as_in_the_whole():
    torch.manual_seed(0)
    attention, x, table = Attention(16, 2), torch.randn(2, 7, 16), rope_table((2, 3), 8, num_prefix=1)
    torch.testing.assert_close(
        attention(x, slice(2, 5), None, table), attention(x, slice(None), None, table)[:, 2:5], atol=1e-6, rtol=1e-5
    )


def test_bf16_queries_are_turned_in_fp32():
    x = torch.randn(1, 1, 4, 8)
    table = rope_table((2, 2), 8)
    low = rotate(x.bfloat16(), table)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, rotate(x.bfloat16().float(), table).bfloat16())


def test_a_head_of_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="head dimension 6 is not a multiple of 4"):
        rope_table((2, 2), 6)
