from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finetune.classifier import HEAD_STD, Classifier
from pretrain.models.vit import ViT

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit(**options) -> ViT:
    torch.manual_seed(0)
    return ViT((16, 16), 8, 3, 24, 2, 3, **options)


def test_it_starts_almost_undecided():
    model = Classifier(vit(), 5)
    probabilities = model(IMAGES).softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.full((3, 5), 0.2), atol=100 * HEAD_STD, rtol=0)


def test_token_pooling_reads_the_class_token_and_mean_pooling_the_patches_before_the_norm():
    backbone = vit(num_registers=2)
    (raw,) = backbone.layers(IMAGES, [1])
    token = backbone.norm(raw)[:, 0]
    mean = F.layer_norm(raw[:, 3:].mean(dim=1), (24,), eps=1e-6)
    torch.testing.assert_close(Classifier(backbone, 5).features(IMAGES), token)
    torch.testing.assert_close(Classifier(backbone, 5, pool="mean").features(IMAGES), mean)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_every_trained_parameter_gets_a_gradient(pool):
    model = Classifier(vit(pos_embed="learned", rel_pos_bias="per_block"), 5, pool=pool)
    torch.nn.init.normal_(model.head.weight)
    F.cross_entropy(model(IMAGES), torch.arange(3)).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_it_learns_three_images():
    model = Classifier(vit(), 3)
    groups = [{"params": g["params"], "lr": 3e-3 * g["lr_scale"]} for g in model.param_groups(decay=0.75)]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(30):
        loss = F.cross_entropy(model(IMAGES), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.predict(IMAGES).tolist() == [0, 1, 2]


def test_the_head_learns_at_the_full_rate_and_tokens_do_not_decay():
    model = Classifier(vit(pos_embed="learned"), 5, pool="mean")
    groups = {name: group for group in model.param_groups(decay=0.5) for name in group["names"]}
    assert groups["head.weight"]["lr_scale"] == groups["fc_norm.weight"]["lr_scale"] == 1.0
    assert groups["backbone.cls_token"]["lr_scale"] == 0.125
    assert groups["backbone.cls_token"]["weight_decay_scale"] == groups["backbone.pos_embed"]["weight_decay_scale"] == 0
    assert groups["backbone.blocks.0.mlp.fc1.weight"]["weight_decay_scale"] == 1.0


def test_wrong_uses_are_refused_by_name():
    with pytest.raises(ValueError, match="num_classes 1: a classifier needs at least 2"):
        Classifier(vit(), 1)
    with pytest.raises(ValueError, match="no class token; use pool mean"):
        Classifier(vit(class_token=False), 3)
    assert Classifier(vit(class_token=False), 3, pool="mean")(IMAGES).shape == (3, 3)
