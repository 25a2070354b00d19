from __future__ import annotations

import pytest
import torch
from timm.layers.mlp import SwiGLUPacked

from pretrain.models.layers.ffn import SwiGLU, TopK, build_ffn, swiglu_hidden


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


def test_relu2_squares_what_is_positive():
    mlp = build_ffn("relu2", 4, 8)
    mlp.load_state_dict(build_ffn("mlp", 4, 8).state_dict())
    x = torch.randn(3, 4)
    expected = mlp.fc2(mlp.fc1(x).clamp(min=0) ** 2)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(mlp(x), expected)


def test_topk_keeps_the_largest_units_of_each_token_and_all_of_them_are_the_mlp():
    x = torch.randn(2, 5, 16, requires_grad=True)
    kept, units = TopK(0.25)(x), torch.nn.functional.gelu(x)
    assert ((kept != 0).sum(-1) == 4).all()
    for token, all_units in zip(kept.flatten(0, 1), units.flatten(0, 1), strict=True):
        assert torch.equal(token[token != 0].sort().values, all_units.sort().values[-4:])
    kept.sum().backward()
    assert torch.equal(x.grad != 0, kept != 0), "no gradient to units that are not kept"  # type: ignore[operator]
    whole, mlp = build_ffn("topk", 16, 32, topk=1.0), build_ffn("mlp", 16, 32)
    whole.load_state_dict(mlp.state_dict())
    assert torch.equal(whole(x), mlp(x))
