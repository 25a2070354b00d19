"""`fovea.load`: any source of weights, ready to extract features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fovea
from finetune.config import ModelSource
from pretrain.data.views.decode import decode_image
from pretrain.data.views.orientation import upright
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from pretrain.probes.subject import open_release
from tests.data.photos import ramps, stored
from tests.finetune.runs import make_release


def test_a_release_loads_by_its_path_and_by_a_section_of_a_configuration(tmp_path: Path):
    release = make_release(tmp_path / "release")
    model = fovea.load(release, device="cpu")
    again = fovea.load(ModelSource(release=str(release)), device="cpu")
    image = torch.rand(3, 40, 50)
    assert model.features(image).pooled.equal(again.features(image).pooled)
    assert (model.img_size, model.embed_dim, model.patch_size, model.in_chans) == ((32, 32), 48, 8, 3)
    assert not model.backbone.training and not any(p.requires_grad for p in model.backbone.parameters())
    assert "matched" in model.report[0] and "mae release" in repr(model)


@pytest.mark.parametrize(("record", "orientation"), [({"orientation": "exif"}, 6), ({}, 1)])
def test_photos_are_read_as_those_of_the_pretraining(record: dict, orientation: int, tmp_path: Path):
    vit = ViT((32, 32), 8, embed_dim=48, depth=1, num_heads=3)
    release = write_release(tmp_path / "r", vit, objective="mae", extra_state={}, record=record)
    (tmp_path / "photo.png").write_bytes(stored(ramps(24, 40), 6))
    model = fovea.load(release, device="cpu")
    seen = upright(decode_image((tmp_path / "photo.png").read_bytes(), 3, "stored"), orientation)
    assert model.features(tmp_path / "photo.png").pooled.equal(model.features(seen).pooled)
    assert open_release(release).orientation == model.orientation


def test_an_architecture_of_timm_with_random_weights_at_another_size():
    model = fovea.load("test_convnext", random=True, img_size=64, device="cpu")
    assert model.img_size == (64, 64) and "random weights" in model.title


def test_what_cannot_be_loaded_is_a_value_error_that_names_it(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing is downloaded"):
        fovea.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no model 'test_convnex' .did you mean test_convnext"):
        fovea.load("test_convnex", random=True)
    with pytest.raises(ValueError, match="device nowhere"):
        fovea.load("test_convnext", random=True, device="nowhere")
