"""Networks that frameworks save below a prefix, in several copies, or with the names of another library."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from finetune.config import ModelSource
from finetune.weights import open_source
from pretrain.core.configlib import ConfigError
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_official, load_strict

State = dict[str, Tensor]


def vit(img_size: tuple[int, int] = (32, 32)) -> ViT:
    torch.manual_seed(3)
    return ViT(img_size, 8, 3, 24, 2, 3, pos_embed="learned")


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


HEAD = {"projection.0.weight": torch.zeros(4, 24)}


@pytest.mark.parametrize("prefix", ["model.", "model.backbone.", "backbone.vit.", "net.encoder.0."])
def test_the_only_prefix_that_leaves_a_known_form_is_removed_and_reported(tmp_path: Path, prefix: str):
    state = vit().state_dict()
    weights = load_official(saved(tmp_path / "l.ckpt", {"state_dict": under(prefix, state) | HEAD, "epoch": 3}))
    report = load_strict(vit(), weights.backbone, left_out=weights.left_out, converted=weights.converted)
    assert all(weights.backbone[name].equal(state[name]) for name in state)
    assert f"prefix {prefix} removed" in str(report) and "projection.0.weight" in str(report)


def test_of_several_networks_one_is_chosen_by_its_prefix(tmp_path: Path):
    student, teacher = vit().state_dict(), {name: tensor + 1 for name, tensor in vit().state_dict().items()}
    path = saved(tmp_path / "d.ckpt", {"state_dict": under("student_backbone.", student) | under("m.ema.", teacher)})
    with pytest.raises(ValueError, match=r"model\.prefix, init\.prefix or --prefix: (m\.ema|student_backbone)\., .*"):
        load_official(path)
    weights = load_official(path, prefix="m.ema")
    assert all(weights.backbone[name].equal(teacher[name]) for name in teacher)
    assert set(weights.left_out) == set(under("student_backbone.", student))
    with pytest.raises(ValueError, match=r"starts with the chosen prefix teacher\. \(.*student_backbone\."):
        load_official(path, prefix="teacher.")


@pytest.mark.parametrize("key", ["state_dict_ema", "ema_state_dict", "current_model_state"])
def test_a_copy_next_to_the_weights_is_read_where_it_is_chosen(tmp_path: Path, key: str):
    state, average = vit().state_dict(), {name: tensor + 1 for name, tensor in vit().state_dict().items()}
    path = saved(tmp_path / "e.pth", {"state_dict": state, key: average})
    assert load_official(path).backbone["cls_token"].equal(state["cls_token"])
    assert load_official(path, prefix=key).backbone["cls_token"].equal(average["cls_token"])


def test_networks_of_a_checkpoint_that_is_incomplete_as_a_whole_are_named(tmp_path: Path):
    state = vit().state_dict()
    head = {"student.head.mlp.0.weight": torch.zeros(4, 24)}
    path = saved(tmp_path / "d.ckpt", under("student.backbone.", state) | under("teacher.backbone.", state) | head)
    with pytest.raises(ValueError, match=r"not a full DINO.*student\.backbone\., teacher\.backbone\."):
        load_official(path)
    assert load_official(path, prefix="teacher.backbone.").backbone.keys() == state.keys()


def foreign(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> type:
    """A class of a package that is not installed where the file is opened."""
    made = type(name, (), {"__module__": module})
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    setattr(sys.modules[module], name, made)
    return made


def test_objects_that_lightning_saves_are_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = vit().state_dict()
    with monkeypatch.context() as patch:
        callback = foreign(patch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        settings = foreign(patch, "omegaconf.dictconfig", "DictConfig")()
        settings.weights = torch.ones(3)
        content = {
            "callbacks": {callback: {"best": torch.ones(1)}},
            "hyper_parameters": {"a": settings, "w": torch.ones(2)},
        }
        path = saved(tmp_path / "l.ckpt", {"state_dict": under("model.", state), **content})
    assert "omegaconf" not in sys.modules
    weights = load_official(path)
    assert weights.backbone.keys() == state.keys() and weights.backbone["cls_token"].equal(state["cls_token"])
    assert any("omegaconf.dictconfig.DictConfig" in name for name in weights.left_out)


class Loud:
    def __init__(self, function: object, text: str):
        self.call = function, (text,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, exec, __import__])
def test_a_lightning_file_that_calls_python_is_refused_and_not_executed(tmp_path: Path, function: object):
    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    path = saved(tmp_path / "l.ckpt", {"state_dict": vit().state_dict(), "hparams": Loud(function, code)})
    with pytest.raises(ValueError, match=r"holds a __builtin__\.\w+, .*nothing in it was executed"):
        load_official(path)
    assert not canary.exists()


def test_torchvisions_vit_gives_its_features(tmp_path: Path):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 48).eval()
    nn.init.normal_(model.class_token)
    path = saved(tmp_path / "v.pth", under("model.", model.state_dict()))
    source = ModelSource(official=str(path), args={"num_heads": 3, "norm_eps": 1e-6})
    opened, images = open_source(source), torch.randn(2, 3, 32, 32)
    model.heads = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(opened.backbone.eval()(images)[:, 0], model(images), atol=1e-5, rtol=1e-5)
    assert "names of torchvision" in "\n".join(opened.report_lines)


def mmpretrain_name(name: str) -> str:
    for ours, theirs in (
        ("patch_embed.proj.", "patch_embed.projection."),
        ("blocks.", "layers."),
        (".norm1.", ".ln1."),
        (".norm2.", ".ln2."),
        (".mlp.fc1.", ".ffn.layers.0.0."),
        (".mlp.fc2.", ".ffn.layers.1."),
        (".ls1.gamma", ".attn.gamma1.weight"),
        (".ls2.gamma", ".ffn.gamma2.weight"),
    ):
        name = name.replace(ours, theirs)
    return "backbone." + ("ln1." + name.removeprefix("norm.") if name.startswith("norm.") else name)


def test_mmpretrains_vit_gives_our_state(tmp_path: Path):
    model = ViT((32, 32), 8, 3, 24, 2, 3, pos_embed="learned", layer_scale=0.1)
    state = model.state_dict()
    content = {"state_dict": {mmpretrain_name(name): tensor for name, tensor in state.items()}, "meta": {"epoch": 1}}
    content["state_dict"]["head.layers.head.weight"] = torch.zeros(3, 24)
    weights = load_official(saved(tmp_path / "mm.pth", content))
    assert all(weights.backbone[name].equal(state[name]) for name in state)
    assert weights.backbone.keys() == state.keys() and weights.left_out == ("head.layers.head.weight",)


def numbered(model: torchvision.models.ResNet) -> State:
    return under("backbone.", nn.Sequential(*list(model.children())[:-1]).state_dict())


@pytest.mark.parametrize(
    "form", [lambda model: model.state_dict(), lambda model: under("backbone.", model.state_dict()), numbered]
)
def test_a_resnet_of_torchvision_gives_its_features_in_timms(tmp_path: Path, form):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    path = str(saved(tmp_path / "r.ckpt", {"state_dict": form(model)}))
    images = torch.randn(1, 3, 64, 64)
    expected = nn.Sequential(*list(model.children())[:-1])(images).flatten(1)
    for source in ({"official": path}, {"timm": "resnet18", "weights": path}):
        backbone = open_source(ModelSource(**source, img_size=64)).backbone.eval()
        torch.testing.assert_close(backbone.model(images), expected, atol=1e-4, rtol=1e-4)


def test_a_model_of_timm_is_found_below_a_prefix(tmp_path: Path):
    model = timm.create_model("test_convnext")
    state = model.state_dict()
    path = saved(tmp_path / "c.ckpt", {"state_dict": under("net.trunk.", state)})
    opened = open_source(ModelSource(timm="test_convnext", weights=str(path), img_size=64))
    assert "prefix net.trunk. removed" in "\n".join(opened.report_lines)
    both = saved(tmp_path / "b.ckpt", {"state_dict": under("a.", state) | under("b.", state)})
    with pytest.raises(ConfigError, match=r"several networks.*a\., b\."):
        open_source(ModelSource(timm="test_convnext", weights=str(both), img_size=64))
    open_source(ModelSource(timm="test_convnext", weights=str(both), img_size=64, prefix="b"))


def test_positions_of_a_grid_that_is_not_square_are_read_where_it_is_stated(tmp_path: Path):
    model = vit((32, 64)).eval()
    path = str(saved(tmp_path / "n.pth", model.state_dict()))
    with pytest.raises(ConfigError, match=r"cannot tell the grid .*33 rows.*model\.grid"):
        open_source(ModelSource(official=path))
    with pytest.raises(ConfigError, match=r"33 rows .* is not of a grid of 3 x 8"):
        open_source(ModelSource(official=path, grid=(3, 8)))
    source, images = {"official": path, "grid": (4, 8), "args": {"num_heads": 3}}, torch.randn(1, 3, 32, 64)
    opened = open_source(ModelSource(**source))
    assert opened.backbone.img_size == (32, 64)
    torch.testing.assert_close(opened.backbone.eval()(images), model(images))
    report = open_source(ModelSource(**source, img_size=(48, 48))).report_lines
    assert "pos_embed 4x8 -> 6x6" in "\n".join(report)


def test_relative_positions_of_a_grid_that_is_not_square_are_read_where_it_is_stated(tmp_path: Path):
    model = ViT((32, 64), 8, 3, 24, 2, 3, pos_embed="none", rel_pos_bias="shared")
    path = str(saved(tmp_path / "n.pth", model.state_dict()))
    with pytest.raises(ConfigError, match=r"not of a square grid.*model\.grid"):
        open_source(ModelSource(official=path))
    source = ModelSource(official=path, grid=(4, 8), args={"num_heads": 3})
    assert open_source(source).backbone.img_size == (32, 64)
