from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.config import ModelConfig
from pretrain.models.release.folder import read_release, write_release
from tests.models.backbones.test_timm_backbone import STAGES, images, tiny

SWIN = "swin_tiny_patch4_window7_224"


@pytest.mark.parametrize("changes", [{"ape": True}, {"patch_norm": False}, {"qk_scale": 0.3}])
def test_a_release_opens_here_and_says_what_timm_lacks(tmp_path: Path, changes: dict):
    backbone = tiny(SWIN, **changes)
    out = write_release(tmp_path / "release", backbone, objective="simmim", extra_state={}, record={})
    assert not (out / "config.json").exists()
    assert f"timm's Swin has no {next(iter(changes))}" in (out / "README.md").read_text()
    own = read_release(out).build().eval()
    assert torch.equal(own(images()), backbone(images()))
    plain = tiny(SWIN)
    assert not torch.allclose(plain(images()), backbone(images()), atol=1e-3)


def test_a_copy_reads_its_own_positions_and_other_sizes_get_resampled_ones():
    backbone = tiny(SWIN, ape=True)
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        twin.get_parameter("model.layers.0.absolute_pos_embed").add_(1.0 * torch.arange(16))
    assert not torch.allclose(twin(images()), backbone(images()), atol=1e-3)
    assert backbone(images(64)).shape == (2, 64, 32)


def test_masked_patches_keep_their_positions():
    backbone = tiny(SWIN, ape=True)
    mask, token = torch.ones(2, 64, dtype=torch.bool), torch.zeros(1, 1, 16)
    hidden = backbone(images(), mask=mask, mask_token=token)
    assert not torch.allclose(hidden[:, 0], hidden[:, -1], atol=1e-3)


def test_the_options_are_settings_of_a_swin_alone():
    swin = ModelConfig.model_validate({"name": f"timm/{SWIN}", "img_size": 32, "args": STAGES | {"ape": True}})
    assert swin.problems() == []
    with pytest.raises(ValueError, match="cannot be built"):
        TimmBackbone("swinv2_tiny_window8_256", (32, 32), ape=True)
