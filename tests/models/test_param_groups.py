from __future__ import annotations

import pytest
import torch
from torch import nn

from pretrain.models.backbones.vit import ViT
from pretrain.models.mechanisms.channel.xca import XCA
from pretrain.models.param_groups import clip_together, split, take


def test_biases_and_vectors_do_not_decay_and_tokens_do():
    groups = {
        group["name"]: set(group["names"]) for group in split(ViT((16, 16), 8, embed_dim=8, depth=1, num_heads=2))
    }
    assert {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= groups["decay"]
    assert {"patch_embed.proj.bias", "blocks.0.norm1.weight", "norm.bias"} <= groups["no_decay"]
    assert "pos_embed" not in groups["decay"] | groups["no_decay"]  # fixed: not trained


def test_every_trainable_parameter_is_in_one_group():
    vit = ViT((16, 16), 8, embed_dim=8, depth=2, num_heads=2, pos_embed="learned", num_registers=2)
    groups = take(split(vit), "blocks.1.", into="last", frozen_steps=3)
    params = [parameter for group in groups for parameter in group["params"]]
    assert len(params) == len({id(p) for p in params}) == len([p for p in vit.parameters() if p.requires_grad])
    assert [(g["name"], g["weight_decay_scale"], g["frozen_steps"]) for g in groups] == [
        ("decay", 1.0, 0),
        ("last_decay", 1.0, 3),
        ("no_decay", 0.0, 0),
        ("last_no_decay", 0.0, 3),
    ]


def test_a_name_can_be_exempted_and_a_wrong_one_is_an_error():
    model = nn.Linear(2, 2)
    (group,) = split(model, no_decay_names=("weight",))
    assert group["weight_decay_scale"] == 0.0 and len(group["params"]) == 2
    with pytest.raises(ValueError, match="no parameter named wieght"):
        split(model, no_decay_names=("wieght",))


def test_an_empty_group_is_left_out():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(3))
    assert [group["name"] for group in split(model)] == ["no_decay"]


def test_everything_can_decay():
    model = nn.Linear(2, 2)
    (group,) = split(model, decay_all=True)
    assert group["weight_decay_scale"] == 1.0 and group["names"] == ["weight", "bias"]


def test_each_module_is_its_own_clip_group():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = clip_together(split(model), "body.", "head.")
    found = {name: group["clip_group"] for group in groups for name in group["names"]}
    assert found == {name: name.partition(".")[0] + "." for name in dict(model.named_parameters())}
    with pytest.raises(ValueError, match=r"head\.weight: below none of body\."):
        clip_together(split(model), "body.")


def test_moving_parameters_keeps_what_their_group_says():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = clip_together(split(model), "body.", "head.")
    for group in groups:
        group["lr_scale"] = 0.25
    moved = take(groups, "head.", into="last", frozen_steps=3)
    assert {g["lr_scale"] for g in moved} == {0.25}
    assert {(g["clip_group"], g["frozen_steps"]) for g in moved} == {("body.", 0), ("head.", 3)}


def test_a_layer_exempts_parameters_of_its_own():
    model = nn.ModuleDict({"attn": XCA(8, 2)})
    decayed, exempt = split(model)
    assert decayed["names"] == ["attn.qkv.weight", "attn.proj.weight"]
    assert exempt["names"] == ["attn.temperature", "attn.qkv.bias", "attn.proj.bias"]
    assert split(model, decay_all=True)[0]["names"][0] == "attn.temperature"
