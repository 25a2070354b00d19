"""Heads that read maps: shapes, and the same numbers as plain formulas of the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.heads.pixels.dense_parts import drop_channels, resize
from finetune.heads.pixels.depth_bins import DepthBins, gradient_loss, silog
from finetune.heads.pixels.dpt import DPT
from finetune.heads.pixels.linear_seg import LinearHead
from finetune.heads.pixels.upernet import AuxiliaryFCN, UPerNet, cell_means


def maps(strides: tuple[int, ...], channels: int = 8, side: int = 64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, channels, side // stride, side // stride) for stride in strides]


@pytest.mark.parametrize(("height", "width"), [(7, 5), (6, 12), (1, 3)])
def test_means_of_cells_are_adaptive_average_pooling(height: int, width: int):
    x = torch.randn(2, 3, height, width)
    for cells in (1, 2, 3, 6):
        torch.testing.assert_close(cell_means(x, cells), F.adaptive_avg_pool2d(x, cells))


def test_upernet_on_a_pyramid_is_the_papers_formula():
    head = UPerNet([8] * 4, [4, 8, 16, 32], 5, width=6, dropout=0.0).eval()
    features = maps((4, 8, 16, 32))
    torch.testing.assert_close(head(features), plain_upernet(head, features), atol=1e-5, rtol=1e-5)


def plain_upernet(head: UPerNet, c: list[Tensor]) -> Tensor:
    """Xiao et al. 2018, figure 4, written out with torch's own pooling and interpolation."""

    def conv(block: nn.Sequential, x: Tensor) -> Tensor:
        weight, norm = block[0].weight, block[1]
        x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps))

    def up(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    pooled = [
        up(conv(r, F.adaptive_avg_pool2d(c[3], s)), c[3]) for s, r in zip((1, 2, 3, 6), head.pool.reduce, strict=True)
    ]
    p5 = conv(head.pool.join, torch.cat([c[3], *pooled], 1))
    p4 = conv(head.laterals[2], c[2]) + up(p5, c[2])
    p3 = conv(head.laterals[1], c[1]) + up(p4, c[1])
    p2 = conv(head.laterals[0], c[0]) + up(p3, c[0])
    levels = [conv(smooth, p) for smooth, p in zip(head.smooth, (p2, p3, p4), strict=True)] + [p5]
    fused = conv(head.fuse, torch.cat([up(level, c[0]) for level in levels], 1))
    return F.conv2d(fused, head.classify.weight, head.classify.bias)


def test_maps_of_one_stride_are_rescaled_to_a_pyramid_first():
    head = UPerNet([8] * 4, [16] * 4, 5, width=6)
    assert head(maps((16, 16, 16, 16))).shape == (2, 5, 16, 16)
    assert head(maps((16, 16, 16, 16), side=48)).shape == (2, 5, 12, 12)


def test_dpt_predicts_at_half_the_image_size():
    assert DPT([8] * 4, [16] * 4, 3, width=16, reassembled=(4, 8, 8, 8))(maps((16,) * 4)).shape == (2, 3, 32, 32)
    assert DPT([8] * 4, [4, 8, 16, 32], 3, width=16)(maps((4, 8, 16, 32))).shape == (2, 3, 32, 32)


def test_every_weight_of_every_head_gets_a_gradient():
    for head in (
        LinearHead([8], 3, dropout=0.1),
        LinearHead([8] * 4, 3),
        UPerNet([8] * 4, [16] * 4, 3, width=6),
        DPT([8] * 4, [16] * 4, 3, width=16, reassembled=(4, 8, 8, 8)),
    ):
        head(maps((16,) * 4)[: 1 if isinstance(head, LinearHead) and head.noise else 4]).square().mean().backward()
        assert all(p.grad is not None for p in head.parameters()), type(head).__name__
    auxiliary = AuxiliaryFCN(8, 3, width=6)
    auxiliary(maps((16,))[0]).sum().backward()
    assert all(p.grad is not None for p in auxiliary.parameters())


def test_heads_that_read_four_maps_refuse_others():
    for head in (UPerNet, DPT):
        with pytest.raises(ValueError, match="4 maps, got 3"):
            head([8] * 3, [16] * 3, 5)


def test_channel_dropout_keeps_the_mean_and_drops_whole_channels():
    x = torch.ones(400, 50, 2, 2)
    dropped = drop_channels(x, torch.rand(400, 50), 0.25)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped.flatten(2).std(2) == 0).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert drop_channels(x, None, 0.25) is x


def test_resizing_to_the_same_size_is_the_map_itself():
    x = torch.randn(1, 2, 3, 5)
    assert resize(x, (3, 5)) is x


def test_depth_stays_within_its_range_and_reaches_a_favoured_bin():
    bins = DepthBins(64, min_depth=0.5, max_depth=8.0, spacing="log")
    assert bins.centres[0].item() == pytest.approx(0.5) and bins.centres[-1].item() == pytest.approx(8.0)
    logits = torch.full((1, 64, 1, 1), -1.0)
    logits[:, 10] = 1e5
    torch.testing.assert_close(bins(logits).flatten(), bins.centres[10:11], rtol=1e-3, atol=1e-3)


def test_the_scale_invariant_loss_with_lambda_1_ignores_the_scale():
    truth = torch.rand(2, 8, 8) + 0.5
    known = torch.ones(2, 8, 8, dtype=torch.bool)
    assert silog(truth * 3, truth, known, variance_focus=1.0).item() == pytest.approx(0, abs=2e-3)
    assert silog(truth * 3, truth, known, variance_focus=0.85).item() > 0.1
    assert gradient_loss(truth * 3, truth, known).item() == pytest.approx(0, abs=1e-5)


def test_unknown_depth_changes_no_loss():
    truth, predicted = torch.rand(1, 8, 8) + 0.5, torch.rand(1, 8, 8) + 0.5
    known = torch.rand(1, 8, 8) < 0.6
    other = torch.where(known, predicted, torch.full_like(predicted, 7.0))
    for loss in (lambda p: silog(p, truth, known, variance_focus=0.85), lambda p: gradient_loss(p, truth, known)):
        assert loss(predicted).item() == loss(other).item()
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert silog(predicted, truth, nothing, variance_focus=0.85).item() == 0
