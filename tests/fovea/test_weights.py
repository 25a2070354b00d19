"""`fovea.load`: any source of weights, ready to extract features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fovea
from finetune.config import ModelSource
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
