from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official, load_strict
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import MoCoV3Config
from pretrain.objectives.mocov3 import MoCoV3
from tests.models.importers.golden import (
    ARGS,
    PACKED,
    UNREAD,
    beit_vit,
    below,
    case,
    objective,
    sizes,
    small_dino,
    small_mae,
    state,
    under,
)

KINDS = {
    "mae_pretrain_normpix": "mae",
    "dino_step_sgd_freelast": "dino",
    "ibot_step_separate": "ibot",
    "ibot_step_shared": "ibot",
    "dinov2_ssl_centering": "dinov2",
    "mocov3_step": "mocov3",
    "beit_pretrain": "beit",
    "simmim_vit": "simmim",
    "simmim_swin": "simmim",
    "ijepa_step": "ijepa",
    "beit2_vqkd": "vqkd",
}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def packed(name: str, folder: Path) -> Path:
    return saved(folder / "checkpoint.pth", PACKED[name](state(name)))


@pytest.mark.parametrize("name", PACKED)
def test_an_official_checkpoint_continues_with_all_its_weights(name: str, tmp_path: Path):
    weights = load_official(packed(name, tmp_path))
    made, expected = objective(name)
    report = made.load_weights(weights)
    found = made.state_dict()
    assert weights.kind == KINDS[name] and not report.missing
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value.view(found[key].shape)), key
    dropped = set(weights.left_out) - set(UNREAD)
    assert not dropped, f"of its own objective nothing is left out, but {dropped}"


@pytest.mark.parametrize("name", PACKED)
def test_every_name_of_a_checkpoint_is_loaded_or_left_out_by_name(name: str, tmp_path: Path):
    weights = load_official(packed(name, tmp_path))
    derived = ("position_index", "attn_mask")
    tied = sum("last_layer2" in key for key in state(name)) if name == "ibot_step_shared" else 0
    tied = 2 if name == "ibot_step_separate" else tied  # the teacher's
    total = sum(not key.endswith(derived) for key in state(name)) - tied
    assert len(weights.backbone) + len(weights.heads) + len(weights.left_out) == total


@pytest.mark.parametrize("name", [name for name in PACKED if name != "simmim_swin"])
def test_another_method_gets_the_backbone_and_hears_what_was_left_out(name: str, tmp_path: Path):
    weights = load_official(packed(name, tmp_path))
    source = objective(name)[0].backbone
    other = small_dino if weights.kind in ("mae", "ijepa") else small_mae
    made = other(_like(source))
    report = made.load_weights(weights)
    backbone = made.backbone.state_dict()
    assert all(torch.equal(backbone[key], value) for key, value in weights.backbone.items())
    assert report.missing and all(key.startswith(made.head_prefixes) for key in report.missing)
    assert {f"{key} ({weights.kind})" for key in weights.heads} <= set(report.left_out)


def _like(vit: ViT) -> ViT:
    return ViT(
        vit.img_size,
        vit.patch_size,
        3,
        vit.embed_dim,
        vit.depth,
        vit.num_heads,
        vit.mlp_ratio,
        class_token=vit.class_token,
        num_registers=vit.num_registers,
        pos_embed=vit.pos_kind,
        qkv_bias=vit.qkv_bias,
        rel_pos_bias=vit.rel_pos_kind,
        layer_scale=vit.layer_scale,
        ffn=vit.ffn,
    )


def test_a_backbone_of_other_options_is_refused_with_the_list(tmp_path: Path):
    weights = load_official(packed("beit_pretrain", tmp_path))
    vit = ViT(*sizes(case("beit_pretrain").config["ctor"]))
    with pytest.raises(ValueError) as error:
        small_mae(vit).load_weights(weights)
    for part in (
        "encoder.rel_pos_bias.relative_position_bias_table: not in the model",
        "encoder.blocks.0.ls1.gamma: not in the model",
        "encoder.pos_embed: not in the file",
    ):
        assert part in str(error.value)


def test_a_swin_does_not_go_into_a_vit(tmp_path: Path):
    weights = load_official(packed("simmim_swin", tmp_path))
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0"):
        small_mae(ViT((32, 32), 8, 3, 24, 2, 2)).load_weights(weights)


def test_what_has_no_backbone_is_refused(tmp_path: Path):
    for name in ("beit_dvae", "beit2_quantizer", "dino_head"):
        path = saved(tmp_path / f"{name}.pth", {"model": state(name)})
        with pytest.raises(ValueError, match=rf"{name}\.pth: not a checkpoint we know"):
            load_official(path)


def test_half_a_dino_checkpoint_is_refused(tmp_path: Path):
    content = PACKED["dino_step_sgd_freelast"](state("dino_step_sgd_freelast"))
    del content["dino_loss"]
    with pytest.raises(ValueError, match="not a full DINO checkpoint: it has no dino_loss"):
        load_official(saved(tmp_path / "x.pth", content))


def test_sinkhorn_knopp_keeps_no_centres(tmp_path: Path):
    weights = load_official(saved(tmp_path / "x.pth", {"model": state("dinov2_ssl_sinkhorn")}))
    ours = objective("dinov2_ssl_sinkhorn")[0]
    assert not ours.load_weights(weights).missing
    assert not weights.heads["center"].any() and not weights.heads["patch_center"].any()


def test_the_teacher_that_dinov2_evaluates_gives_its_backbone_and_names_its_heads(tmp_path: Path):
    teacher = below(state("dinov2_ssl_sinkhorn"), "teacher.")
    weights = load_official(saved(tmp_path / "teacher_checkpoint.pth", {"teacher": teacher}))
    assert weights.kind == "vit" and not weights.heads
    assert len(weights.backbone) + len(weights.left_out) == len(teacher)
    assert torch.equal(weights.backbone["cls_token"], teacher["backbone.cls_token"])


@pytest.mark.parametrize("pooling", ["cls", "meanpool"])
def test_a_classifier_of_beit_gives_its_backbone_unless_the_norm_is_gone(tmp_path: Path, pooling: str):
    of = case(f"beit_finetune_{pooling}")
    path = saved(tmp_path / "ft.pth", {"model": of.below("state"), "args": ARGS})
    if pooling == "meanpool":
        with pytest.raises(ValueError, match="fine-tuned with mean pooling: it has fc_norm"):
            load_official(path)
        return
    weights = load_official(path)
    vit = beit_vit(of.config["ctor"], rel_pos_bias="per_block")
    load_strict(vit, weights.backbone)
    torch.testing.assert_close(vit.forward_cls(of["input/images"]), of["expect/features"], atol=2e-5, rtol=1e-5)
    assert set(weights.left_out) == {"head.weight", "head.bias"}


def test_data2vec_is_known_by_its_head_of_full_width(tmp_path: Path):
    values = state("beit_pretrain")
    dim = values["cls_token"].shape[-1]
    values["lm_head.weight"], values["lm_head.bias"] = torch.randn(dim, dim), torch.randn(dim)
    average = {key: value + 1 if value.is_floating_point() else value for key, value in values.items()}
    path = saved(tmp_path / "d2v.pth", {"model": values, "model_ema": average, "args": ARGS})
    weights = load_official(path)
    assert weights.kind == "data2vec" and not weights.left_out
    assert torch.equal(weights.heads["head.weight"], values["lm_head.weight"])
    assert torch.equal(weights.heads["teacher.average.cls_token"], values["cls_token"] + 1)
    assert torch.equal(weights.backbone["cls_token"], values["cls_token"])


def test_the_condenser_of_beit2_comes_with_its_blocks_in_our_names(tmp_path: Path):
    values = state("beit_pretrain")
    blocks = under("cls_pt_layers.", below(values, "blocks."))
    weights = load_official(saved(tmp_path / "beit2.pth", {"model": values | blocks}))
    assert weights.kind == "beit2"
    assert torch.equal(weights.heads["cls_pt_layers.1.ls2.gamma"], values["blocks.1.gamma_2"])
    assert {"lm_head.weight", "mask_token", "cls_pt_layers.0.attn.q_bias"} <= weights.heads.keys()


def test_names_that_wrappers_add_are_taken_away(tmp_path: Path):
    values = state("dino_vit")
    for wrap in (
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"backbone.{key}",
        lambda key: key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
        lambda key: f"_fsdp_wrapped_module.{key.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module.')}",
    ):
        path = saved(tmp_path / "x.pth", {wrap(key): value for key, value in values.items()})
        assert load_official(path).backbone.keys() == values.keys()
    both = values | {"module.cls_token": values["cls_token"]}
    with pytest.raises(ValueError, match="two entries are named cls_token"):
        load_official(saved(tmp_path / "x.pth", both))


def test_a_cnn_of_moco_v3_continues_with_both_encoders(tmp_path: Path):
    """The official names of a ResNet are torchvision's, which are timm's; its projector is called fc."""
    config = MoCoV3Config(hidden_dim=16, projection_dim=8, projector_layers=2, sync_bn=False, freeze_patch_embed=False)
    torch.manual_seed(0)
    source, fresh = (MoCoV3(config, TimmBackbone("resnet18", (32, 32)), Horizon(1, 1)) for _ in range(2))
    values = {}
    for name, tensor in source.state_dict().items():
        name = name.replace("momentum_encoder.average.", "momentum_encoder.").replace("base.", "base_encoder.")
        values[name.replace("backbone.model.", "").replace(".projector.", ".fc.")] = tensor
    content = {"state_dict": under("module.", values), "arch": "resnet18", "epoch": 1}
    report = fresh.load_weights(load_official(saved(tmp_path / "r18.pth", content)))
    assert not report.missing and not report.left_out
    found, expected = fresh.state_dict(), source.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["ibot_step_shared", "dinov2_ssl_centering", "simmim_vit", "beit2_vqkd"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_with_its_path_or_the_name(name: str, tmp_path: Path):
    made, values = objective(name)[0], state(name)
    needed = [key for key in values if key not in UNREAD and not key.endswith("position_index")]
    for lost in needed[:: max(1, len(needed) // 12)]:
        path = saved(tmp_path / "x.pth", PACKED[name]({k: v for k, v in values.items() if k != lost}))
        with pytest.raises(ValueError, match=r"x\.pth: |the weights do not fit the model"):
            made.load_weights(load_official(path))
            pytest.fail(f"{lost} was not missed")
