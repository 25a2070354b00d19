from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from finetune.predictions import Classes
from finetune.tasks.classification import Classification
from finetune.tasks.configs import ClassificationConfig
from finetune.tasks.opened import OpenedBackbone
from finetune.tasks.timm_classifier import write_timm
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

pytestmark = pytest.mark.slow

BACKBONES = {
    "vit": {"pos_embed": "learned"},
    "registers": {"pos_embed": "learned", "num_registers": 2},
    "beit": {"pos_embed": "none", "rel_pos_bias": "per_block", "qkv_bias": "no_key", "layer_scale": 0.1},
    "rope": {"pos_embed": "rope", "qkv_bias": "no_key"},
    "no class token": {"pos_embed": "learned", "class_token": False},
    "swiglu": {"pos_embed": "learned", "ffn": "swiglu"},
}
SECTIONS = {
    "full": {"pool": "auto"},
    "mean": {"pool": "mean"},
    "linear": {"train": "linear"},
    "lora": {"train": "lora", "lora": {"rank": 2, "layers": ["qkv", "fc1"]}},
    "grid": {"train": "grid", "grid": {"blocks": [1], "pools": ["mean"], "lrs": [0.1, 1.0]}},
}


def classifier(backbone, section) -> Classification:
    """With weights that are nowhere at their start."""
    opened = OpenedBackbone(backbone, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "a test")
    made = Classification(ClassificationConfig.model_validate(section), opened, Classes(["a", "b", "c"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in made.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2.0)
    return made.eval()


def vit(options) -> ViT:
    torch.manual_seed(0)
    return ViT((32, 48), 8, 3, 64, 2, 2, **options)


@torch.no_grad()
def logits(made: Classification, images: torch.Tensor) -> torch.Tensor:
    found = made.logits(images)
    return found[int(made.head.best)] if found.ndim == 3 else found


@pytest.mark.parametrize("size", [(32, 48), (48, 48)])
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_timm_computes_our_logits_at_two_image_sizes(kind, section, size, tmp_path: Path):
    made = classifier(vit(BACKBONES[kind]), SECTIONS[section])
    assert write_timm(tmp_path, made, img_size=size) is None
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), logits(made, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [
    ("test_vit", {"patch_size": 16}),
    ("test_convnext", {}),
    ("beit_base_patch16_224", {"embed_dim": 64, "depth": 2, "num_heads": 2}),
    ("eva02_tiny_patch14_224", {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 16}),
])  # fmt: skip
@pytest.mark.parametrize("section", ["full", "mean", "linear"])
def test_timms_own_networks_are_exported_with_a_classifier(name, options, section, tmp_path: Path):
    made = classifier(TimmBackbone(name, (64, 64), **options), SECTIONS[section])
    assert write_timm(tmp_path, made) is None
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), logits(made, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("kind", ["vit", "registers", "beit"])
def test_an_exported_state_is_imported_with_the_same_logits(kind, section):
    made = classifier(vit(BACKBONES[kind]), SECTIONS[section])
    state, files = made.exported(made.state_dict())
    assert set(files) == (set() if section == "grid" else {"config.json"})
    again = classifier(vit(BACKBONES[kind]), SECTIONS[section])
    again.load_state_dict(again.imported(state))
    images = torch.randn(2, 3, 32, 48)
    torch.testing.assert_close(logits(again, images), logits(made, images), atol=1e-5, rtol=1e-4)


def test_timm_prepares_images_as_our_evaluation_does(tmp_path: Path):
    made = classifier(vit(BACKBONES["vit"]), {"resize": 60})
    write_timm(tmp_path, made)
    settings = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}", pretrained=True))
    assert tuple(settings["mean"]) == (0.5, 0.4, 0.3) and settings["input_size"] == (3, 32, 48)
    assert settings["crop_pct"] == pytest.approx(48 / 60) and settings["interpolation"] == "bicubic"


def test_classifiers_that_timm_lacks_are_refused_with_the_reason():
    attentive = classifier(vit(BACKBONES["vit"]), {"train": "attentive"})
    assert "reads its backbone as this one (AttentiveHead) does" in str(write_timm("nowhere", attentive))
    assert not Path("nowhere").exists()
    assert attentive.exported(attentive.state_dict())[1] == {}
    several = classifier(vit(BACKBONES["vit"]), {"train": "grid", "grid": {"blocks": [2], "lrs": [1.0]}})
    assert "(GridHead)" in str(write_timm("nowhere", several))
