from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from finetune.dense.blocks import four_blocks
from finetune.dense.plain import PlainDense
from finetune.tasks.groups import task_groups
from pretrain.models.backbones.vit import ViT
from tests.finetune.dense.test_windows import POSITIONS, vit


@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: p.get("rel_pos_bias", p["pos_embed"]))
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 29), (9, 70)])
def test_maps_equal_pretrainings_tokens_for_padded_images(positions: dict[str, object], height: int, width: int):
    backbone, images = vit(num_registers=2, **positions), torch.randn(2, 3, height, width)
    padded = F.pad(images, (0, -width % 8, 0, -height % 8))
    expected = [backbone.norm(tokens) for tokens in backbone.layers(padded, (0, 2))]
    maps = PlainDense(backbone, indices=(0, 2))(images)
    for one, tokens in zip(maps, expected, strict=True):
        assert one.shape == (2, 32, -(-height // 8), -(-width // 8))
        torch.testing.assert_close(one.flatten(2).transpose(1, 2), tokens[:, 3:], atol=1e-5, rtol=1e-4)


def sam_and_dense(grid: int, *, window: int) -> tuple[VisionTransformerSAM, PlainDense]:
    """timm's ViTDet encoder (written for SAM) and ours, with the same weights."""
    torch.manual_seed(0)
    sam = VisionTransformerSAM(
        img_size=grid * 4,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="",
        neck_chans=0,
        use_abs_pos=True,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=(1,),
    ).eval()
    sam.neck = nn.Identity()
    backbone = ViT((grid * 4, grid * 4), 4, 3, 32, 3, 4, class_token=False, pos_embed="learned", norm_eps=1e-5)
    dense = PlainDense(backbone, window=window, global_blocks=(1,), rel_pos=True, norm=False).eval()
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        state = sam.state_dict()
        state["pos_embed"] = state["pos_embed"].flatten(1, 2)
        state |= {name: tensor for name, tensor in backbone.state_dict().items() if name.startswith("norm.")}
        backbone.load_state_dict(state)
    return sam.double(), dense.double()


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 72)])
def test_windows_and_relative_positions_are_those_of_timms_vitdet_encoder(height: int, width: int):
    sam, dense = sam_and_dense(12, window=6)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = sam.forward_features(images)
    (ours,) = dense(images)
    assert ours.std() > 0.3
    if (height, width) == (48, 48):
        torch.testing.assert_close(ours, expected)
        return
    # The position table is resampled without and with antialiasing: from the first block on they are the same.
    x = sam.patch_embed(images)
    tokens = x.flatten(1, 2)
    for index, block in enumerate(sam.blocks):
        x = block(x)
        tokens = dense.block(index, tokens, (6, 18))
    torch.testing.assert_close(tokens.unflatten(1, (6, 18)), x)


def test_relative_positions_change_nothing_at_first_and_keep_the_names_of_the_blocks():
    images = torch.randn(1, 3, 40, 24)
    before = vit()
    expected, names = PlainDense(before, window=3, global_blocks=(1,))(images)[0], set(before.state_dict())
    dense = PlainDense(before, window=3, global_blocks=(1,), rel_pos=True)
    torch.testing.assert_close(dense(images)[0], expected)
    tables = {f"blocks.{i}.attn.rel_pos_{axis}" for i in range(3) for axis in "hw"}
    assert set(before.state_dict()) == names | tables


def test_relative_positions_have_the_learning_rate_of_their_block():
    dense = PlainDense(vit(), window=3, global_blocks=(1,), rel_pos=True)
    groups = task_groups(dense, dense.backbone, prefix="backbone.", no_decay=set(), layer_decay=0.5, head_lr_scale=1.0)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    for block in range(3):
        same = {scales[f"backbone.blocks.{block}.attn.{name}"] for name in ("rel_pos_h", "rel_pos_w", "qkv.weight")}
        assert same == {0.5 ** (3 - block)}


def test_a_sample_dropped_by_drop_path_is_dropped_in_all_its_windows():
    backbone = vit(drop_path_rate=0.5)
    dense, images = PlainDense(backbone, window=3, global_blocks=(2,)), torch.randn(2, 3, 40, 40)
    drop = torch.ones(2, 3, 2)
    drop[1] = 0.0
    kept, x = dense.train()(images, drop)[0], dense.prepare(images)[0]
    # Block 0 has rate 0; the others are skipped by the second sample.
    first = dense.block(0, x, (5, 5), drop=drop[:, 0])
    torch.testing.assert_close(kept[1], dense.as_map(backbone.norm(first), (5, 5))[1], atol=1e-5, rtol=1e-4)
    drop[1] = 1.0
    torch.testing.assert_close(kept[0], dense(images, drop)[0][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: p.get("rel_pos_bias", p["pos_embed"]))
def test_a_map_of_windows_does_not_depend_on_other_images(positions: dict[str, object]):
    dense = PlainDense(vit(num_registers=1, **positions), window=2, global_blocks=(1,)).eval()
    images = torch.randn(3, 3, 40, 24)
    (together,) = dense(images)
    for image, expected in zip(images, together, strict=True):
        torch.testing.assert_close(dense(image[None])[0][0], expected, atol=1e-5, rtol=1e-4)


def test_training_with_drop_path_needs_its_random_numbers():
    dense = PlainDense(vit(drop_path_rate=0.1)).train()
    with pytest.raises(ValueError, match="random numbers: drop"):
        dense(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "options", [{"indices": (0, 1)}, {"norm": False}, {"window": 2, "global_blocks": (1,), "rel_pos": True}]
)
def test_every_parameter_that_requires_a_gradient_gets_one(options: dict[str, Any]):
    dense = PlainDense(vit(num_registers=1), **options).train()
    sum(level.square().sum() for level in dense(torch.randn(1, 3, 40, 32))).backward()  # type: ignore[union-attr]
    assert {name for name, p in dense.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert {name for name, p in dense.named_parameters() if not p.requires_grad and p.grad is not None} == set()


@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: p.get("rel_pos_bias", p["pos_embed"]))
def test_recomputed_activations_give_the_same_gradients(positions: dict[str, object]):
    gradients: list[dict[str, Tensor]] = []
    for enabled in (False, True):
        dense = PlainDense(vit(**positions), window=2, global_blocks=(1,), rel_pos=True).train()
        dense.backbone.set_checkpointing(enabled)
        torch.manual_seed(1)
        dense(torch.randn(2, 3, 24, 40))[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in dense.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: p.get("rel_pos_bias", p["pos_embed"]))
def test_masked_further_tokens_do_not_change_the_others(positions: dict[str, object]):
    dense = PlainDense(vit(**positions))
    x, grid = dense.prepare(torch.randn(2, 3, 24, 40))
    queries = torch.randn(2, 4, 32)
    mask = torch.ones(x.shape[1] + 4, x.shape[1] + 4, dtype=torch.bool)
    mask[4:, :4] = False
    out = dense.block(1, torch.cat([queries, x], dim=1), grid, extra=4, mask=mask[None, None])
    torch.testing.assert_close(out[:, 4:], dense.block(1, x, grid), atol=1e-5, rtol=1e-4)
    alone = dense.run(torch.cat([queries, x], dim=1), grid, 1, 2, extra=4)
    torch.testing.assert_close(out[:, :4], alone[:, :4], atol=1e-5, rtol=1e-4)


def test_an_attention_mask_needs_a_global_block():
    dense = PlainDense(vit(), window=2, global_blocks=(2,))
    x, grid = dense.prepare(torch.randn(1, 3, 32, 32))
    mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
    dense.block(2, x, grid, mask=mask)
    with pytest.raises(ValueError, match="block 1 attends within windows"):
        dense.block(1, x, grid, mask=mask)


def test_global_blocks_are_those_of_vitdet():
    assert four_blocks(12) == (2, 5, 8, 11)
    assert four_blocks(24) == (5, 11, 17, 23)
    assert four_blocks(32) == (7, 15, 23, 31)
    assert four_blocks(3)[-1] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": (2, 1)}, "indices must ascend within 0 to 2"),
        ({"indices": (3,)}, "indices must ascend within 0 to 2"),
        ({"window": 0}, "window 0"),
        ({"window": 2, "global_blocks": (5,)}, "global_blocks must ascend"),
        ({"global_blocks": (1,)}, "global_blocks without a window"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PlainDense(vit(), **options)
