from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.views.masks import BlockMask
from pretrain.data.views.specs import Noise, ViewSpec
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.beit2 import BEiT2
from pretrain.objectives.configs import BEiT2Config
from tests.objectives.tiny import HORIZON, Shape, batch, objective

BASE = Shape(size=(224, 224), patch_size=16, num_blocks=12, drop_path_rate=0.1)
OFFICIAL: dict[str, Any] = {"rel_pos_bias": "shared", "qkv_bias": "no_key", "layer_scale": 0.1, "pos_embed": "none"}


def test_the_loss_is_of_last_patches_and_of_early_ones_that_the_last_class_token_completes():
    of = objective("beit2").eval()
    given = batch(of)
    mask, images = given["mask"], given["image"][:, 0]
    first, last = of.encoder.layers(images, [0, 1], mask=mask, mask_token=of.mask_token)
    completed = torch.cat([last[:, :1], first[:, 1:]], dim=1)
    for block in of.cls_pt_layers:
        completed = block(completed)
    targets = of.tokenizer.tokens(given["tokenizer_image"][:, 0])[mask]
    heads = [of.lm_head(of.encoder.norm(x))[:, 1:][mask] for x in (last, completed)]
    losses = of(given, 0)
    torch.testing.assert_close(losses["loss"], sum(F.cross_entropy(logits, targets) for logits in heads))
    torch.testing.assert_close(losses["loss_patch"] + losses["loss_cls"], losses["loss"].detach())


def test_what_the_class_token_learns_comes_through_it_alone():
    of = objective("beit2").eval()
    given = batch(of)
    images = given["image"][:, 0].clone().requires_grad_()
    last, completed = of.encode(images, given["mask"])
    early = of.encoder.layers(images, [0], mask=given["mask"], mask_token=of.mask_token)[0]
    reads = torch.cat([last[:, :1], early[:, 1:]], dim=1).detach()
    for block in of.cls_pt_layers:
        reads = block(reads)
    torch.testing.assert_close(reads, completed)


def test_all_blocks_share_the_relative_positions_those_of_the_head_too():
    torch.manual_seed(0)
    of = BEiT2(objective("beit2").config, ViT((24, 32), 8, 3, 16, 2, 2, 2.0, **OFFICIAL), HORIZON)
    given = batch(of)
    of(given, 0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in of.parameters())
    before = of.encode(given["image"][:, 0], given["mask"])[1]
    with torch.no_grad():
        for block in of.encoder.blocks:
            block.attn.proj.weight.zero_(), block.attn.proj.bias.zero_()  # the bias acts in attention only
        alone = of.encode(given["image"][:, 0], given["mask"])[1]
        of.encoder.rel_pos_bias.relative_position_bias_table.normal_()
        assert not torch.equal(of.encode(given["image"][:, 0], given["mask"])[1], alone)
    assert not torch.equal(alone, before)


@pytest.mark.parametrize("shared", [True, False])
def test_a_head_of_its_own_is_possible(shared: bool):
    of = objective("beit2", shared_lm_head=shared)
    assert any(name.startswith("cls_pt_lm_head") for name in of.state_dict()) is not shared
    of(batch(of), 0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in of.parameters() if parameter.requires_grad)


def test_the_blocks_of_the_head_start_as_officially_as_torchs_own_and_the_encoders_narrower():
    torch.manual_seed(0)
    of = BEiT2(objective("beit2").config, ViT((24, 32), 8, 3, 64, 4, 2, **OFFICIAL), HORIZON)
    (head, _), encoder = of.cls_pt_layers, of.encoder.blocks[1]
    widths = {name: getattr(block.attn, name).weight.std().item() for block in (head,) for name in ("qkv", "proj")}
    assert widths["qkv"] == pytest.approx(1 / (3 * 64) ** 0.5, rel=0.05)  # uniform up to 1 / sqrt(64)
    assert widths["proj"] == pytest.approx(widths["qkv"] / (2 * 2) ** 0.5, rel=0.05)  # the second block of its way
    assert encoder.attn.qkv.weight.abs().max() <= 0.02


def test_the_early_patches_can_be_the_last_ones():
    of = objective("beit2", early_layers=2)
    assert of(batch(of), 0)["loss"].isfinite()


def test_drop_path_goes_on_in_the_blocks_of_the_head():
    torch.manual_seed(0)
    vit = ViT((24, 32), 8, 3, 16, 2, 2, 2.0, drop_path_rate=0.4)
    of = BEiT2(objective("beit2").config, vit, HORIZON).train()
    # 1 early block and 2 of the head: rates 0, 0.2, 0.4 along this way, of which the head has the last two.
    assert [block.drop_rate for block in of.cls_pt_layers] == pytest.approx([0.2, 0.4])
    given = batch(of, Shape(drop_path_rate=0.4))
    assert given["drop_path"].shape == (4, 4, 2) and of(given, 0)["loss"].isfinite()
    dropped, kept = torch.zeros(4, 4, 2), torch.ones(4, 4, 2)
    images, mask = given["image"][:, 0], given["mask"]
    only_head = torch.cat([kept[:, :2], dropped[:, 2:]], dim=1)
    last, completed = of.encode(images, mask, drop=only_head)
    assert torch.equal(completed[:, 0], last[:, 0])


def test_masks_have_the_exact_count_and_the_tokenizer_sees_the_models_size():
    config = BEiT2Config(tokenizer="vqkd.pth")
    _, picture, mask, drop_path = config.views(BASE)
    assert picture == ViewSpec("tokenizer_image", (224, 224), same_as="image", interpolation="bicubic", normalize=False)
    assert mask == BlockMask("mask", (14, 14), num_masked=75, min_per_block=16, max_per_block=None, exact=True)
    assert drop_path == Noise("drop_path", (14, 2)) and config.problems(BASE) == []


def test_early_layers_beyond_the_depth_are_named():
    found = BEiT2Config(tokenizer="vqkd.pth", early_layers=13).problems(BASE)
    assert found == ["objective.early_layers: 13, but the model has 12 blocks; the paper uses three quarters of them"]
