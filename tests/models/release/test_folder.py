from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_strict
from pretrain.models.release.folder import read_release, write_release
from pretrain.models.teachers.ema import EMA
from pretrain.models.tokenizers.dvae import ConvEncoder
from pretrain.release import seal

RECORD = {
    "recipe": {"objective": {"name": "mae"}},
    "data": {"fingerprint": "abc123", "images": 960},
    "metrics": {"kNN top-1, k=20, T=0.07": 0.5123},
    "commit": "0123abc",
    "versions": {"torch": "2.11"},
}
STATS = {1: (0.5,), 3: (0.485, 0.456, 0.406), 4: (0.5,) * 4, 6: (0.4,) * 6}


def arguments(**changes) -> dict:
    return {
        "img_size": (32, 32), "patch_size": 8, "in_chans": 3, "embed_dim": 24, "depth": 2, "num_heads": 3,
        "mlp_ratio": 2.0, "num_registers": 0, "pos_embed": "sincos", "drop_path_rate": 0.0, **changes,
    }  # fmt: skip


def perturbed(model: dict) -> ViT:
    torch.manual_seed(0)
    return perturbed_module(ViT(**model))


def perturbed_module(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def write(folder: Path, vit: Any, **changes) -> Path:
    stats = STATS[vit.in_chans]
    given = {"objective": "mae", "extra_state": {"decoder.x": torch.ones(2)}, "record": RECORD} | changes
    return write_release(folder, vit, mean=stats, std=stats, **given)


@pytest.mark.parametrize("in_chans", [1, 3, 4, 6])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("img_size", [(32, 32), (24, 40)])
def test_timm_opens_it_with_equal_features(tmp_path: Path, in_chans, registers, pos_embed, img_size):
    model = arguments(in_chans=in_chans, num_registers=registers, pos_embed=pos_embed, img_size=img_size)
    vit = perturbed(model)
    out = write(tmp_path / "release", vit)
    other = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, in_chans, *img_size)
    torch.testing.assert_close(other.forward_features(images), vit(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other(images), vit.forward_cls(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_reading_gives_a_backbone_with_equal_features(tmp_path: Path, registers: int, pos_embed: str):
    model = arguments(num_registers=registers, pos_embed=pos_embed, img_size=(24, 40))
    vit = perturbed(model)
    release = read_release(write(tmp_path / "release", vit))
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(release.build().eval()(images), vit(images), atol=1e-6, rtol=1e-6)
    assert (release.kind, release.grid) == ("mae", (3, 5))
    assert torch.equal(release.heads["decoder.x"], torch.ones(2))
    assert release.backbone.keys() == vit.state_dict().keys()


def test_the_average_of_a_backbone_can_be_released(tmp_path: Path):
    model = arguments()
    vit = perturbed(model)
    out = write(tmp_path / "release", EMA(vit).average)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(read_release(out).build().eval()(images), vit(images))


def test_the_record_holds_the_recipe_and_the_card_its_numbers(tmp_path: Path):
    model = arguments()
    out = write(tmp_path / "release", perturbed(model))
    facts = json.loads((out / "fovea.json").read_text())
    assert (
        facts["objective"] == "mae" and facts["recipe"] == RECORD["recipe"] and facts["model"]["img_size"] == [32, 32]
    )
    text = (out / "README.md").read_text()
    for expected in ("timm.create_model", "kNN top-1, k=20, T=0.07 | 0.5123", "abc123", "0123abc", "Licence"):
        assert expected in text


def test_a_card_without_metrics_says_so(tmp_path: Path):
    model = arguments()
    out = write(tmp_path / "release", perturbed(model), record={**RECORD, "metrics": {}})
    assert "None were measured" in (out / "README.md").read_text()


def test_a_release_replaces_a_release_and_nothing_else(tmp_path: Path):
    model = arguments()
    write(tmp_path / "release", perturbed(model))
    write(tmp_path / "release", perturbed(model), objective="dino")
    assert read_release(tmp_path / "release").kind == "dino"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds other files than a release; choose another folder"):
        write(other, perturbed(model))
    assert (other / "a.jpg").exists()


def test_channels_need_their_own_mean_and_std(tmp_path: Path):
    model = arguments(in_chans=4)
    with pytest.raises(ValueError, match="3 and 3 values, the backbone 4 channels"):
        write_release(tmp_path / "r", perturbed(model), objective="mae", extra_state={}, record=RECORD)


def test_a_folder_that_is_no_release_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"not a release, it has no fovea.json, model.safetensors, heads.safetensors"):
        read_release(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path):
    model = arguments()
    out = write(tmp_path / "release", perturbed(model))
    record = json.loads((out / "fovea.json").read_text()) | {"format": 99}
    (out / "fovea.json").write_text(json.dumps(record))
    seal(out)
    with pytest.raises(ValueError, match="release format 99; this version reads 1"):
        read_release(out)


VARIANTS = {
    "layer scale": ({"layer_scale": 0.1}, "VisionTransformer"),
    "no class token": ({"class_token": False}, "VisionTransformer"),
    "registers alone": ({"class_token": False, "num_registers": 2}, "VisionTransformer"),
    "gated": ({"ffn": "swiglu", "layer_scale": 0.1, "num_registers": 3}, "VisionTransformer"),
    "no key bias": ({"qkv_bias": "no_key"}, "VisionTransformer"),
    "no positions": ({"pos_embed": "none", "num_registers": 1, "qkv_bias": False}, "VisionTransformer"),
    "rows first": ({"pos_embed": "sincos_rows_first"}, "VisionTransformer"),
    "BEiT, shared": (
        {"rel_pos_bias": "shared", "pos_embed": "none", "qkv_bias": "no_key", "layer_scale": 0.1},
        "Beit",
    ),
    "BEiT, by block": ({"rel_pos_bias": "per_block", "pos_embed": "learned"}, "Beit"),
    "BEiT, gated": ({"rel_pos_bias": "shared", "ffn": "swiglu", "pos_embed": "none", "qkv_bias": False}, "Beit"),
    "DINOv3": (
        {"pos_embed": "rope", "qkv_bias": "no_key", "num_registers": 4, "layer_scale": 0.01, "norm_eps": 1e-5},
        "Eva",
    ),
    "DINOv3, other periods": ({"pos_embed": "rope", "qkv_bias": False, "rope": {"base": 30.0}}, "Eva"),
    "wider": ({"pos_embed": "rope", "qkv_bias": False, "ffn": "swiglu", "ffn_multiple": 64}, "Eva"),
    "both tables": ({"rel_pos_bias": "both"}, "Beit"),
    "few biases": ({"proj_bias": False, "ffn_bias": False}, "VisionTransformer"),
    "rotary alone": ({"pos_embed": "rope", "qkv_bias": False, "class_token": False}, "Eva"),
    "rotary, gated": ({"pos_embed": "rope", "qkv_bias": "no_key", "ffn": "swiglu"}, "Eva"),
}
WITHOUT_CLASS = {
    "has no key biases; train with model.qkv_bias=no_key": {"pos_embed": "rope"},
    "has a class token, no registers and no rotation": {"rel_pos_bias": "shared", "num_registers": 1},
    "has norm_eps 1e-06, this backbone 1e-05": {"norm_eps": 1e-5},
    "have both biases": {"ffn_bias": False, "pos_embed": "learned", "pos_offset": 0.2},
    "have an MLP": {"ffn": "identity"},
    "scores divided by the root of a head's channels": {"qk_scale": 0.3},
    "this backbone relu2": {"ffn": "relu2"},
    "this backbone topk": {"ffn": "topk", "ffn_topk": 0.2},
    "Beit has biases in": {"rel_pos_bias": "shared", "proj_bias": False, "ffn_bias": False},
    "one last layer norm for all tokens": {"norm_layer": "rms"},
    "have one last layer norm": {"cls_norm": True, "num_registers": 1},
    "periods of a base, fp32 angles": {"pos_embed": "rope", "rope": {"precision": "bf16"}},
    "each axis its own length": {"pos_embed": "rope", "rope": {"periods": (0.5, 9.0), "normalize": "min"}},
    "Eva has biases in": {"pos_embed": "rope", "proj_bias": False, "ffn_bias": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_vit_opens_in_timm_and_here_with_equal_features(tmp_path: Path, variant: str):
    changes, timm_class = VARIANTS[variant]
    vit = perturbed(arguments(img_size=(24, 40), **changes))
    out = write(tmp_path / "release", vit)
    other = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert type(other).__name__ == timm_class
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(other.forward_features(images), vit(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other(images), vit.forward_cls(images), atol=1e-5, rtol=1e-5)
    own = read_release(out).build().eval()
    torch.testing.assert_close(own(images), vit(images), atol=1e-5, rtol=1e-5)
    assert own.state_dict().keys() == vit.state_dict().keys()


@pytest.mark.parametrize("reason", WITHOUT_CLASS)
def test_what_timm_has_no_class_for_says_so_and_opens_here(tmp_path: Path, reason: str):
    vit = perturbed(arguments(**WITHOUT_CLASS[reason]))
    out = write(tmp_path / "release", vit)
    assert not (out / "config.json").exists()
    assert reason in (out / "README.md").read_text() and "timm.create_model" not in (out / "README.md").read_text()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(read_release(out).build().eval()(images), vit(images))


def test_the_encoder_of_a_dvae_opens_here_alone(tmp_path: Path):
    encoder = perturbed_module(ConvEncoder((32, 32), 8, embed_dim=8))
    out = write(tmp_path / "release", encoder)
    assert "timm has no class like ConvEncoder" in (out / "README.md").read_text()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(read_release(out).build().eval()(images), encoder(images))


def test_a_release_of_a_backbone_of_a_later_version_is_refused(tmp_path: Path):
    out = write(tmp_path / "release", perturbed(arguments()))
    facts = json.loads((out / "fovea.json").read_text())
    (out / "fovea.json").write_text(json.dumps(facts | {"model": facts["model"] | {"class": "mamba"}}))
    seal(out)
    with pytest.raises(ValueError, match="'mamba'; this version has vit, video_vit, timm, conv_encoder"):
        read_release(out).build()


@pytest.mark.parametrize(
    ("file", "keep", "problem"),
    [
        (
            "model.safetensors",
            0.5,
            r"damaged: model\.safetensors has \d+ bytes, the manifest records \d+; copy it",
        ),
        (
            "heads.safetensors",
            0.1,
            r"damaged: heads\.safetensors has \d+ bytes, the manifest records \d+; copy it",
        ),
        ("fovea.json", 0.5, r"damaged: fovea\.json has \d+ bytes, the manifest records \d+; copy it again"),
    ],
)
def test_a_release_that_was_copied_in_part_is_named(tmp_path: Path, file: str, keep: float, problem: str):
    out = write(tmp_path / "release", perturbed(arguments()))
    content = (out / file).read_bytes()
    (out / file).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=problem):
        read_release(out)


def test_a_record_that_says_too_little_is_named(tmp_path: Path):
    out = write(tmp_path / "release", perturbed(arguments()))
    (out / "fovea.json").write_text('{"format": 1, "model": {"img_size": [32, 32]}}')
    seal(out)
    with pytest.raises(ValueError, match=r"fovea\.json: has no objective, mean, std"):
        read_release(out)
    (out / "fovea.json").write_text("[]")
    seal(out)
    with pytest.raises(ValueError, match="release format None; this version reads 1"):
        read_release(out)


def test_a_release_of_a_timm_vit_tells_the_grid_of_its_positions(tmp_path: Path):
    small = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
    out = write(tmp_path / "release", TimmBackbone("vit_tiny_patch16_224", (16, 64), **small))
    released = read_release(out)
    square = TimmBackbone("vit_tiny_patch16_224", (32, 32), **small)
    report = load_strict(square, released.backbone, grid=released.grid)
    assert report.resized == ["model.pos_embed 2x8 -> 4x4"]
