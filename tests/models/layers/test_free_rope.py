from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.attention import Attention
from pretrain.models.layers.free_rope import FreeRope, border, coordinates
from pretrain.models.layers.rope import rotate


def test_rows_turn_the_first_half_of_the_channels_and_columns_the_second():
    rope = FreeRope(8, (0.5, 2.0))
    expected = 2 * math.pi * torch.tensor([2.0, 0.5, 2.0, 0.5])
    torch.testing.assert_close(rope.freqs[0], torch.cat([expected, torch.zeros(4)]))
    torch.testing.assert_close(rope.freqs[1], torch.cat([torch.zeros(4), expected]))
    sin, cos = rope(torch.tensor([0.25, 0.5])[None, None, None, None])
    angles = torch.cat([0.25 * expected, 0.5 * expected])
    torch.testing.assert_close(sin[0, 0, 0], angles.sin())
    torch.testing.assert_close(cos[0, 0, 0], angles.cos())


def test_tokens_without_a_place_stand_on_the_border_of_the_visible_patches():
    assert border(4).tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert border(8).tolist()[:4] == [[0, 0], [0.5, 0], [1, 0], [1, 0.5]]
    places = coordinates((3, 5), 4, extra=1, keep=torch.tensor([[6, 13], [0, 14]]))[0, :, 0]
    assert places[0].tolist() == [[0, 0], [0.5, 0.25], [1, 0.25], [1, 0.75], [0.5, 0.75], [0.5, 0.25], [1, 0.75]]
    assert places[1, 1:5].tolist() == border(4).tolist()
    assert coordinates((1, 1), 0)[0, 0, 0].tolist() == [[0, 0]]


def test_an_attention_with_frequencies_of_its_own_turns_by_coordinates():
    torch.manual_seed(0)
    attention, x, places = Attention(16, 2), torch.randn(1, 6, 16), coordinates((2, 3), 0)
    attention.rope = FreeRope(8, (0.1, 3.0))
    q, k, _ = attention.split_heads(x, slice(1, 3), places)
    plain_q, plain_k, _ = attention.split_heads(x)
    torch.testing.assert_close(q, rotate(plain_q, attention.rope(places))[:, :, 1:3])
    torch.testing.assert_close(k, rotate(plain_k, attention.rope(places)))


def test_the_frequencies_of_every_block_are_in_the_state_and_fixed():
    vit = ViT((16, 16), 8, 3, 16, 2, 2, pos_embed="rope", rope={"frequencies": (7e-4, 7.0)})
    freqs = {name: p for name, p in vit.named_parameters() if "freqs" in name}
    assert list(freqs) == [f"blocks.{i}.attn.rope.freqs" for i in (0, 1)]
    assert not any(p.requires_grad for p in freqs.values())
    with pytest.raises(ValueError, match=r"coordinates of rope\.frequencies are not moved"):
        vit(torch.zeros(1, 3, 16, 16), axes=torch.zeros(2, 2, 2))
