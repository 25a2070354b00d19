"""Where a backbone's weights come from, how they fit, and the control that never loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune.config import ModelSource
from finetune.predictions import Classes
from finetune.release import open_task
from finetune.release import write_release as write_task
from finetune.weights import open_source
from pretrain.core.configlib import ConfigError
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from tests.finetune.small_tasks import small_task


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViT]:
    torch.manual_seed(5)
    vit = ViT((32, 32), 8, embed_dim=48, depth=2, num_heads=3)
    folder = tmp_path_factory.mktemp("weights") / "release"
    write_release(folder, vit, objective="mae", extra_state={}, record={"data": {"images": 3}}, mean=(0.4,) * 3)
    return folder, vit


def test_a_release_gives_its_features_and_its_normalization(release: tuple[Path, ViT]):
    folder, vit = release
    opened = open_source(ModelSource(release=str(folder), drop_path_rate=0.2))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(opened.backbone.eval()(images), vit.eval()(images))
    assert opened.mean == (0.4,) * 3 and "matched" in opened.report_lines[0]
    assert any(block.drop_rate for block in opened.backbone.blocks)
    own = open_source(ModelSource(release=str(folder), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert opened.backbone.pos_embed.requires_grad, "a fixed table is trained from here on"
    assert opened.backbone.release_model()["pos_embed"] == "learned"


def test_positions_are_resampled_to_any_height_and_width(release: tuple[Path, ViT]):
    opened = open_source(ModelSource(release=str(release[0]), img_size=(48, 80)))
    assert opened.backbone.img_size == (48, 80)
    assert "pos_embed 4x4 -> 6x10" in "\n".join(opened.report_lines)
    assert opened.backbone(torch.randn(1, 3, 48, 80)).shape == (1, 1 + 60, 48)


def test_the_control_is_the_same_architecture_and_loads_nothing(release: tuple[Path, ViT]):
    folder, vit = release
    control, twin, other = (
        open_source(ModelSource(release=str(folder), random=True), seed=seed).backbone for seed in (3, 3, 4)
    )
    assert control.state_dict().keys() == vit.state_dict().keys()
    weight = "blocks.0.attn.qkv.weight"
    assert control.state_dict()[weight].equal(twin.state_dict()[weight])
    assert not control.state_dict()[weight].equal(other.state_dict()[weight])
    assert not control.state_dict()[weight].equal(vit.state_dict()[weight])
    assert control.pos_embed.equal(vit.pos_embed), "the table it would have begun pretraining with"
    assert "random weights" in open_source(ModelSource(release=str(folder), random=True)).title


def test_a_file_of_an_official_code_and_its_name_in_timm_are_the_same_model(tmp_path: Path):
    model = timm.create_model("test_vit", img_size=64).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    path, images = str(tmp_path / "vit.pth"), torch.randn(2, 3, 64, 64)
    official = open_source(ModelSource(official=path, args={"num_heads": 2})).backbone.eval()
    named = open_source(
        ModelSource(timm="test_vit", weights=path, img_size=64, args={"patch_size": 16})
    ).backbone.eval()
    expected = model.forward_features(images)
    assert torch.allclose(official(images), expected, atol=1e-5) and torch.allclose(named(images), expected, atol=1e-5)


def test_weights_of_a_hierarchical_model_in_a_folder(tmp_path: Path):
    model = timm.create_model("test_convnext").eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    opened = open_source(ModelSource(timm="test_convnext", weights=str(tmp_path), img_size=64))
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(opened.backbone.eval().model.forward_features(images), model.forward_features(images))
    assert any(line.startswith("left out       2") for line in opened.report_lines), opened.report_lines


def test_an_index_of_weights_names_files_of_its_own_folder_alone(tmp_path: Path):
    model = timm.create_model("test_convnext")
    names = sorted(model.state_dict())
    folder = tmp_path / "weights"
    folder.mkdir()
    for piece, some in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: model.state_dict()[name] for name in some}, folder / piece)
    index = {name: ("a.safetensors", "b.safetensors")[place % 2] for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    source = ModelSource(timm="test_convnext", weights=str(folder), img_size=64)
    assert "matched" in open_source(source).report_lines[0]
    (folder / "a.safetensors").rename(tmp_path / "a.safetensors")
    outside = {name: piece.replace("a.", "../a.") for name, piece in index.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(ConfigError, match="lists files outside its folder"):
        open_source(source)


def test_a_folder_of_hugging_face_gives_its_heads_and_norms(tmp_path: Path):
    vit = ViT((32, 32), 8, embed_dim=48, depth=2, num_heads=4, pos_embed="learned", norm_eps=1e-4)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {}
    for name, tensor in vit.state_dict().items():
        if "qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[name.replace("attn.qkv", f"attention.attention.{part}")] = piece
        else:
            state[name] = tensor
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks.": "encoder.layer.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }

    def theirs(name: str) -> str:
        for ours, other in names.items():
            name = name.replace(ours, other)
        return name.replace("norm.", "layernorm.") if name.startswith("norm.") else name

    save_file(
        {theirs(name): tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "model.safetensors"
    )
    config = {"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": 1e-4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.2] * 3}))
    opened = open_source(ModelSource(huggingface=str(tmp_path)))
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(opened.backbone.eval()(images), vit.eval()(images), atol=1e-5)
    assert opened.mean == (0.1, 0.1, 0.1) and opened.std == (0.2, 0.2, 0.2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"release": "nowhere"}, "model.release=nowhere: 1 problem\n  nowhere: not a release"),
        ({"official": "nowhere.pth"}, "nowhere.pth: no such file"),
        ({"timm": "vit_tinny_patch16_224", "random": True}, "did you mean vit_tiny_patch16"),
        ({"huggingface": "."}, "contains no config.json"),
    ],
)
def test_an_invalid_source_is_named(source: dict, message: str):
    with pytest.raises(ConfigError) as error:
        open_source(ModelSource(**source))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("classification", {"train": "lora", "lora": {"layers": ["qkv", "fc1"]}}),
        ("detection", {"head": {"name": "faster_rcnn", "channels": 16, "box_dim": 16}, "size": 32, "window": 2,
                       "rel_pos": True}),
    ],
)  # fmt: skip
def test_the_backbone_of_a_fine_tuned_task_is_loaded_without_additions(
    tmp_path: Path, name: str, section: dict[str, object]
):
    task = small_task(name, **section)
    opened = open_source(ModelSource(release=str(write_task(tmp_path / "release", task, {}))))
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(opened.backbone.eval()(images), task.bare_backbone.eval()(images), atol=1e-5)
    left_out = "".join(line for line in opened.report_lines if line.startswith("left out"))
    assert ("rel_pos_h" in left_out) == (name == "detection")


def test_the_norm_of_a_mean_patch_classifier_returns_to_the_backbone(tmp_path: Path):
    task = small_task("classification", pool="mean")
    torch.nn.init.normal_(task.head.fc_norm.weight)  # pyright: ignore
    opened = open_source(ModelSource(release=str(write_task(tmp_path / "release", task, {}))))
    images = torch.randn(2, 3, 32, 32)
    expected = task.head.fc_norm(task.bare_backbone(images))  # pyright: ignore
    torch.testing.assert_close(opened.backbone.eval()(images), expected)


def test_a_class_name_of_bytes_that_are_not_utf_8_is_kept(tmp_path: Path):
    classes = Classes(("caf\udce9", "dog"))
    folder = write_task(tmp_path / "release", small_task("classification", classes=classes), {})
    assert open_task(folder)[0].classes == classes and "dog" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_damaged_release_of_a_task_is_named(tmp_path: Path):
    folder = write_task(tmp_path / "release", small_task("classification"), {})
    assert open_task(folder)[1]["classes"] == ["cat", "dog", "cow"]
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"damaged: model\.safetensors has 900 bytes, the manifest records"):
        open_task(folder)
    (folder / "MANIFEST.json").unlink()  # as one of version 0.1.0
    (folder / "fovea.json").write_text('{"task"')
    with pytest.raises(ValueError, match=r"fovea\.json: cannot be read"):
        open_task(folder)


def test_weights_of_another_architecture_are_listed_by_name(release: tuple[Path, ViT]):
    with pytest.raises(ConfigError) as error:
        open_source(ModelSource(release=str(release[0]), args={"depth": 1}))
    assert "blocks.1.attn.qkv.weight: not in the model" in str(error.value)
