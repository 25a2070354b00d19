from __future__ import annotations

import pytest
import torch
from timm.layers.mlp import SwiGLUPacked

from pretrain.models.layers.ffn import SwiGLU, swiglu_hidden


def test_the_gated_network_is_timms_with_the_same_weights():
    torch.manual_seed(0)
    ours, other = SwiGLU(16, 24), SwiGLUPacked(16, 48)
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), other(x))


@pytest.mark.parametrize(("hidden", "expected"), [(1536 * 4, 4096), (128, 88), (96, 64), (1, 0), (3, 8)])
def test_the_width_is_two_thirds_rounded_up_to_eight(hidden: int, expected: int):
    assert swiglu_hidden(hidden) == expected == (int(hidden * 2 / 3) + 7) // 8 * 8


def test_it_has_about_as_many_weights_as_the_mlp():
    gated = sum(p.numel() for p in SwiGLU(96, swiglu_hidden(4 * 96)).parameters())
    assert gated == pytest.approx(2 * 96 * 4 * 96, rel=0.05)
