from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from pretrain.models.ema import EMA
from pretrain.models.release import read_release, write_release
from pretrain.models.vit import ViT

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
    vit = ViT(**model).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def write(folder: Path, vit: ViT, model: dict, **changes) -> Path:
    stats = STATS[model["in_chans"]]
    given = {"objective": "mae", "extra_state": {"decoder.x": torch.ones(2)}, "record": RECORD} | changes
    return write_release(folder, vit, model_config=model, mean=stats, std=stats, **given)


@pytest.mark.parametrize("in_chans", [1, 3, 4, 6])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("img_size", [(32, 32), (24, 40)])
def test_timm_opens_it_with_equal_features(tmp_path: Path, in_chans, registers, pos_embed, img_size):
    model = arguments(in_chans=in_chans, num_registers=registers, pos_embed=pos_embed, img_size=img_size)
    vit = perturbed(model)
    out = write(tmp_path / "release", vit, model)
    other = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, in_chans, *img_size)
    torch.testing.assert_close(other.forward_features(images), vit(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other(images), vit.forward_cls(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
def test_reading_gives_a_backbone_with_equal_features(tmp_path: Path, registers: int, pos_embed: str):
    model = arguments(num_registers=registers, pos_embed=pos_embed, img_size=(24, 40))
    vit = perturbed(model)
    release = read_release(write(tmp_path / "release", vit, model))
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(release.build().eval()(images), vit(images), atol=1e-6, rtol=1e-6)
    assert (release.kind, release.grid) == ("mae", (3, 5))
    assert torch.equal(release.heads["decoder.x"], torch.ones(2))
    assert release.backbone.keys() == vit.state_dict().keys()


def test_the_average_of_a_backbone_can_be_released(tmp_path: Path):
    model = arguments()
    vit = perturbed(model)
    out = write(tmp_path / "release", EMA(vit).average, model)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(read_release(out).build().eval()(images), vit(images))


def test_the_record_holds_the_recipe_and_the_card_its_numbers(tmp_path: Path):
    model = arguments()
    out = write(tmp_path / "release", perturbed(model), model)
    facts = json.loads((out / "fovea.json").read_text())
    assert (
        facts["objective"] == "mae" and facts["recipe"] == RECORD["recipe"] and facts["model"]["img_size"] == [32, 32]
    )
    text = (out / "README.md").read_text()
    for expected in ("timm.create_model", "kNN top-1, k=20, T=0.07 | 0.5123", "abc123", "0123abc", "Licence"):
        assert expected in text


def test_a_card_without_metrics_says_so(tmp_path: Path):
    model = arguments()
    out = write(tmp_path / "release", perturbed(model), model, record={**RECORD, "metrics": {}})
    assert "None were measured" in (out / "README.md").read_text()


def test_a_release_replaces_a_release_and_nothing_else(tmp_path: Path):
    model = arguments()
    write(tmp_path / "release", perturbed(model), model)
    write(tmp_path / "release", perturbed(model), model, objective="dino")
    assert read_release(tmp_path / "release").kind == "dino"
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="no release; choose another folder"):
        write(other, perturbed(model), model)
    assert (other / "a.jpg").exists()


def test_channels_need_their_own_mean_and_std(tmp_path: Path):
    model = arguments(in_chans=4)
    with pytest.raises(ValueError, match="3 and 3 values, the backbone 4 channels"):
        write_release(
            tmp_path / "r", perturbed(model), model_config=model, objective="mae", extra_state={}, record=RECORD
        )


def test_a_folder_that_is_no_release_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"not a release, it has no fovea.json, model.safetensors, heads.safetensors"):
        read_release(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path):
    model = arguments()
    out = write(tmp_path / "release", perturbed(model), model)
    record = json.loads((out / "fovea.json").read_text()) | {"format": 99}
    (out / "fovea.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="release format 99; this version reads 1"):
        read_release(out)
