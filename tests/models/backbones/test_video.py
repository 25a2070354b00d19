"""The vision transformer of clips: its tubes, and what it shares with that of images."""

from typing import Any

import pytest
import torch

from pretrain.core.configlib import ConfigError, validate
from pretrain.models.backbones.video import VideoViT
from pretrain.models.backbones.vit import ViT
from pretrain.models.config import ModelConfig
from pretrain.models.importers import load_strict
from pretrain.models.release.folder import read_release, write_release

LKA = {"kind": "lka", "places": "blocks.*.attn"}
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}


def of_images(**changes: Any) -> ViT:
    torch.manual_seed(1)
    vit = ViT((16, 24), 8, **SMALL, **{"pos_embed": "learned", **changes}).eval()
    return vit.requires_grad_(False)


def of_clips(
    *, size: tuple[int, int] = (16, 24), num_frames: int = 4, tubelet_size: int = 2, **changes: Any
) -> VideoViT:
    torch.manual_seed(2)
    sizes = {"num_frames": num_frames, "tubelet_size": tubelet_size}
    return VideoViT(size, 8, **sizes, **SMALL, **changes).eval().requires_grad_(False)


@pytest.mark.parametrize("changes", [{}, {"class_token": False}, {"num_registers": 2, "layer_scale": 0.1}])
@pytest.mark.parametrize("pos_embed", ["learned", "sincos"])
def test_an_image_model_inflated_to_one_frame_equals_it_bitwise(changes: dict[str, Any], pos_embed: Any):
    image = of_images(**changes, pos_embed=pos_embed)
    clip = of_clips(num_frames=1, tubelet_size=1, pos_embed="learned", **changes)
    report = load_strict(clip, image.state_dict(), grid=image.grid_size)
    assert not report.missing
    x, keep = torch.randn(3, 3, 16, 24), torch.tensor([[4, 1]] * 3)
    for given in (x, x[:, None]):
        assert torch.equal(clip(given), image(x))
        assert torch.equal(clip(given, keep=keep), image(x, keep=keep))
        assert torch.equal(clip.forward_cls(given), image.forward_cls(x))
        assert all(torch.equal(*pair) for pair in zip(clip.layers(given, [0, 1]), image.layers(x, [0, 1]), strict=True))


def test_equal_frames_give_an_inflated_model_the_tokens_of_the_image():
    image, clip = of_images(), of_clips(pos_embed="learned")
    load_strict(clip, image.state_dict(), grid=image.grid_size)
    x = torch.randn(2, 3, 16, 24)
    tokens = clip.prepare_tokens(x[:, None].expand(-1, 4, -1, -1, -1))
    at_each_time = tokens[:, 1:].unflatten(1, (2, 6))
    expected = image.prepare_tokens(x)
    torch.testing.assert_close(tokens[:, :1], expected[:, :1])
    torch.testing.assert_close(at_each_time, expected[:, None, 1:].expand(-1, 2, -1, -1))
    assert torch.equal(clip(x), clip(x[:, None].expand(-1, 4, -1, -1, -1)))


def test_fixed_positions_of_an_image_are_not_repeated_in_time():
    image = of_images()
    with pytest.raises(ValueError, match=r"never tell the times apart; give model\.pos_embed=learned"):
        load_strict(of_clips(), image.state_dict(), grid=image.grid_size)


def test_a_token_is_a_tube_in_the_order_time_row_column():
    clip, x = of_clips(), torch.randn(1, 4, 3, 16, 24)
    before = clip.prepare_tokens(x)
    x[0, 3, :, 8:, 16:] += 1  # the last frame, second row, third column
    changed = (clip.prepare_tokens(x) != before).any(dim=2)[0, 1:].nonzero().flatten()
    assert changed.tolist() == [1 * 6 + 1 * 3 + 2]


def test_kept_tubes_are_encoded_alone_and_in_any_order():
    clip, x = of_clips(), torch.randn(2, 4, 3, 16, 24)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    shuffled = clip(x, keep=order)[:, 1:]
    torch.testing.assert_close(shuffled.gather(1, order.argsort(1)[..., None].expand(-1, -1, 16)), clip(x)[:, 1:])
    few = clip(x, keep=order[:, :3])
    x[:, :, :] = torch.where(hidden_pixels(order[:, 3:]), torch.randn_like(x), x)
    assert torch.equal(clip(x, keep=order[:, :3]), few)


def hidden_pixels(tubes: torch.Tensor) -> torch.Tensor:
    """bool [b, 4, 1, 16, 24]: pixels of these tubes."""
    marks = torch.zeros(len(tubes), 12, dtype=torch.bool).scatter(1, tubes, True).view(-1, 2, 1, 2, 3)
    return marks.repeat_interleave(2, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)


def test_other_sizes_are_resampled_at_every_time_and_other_lengths_refused():
    clip = of_clips(pos_embed="learned")
    table = clip.position_table((2 * 4, 6))
    assert table is not None and table.shape == (1, 1 + 2 * 24, 16)
    larger = of_clips(size=(32, 48), pos_embed="learned")
    report = load_strict(larger, clip.state_dict(), grid=clip.frame_grid)
    assert larger.pos_embed is not None and torch.equal(larger.pos_embed, table)
    assert any("pos_embed: 2 x 2x3 -> 4x6" in line for line in report.converted)
    with pytest.raises(ValueError, match="reads clips of 4 frames, got 8"):
        clip(torch.randn(1, 8, 3, 16, 24))
    with pytest.raises(ValueError, match=r"clips must be \[b, T, 3, H, W\]"):
        clip(torch.randn(1, 4, 2, 16, 24))


def test_a_release_opens_again_with_equal_features(tmp_path):
    clip, x = of_clips(num_registers=1, pos_embed="learned", qkv_bias="no_key"), torch.randn(2, 4, 3, 16, 24)
    write_release(tmp_path / "r", clip, objective="videomae", extra_state={}, record={})
    release = read_release(tmp_path / "r")
    assert torch.equal(release.build().eval()(x), clip(x))
    assert release.record["timm"] == "timm has no class like VideoViT"
    assert "clips of 4 frames, 2 to a token" in (tmp_path / "r" / "README.md").read_text()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_frames": 5}, "model.num_frames: 5 is not a multiple of tubelet_size 2; try 4"),
        ({"num_frames": 4, "pos_embed": "rope"}, "model.pos_embed: rope is of images"),
        ({"num_frames": 4, "rel_pos_bias": "shared"}, "model.rel_pos_bias: shared is of images"),
        ({"tubelet_size": 4}, "model.tubelet_size: is read with model.num_frames only"),
        ({"time_attention": "divided"}, "model.time_attention: is read with model.num_frames only"),
        (
            {"num_frames": 4, "time_attention": "divided", "attention": [{"kind": "xca", "places": "blocks.*.attn"}]},
            "model.time_attention: divided has attention of its own",
        ),
        ({"pos_embed": "sincos_flat"}, "model.pos_embed: sincos_flat is of models of clips"),
        (
            {"num_frames": 4, "attention": [{"kind": "lka", "places": "blocks.*.attn"}]},
            "model.attention: lka reads the grid of an image",
        ),
        ({"name": "conv_encoder", "num_frames": 4}, "model.num_frames: 4 is no setting of conv_encoder"),
    ],
)
def test_settings_that_do_not_fit_are_named(model: dict[str, Any], message: str):
    problems = validate(ModelConfig, {"name": "vit_tiny", **model}, source="x").problems()
    assert any(problem.startswith(message) for problem in problems), problems


def test_positions_of_clips_are_the_default_of_a_model_of_clips():
    built = validate(ModelConfig, {"name": "vit_tiny", "num_frames": 4}, source="x")
    assert built.pos_embed == "sincos_flat" and not built.problems()
    with pytest.raises(ConfigError):
        validate(ModelConfig, {"name": "vit_tiny", "num_frames": 0}, source="x")
    with pytest.raises(ValueError, match="num_frames 5 is not a multiple of tubelet_size 2"):
        of_clips(num_frames=5)
