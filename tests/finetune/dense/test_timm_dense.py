from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.dense.build import dense_backbone
from finetune.dense.plain import PlainDense
from finetune.dense.pyramid import HierarchicalFPN, pyramid
from finetune.dense.timm_dense import TimmDense
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

SWIN: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}
TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "channels"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, [16, 32, 64, 128]),
        ("convnext_atto", CONVNEXT, [8, 16, 16, 32]),
        ("resnet10t", {}, [64, 128, 256, 512]),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (50, 67)])
def test_stages_of_a_hierarchical_model_are_maps_of_every_image_size(
    name: str, arguments: dict, channels: list[int], height: int, width: int
):
    torch.manual_seed(0)
    made = dense_backbone(TimmBackbone(name, (64, 64), **arguments)).train()
    assert made.channels == channels and made.strides == [4, 8, 16, 32]
    maps = made(torch.randn(2, 3, height, width))
    cover = [(c, -(-height // stride), -(-width // stride)) for c, stride in zip(channels, made.strides, strict=True)]
    assert [tuple(level.shape[1:]) for level in maps] == cover
    neck = pyramid(made, 8)
    assert isinstance(neck, HierarchicalFPN)
    sum(level.square().sum() for level in neck(maps)).backward()  # type: ignore[union-attr]
    assert {n for n, p in made.named_parameters() if p.requires_grad and p.grad is None} == set()


def pair() -> tuple[TimmBackbone, ViT]:
    """The same plain ViT as timm's class and as ours."""
    torch.manual_seed(0)
    theirs = TimmBackbone("vit_tiny_patch16_224", (32, 32), patch_size=8, **TINY_VIT)
    ours = ViT((32, 32), 8, 3, 32, 3, 4, pos_embed="learned", pos_resize="antialias")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ours.load_state_dict(theirs.model.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_a_plain_model_of_timms_gives_the_maps_of_our_own(window: int | None, norm: bool):
    theirs, ours = pair()
    options = {"window": window, "global_blocks": None if window is None else (1,), "indices": (0, 2), "norm": norm}
    images = torch.randn(2, 3, 40, 29)
    wrapped = dense_backbone(theirs, **options)
    assert isinstance(wrapped, TimmDense)
    expected = PlainDense(ours, **options)(images)
    for one, other in zip(wrapped(images), expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_parameters_after_the_last_map_are_frozen():
    made = dense_backbone(TimmBackbone("convnext_atto", (64, 64), **CONVNEXT), indices=(1, 2))
    frozen = {name for name, p in made.named_parameters() if not p.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"stages", "head"}
    assert all(name.startswith(("backbone.model.stages.3.", "backbone.model.head.")) for name in frozen)


def test_an_image_size_that_the_model_refuses_is_named_with_the_remedy():
    made = dense_backbone(TimmBackbone("hiera_tiny_224", (64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"made for 64 x 64 px and refuses 64 x 96.*set model\.img_size"):
        made(torch.zeros(1, 3, 64, 96))


def test_unsupported_arguments_of_a_model_are_refused():
    with pytest.raises(ValueError, match="no plain ViT whose blocks take windows"):
        dense_backbone(TimmBackbone("convnext_atto", (64, 64), **CONVNEXT), window=7)
    with pytest.raises(ValueError, match=r"global_blocks must ascend within 0 to 2, got \[2, 5, 8, 11\]"):
        dense_backbone(
            TimmBackbone("vit_tiny_patch16_224", (32, 32), **TINY_VIT), window=2, global_blocks=(2, 5, 8, 11)
        )
    with pytest.raises(ValueError, match="decomposed positions are of our own ViT"):
        dense_backbone(TimmBackbone("convnext_atto", (64, 64), **CONVNEXT), rel_pos=True)
    with pytest.raises(ValueError, match="indices must ascend within 0 to 3"):
        dense_backbone(TimmBackbone("convnext_atto", (64, 64), **CONVNEXT), indices=(4,))
    with pytest.raises(ValueError, match="a Linear gives no maps"):
        dense_backbone(torch.nn.Linear(2, 2))
