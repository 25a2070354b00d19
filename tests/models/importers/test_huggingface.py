"""Folders of Hugging Face: features equal to those of transformers, and no key of config.json is half read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from finetune.config import ModelSource
from finetune.weights import open_source
from pretrain.core.configlib import ConfigError
from pretrain.models.importers import load_official
from tests.models.importers.make_huggingface import CASES, FOLDER, drawn, images

Case = dict[str, Any]


def case(name: str) -> Case:
    return json.loads((FOLDER / f"{name}.json").read_text())


def written(folder: Path, of: Case, **changed: Any) -> Path:
    save_file({name: drawn(name, shape) for name, shape in of["shapes"].items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(of["config"] | changed))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_folder_has_the_features_of_transformers(tmp_path: Path, name: str):
    of = case(name)
    source = ModelSource(huggingface=str(written(tmp_path, of)), img_size=16)
    tokens = open_source(source).backbone.eval()(images())[0]
    torch.testing.assert_close(tokens, torch.tensor(of["features"]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changed", "refused"),
    [
        ("dinov3", {"rope_theta": 10000.0}, "rope_theta: 10000.0, our ViT rotates with 100"),
        ("dinov3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: {'rope_type': 'yarn'}"),
        ("dinov3_gated", {"hidden_act": "gelu"}, "hidden_act: 'gelu', and our ViT computes 'silu'"),
        ("vit", {"hidden_act": "quick_gelu"}, "hidden_act: 'quick_gelu', and our ViT computes 'gelu'"),
        ("vit", {"num_attention_heads": None}, "num_attention_heads: None, a number is needed"),
        ("dinov2", {"qk_norm": True}, "qk_norm: True is not known here and may change what the network computes"),
        ("vit", {"model_type": "siglip_vision_model"}, "model_type: 'siglip_vision_model' is not read"),
    ],
)
def test_a_key_that_changes_the_function_is_refused_by_name(
    tmp_path: Path, name: str, changed: dict[str, Any], refused: str
):
    folder = written(tmp_path, case(name), **changed)
    with pytest.raises(ConfigError) as raised:
        open_source(ModelSource(huggingface=str(folder), img_size=16))
    assert refused in str(raised.value)
    with pytest.raises(ValueError) as again:  # the file alone, with config.json next to it
        load_official(folder / "model.safetensors")
    assert refused in str(again.value)


def test_eps_and_heads_are_those_of_the_configuration_or_its_class(tmp_path: Path):
    folder = written(tmp_path, case("vit"), layer_norm_eps=1e-3)
    opened = open_source(ModelSource(official=str(folder / "model.safetensors")))
    assert (opened.backbone.norm_eps, opened.backbone.num_heads) == (1e-3, 4)
    of = case("vit")
    del of["config"]["layer_norm_eps"]
    found = load_official(written(tmp_path, of) / "model.safetensors").facts
    assert found is not None and found.norm_eps == 1e-12
    with pytest.raises(ConfigError, match="num_heads: 2 in the model, 4 in the file"):
        open_source(ModelSource(huggingface=str(folder), args={"num_heads": 2}))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="do not show how many heads"):
        open_source(ModelSource(official=str(folder / "model.safetensors")))


def test_a_table_that_is_not_square_has_the_grid_of_the_configuration(tmp_path: Path):
    of = case("vit")
    of["shapes"]["embeddings.position_embeddings"] = [1, 1 + 2 * 3, 32]
    folder = written(tmp_path, of, image_size=[16, 24])
    assert open_source(ModelSource(huggingface=str(folder))).backbone.grid_size == (2, 3)


def test_a_network_that_ends_in_the_norm_of_its_mean_is_named(tmp_path: Path):
    of = case("beit")
    of["shapes"] = {name.replace("encoder.layernorm", "pooler.layernorm"): s for name, s in of["shapes"].items()}
    of["shapes"] = {f"pooler.{n}" if n.startswith("layernorm.") else n: s for n, s in of["shapes"].items()}
    with pytest.raises(ConfigError, match="fine-tuned with mean pooling"):
        open_source(ModelSource(huggingface=str(written(tmp_path, of))))


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_a_token_of_distillation_is_the_first_register(tmp_path: Path, grid: tuple[int, int] | None):
    """timm's DeiT, whose classifier has two heads; its position table has a row for the token."""
    size = (32, 32) if grid is None else (grid[0] * 16, grid[1] * 16)
    options: dict[str, Any] = {"img_size": size, "embed_dim": 48, "depth": 2, "num_heads": 3}
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, **options).eval()
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    source = ModelSource(official=str(tmp_path / "deit.pth"), grid=grid, args={"num_heads": 3})
    opened = open_source(source)
    pixels = torch.randn(2, 3, *size)
    assert opened.backbone.num_registers == 1
    torch.testing.assert_close(opened.backbone.eval()(pixels), deit.forward_features(pixels), atol=2e-5, rtol=1e-4)
