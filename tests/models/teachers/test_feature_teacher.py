from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.core.configlib import ConfigError
from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models.backbones.vit import ViT
from pretrain.models.backbones.vit_arguments import vit_arguments
from pretrain.models.release.folder import read_release
from pretrain.models.teachers.feature_teacher import open_teacher
from tests.objectives.released import vit_release


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_release_gives_the_patch_features_of_pictures_that_it_normalizes_itself():
    path = vit_release((16, 16), 8, 3)
    teacher, _ = open_teacher(path, num_heads=None, size=(16, 16), grid=(2, 2), in_chans=3)
    expected = read_release(path).build()((pictures() - 0.5) / 0.25)[:, 1:]
    torch.testing.assert_close(teacher.features(pictures()), expected)
    assert teacher.embed_dim == 16 and not teacher.state_dict() and not list(teacher.parameters())


@pytest.mark.parametrize("registers", [0, 3])
def test_a_file_tells_its_widths_but_not_its_heads(tmp_path: Path, registers: int):
    torch.manual_seed(0)
    vit = ViT((16, 16), 8, 3, 32, 2, 4, 2.0, pos_embed="learned", num_registers=registers)
    assert vit_arguments(vit.state_dict(), num_heads=4) == {
        "img_size": (16, 16), "patch_size": 8, "in_chans": 3, "embed_dim": 32, "depth": 2, "num_heads": 4,
        "mlp_ratio": 2.0, "pos_embed": "learned", **({"num_registers": registers} if registers else {}),
    }  # fmt: skip
    if registers:
        return
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    teacher, _ = open_teacher(tmp_path / "vit.pth", num_heads=4, size=(16, 16), grid=(2, 2), in_chans=3)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(teacher.features(pictures()), vit((pictures() - mean) / std)[:, 1:])


@pytest.mark.parametrize(
    "options", [{"qkv_bias": "no_key"}, {"layer_scale": 0.1}, {"qkv_bias": False}, {"ffn": "swiglu"}]
)
def test_the_options_of_a_vit_are_read_from_its_names(options: dict):
    vit = ViT((16, 16), 8, 3, 64, 2, 1, 3.0, pos_embed="learned", **options)
    ViT(**vit_arguments(vit.state_dict(), num_heads=1)).load_state_dict(vit.state_dict())


@pytest.mark.parametrize(
    ("make", "size", "chans", "problem"),
    [
        (lambda: vit_release((16, 16), 8, 3), (24, 24), 3, r"do not give the model's 2 x 2 .*: \[16, 16\]"),
        (lambda: vit_release((16, 16), 8, 3), (16, 16), 6, "reads 3 channels, model.in_chans is 6"),
        (lambda: "nowhere", (16, 16), 3, "nowhere: no such file"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, size: tuple, chans: int, problem: str):
    with pytest.raises(ConfigError, match=problem):
        open_teacher(make(), num_heads=None, size=size, grid=(2, 2), in_chans=chans)
