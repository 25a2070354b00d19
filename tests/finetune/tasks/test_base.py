"""What every task shares: learning rates by layer, an average of the weights, uniforms for the drop path."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from finetune.config import FinetuneOptim
from finetune.predictions import Classes
from finetune.tasks.opened import OpenedBackbone
from pretrain.engine.optim.optimizer import trainable_groups
from pretrain.models.backbones.timm_backbone import TimmBackbone
from tests.finetune.tiny import Brightness, opened

OPTIM: dict[str, Any] = {"lr": 1e-3, "global_batch_size": 8, "total_steps": 4}


def task(**optim: Any) -> Brightness:
    made = Brightness(None, opened(drop_path_rate=optim.pop("drop_path_rate", 0.0)), Classes(("dark", "bright")))
    made.prepare(FinetuneOptim(**OPTIM, **optim))
    return made


def scales(made: Any) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) scale by name."""
    groups = trainable_groups(made, made.param_groups())
    return {name: (group["lr_scale"], group["weight_decay_scale"]) for group in groups for name in group["names"]}


def test_layers_decay_towards_the_input_and_the_head_has_its_own_rate():
    found = scales(task(layer_decay=0.5, head_lr_scale=10.0))
    assert found["head.weight"] == (10.0, 1.0) and found["head.bias"] == (10.0, 0.0)
    assert found["backbone.norm.weight"] == (1.0, 0.0)
    assert found["backbone.blocks.1.mlp.fc1.weight"] == (0.5, 1.0)
    assert found["backbone.blocks.0.mlp.fc1.weight"] == (0.25, 1.0)
    assert found["backbone.patch_embed.proj.weight"] == (0.125, 1.0)
    assert found["backbone.pos_embed"] == found["backbone.cls_token"] == (0.125, 0.0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_convnext", {}),
        ("resnet10t", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}),
        ("hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
        ("xcit_nano_12_p8_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}),
    ],
)
def test_layers_of_a_hierarchical_backbone_are_those_of_timm(name: str, arguments: dict[str, Any]):
    backbone = TimmBackbone(name, (224, 224), **arguments)
    made = Brightness(None, OpenedBackbone(backbone, (0.5,) * 3, (0.5,) * 3, ""), Classes(("dark", "bright")))
    made.prepare(FinetuneOptim(**OPTIM, layer_decay=0.5))
    found = {name: scale for name, (scale, _) in scales(made).items()}
    theirs = timm.create_model(name, num_classes=2, **arguments)
    groups = param_groups_layer_decay(theirs, layer_decay=0.5)
    expected = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    for parameter, tensor in theirs.named_parameters():
        if parameter in dict(backbone.model.named_parameters()):
            assert found[f"backbone.model.{parameter}"] == pytest.approx(expected[id(tensor)]), parameter
    assert found["head.weight"] == 1.0


def test_a_frozen_backbone_is_in_no_group():
    made = task(layer_decay=0.5)
    made.backbone.requires_grad_(False)
    assert set(scales(made)) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_the_average_follows_the_weights_and_has_the_newest_statistics():
    made = task(ema_decay=0.75)
    average = made.evaluated
    assert average is not made and not list(average.parameters())
    before, running = made.head.bias.detach().clone(), made.norm.running_mean
    assert running is not None
    with torch.no_grad():
        made.head.bias += 1.0
        running += 2.0
    made.after_step(1)
    assert torch.allclose(dict(average.named_buffers())["head.bias"], before + 0.25)
    assert dict(average.named_buffers())["norm.running_mean"].equal(running)


def test_only_a_backbone_with_drop_path_reads_random_numbers():
    assert task().noises == {} and task(drop_path_rate=0.1).noises == {"drop": (2, 2)}


def test_bytes_and_float_pixels_are_normalized_alike():
    made, images = task(), torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert made.normalize(images).unique().tolist() == pytest.approx([2.0])
    assert made.normalize(images.float()).equal(made.normalize(images))
