from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.core.configlib import ConfigError
from pretrain.data.views.masks import BlockMask
from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.vit import ViT
from pretrain.models.tokenizers.tokenizer import Tokenizer
from pretrain.objectives.beit import BEiT
from pretrain.objectives.configs import BEiTConfig
from tests.objectives.released import NUM_TOKENS, dvae_release, reads, vit_release, vqkd_release
from tests.objectives.tiny import HORIZON, Shape, batch, objective

BASE = Shape(size=(224, 224), patch_size=16, num_blocks=12, drop_path_rate=0.1)


def test_the_loss_is_the_cross_entropy_of_the_tokens_of_hidden_patches():
    of = objective("beit", registers=1).eval()
    given = batch(of)
    mask, images = given["mask"], given["image"][:, 0]
    tokens = of.encoder(images, mask=mask, mask_token=of.mask_token)[:, 2:]
    logits = of.lm_head(tokens)  # of all patches
    targets = of.tokenizer.tokens(given["tokenizer_image"][:, 0])
    losses = of(given, 0)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits[mask], targets[mask]))
    assert losses["accuracy"] == (logits.argmax(-1) == targets)[mask].float().mean()


def test_hidden_pixels_never_reach_the_encoder_and_visible_tokens_never_reach_the_loss():
    of = objective("beit").eval()
    given = batch(of)
    hidden = given["mask"].unflatten(1, (3, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None, None]
    changed = given | {"image": torch.where(hidden, 7.0, given["image"])}
    assert torch.equal(of(changed, 0)["loss"], of(given, 0)["loss"])

    class Other(Tokenizer):
        def tokens(self, images: torch.Tensor) -> torch.Tensor:
            tokens = original.tokens(images)
            return torch.where(given["mask"], tokens, (tokens + 1) % NUM_TOKENS)

    original, expected = of.tokenizer, of(given, 0)["loss"]
    of.tokenizer = Other()
    assert torch.equal(of(given, 0)["loss"], expected)


def test_a_backbone_with_relative_positions_and_layer_scale_trains_every_part_of_it():
    torch.manual_seed(0)
    options: dict[str, Any] = {"rel_pos_bias": "shared", "qkv_bias": "no_key", "layer_scale": 0.1, "pos_embed": "none"}
    vit = ViT((24, 32), 8, 3, 16, 2, 2, 2.0, **options)
    config = objective("beit").config
    of = BEiT(config, vit, HORIZON)
    of(batch(of), 0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in of.parameters())
    decays = {n for g in of.param_groups() for n in g["names"] if g["weight_decay_scale"]}
    assert {"mask_token", "encoder.rel_pos_bias.relative_position_bias_table", "lm_head.weight"} <= decays
    kept = {"encoder.cls_token", "encoder.blocks.0.ls1.gamma", "encoder.blocks.0.attn.q_bias", "lm_head.bias"}
    assert not decays & kept


def test_checkpoints_and_heads_carry_the_tokenizers_fingerprint_and_not_its_weights():
    of = objective("beit")
    assert not any(name.startswith("tokenizer") for name in of.state_dict())
    assert set(of.heads_state()) == {"mask_token", "lm_head.weight", "lm_head.bias", "fingerprint.sha256"}


def test_another_tokenizer_is_refused_when_training_goes_on():
    of = objective("beit")
    other = objective("beit", tokenizer=dvae_release((12, 16), 4, 3, seed=9))
    with pytest.raises(ConfigError, match=r"objective\.tokenizer.*\n.*is not what these weights were trained with"):
        other.load_state_dict(of.state_dict())


def test_the_picture_of_the_tokenizer_is_the_same_crop_at_its_own_size():
    config = BEiTConfig(tokenizer="encoder.pkl")
    image, picture, mask, drop_path = config.views(BASE)
    assert isinstance(image, ViewSpec) and isinstance(picture, ViewSpec)
    assert (image.size, image.scale, image.hflip) == ((224, 224), (0.08, 1.0), 0.5)
    assert image.jitter is not None and dataclasses.astuple(image.jitter) == (0.4, 0.4, 0.4, 0.0, 1.0)
    assert picture == ViewSpec("tokenizer_image", (112, 112), same_as="image", interpolation="lanczos", normalize=False)
    assert mask == BlockMask("mask", (14, 14), num_masked=75, min_per_block=16, max_per_block=None, exact=False)
    assert drop_path == Noise("drop_path", (12, 2)) and config.problems(BASE) == []


def test_the_size_of_the_picture_follows_from_the_release():
    path = dvae_release((12, 16), 4, 3)
    config = BEiTConfig(tokenizer=path, num_masking_patches=3, min_mask_patches_per_block=1)
    assert config.views(Shape())[1].size == (12, 16)  # type: ignore[union-attr]
    assert config.problems(Shape()) == []


@pytest.mark.parametrize(
    ("changes", "shape", "problem"),
    [
        ({"num_masking_patches": 12}, Shape(), "num_masking_patches: 12 of 12 patches leaves none visible"),
        ({"min_mask_patches_per_block": 4}, Shape(), "min_mask_patches_per_block: 4 is more than may be masked (2)"),
        ({"crop_scale": (1.0, 0.5)}, Shape(), "objective.crop_scale: 1.0 is larger than 0.5"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0)}, Shape(in_chans=1), "objective.color_jitter: needs RGB"),
        ({"tokenizer_size": 24}, Shape(), "objective.tokenizer_size: 24 x 24 px give 6 x 6 tokens of 4 px, but"),
        ({}, Shape(in_chans=1), "reads 3 channels, model.in_chans is 1"),
        ({"tokenizer": lambda: vit_release((24, 32), 8, 3)}, Shape(), "is a release of mae, which makes no tokens"),
        ({"tokenizer": lambda: vqkd_release((32, 32), 8, 3)}, Shape(), "trained on 4 x 4 tokens, but the model has 3"),
    ],
)
def test_impossible_settings_are_named_before_training(changes: dict, shape: Shape, problem: str):
    settings = {"num_masking_patches": 3, "min_mask_patches_per_block": 1, "max_mask_patches_per_block": 2}
    settings |= reads("beit", (24, 32), 3) | {key: v() if callable(v) else v for key, v in changes.items()}
    found = BEiTConfig(**settings).problems(shape)
    assert any(problem in line for line in found), found


def test_a_tokenizer_that_is_not_there_is_named_when_training_starts():
    with pytest.raises(ConfigError, match=r"objective\.tokenizer.*\n.*nowhere: no such file"):
        objective("beit", tokenizer="nowhere")


def test_the_picture_shows_what_was_hidden_and_what_was_predicted():
    of = objective("beit").eval()
    shown = of.pictures(batch(of), 0, mean=(0.5,) * 3, std=(0.5,) * 3)
    (title,) = shown
    assert title == "input | masked | predicted tokens"
    # A tokenizer without a way back has no such column.
    other = objective("beit", tokenizer=vqkd_release((24, 32), 8, 3)).eval()
    assert list(other.pictures(batch(other), 0, mean=(0.5,) * 3, std=(0.5,) * 3)) == ["input | masked"]
