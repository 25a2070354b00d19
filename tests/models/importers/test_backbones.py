"""Backbones of timm, DINOv3 and Hugging Face give equal features in our ViT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official, load_strict
from pretrain.models.importers.huggingface.names import huggingface
from pretrain.models.importers.weights import Source
from pretrain.models.layers import rope

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LEARNED = {"pos_embed": "learned"}
BEIT = {"pos_embed": "none", "rel_pos_bias": "per_block", "qkv_bias": "no_key", "layer_scale": 0.1}
DINOV3 = {"pos_embed": "rope", "num_registers": 4, "layer_scale": 0.1, "norm_eps": 1e-5}
TIMM = {
    "plain": ("vit_base_patch16_224", {}, LEARNED),
    "without class token": (
        "vit_base_patch16_224",
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        LEARNED | {"class_token": False},
    ),
    "dinov2 with registers": (
        "vit_base_patch14_reg4_dinov2",
        {},
        LEARNED | {"num_registers": 4, "layer_scale": 1e-5},
    ),
    "dinov2 with swiglu": (
        "vit_giant_patch14_dinov2",
        {"mlp_ratio": 4 * 4 / 3},
        LEARNED | {"ffn": "swiglu", "layer_scale": 1e-5, "mlp_ratio": 4.0},
    ),
    "beit": ("beit_base_patch16_224", {"global_pool": "token"}, BEIT),
    "beit with one table": (
        "beit_base_patch16_224",
        {"global_pool": "token", "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        BEIT | {"rel_pos_bias": "shared"},
    ),
    "eva": ("eva_giant_patch14_224", {"global_pool": "token", "mlp_ratio": 4.0}, LEARNED | {"qkv_bias": "no_key"}),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 48}, DINOV3 | {"qkv_bias": False}),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", {"embed_dim": 48}, DINOV3 | {"qkv_bias": "no_key"}),
    "dinov3 with swiglu": (
        "vit_small_plus_patch16_dinov3",
        {"embed_dim": 48},
        DINOV3 | {"qkv_bias": False, "ffn": "swiglu", "mlp_ratio": 6.0},
    ),
}


def disturbed(model: Any) -> Any:
    """Nothing stays 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def of_timm(kind: str) -> Any:
    name, arguments, _ = TIMM[kind]
    return disturbed(timm.create_model(name, **SMALL | arguments))


def our_vit(mlp_ratio: float = 4.0, embed_dim: int = 24, num_heads: int = 3, **options: Any) -> ViT:
    return disturbed(ViT((32, 32), 8, 3, embed_dim, 2, num_heads, mlp_ratio, **options))


def written(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, path)
    return path


def ours_like(kind: str) -> ViT:
    _, arguments, options = TIMM[kind]
    dim = arguments.get("embed_dim", 24)
    return our_vit(**{"mlp_ratio": arguments.get("mlp_ratio", 4.0), "embed_dim": dim} | options)


@pytest.mark.parametrize("kind", TIMM)
def test_a_timm_state_dict_has_equal_features(tmp_path: Path, kind: str):
    other, vit = of_timm(kind), ours_like(kind)
    weights = load_official(written(tmp_path / "w.safetensors", other.state_dict()))
    load_strict(vit, weights.backbone)
    torch.testing.assert_close(vit(IMAGES), other.forward_features(IMAGES), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["beit", "dinov2 with registers", "dinov3 with swiglu", "plain"])
def test_the_same_file_goes_into_the_timm_model_by_name(tmp_path: Path, kind: str):
    name, arguments, _ = TIMM[kind]
    other = of_timm(kind)
    weights = load_official(written(tmp_path / "w.safetensors", other.state_dict()))
    given = {key: value for key, value in (SMALL | arguments).items() if key not in ("img_size", "num_classes")}
    backbone = TimmBackbone(name, (32, 32), 3, **given).eval()
    report = load_strict(backbone, weights.backbone)
    assert not report.missing
    torch.testing.assert_close(backbone(IMAGES), other.forward_features(IMAGES), atol=2e-5, rtol=1e-5)


def test_eva02_is_refused_for_its_rotations(tmp_path: Path):
    other = timm.create_model("eva02_tiny_patch14_224", **SMALL, global_pool="token")
    with pytest.raises(ValueError, match="EVA-02, which rotates positions in another way"):
        load_official(written(tmp_path / "w.safetensors", other.state_dict()))


def official_dinov3(state: dict[str, Tensor], *, head_dim: int) -> dict[str, Tensor]:
    """As Meta's file has it: one bias with a mask of its keys, and the periods of the rotations."""
    result = {"mask_token": torch.ones(1, 48)}
    for name, tensor in state.items():
        name = (
            name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma").replace("reg_token", "storage_tokens")
        )
        result[name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2")] = tensor
    for name in [name for name in result if name.endswith("q_bias")]:
        stem, q, v = name.removesuffix("q_bias"), result.pop(name), result.pop(name.replace("q_bias", "v_bias"))
        result[f"{stem}qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
        result[f"{stem}qkv.bias_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(q), torch.ones_like(q)])
    if any("mlp.w1" in name for name in result):
        result = {name.replace("mlp.fc2", "mlp.w3"): tensor for name, tensor in result.items()}
    periods = rope.BASE ** (torch.arange(head_dim // 4) / (head_dim // 4))
    return result | {"rope_embed.periods": periods.bfloat16()}


@pytest.mark.parametrize("kind", ["dinov3 with biases", "dinov3 with swiglu"])
def test_an_official_dinov3_file_has_equal_features(tmp_path: Path, kind: str):
    other, vit = of_timm(kind), ours_like(kind)
    state = official_dinov3(other.state_dict(), head_dim=16)
    weights = load_official(written(tmp_path / "w.safetensors", state))
    load_strict(vit, weights.backbone)
    torch.testing.assert_close(vit(IMAGES), other.forward_features(IMAGES), atol=2e-5, rtol=1e-5)
    assert weights.left_out == ("mask_token",)
    state["rope_embed.periods"] = state["rope_embed.periods"] * 2
    with pytest.raises(ValueError, match="periods of rotary positions are not those of base 100"):
        load_official(written(tmp_path / "w.safetensors", state))


OUTER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.attention.{}",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BEIT_BLOCK = VIT_BLOCK | {
    "ls1.gamma": "lambda_1",
    "ls2.gamma": "lambda_2",
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.relative_position_bias_table": "attention.attention.relative_position_bias.relative_position_bias_table",
}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "attention.attention.{}",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
DINOV3_BLOCK = DINOV2_BLOCK | {
    "attn.qkv": "attention.{}_proj",
    "attn.q_bias": "attention.q_proj.bias",
    "attn.v_bias": "attention.v_proj.bias",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
SHARED = {"rel_pos_bias.relative_position_bias_table": "encoder.relative_position_bias.relative_position_bias_table"}
V3_OUTER = OUTER | {"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"}
GATED_V2 = DINOV2_BLOCK | {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
GATED_V3 = DINOV3_BLOCK | {"mlp.fc1": "mlp.gate_proj+mlp.up_proj"}
# prefix, where blocks are, names outside of blocks, names in a block, options of our ViT
HUGGING_FACE: dict[str, tuple[str, str, dict[str, str], dict[str, str], dict[str, Any]]] = {
    "vit": ("vit.", "encoder.layer", OUTER, VIT_BLOCK, LEARNED),
    "vit without prefix": ("", "encoder.layer", OUTER, VIT_BLOCK, LEARNED),
    "beit": ("beit.", "encoder.layer", OUTER, BEIT_BLOCK, BEIT),
    "beit with one table": (
        "beit.",
        "encoder.layer",
        OUTER | SHARED | {"norm": "/layernorm"},
        BEIT_BLOCK,
        BEIT | {"rel_pos_bias": "shared"},
    ),
    "data2vec": ("data2vec_vision.", "encoder.layer", OUTER, BEIT_BLOCK, BEIT),
    "dinov2": ("dinov2.", "encoder.layer", OUTER, DINOV2_BLOCK, LEARNED | {"layer_scale": 0.1}),
    "dinov2 with registers": (
        "dinov2_with_registers.",
        "encoder.layer",
        OUTER,
        GATED_V2,
        LEARNED | {"layer_scale": 0.1, "num_registers": 2, "ffn": "swiglu"},
    ),
    "dinov3": ("", "layer", V3_OUTER, DINOV3_BLOCK, DINOV3 | {"qkv_bias": "no_key"}),
    "dinov3 gated": ("model.", "layer", V3_OUTER, GATED_V3, DINOV3 | {"qkv_bias": False, "ffn": "swiglu"}),
}


def to_hugging_face(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix, blocks, outer, block, _ = HUGGING_FACE[kind]
    parts = ("q", "k", "v") if "_proj" in block["attn.qkv"] else ("query", "key", "value")
    result = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        table = outer if found is None else block
        stem, leaf = (name, "") if found is None else (found[2], found[3] or "")
        if stem not in table:
            stem, _, leaf = stem.rpartition(".")
            leaf = f".{leaf}"
        new = table[stem]
        where = prefix if found is None else f"{prefix}{blocks}.{found[1]}."
        if stem == "attn.qkv":
            for part, third in zip(parts, tensor.chunk(3), strict=True):
                result[f"{where}{new.format(part)}{leaf}"] = third
        elif "+" in new:
            for half, value in zip(new.split("+"), tensor.chunk(2), strict=True):
                result[f"{where}{half}{leaf}"] = value
        else:
            result[f"{where}{new}{leaf}" if not new.startswith("/") else f"{new[1:]}{leaf}"] = tensor
    return result


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_hugging_face_file_gives_our_state(tmp_path: Path, kind: str):
    vit = our_vit(**{"embed_dim": 48} | HUGGING_FACE[kind][4])
    theirs = to_hugging_face(vit.state_dict(), kind)
    assert not theirs.keys() & vit.state_dict().keys() - {"norm.weight", "norm.bias"}
    extra = {"classifier.weight": torch.ones(3, 48), "embeddings.mask_token": torch.ones(1, 48)}
    weights = load_official(written(tmp_path / "model.safetensors", theirs | extra))
    assert weights.kind == "vit" and set(weights.left_out) == extra.keys()
    assert weights.backbone.keys() == vit.state_dict().keys()
    has_table = vit.pos_embed is not None or vit.rel_pos_kind != "none"
    alone = huggingface(theirs, Source("a folder"))
    assert alone is not None and alone.grid == weights.grid == (vit.grid_size if has_table else None)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(weights.backbone[name], tensor), name


def test_a_shared_table_goes_into_every_block_and_computes_the_same():
    shared, own = our_vit(**BEIT | {"rel_pos_bias": "shared"}), our_vit(**BEIT)
    report = load_strict(own, shared.state_dict())
    assert report.converted == ["rel_pos_bias.relative_position_bias_table -> every block"]
    torch.testing.assert_close(own(IMAGES), shared(IMAGES))


@pytest.mark.parametrize(("one", "other"), [(True, "no_key"), ("no_key", True)])
def test_biases_of_queries_keys_and_values_are_rewritten_and_compute_the_same(one: Any, other: Any):
    source, target = our_vit(qkv_bias=one), our_vit(qkv_bias=other)
    report = load_strict(target, source.state_dict())
    assert len(report.converted) == 2 and not report.missing
    torch.testing.assert_close(target(IMAGES), source(IMAGES), atol=1e-5, rtol=1e-5)


def test_a_bias_of_rotated_keys_cannot_be_left_out():
    source = our_vit(embed_dim=48, pos_embed="rope")
    target = our_vit(embed_dim=48, pos_embed="rope", qkv_bias="no_key")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.bias: not in the model"):
        load_strict(target, source.state_dict())
    with torch.no_grad():
        for block in source.blocks:
            block.attn.qkv.bias[48:96] = 0  # type: ignore[index, union-attr]
    load_strict(target, source.state_dict())
    torch.testing.assert_close(target(IMAGES), source(IMAGES), atol=1e-5, rtol=1e-5)


def test_relative_tables_of_another_grid_are_resized_and_reported():
    small = our_vit(**BEIT)
    large = disturbed(ViT((48, 32), 8, 3, 24, 2, 3, **BEIT))
    report = load_strict(large, small.state_dict())
    assert report.resized == [f"blocks.{i}.attn.relative_position_bias_table 4x4 -> 6x4" for i in range(2)]
    odd = small.state_dict()
    odd["blocks.0.attn.relative_position_bias_table"] = torch.ones(50, 3)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\..*: its positions are not a square"):
        load_strict(small, odd)
