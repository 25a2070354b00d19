from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.objectives import build
from pretrain.objectives.base import images_of
from pretrain.objectives.configs.simmim import SimMIMConfig
from tests.objectives.tiny import HORIZON, Shape, batch, objective

# Both have a stem of 4 px per place. The Swin of two stages has 8 px per output token, the ConvNeXt 32.
SWIN, CONVNEXT = "swin_tiny_patch4_window7_224", "convnext_atto"
SMALL: dict[str, dict[str, Any]] = {
    SWIN: {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2},
    CONVNEXT: {"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1)},
}


def on_timm(name: str, cell: int, side: int = 64) -> Any:
    torch.manual_seed(0)
    config, backbone = SimMIMConfig(mask_cell=cell, mask_ratio=0.5), TimmBackbone(name, (side, side), 3, **SMALL[name])
    return build("simmim")(config, backbone, HORIZON)  # pyright: ignore[reportArgumentType]


def by_definition(of: Any, given: dict[str, Tensor]) -> Tensor:
    """The loss of the paper: every pixel predicted, the error of the masked ones averaged."""
    images = images_of(given, "image")
    cells, patch = of.cells(images, given["mask_noise"]), of.encoder.patch_size
    grid = (images.shape[2] // patch, images.shape[3] // patch)
    drawn = of.reconstruct(of.encode(images, cells), grid)
    mask = cells.pixels()[:, None].float()
    return ((images - drawn).abs() * mask).sum() / (mask.sum() + 1e-5) / images.shape[1]


@pytest.mark.parametrize("shape", [Shape(), Shape(size=(16, 32), in_chans=1)])
@pytest.mark.parametrize("mask_ratio", [0.3, 0.6, 0.85])
def test_decoding_masked_tokens_only_gives_the_loss_and_gradients_of_the_whole_picture(shape: Shape, mask_ratio: float):
    of = objective("simmim", shape, mask_ratio=mask_ratio, registers=1)
    given, gradients = batch(of, shape), []
    for loss in (of(given, 0)["loss"], by_definition(of, given)):
        of.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None})
    torch.testing.assert_close(of(given, 0)["loss"], by_definition(of, given), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "cell"), [(SWIN, 4), (SWIN, 8), (SWIN, 16), (CONVNEXT, 8), (CONVNEXT, 32)])
def test_hierarchical_backbones_take_cells_below_at_and_above_their_stride(name: str, cell: int):
    of = on_timm(name, cell)
    given = batch(of, Shape(size=(64, 64)))
    loss = of(given, 0)["loss"]
    torch.testing.assert_close(loss, by_definition(of, given), atol=1e-6, rtol=1e-5)
    loss.backward()
    assert not [n for n, p in of.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", ["vit", SWIN, CONVNEXT])
def test_masked_pixels_never_reach_the_encoder(name: str):
    shape = Shape(size=(64, 64))
    of: Any = objective("simmim", shape) if name == "vit" else on_timm(name, 8)
    given = batch(of, shape)
    images = images_of(given, "image")
    cells = of.cells(images, given["mask_noise"])
    changed = torch.where(cells.pixels()[:, None], 7.0, images)
    assert torch.equal(of.encode(changed, cells), of.encode(images, cells))
    assert not torch.equal(of.encode(images + 1, cells), of.encode(images, cells))


def test_the_number_of_masked_cells_is_rounded_up():
    assert SimMIMConfig(mask_ratio=0.6).num_masked(49) == 30
    of = objective("simmim", mask_ratio=0.6)  # of 12 cells
    given = batch(of)
    cells = of.cells(images_of(given, "image"), given["mask_noise"])
    assert cells.masked.shape == (4, 8) and cells.num_masked_pixels == 4 * 8 * 64


def test_the_largest_noise_marks_what_is_masked():
    of = objective("simmim", mask_ratio=0.5)
    noise = torch.arange(12.0).expand(2, 12)
    assert of.cells(torch.zeros(2, 3, 24, 32), noise).masked.sort().values.tolist() == [list(range(6, 12))] * 2


def test_a_perfect_picture_costs_nothing():
    of = objective("simmim")
    given = batch(of)
    images = given["image"] * 0 + 0.25
    with torch.no_grad():
        of.decoder.weight.zero_()
        of.decoder.bias.fill_(0.25)
    assert of(given | {"image": images}, 0)["loss"] == 0


def test_what_does_not_decay_depends_on_the_backbone_as_in_the_official_code():
    def exempt(of: Any) -> set[str]:
        return {name for group in of.param_groups() if not group["weight_decay_scale"] for name in group["names"]}

    vit = exempt(objective("simmim"))
    assert "encoder.cls_token" in vit and "mask_token" not in vit
    assert "mask_token" in exempt(on_timm(SWIN, 8))


def test_the_mask_token_starts_wider_before_a_swin_as_in_the_official_code():
    assert objective("simmim").mask_token.abs().max() <= 0.02
    torch.manual_seed(0)
    swin = TimmBackbone(SWIN, (64, 64), 3, **SMALL[SWIN] | {"embed_dim": 96})
    token = build("simmim")(SimMIMConfig(mask_cell=8), swin, HORIZON).mask_token  # pyright: ignore[reportArgumentType]
    assert 0.015 < token.std() < 0.025 and token.abs().max() > 0.03


def test_the_picture_keeps_what_was_visible_and_grays_what_was_not():
    of, shape = objective("simmim", Shape(size=(16, 16)), mask_ratio=0.5), Shape(size=(16, 16))
    given = batch(of, shape, images=1) | {"mask_noise": torch.tensor([[0.1, 0.9, 0.2, 0.8]])}
    (sheet,) = of.pictures(given, 0, mean=(0.5,) * 3, std=(0.2,) * 3).values()
    assert sheet.shape == (3, 20, 60)
    seen, masked, drawn = (sheet[:, 2:18, 2 + 20 * i : 18 + 20 * i] for i in range(3))
    assert torch.equal(seen[:, :, :8], masked[:, :, :8]) and torch.equal(seen[:, :, :8], drawn[:, :, :8])
    assert (masked[:, :, 8:] == 128).all() and not torch.equal(seen[:, :, 8:], drawn[:, :, 8:])


def test_collapsed_features_show_in_what_is_logged():
    of = objective("simmim")
    given = batch(of)
    same = {name: value[:1].expand_as(value) for name, value in given.items()}
    assert of(same, 0)["feature_std"] < 1e-6 < of(given, 0)["feature_std"]


def test_noise_of_another_grid_is_named():
    of = objective("simmim")
    with pytest.raises(ValueError, match="has 9 numbers per image, there are 12 cells"):
        of(batch(of) | {"mask_noise": torch.rand(4, 9)}, 0)


def test_views_are_those_of_the_paper():
    image, noise, drop_path = SimMIMConfig().views(Shape(size=(224, 224), num_blocks=12, drop_path_rate=0.1))
    assert isinstance(image, ViewSpec) and (image.scale, image.hflip, image.size) == ((0.67, 1.0), 0.5, (224, 224))
    assert image.interpolation == "bilinear"  # torchvision's default
    assert noise == Noise("mask_noise", (49,)) and drop_path == Noise("drop_path", (12, 2))


@pytest.mark.parametrize(
    ("config", "shape", "problem"),
    [
        ({"mask_cell": 32}, Shape(size=(48, 48)), "objective.mask_cell: 32 px do not tile an image of 48 x 48 px"),
        ({"mask_cell": 12}, Shape(size=(24, 24)), "objective.mask_cell: 12 px is neither a multiple"),
        ({"mask_cell": 16, "mask_ratio": 0.9}, Shape(size=(32, 32)), "leaves 0 visible"),
        ({"crop_scale": (0.9, 0.5), "mask_cell": 8}, Shape(), "objective.crop_scale: 0.9 is larger than 0.5"),
    ],
)
def test_impossible_settings_are_named_before_training(config: dict, shape: Shape, problem: str):
    assert any(problem in found for found in SimMIMConfig(**config).problems(shape))


def test_cells_that_fit_are_no_problem():
    assert SimMIMConfig().problems(Shape(size=(224, 192), patch_size=16)) == []
    assert SimMIMConfig(mask_cell=4).problems(Shape(patch_size=8)) == []
