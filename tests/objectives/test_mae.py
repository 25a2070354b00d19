from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models.layers.patches import normalize_patches, patchify
from pretrain.objectives.base import images_of
from pretrain.objectives.configs import MAEConfig
from tests.objectives.tiny import Shape, batch, objective


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.3, 0.75, 0.9])
def test_the_loss_is_that_of_the_full_picture_on_hidden_patches(norm_pix_loss: bool, mask_ratio: float):
    of = objective("mae", norm_pix_loss=norm_pix_loss, mask_ratio=mask_ratio, registers=2)
    given = batch(of)
    keep, masked = of.split(given["mask_noise"])
    _, pred = of.predict(given["image"][:, 0], keep, masked)
    target = patchify(given["image"][:, 0], 8)
    if norm_pix_loss:
        target, _, _ = normalize_patches(target)
    hidden = torch.zeros(4, 12).scatter(1, masked, 1.0)
    expected = ((pred - target).square().mean(-1) * hidden).sum() / hidden.sum()
    torch.testing.assert_close(of(given, 0)["loss"], expected, atol=1e-5, rtol=1e-5)
    assert keep.shape[1] == int(12 * (1 - mask_ratio))


PIXIO = {"mask_grid": 2, "positions": "learned", "registers_are_class_tokens": True, "mask_ratio": 0.5}
PIXIO_SHAPE = Shape(size=(32, 48))


def test_cells_are_masked_whole():
    of: Any = objective("mae", PIXIO_SHAPE, **PIXIO)
    keep, masked = of.split(batch(of, PIXIO_SHAPE)["mask_noise"])
    assert keep.shape == masked.shape == (4, 12)
    hidden = torch.zeros(4, 24).scatter(1, masked, 1.0).reshape(4, 2, 2, 3, 2).permute(0, 1, 3, 2, 4).flatten(3)
    assert (hidden == hidden[..., :1]).all() and hidden[..., 0].sum() == 4 * 3
    assert torch.equal(torch.cat([keep, masked], 1).sort(1).values, torch.arange(24).expand(4, -1))


def test_further_class_tokens_are_decoded_and_learned_positions_are_trained():
    of: Any = objective("mae", PIXIO_SHAPE, registers=3, **PIXIO)
    of(batch(of, PIXIO_SHAPE), 0)["loss"].backward()
    assert of.decoder.pos_embed.shape == (1, 4 + 24, 16)
    for trained in (of.encoder.pos_embed, of.decoder.pos_embed, of.encoder.reg_token):
        assert trained.grad is not None and (trained.grad.flatten(0, 1) != 0).any(1).all()
    assert 0.02 < of.encoder.reg_token.std() < 0.04, "a token and a position of 0.02 each"
    assert of.encoder.release_model()["pos_embed"] == "learned"


def test_adamw_moves_a_further_class_token_as_a_token_and_its_position():
    of: Any = objective("mae", PIXIO_SHAPE, registers=1, **PIXIO)
    (group,) = [group for group in of.param_groups() if group["names"] == ["encoder.reg_token"]]
    token, position, together = (torch.nn.Parameter(torch.randn(4)) for _ in range(3))
    together.data.copy_(token.data + position.data)
    lr, decay = 1e-2, 0.1
    two = torch.optim.AdamW([token, position], lr=lr, weight_decay=decay)
    one = torch.optim.AdamW([together], lr=lr * group["lr_scale"], weight_decay=decay * group["weight_decay_scale"])
    for _ in range(5):
        for optimizer, weight in ((two, token + position), (one, together)):
            optimizer.zero_grad()
            (weight - 3).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(together.data, token.data + position.data)


def test_hidden_pixels_never_reach_the_encoder():
    of = objective("mae")
    given = batch(of)
    keep, masked = of.split(given["mask_noise"])
    changed = given["image"][:, 0].clone()
    for image, patches in enumerate(masked.tolist()):
        for patch in patches:
            row, column = divmod(patch, 4)
            changed[image, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = 7.0
    latent, _ = of.predict(given["image"][:, 0], keep, masked)
    assert torch.equal(of.predict(changed, keep, masked)[0], latent)


def test_the_picture_keeps_what_was_visible_and_grays_what_was_not():
    of, shape = objective("mae", Shape(size=(16, 16))), Shape(size=(16, 16))
    given = batch(of, shape, images=1)
    given["image"] = given["image"] * 0.1
    stats = ((0.5,) * 3, (0.25,) * 3)
    (sheet,) = of.pictures(given, 0, mean=stats[0], std=stats[1]).values()
    panels = [sheet[:, 2:18, 2 + 20 * i : 18 + 20 * i] for i in range(3)]
    expected = ((given["image"][0, 0] * 0.25 + 0.5) * 255).round().to(torch.uint8)
    assert torch.equal(panels[0], expected)
    keep, _ = of.split(given["mask_noise"])
    for patch in range(4):
        row, column = divmod(patch, 2)
        where = (slice(None), slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8))
        if patch in keep[0]:
            assert torch.equal(panels[1][where], expected[where]) and torch.equal(panels[2][where], expected[where])
        else:
            assert (panels[1][where] == 128).all() and not torch.equal(panels[2][where], expected[where])


def test_a_perfect_reconstruction_looks_like_the_input(monkeypatch: pytest.MonkeyPatch):
    of = objective("mae")
    given = batch(of)
    given["image"] = given["image"] * 0.2
    target, _, _ = normalize_patches(patchify(given["image"][:, 0], 8))
    monkeypatch.setattr(of, "predict", lambda images, keep, masked: (None, target))
    (sheet,) = of.pictures(given, 0, mean=(0.5,) * 3, std=(0.25,) * 3).values()
    width = 32 + 4
    difference = sheet[:, :, :width].int() - sheet[:, :, 2 * width :].int()
    assert difference.abs().max() <= 1


def test_a_batch_of_another_layout_is_refused():
    with pytest.raises(ValueError, match=r"batch\['image'\] must be \[b, 1, C, H, W\], got \[2, 3, 8, 8\]"):
        images_of({"image": torch.zeros(2, 3, 8, 8)}, "image")


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({"mask_ratio": 0.99}, Shape(size=(16, 16)), "of 4 patches leaves 0 visible"),
        ({"mask_ratio": 0.001}, Shape(size=(8, 8)), "leaves 0 visible"),
        ({"mask_grid": 2}, Shape(size=(24, 32)), "objective.mask_grid: 2 does not divide the grid of 3 x 4 patches"),
        ({"registers_are_class_tokens": True}, Shape(provides=frozenset({"keep"})), "needs our vision transformer"),
        ({"decoder_embed_dim": 30}, Shape(), "30 is not a multiple of 4"),
        ({"crop_scale": (1.0, 0.2)}, Shape(), "objective.crop_scale: 1.0 is larger than 0.2"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in MAEConfig(**config).problems(shape))


def test_the_defaults_have_no_problem():
    assert MAEConfig().problems(Shape(size=(224, 224), patch_size=16)) == []
