"""Heads and eps of norms, which no shape shows, come from the file or from the table, never from a silent guess."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from finetune.config import ModelSource
from finetune.weights import open_source
from pretrain.core.configlib import ConfigError
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official, load_strict
from pretrain.models.importers.facts import PROJECTS

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# A MoCo v3 ViT-S: 12 blocks of width 384 with 12 heads; small patches of small images.
SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 12, "pos_embed": "sincos_rows_first"}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def mocov3() -> ViT:
    torch.manual_seed(0)
    vit = ViT((32, 32), 16, **SMALL).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return vit


def complete(vit: ViT) -> dict[str, Any]:
    """As main_moco.py saves it."""
    state = {f"module.base_encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    return {"epoch": 300, "arch": "vit_small", "state_dict": state}


def alone(vit: ViT) -> dict[str, Any]:
    """As its linear probe saves it, and as people cut it out: timm's names of ViT-S."""
    return {"model": vit.state_dict()}


@pytest.fixture(scope="module")
def vit() -> ViT:
    return mocov3()


@pytest.mark.parametrize("pack", [complete, alone])
def test_a_vit_small_of_mocov3_has_its_12_heads(vit: ViT, tmp_path: Path, pack: Any):
    path = saved(tmp_path / "vit-s-300ep.pth", pack(vit))
    opened = open_source(ModelSource(official=str(path)))
    assert opened.backbone.num_heads == 12
    assert torch.equal(opened.backbone.eval()(IMAGES), vit(IMAGES))
    assert "12 heads, eps of the norms 1e-06 (MoCo v3, vit_small)" in "\n".join(opened.report_lines)


@pytest.mark.parametrize("pack", [complete, alone])
def test_other_heads_than_the_files_are_refused_everywhere(vit: ViT, tmp_path: Path, pack: Any):
    path = saved(tmp_path / "vit-s-300ep.pth", pack(vit))
    wrong = "num_heads: 6 in the model, 12 in the file (MoCo v3, vit_small)"
    weights = load_official(path)
    with pytest.raises(ValueError) as raised:
        load_strict(ViT((32, 32), 16, **SMALL | {"num_heads": 6}), weights.backbone, facts=weights.facts)
    assert wrong in str(raised.value)
    with pytest.raises(ConfigError) as refused:
        open_source(ModelSource(official=str(path), args={"num_heads": 6}))
    assert wrong in str(refused.value)
    if pack is alone:
        with pytest.raises(ConfigError) as refused:
            open_source(ModelSource(timm="vit_small_patch16_224", weights=str(path), img_size=32))
        assert wrong in str(refused.value)


def plain(**options: Any) -> dict[str, Tensor]:
    return ViT((32, 32), 16, embed_dim=64, depth=2, num_heads=4, pos_embed="learned", **options).state_dict()


def test_heads_of_no_official_size_are_asked_for_or_read_in_the_settings(tmp_path: Path):
    path = saved(tmp_path / "a.pth", {"model": plain()})
    with pytest.raises(ConfigError, match=r"do not show how many heads.*model\.args\.num_heads"):
        open_source(ModelSource(official=str(path)))
    assert open_source(ModelSource(official=str(path), args={"num_heads": 4})).backbone.num_heads == 4
    settings = argparse.Namespace(num_heads=8, lr=0.1)
    path = saved(tmp_path / "b.pth", {"model": plain(), "args": settings})
    assert open_source(ModelSource(official=str(path))).backbone.num_heads == 8
    biased = plain(rel_pos_bias="per_block")
    assert open_source(ModelSource(official=str(saved(tmp_path / "c.pth", biased)))).backbone.num_heads == 4


def test_the_name_of_a_timm_model_in_a_file_gives_its_facts(tmp_path: Path):
    name = "test_vit3"  # 96 wide, 9 blocks, 3 heads: no official size
    model = timm.create_model(name, num_classes=0, class_token=True, global_pool="token", fc_norm=False)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("fc_norm")}
    args = argparse.Namespace(model=name)
    weights = load_official(saved(tmp_path / "a.pth", {"arch": name, "state_dict": state, "args": args}))
    assert weights.facts is not None and (weights.facts.num_heads, weights.facts.certain) == (3, True)


def test_periods_of_rotations_give_the_heads_and_other_rotations_are_asked_for(tmp_path: Path):
    rotated = ViT((32, 32), 16, embed_dim=64, depth=2, num_heads=2, pos_embed="rope", num_registers=4).state_dict()
    periods = 100.0 ** (torch.arange(8) / 8)
    found = load_official(saved(tmp_path / "a.pth", rotated | {"rope_embed.periods": periods})).facts
    assert found is not None and (found.num_heads, found.norm_eps, found.rotary) == (2, 1e-5, True)
    with pytest.raises(ConfigError, match=r"state model\.args\.pos_embed"):
        open_source(ModelSource(official=str(saved(tmp_path / "b.pth", rotated)), args={"num_heads": 2}))


def test_the_table_names_every_kind_of_checkpoint_once():
    kinds = [kind for project in PROJECTS for kind in project.kinds]
    assert len(kinds) == len(set(kinds))
    with torch.device("meta"):
        for name in ("vit_small_patch16_dinov3", "vit_huge_plus_patch16_dinov3", "vit_7b_patch16_dinov3"):
            model: Any = timm.create_model(name)
            heads = [m.num_heads for one in PROJECTS if one.title == "DINOv3" for m in one.models
                     if (m.embed_dim, m.depth) == (model.embed_dim, len(model.blocks))]  # fmt: skip
            assert heads == [model.blocks[0].attn.num_heads], name
