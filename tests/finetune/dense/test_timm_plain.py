"""timm's plain vision transformers, block by block, with tokens of others among theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.dense.build import dense_backbone
from finetune.dense.plain import PlainDense
from finetune.dense.timm_plain import TimmPlain
from finetune.heads.queries.eomt import EoMT
from finetune.heads.queries.mask_loss import MaskSetLoss, MaskTargets
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3}
NAMES = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "eva02_tiny_patch14_224",
)


def plain(name: str) -> TimmPlain:
    torch.manual_seed(0)
    size = (28, 28) if "14_" in name else (32, 32)
    made = dense_backbone(TimmBackbone(name, size, **SMALL))  # pyright: ignore[reportArgumentType]
    assert isinstance(made, TimmPlain)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def images_for(made: TimmPlain) -> Tensor:
    p = made.patch_size
    return torch.randn(2, 3, 3 * p, 4 * p - 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_one_by_one_give_the_map_of_the_model(name):
    made = plain(name)
    images = images_for(made)
    x, grid = made.prepare(images)
    assert grid == (3, 4)
    x = made.run(x, grid, 0, 2)
    x = made.block(2, x, grid)
    torch.testing.assert_close(made.as_map(made.normed(x), grid), made(images)[0])


@pytest.mark.parametrize("name", NAMES)
def test_queries_have_no_position_and_can_be_masked_for_the_patches(name):
    made = plain(name)
    x, grid = made.prepare(images_for(made))
    queries = torch.randn(2, 5, x.shape[2])
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        one, other = (made.run(torch.cat([q, x], 1), grid, 0, 3, extra=5) for q in (queries, queries[:, order]))
        torch.testing.assert_close(one[:, order], other[:, :5], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one[:, 5:], other[:, 5:], rtol=1e-4, atol=1e-4)
        mask = torch.ones(2, 1, 5 + x.shape[1], 5 + x.shape[1], dtype=torch.bool)
        mask[:, :, 5:, :5] = False
        hidden = made.block(0, torch.cat([queries, x], 1), grid, extra=5, mask=mask)[:, 5:]
        torch.testing.assert_close(hidden, made.block(0, x, grid), rtol=1e-4, atol=1e-4)
        assert (made.block(0, torch.cat([queries, x], 1), grid, extra=5)[:, 5:] - hidden).abs().max() > 1e-3


def test_eomt_gives_the_same_on_timms_model_and_ours_with_its_weights():
    timm = plain("vit_tiny_patch16_224")
    ours = ViT((32, 32), 16, embed_dim=48, depth=3, num_heads=3, pos_embed="learned")
    ours.load_state_dict(timm.backbone.model.state_dict())
    head = EoMT(timm, MaskSetLoss(2), num_queries=4, num_blocks=2).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for (mask, label), (other_mask, other_label) in zip(
            head(timm, images), head(PlainDense(ours.eval()), images), strict=True
        ):
            torch.testing.assert_close(mask, other_mask, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(label, other_label, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES[:2])
def test_every_trained_parameter_gets_a_gradient_through_eomt(name):
    made = plain(name).train()
    made.backbone.set_checkpointing(True)
    head = EoMT(made, MaskSetLoss(2, num_points=32), num_queries=4, num_blocks=2)
    target = MaskTargets(torch.tensor([1]), torch.ones(1, 32, 32))
    uniforms = torch.rand(2, head.noise)
    head.losses(made, torch.randn(2, 3, 32, 32), [target, target], fraction=0.4, uniforms=uniforms)["loss"].backward()
    for part, parameter in [*made.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None or not parameter.requires_grad, part
