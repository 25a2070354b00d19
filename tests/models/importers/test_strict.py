from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official, load_strict
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import DINOConfig, MAEConfig
from pretrain.objectives.dino import DINO
from pretrain.objectives.mae import MAE

CASES = Path(__file__).parents[2] / "golden" / "cases"
ARGS = argparse.Namespace(model="vit", lr=1e-3, output_dir="out")


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(CASES / f"{name}.safetensors")


def states(tensors: dict[str, torch.Tensor], prefix: str = "state/") -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def mae(img_size=(32, 32)) -> MAE:
    config = MAEConfig(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4)
    return MAE(config, ViT(img_size, 8, 3, 48, 2, 4), Horizon(1, 1))


def dino() -> DINO:
    config = DINOConfig(
        out_dim=256, head_hidden_dim=32, head_bottleneck_dim=32, local_crops_number=3, drop_path_rate=0.0
    )
    backbone = ViT((24, 24), 8, 3, 24, 2, 3, 2.0, pos_embed="learned")
    return DINO(config, backbone, Horizon(8, 2))


def test_an_official_mae_checkpoint_continues_with_its_decoder(tmp_path: Path):
    case = golden("mae_pretrain_normpix")
    content = {"model": states(case), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "args": ARGS}
    weights = load_official(saved(tmp_path / "mae.pth", content))
    objective = mae()
    report = objective.load_weights(weights)
    losses = objective({"image": case["input/images"][:, None], "mask_noise": case["draw/noise"]}, 0)
    torch.testing.assert_close(losses["loss"], case["expect/loss"], atol=1e-5, rtol=1e-5)
    assert weights.kind == "mae" and not report.missing and len(report.matched) == len(objective.state_dict())


def test_an_official_mae_encoder_alone_leaves_the_decoder_fresh(tmp_path: Path):
    encoder = {
        n: t for n, t in states(golden("mae_pretrain_normpix")).items() if not n.startswith(("decoder_", "mask"))
    }
    weights = load_official(saved(tmp_path / "encoder.pth", {"model": encoder}))
    objective = mae()
    report = objective.load_weights(weights)
    assert weights.kind == "vit"
    assert torch.equal(objective.encoder.blocks[1].mlp.fc2.weight, encoder["blocks.1.mlp.fc2.weight"])
    assert report.missing and all(name.startswith("decoder.") for name in report.missing)


def test_a_finetuned_checkpoint_gives_its_encoder_and_names_the_classifier(tmp_path: Path):
    encoder = {
        n: t for n, t in states(golden("mae_pretrain_normpix")).items() if not n.startswith(("decoder_", "mask"))
    }
    content = {"model": encoder | {"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}, "args": ARGS}
    weights = load_official(saved(tmp_path / "finetuned.pth", content))
    assert weights.left_out == ("head.weight", "head.bias")
    assert "left out       2  head.weight, head.bias" in str(mae().load_weights(weights))


def test_an_official_dino_backbone_has_equal_features(tmp_path: Path):
    case = golden("dino_vit")
    weights = load_official(saved(tmp_path / "backbone.pth", states(case)))
    vit = ViT((32, 32), 8, 3, 48, 2, 3, pos_embed="learned", pos_resize="dino").eval()
    load_strict(vit, weights.backbone)
    torch.testing.assert_close(vit.forward_cls(case["input/rect"]), case["expect/rect/forward"], atol=2e-5, rtol=1e-5)


def test_an_official_dino_checkpoint_continues_with_student_teacher_and_centre(tmp_path: Path):
    case = golden("dino_step_sgd_freelast")
    content = {
        "student": {f"module.{n}": t for n, t in states(case, "state/student.").items()},
        "teacher": states(case, "state/teacher."),
        "dino_loss": {"center": case["state/dino_loss.center"]},
        "epoch": 1,
        "args": ARGS,
    }
    weights = load_official(saved(tmp_path / "checkpoint.pth", content))
    objective = dino()
    objective.load_weights(weights)
    batch = {
        "global": torch.stack([case[f"input/step0/global{i}"] for i in range(2)], 1),
        "local": torch.stack([case[f"input/step0/local{i}"] for i in range(3)], 1),
    }
    torch.testing.assert_close(objective(batch, 0)["loss"], case["expect/step0/loss_rank0"], atol=2e-5, rtol=1e-5)
    assert weights.kind == "dino"


def test_another_objectives_checkpoint_gives_its_backbone(tmp_path: Path):
    case = golden("dino_step_sgd_freelast")
    content = {
        "student": {f"module.{n}": t for n, t in states(case, "state/student.").items()},
        "teacher": states(case, "state/teacher."),
        "dino_loss": {"center": case["state/dino_loss.center"]},
    }
    weights = load_official(saved(tmp_path / "checkpoint.pth", content))
    objective = MAE(
        MAEConfig(decoder_embed_dim=8, decoder_num_heads=2), ViT((24, 24), 8, 3, 24, 2, 3, 2.0), Horizon(1, 1)
    )
    report = objective.load_weights(weights)
    teacher = states(case, "state/teacher.")
    assert torch.equal(objective.backbone.cls_token, teacher["backbone.cls_token"])
    assert {name.split(".")[0] for name in report.missing} == {"decoder"}


@pytest.mark.parametrize("registers", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"reg_tokens": 2}])
def test_a_timm_state_dict_has_equal_features(tmp_path: Path, registers: dict):
    torch.manual_seed(0)
    other = timm.create_model(
        "vit_base_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=0,
        **registers,
    ).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    weights = load_official(tmp_path / "timm.safetensors")
    vit = ViT((32, 32), 8, 3, 24, 2, 3, num_registers=registers.get("reg_tokens", 0)).eval()
    load_strict(vit, weights.backbone)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), other.forward_features(images), atol=1e-5, rtol=1e-5)


def test_positions_of_another_grid_are_resized_and_reported(tmp_path: Path):
    weights = load_official(saved(tmp_path / "mae.pth", {"model": states(golden("mae_pretrain_normpix"))}))
    objective = mae(img_size=(48, 32))
    report = objective.load_weights(weights)
    assert report.resized == ["decoder.pos_embed 4x4 -> 6x4", "encoder.pos_embed 4x4 -> 6x4"]
    assert objective.encoder.pos_embed.shape == (1, 25, 48)


def test_as_many_positions_in_another_arrangement_are_resized_too():
    source, target = ViT((16, 64), 8, 3, 24, 1, 3), ViT((32, 32), 8, 3, 24, 1, 3)
    report = load_strict(target, source.state_dict(), grid=(2, 8))
    assert report.resized == ["pos_embed 2x8 -> 4x4"]
    assert not torch.allclose(target.pos_embed, source.pos_embed)


def test_the_square_table_of_a_file_is_resized_for_as_many_patches_in_another_arrangement(tmp_path: Path):
    square, wide = (ViT(size, 8, 3, 24, 1, 3, pos_embed="learned") for size in ((32, 32), (16, 64)))
    weights = load_official(saved(tmp_path / "square.pth", square.state_dict()))
    assert load_strict(wide, weights.backbone, grid=weights.grid).resized == ["pos_embed 4x4 -> 2x8"]


def test_a_table_of_a_finer_grid_than_that_of_the_patches_is_taken_as_it_is():
    stem = torch.nn.Module()
    stem.grid_size, stem.pos_embed = (2, 2), torch.nn.Parameter(torch.randn(1, 64, 8))  # as Hiera's
    assert not load_strict(stem, {"pos_embed": torch.zeros(1, 64, 8)}, grid=(8, 8)).resized
    with pytest.raises(ValueError, match=r"pos_embed: \[1, 16, 8\] in the file, \[1, 64, 8\] in the model"):
        load_strict(stem, {"pos_embed": torch.zeros(1, 16, 8)}, grid=(4, 4))


def test_every_name_that_does_not_fit_is_listed_and_nothing_is_loaded():
    vit = ViT((16, 16), 8, 3, 24, 1, 3)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    state = dict(vit.state_dict()) | {"blocks.0.ls1.gamma": torch.ones(24), "norm.bias": torch.ones(7)}
    state["cls_token"] = torch.ones(1, 1, 24)
    del state["norm.weight"]
    with pytest.raises(ValueError) as error:
        load_strict(vit, state)
    text = str(error.value)
    for part in ("blocks.0.ls1.gamma: not in the model", "norm.weight: not in the file", "norm.bias: [7] in the file"):
        assert part in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_missing_is_allowed_only_where_named():
    vit = ViT((16, 16), 8, 3, 24, 1, 3)
    state = {name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("norm.")}
    assert load_strict(vit, state, allow_missing=("norm.",)).missing == ["norm.weight", "norm.bias"]
    with pytest.raises(ValueError, match="not in the file"):
        load_strict(vit, state, allow_missing=("blocks.",))


class Canary:
    """A pickle that would make a file when it is opened carelessly."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path):
    canary = tmp_path / "canary"
    path = saved(tmp_path / "evil.pth", {"model": {"cls_token": torch.ones(1, 1, 4)}, "args": Canary(canary)})
    torch.load(path, weights_only=False)
    assert canary.exists()  # the trap works
    canary.unlink()
    with pytest.raises(ValueError, match="nothing in it was executed"):
        load_official(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str):
    path = tmp_path / name
    with pytest.raises(ValueError, match="no such file"):
        load_official(path)
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=name):
        load_official(path)


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, {"model": {"cls_token": 3}}, [torch.ones(2)]])
def test_an_unknown_checkpoint_is_refused(tmp_path: Path, content: object):
    with pytest.raises(ValueError, match=r"odd\.pth: "):
        load_official(saved(tmp_path / "odd.pth", content))


def test_a_refused_class_is_named_and_nobody_is_told_to_execute_the_file(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"refused, it holds a torch\.nn\.modules\.linear\.Linear, .*Save the state_dict"
    ) as told:
        load_official(saved(tmp_path / "module.pth", torch.nn.Linear(2, 2)))
    assert "weights_only" not in str(told.value)
    page = tmp_path / "page.pth"
    page.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.pth: not a checkpoint of tensors .*\(Unsupported operand 60\)"):
        load_official(page)
    with pytest.raises(ValueError, match="a folder; give the file in it"):
        load_official(tmp_path)


def test_a_file_of_an_old_torch_that_was_cut_off_anywhere_is_named(tmp_path: Path):
    path = tmp_path / "old.pth"
    torch.save({"model": {"cls_token": torch.ones(1, 1, 4)}, "epoch": 3}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"old\.pth: "):
            load_official(path)


def test_the_averages_that_trainers_save_beside_the_weights_are_left_out_by_name(tmp_path: Path):
    state = ViT((32, 32), 8, 3, 24, 1, 3, pos_embed="learned").state_dict()
    content = {"state_dict": state, "state_dict_ema": dict(state), "epoch": 3, "arch": "vit", "metric": 70.0}
    weights = load_official(saved(tmp_path / "model_best.pth.tar", content))
    assert weights.backbone.keys() == state.keys()
    assert set(weights.left_out) == {f"state_dict_ema.{name}" for name in state}
