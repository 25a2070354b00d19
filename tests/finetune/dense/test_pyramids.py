from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.dense.plain import PlainDense
from finetune.dense.pyramid import HierarchicalFPN, PlainFPN, pyramid
from finetune.dense.simple_fpn import SimpleFPN
from tests.finetune.dense.test_windows import vit

SCALES = (4, 2, 1, 0.5)


def normalized(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over the channels of each place."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


def doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A transposed convolution of 2 x 2 with stride 2: every place becomes four, each by its own matrix."""
    out = x.new_zeros(len(x), weight.shape[1], x.shape[2] * 2, x.shape[3] * 2)
    for dy in range(2):
        for dx in range(2):
            out[:, :, dy::2, dx::2] = torch.einsum("bchw,cd->bdhw", x, weight[:, :, dy, dx]) + bias[:, None, None]
    return out


def by_hand(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """ViTDet, section 3: deconvolutions with norm and GELU between, or max pooling; then 1 x 1 and 3 x 3 with norms."""

    def of(stage: int, part: int) -> tuple[Tensor, Tensor]:
        return state[f"stages.{stage}.{part}.weight"], state[f"stages.{stage}.{part}.bias"]

    once = F.gelu(normalized(doubled(x, *of(0, 0)), *of(0, 1)))
    resized = [doubled(once, *of(0, 3)), doubled(x, *of(1, 0)), x, x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))]
    resized[3] = resized[3].amax((3, 5))
    levels = []
    for stage, (level, first) in enumerate(zip(resized, (4, 1, 0, 1), strict=True)):
        weight = state[f"stages.{stage}.{first}.weight"][:, :, 0, 0]
        level = normalized(torch.einsum("bchw,dc->bdhw", level, weight), *of(stage, first + 1))
        level = F.unfold(level, 3, padding=1).unflatten(2, level.shape[2:])
        weight = state[f"stages.{stage}.{first + 2}.weight"].flatten(1)
        levels.append(normalized(torch.einsum("bkhw,dk->bdhw", level, weight), *of(stage, first + 3)))
    return levels


def test_the_simple_pyramid_follows_its_paper():
    torch.manual_seed(0)
    fpn, x = SimpleFPN(16, 8, SCALES), torch.randn(2, 16, 6, 4)
    with torch.no_grad():
        for parameter in fpn.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        levels, expected = fpn(x), by_hand(fpn.state_dict(), x)
    for level, wanted, scale in zip(levels, expected, SCALES, strict=True):
        assert level.shape == (2, 8, int(6 * scale), int(4 * scale))
        torch.testing.assert_close(level, wanted, atol=1e-5, rtol=1e-4)


def test_only_the_four_scales_are_accepted():
    assert [level.shape[-1] for level in SimpleFPN(8, 4, (1, 0.5))(torch.zeros(1, 8, 4, 4))] == [4, 2]
    with pytest.raises(ValueError, match="scale 3"):
        SimpleFPN(8, 4, (3,))


def test_a_plain_backbone_gets_the_simple_pyramid_of_its_last_map():
    dense = PlainDense(vit(), indices=(0, 2))
    neck = pyramid(dense, 8, scales=(2, 1))
    assert isinstance(neck, PlainFPN) and neck.strides == [4, 8]
    assert [tuple(level.shape[1:]) for level in neck(dense(torch.randn(1, 3, 32, 40)))] == [(8, 8, 10), (8, 4, 5)]


def test_stages_get_a_feature_pyramid_whose_coarse_levels_reach_the_fine_ones():
    neck = HierarchicalFPN([4, 8], [4, 8], 6)
    maps = [torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 4, 4, requires_grad=True)]
    fine, coarse = neck([maps[0], maps[1] + 0])
    assert fine.shape == (1, 6, 8, 8) and coarse.shape == (1, 6, 4, 4)
    fine.square().sum().backward()
    assert maps[1].grad is not None
