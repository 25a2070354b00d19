"""A vision transformer is rebuilt from its weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.models.backbones.sizes import SIZES
from pretrain.models.backbones.vit import ViT
from pretrain.models.backbones.vit_arguments import vit_arguments


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": False, "pos_embed": "learned"},
        {"pos_embed": "none", "rel_pos_bias": "shared", "qkv_bias": "no_key"},
        {"pos_embed": "none", "rel_pos_bias": "per_block", "layer_scale": 0.1},
        {"pos_embed": "learned", "rel_pos_bias": "per_block", "num_registers": 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_tokens_and_positions_are_read_from_the_names(options: dict[str, Any]):
    vit = ViT((24, 24), 8, 3, 64, 2, 1, 3.0, **options)
    arguments = vit_arguments(vit.state_dict())
    assert arguments["img_size"] == (24, 24)
    ViT(**arguments).load_state_dict(vit.state_dict())


def test_a_grid_that_is_not_square_must_be_told():
    vit = ViT((16, 24), 8, 3, 64, 1, 1, pos_embed="learned")
    assert vit_arguments(vit.state_dict(), grid=(2, 3))["img_size"] == (16, 24)
    with pytest.raises(ValueError, match="a position table of 6 patches is not of a square grid"):
        vit_arguments(vit.state_dict())


@pytest.mark.parametrize(("name", "heads"), [(name, size["num_heads"]) for name, size in SIZES.items()])
def test_the_heads_of_a_published_size_are_known_by_its_width_and_depth(name: str, heads: int):
    with torch.device("meta"):
        vit = ViT((28, 28), 14, 3, **SIZES[name], pos_embed="learned")
    assert vit_arguments(vit.state_dict())["num_heads"] == heads


def test_what_is_no_vit_or_tells_no_positions_is_refused():
    with pytest.raises(ValueError, match=r"not the weights of a ViT: 'patch_embed\.proj\.weight'"):
        vit_arguments({})
    with pytest.raises(ValueError, match="its grid is unknown"):
        vit_arguments(ViT((16, 16), 8, 3, 64, 1, 1, pos_embed="rope").state_dict())
