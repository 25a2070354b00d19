from __future__ import annotations

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
        ({"decoder_embed_dim": 30}, Shape(), "30 is not a multiple of 4"),
        ({"crop_scale": (1.0, 0.2)}, Shape(), "objective.crop_scale: 1.0 is larger than 0.2"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in MAEConfig(**config).problems(shape))


def test_the_defaults_have_no_problem():
    assert MAEConfig().problems(Shape(size=(224, 224), patch_size=16)) == []
