from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.models.backbones.vit import ViT
from pretrain.models.layer_decay import layer_decay, layer_of
from pretrain.models.param_groups import clip_together, split, take


def vit(depth: int = 3) -> ViT:
    return ViT((16, 16), 8, embed_dim=8, depth=depth, num_heads=2, pos_embed="learned")


def scales(groups: list[dict]) -> dict[str, float]:
    return {name: group["lr_scale"] for group in groups for name in group["names"]}


def test_the_head_learns_fastest_and_the_first_layer_slowest():
    found = scales(layer_decay(split(vit()), decay=0.5, depth=3))
    assert found["norm.weight"] == 1.0
    assert [found[f"blocks.{i}.attn.qkv.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found["cls_token"] == found["pos_embed"] == found["patch_embed.proj.bias"] == 0.0625


def test_a_shared_position_table_belongs_to_the_last_layer_and_a_blocks_own_to_its_block():
    assert layer_of("rel_pos_bias.relative_position_bias_table", 12) == 13
    assert layer_of("blocks.10.attn.relative_position_bias_table", 12) == 11
    with pytest.raises(ValueError, match="block 12 of a model of 12 blocks"):
        layer_of("blocks.12.norm1.weight", 12)


def test_the_patch_embedding_can_be_slower_still():
    found = scales(layer_decay(split(vit()), decay=0.9, depth=3, patch_embed_lr_scale=0.2))
    assert found["patch_embed.proj.weight"] == pytest.approx(0.9**4 * 0.2)
    assert found["cls_token"] == pytest.approx(0.9**4)


@given(st.integers(1, 4), st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_cutting_by_layer_loses_no_parameter_and_keeps_what_the_groups_say(depth, decay, patch):
    model = vit(depth)
    before = clip_together(take(split(model), "norm.", into="frozen", frozen_steps=5), "norm", "")
    after = layer_decay(before, decay=decay, depth=depth, patch_embed_lr_scale=patch)

    def facts(groups: list[dict]) -> dict:
        keys = ("weight_decay_scale", "frozen_steps", "clip_group")
        return {
            name: (id(param), *(group[key] for key in keys))
            for group in groups
            for name, param in zip(group["names"], group["params"], strict=True)
        }

    assert facts(before) == facts(after)
    assert sum(len(group["names"]) for group in after) == len(list(model.parameters()))
    assert len({group["name"] for group in after}) == len(after)


def test_the_order_of_freezing_and_layer_decay_does_not_matter():
    one = take(layer_decay(split(vit()), decay=0.5, depth=3), "blocks.1.", into="last", frozen_steps=2)
    other = layer_decay(take(split(vit()), "blocks.1.", into="last", frozen_steps=2), decay=0.5, depth=3)
    assert scales(one) == scales(other)
    frozen = [{n: g["frozen_steps"] for g in groups for n in g["names"]} for groups in (one, other)]
    assert frozen[0] == frozen[1] and set(frozen[0].values()) == {0, 2}


def test_wrong_uses_are_refused_by_name():
    groups = split(vit())
    with pytest.raises(ValueError, match=r"layer decay 1\.5: expected a number above 0, at most 1"):
        layer_decay(groups, decay=1.5, depth=3)
    with pytest.raises(ValueError, match=r"below student\.blocks\."):
        layer_decay(groups, decay=0.5, depth=3, prefix="student.")
    with pytest.raises(ValueError, match="no trained parameter named mask_token"):
        layer_decay(groups, decay=0.5, depth=3, first=("mask_token",))
