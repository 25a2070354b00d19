from __future__ import annotations

import torch

from pretrain.models.heads.ijepa_predictor import JEPAPredictor
from pretrain.models.layers.pos_embed import sincos_2d


def predictor() -> JEPAPredictor:
    torch.manual_seed(0)
    made = JEPAPredictor(in_dim=12, embed_dim=8, depth=2, num_heads=2, grid_size=(3, 4))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def test_a_prediction_is_that_of_the_plain_sequence_context_then_mask_tokens():
    of = predictor()
    keep, targets = torch.tensor([[[0, 5, 7]]]), torch.tensor([[[2, 3]]])
    context = torch.randn(1, 3, 12)
    table = sincos_2d(8, (3, 4), cls_row=False).float()
    x = torch.cat([of.embed(context) + table[[0, 5, 7]], of.mask_token + table[[2, 3]]], dim=1)
    for block in of.blocks:
        x = block(x)
    torch.testing.assert_close(of(context, keep, targets)[0, 0, 0], of.proj(of.norm(x))[0, 3:])


def test_the_order_of_the_context_does_not_matter_and_its_positions_do():
    of = predictor()
    keep, targets, context = torch.tensor([[[0, 5, 7]]]), torch.tensor([[[2, 3]]]), torch.randn(1, 3, 12)
    turned = of(context[:, [2, 0, 1]], keep[:, :, [2, 0, 1]], targets)
    torch.testing.assert_close(turned, of(context, keep, targets))
    assert not torch.allclose(of(context, keep[:, :, [2, 0, 1]], targets), turned)


def test_every_image_block_and_context_has_its_own_place():
    of = predictor()
    keep = torch.stack([torch.stack([torch.randperm(12)[:4] for _ in range(3)]) for _ in range(2)])
    targets = torch.stack([torch.stack([torch.randperm(12)[:2] for _ in range(5)]) for _ in range(2)])
    context = torch.randn(6, 4, 12)
    together = of(context, keep, targets)
    assert together.shape == (2, 5, 3, 2, 12)
    alone = of(context[5:6], keep[1:2, 2:3], targets[1:2, 4:5])
    torch.testing.assert_close(together[1, 4, 2], alone[0, 0, 0])


def test_the_positions_stand_still():
    assert not predictor().pos_embed.requires_grad
