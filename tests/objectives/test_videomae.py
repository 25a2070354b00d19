"""VideoMAE by its definition."""

import pytest
import torch

from pretrain.__main__ import check
from pretrain.core.configlib import ConfigError
from pretrain.data.views.specs import stacks
from pretrain.objectives.videomae import VideoMAE
from tests.objectives.tiny import Shape, batch, objective
from tests.runs import ROOT

DEBUG, CLIPS = ROOT / "configs" / "debug", f"data.shards={ROOT / 'samples' / 'bunny' / 'train'}"


def made(**changes) -> VideoMAE:
    of = objective("videomae", **changes)
    assert isinstance(of, VideoMAE)
    return of


def test_the_same_patches_are_masked_in_all_frames():
    of = made(mask_ratio=0.9)
    keep, masked = of.split(torch.rand(5, 12))
    assert keep.shape == (5, 2 * 2) and masked.shape == (5, 2 * 10)  # int(0.9 * 12) = 10 of 12 hidden, at 2 times
    assert torch.equal(torch.cat([keep, masked], dim=1).sort().values, torch.arange(24).expand(5, -1))
    assert torch.equal(keep[:, 2:], keep[:, :2] + 12)


def test_the_target_is_normalized_by_tube_and_colour_with_the_constant_on_the_deviation():
    of, pixels = made(), torch.rand(2, 4, 3, 24, 32)
    pixels[0, :2, :, :8, :8] = 0.5  # a tube of one colour stays finite
    target = of.target(pixels).view(2, 24, 2 * 8 * 8, 3)
    tube = pixels[1, 2:4, 1, 8:16, 16:24]  # second time, second row, third column, green
    torch.testing.assert_close(target[1, 12 + 4 + 2, :, 1], ((tube - tube.mean()) / (tube.std() + 1e-6)).flatten())
    assert (target[0, 0] == 0).all()
    raw = made(norm_pix_loss=False).target(pixels).view(2, 24, 2, 8, 8, 3)
    assert torch.equal(raw[1, 12 + 4 + 2, 1], pixels[1, 3, :, 8:16, 16:24].permute(1, 2, 0))


def test_masked_pixels_reach_the_loss_through_the_target_alone():
    of = made()
    given = batch(of)
    losses = of(given, 0)
    _, masked = of.split(given["mask_noise"])
    hidden = torch.zeros(4, 24, dtype=torch.bool).scatter(1, masked, True).view(4, 2, 1, 3, 4)
    pixels = hidden.repeat_interleave(2, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = given | {"clip": torch.where(pixels, torch.randn(4, 4, 3, 24, 32), given["clip"])}
    assert torch.equal(of(other, 0)["loss"], losses["loss"])
    seen = given | {"pixels": torch.where(pixels, given["pixels"], torch.rand(4, 4, 3, 24, 32))}
    assert torch.equal(of(seen, 0)["loss"], losses["loss"])


def test_views_are_a_clip_and_its_pixels_and_the_drop_path_where_there_is_one():
    of, shape = made(), Shape(drop_path_rate=0.1)
    entries = stacks(of.config.views(shape))
    assert {name: sum(view.num_images for _, view in found) for name, found in entries.items()} == {
        "clip": 4,
        "pixels": 4,
    }
    assert [view.name for view in of.config.views(shape)] == ["clip", "pixels", "mask_noise", "drop_path"]
    assert made(mask_ratio=0.5).config.problems(shape) == []
    wrong = made(mask_ratio=0.05).config.problems(shape)
    assert wrong and wrong[0].startswith("objective.mask_ratio: 0.05 of 12 patches of a frame leaves 12 visible")


def test_clips_are_accepted_before_a_run_by_models_of_clips_alone():
    _, dataset, _ = check(DEBUG / "videomae.yaml", [CLIPS], world_size=1)
    assert dataset.num_samples == 11
    with pytest.raises(ConfigError, match=r"clips are read by a model of clips \(model\.num_frames\)"):
        check(DEBUG / "mae.yaml", [CLIPS], world_size=1)
    images = f"data.shards={ROOT / 'samples' / 'grocery' / 'train'}"
    assert check(DEBUG / "videomae.yaml", [images], world_size=1)[1].num_samples == 960
