"""A vision transformer is rebuilt from its weights alone."""

from __future__ import annotations

from typing import Any

import pytest

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
    arguments = vit_arguments(vit.state_dict(), num_heads=None if "rel_pos_bias" in options else 1)
    assert arguments["img_size"] == (24, 24)
    ViT(**arguments).load_state_dict(vit.state_dict())


def test_a_grid_that_is_not_square_must_be_told():
    vit = ViT((16, 24), 8, 3, 64, 1, 1, pos_embed="learned")
    assert vit_arguments(vit.state_dict(), num_heads=1, grid=(2, 3))["img_size"] == (16, 24)
    with pytest.raises(ValueError, match="a position table of 6 patches is not of a square grid"):
        vit_arguments(vit.state_dict())


def test_heads_that_no_weight_shows_must_be_told():
    vit = ViT((24, 24), 8, 3, 64, 2, 4, pos_embed="learned")
    with pytest.raises(ValueError, match="do not show how many heads"):
        vit_arguments(vit.state_dict())
    assert vit_arguments(vit.state_dict(), num_heads=4)["num_heads"] == 4
    biased = ViT((24, 24), 8, 3, 64, 2, 4, rel_pos_bias="shared")
    assert vit_arguments(biased.state_dict())["num_heads"] == 4


def test_what_is_no_vit_or_tells_no_positions_is_refused():
    with pytest.raises(ValueError, match=r"not the weights of a ViT: 'patch_embed\.proj\.weight'"):
        vit_arguments({})
    with pytest.raises(ValueError, match="its grid is unknown"):
        vit_arguments(ViT((16, 16), 8, 3, 64, 1, 1, pos_embed="rope").state_dict())
