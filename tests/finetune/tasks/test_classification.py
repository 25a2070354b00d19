from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.config import FinetuneConfig, FinetuneOptim
from finetune.data.examples import Example
from finetune.heads.pooled.grid import features
from finetune.heads.pooled.lora import AdaptedLinear
from finetune.predictions import Classes
from finetune.tasks.classification import Classification
from finetune.tasks.configs import ClassificationConfig
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.configlib import ConfigError, validate
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.export.outputs import NotExportableError
from pretrain.models.layers.sync_batch_norm import SyncBatchNorm

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PIXELS = (IMAGES * 0.25 + 0.5) * 255  # before the normalization of `task`
LABELS = torch.tensor([0, 1, 2, 3])
KINDS = {
    "full": {},
    "mean": {"pool": "mean"},
    "partial": {"train": "partial", "partial_blocks": 1},
    "lora": {"train": "lora", "lora": {"rank": 4, "layers": ["qkv", "proj", "fc1", "fc2"]}},
    "linear": {"train": "linear"},
    "attentive": {"train": "attentive"},
    "glimpses": {"train": "glimpses", "glimpses": {"count": 3, "hidden": 32}},
    "grid": {"train": "grid", "grid": {"blocks": [1, 2], "lrs": [0.1, 1.0]}},
}


def vit(**options) -> ViT:
    torch.manual_seed(0)
    return ViT((16, 16), 8, 3, 24, 2, 3, **{"pos_embed": "learned", **options})


def task(backbone=None, *, optim=None, **section) -> Classification:
    opened = OpenedBackbone(backbone or vit(), (0.5,) * 3, (0.25,) * 3, "a test")
    torch.manual_seed(0)
    made = Classification(ClassificationConfig.model_validate(section), opened, Classes(["a", "b", "c", "d"]))
    values = {"global_batch_size": 4, "total_steps": 10, "lr": 1.0, **(optim or {})}
    made.prepare(FinetuneOptim.model_validate(values))
    return made.train()


def batch(**more):
    glimpses = torch.full((4, 4, 2), 0.5)  # the centre, then the means of the locations, as in evaluation
    return {"image": PIXELS, "label": LABELS, "rng_step": torch.full((64,), 0.5), "glimpses": glimpses, **more}


def learn(made, steps, lr):
    groups = [{"params": group["params"], "lr": lr * group["lr_scale"]} for group in made.param_groups()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        made(batch(), step)["loss"].backward()
        optimizer.step()
        made.after_step(step + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_overfits_four_images_and_frozen_parameters_do_not_change(kind):
    made = task(**KINDS[kind])
    frozen = {name: p.detach().clone() for name, p in made.named_parameters() if not p.requires_grad}
    rates = {"linear": 3e-2, "attentive": 3e-2, "grid": 3e-2, "glimpses": 5e-3}  # at 3e-2 where it looks is chaotic
    learn(made, 60, rates.get(made.config.train, 3e-3))
    lacking = [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert not lacking
    assert all(dict(made.named_parameters())[name].equal(value) for name, value in frozen.items())
    assert bool(frozen) == (kind not in ("full", "mean"))
    made.eval()
    with torch.no_grad():
        if kind == "grid":
            made.head.choose(1)
        found = made.predict({"image": PIXELS})
    assert [int(p.probabilities.argmax()) for p in found] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["test_convnext", "resnet10t"])
def test_networks_without_blocks_are_fine_tuned_and_probed_by_their_own_pooling(name):
    backbone = TimmBackbone(name, (64, 64))
    images = torch.randn(2, 3, 64, 64)
    made = task(backbone, train="linear", batch_norm=False).eval()
    torch.testing.assert_close(made.head.features(backbone, images), backbone.forward_cls(images))
    with pytest.raises(ValueError, match="no class token; use mean"):
        task(TimmBackbone(name, (64, 64)), pool="token")
    with pytest.raises(ValueError, match="the backbone has 0 blocks"):
        task(TimmBackbone(name, (64, 64)), train="partial")


def test_batch_norms_of_a_network_that_is_fine_tuned_are_those_of_all_ranks():
    made = task(TimmBackbone("resnet10t", (64, 64)))
    norms = [module for module in made.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, SyncBatchNorm) for norm in norms)
    names = {name.removeprefix("backbone.") for name in made.state_dict() if name.startswith("backbone.")}
    assert names == set(TimmBackbone("resnet10t", (64, 64)).state_dict())


def test_token_pooling_reads_the_class_token_and_mean_pooling_the_patches_before_the_norm():
    backbone = vit(num_registers=2)
    (raw,) = backbone.layers(IMAGES, [1])
    token = backbone.norm(raw)[:, 0]
    normalized = backbone.norm(raw)[:, 3:].mean(dim=1)
    mean = F.layer_norm(raw[:, 3:].mean(dim=1), (24,), eps=1e-6)

    def pooled(**section):
        own = copy.deepcopy(backbone)
        return task(own, **section).head.features(own, IMAGES)

    torch.testing.assert_close(pooled(pool="token"), token)
    torch.testing.assert_close(pooled(pool="mean"), mean)
    torch.testing.assert_close(pooled(pool="mean", train="linear"), normalized)  # frozen features keep their norm


def test_glimpses_are_refused_where_they_cannot_work():
    with pytest.raises(NotExportableError, match="train=glimpses cuts whole pixels where it chooses"):
        task(**KINDS["glimpses"]).export_outputs()
    values = {
        "run_dir": "r",
        "task": {"name": "classification", "train": "glimpses", "augment": {"mixup": 0.8}, "pool": "mean"},
        "model": {"release": "r"},
        "data": {"train": {"images": "t"}, "val": {"images": "v"}},
        "optim": {"lr": 1.0, "epochs": 1, "global_batch_size": 8},
    }
    with pytest.raises(ConfigError) as error:
        validate(FinetuneConfig, values, source="t.yaml")
    assert "glimpses are rewarded for one class" in str(error.value) and "has its own pooling" in str(error.value)


def test_without_a_class_token_the_patches_are_pooled():
    assert task(vit(class_token=False)).head.pool == "mean"
    with pytest.raises(ValueError, match="no class token; use mean"):
        task(vit(class_token=False), pool="token")


def test_initial_predictions_are_almost_uniform():
    probabilities = task().logits(IMAGES).softmax(dim=1)
    torch.testing.assert_close(probabilities, torch.full((4, 4), 0.25), atol=2e-3, rtol=0)


def test_the_head_has_its_own_learning_rate_and_tokens_do_not_decay():
    made = task(vit(num_registers=1), pool="mean", optim={"layer_decay": 0.5, "head_lr_scale": 10.0})
    groups = {name: group for group in made.param_groups() for name in group["names"]}
    assert groups["head.fc.weight"]["lr_scale"] == groups["head.fc_norm.weight"]["lr_scale"] == 10.0
    assert groups["backbone.cls_token"]["lr_scale"] == 0.125
    for name in ("cls_token", "reg_token", "pos_embed"):
        assert groups[f"backbone.{name}"]["weight_decay_scale"] == 0
    assert groups["backbone.blocks.0.mlp.fc1.weight"]["weight_decay_scale"] == 1.0


def test_a_probes_batch_norm_standardizes_and_a_skipped_step_leaves_no_trace_in_it():
    made = task(train="linear")
    made(batch(), 0)
    standardized = made.head.norm(made.head.features(made.backbone, IMAGES))
    torch.testing.assert_close(standardized.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
    before = made.head.norm.running_mean.clone()
    made.after_step(1)
    made(batch(image=PIXELS + 300), 1)
    assert not made.head.norm.running_mean.equal(before)
    made.discard_pending()
    assert made.head.norm.running_mean.equal(before)


def test_low_rank_updates_start_at_zero_and_only_they_are_trained():
    backbone = vit(qkv_bias="no_key")
    expected = copy.deepcopy(backbone).forward_cls(IMAGES)
    made = task(backbone, train="lora", lora={"rank": 2, "alpha": 4})
    torch.testing.assert_close(made.head.features(backbone, IMAGES), expected)
    learnt = {name for name, p in made.named_parameters() if p.requires_grad}
    assert learnt == {f"backbone.blocks.{i}.attn.qkv.{part}" for i in (0, 1) for part in ("down", "up")} | {
        "head.fc.weight",
        "head.fc.bias",
    }
    layer = backbone.blocks[0].attn.qkv
    assert isinstance(layer, AdaptedLinear)
    torch.nn.init.normal_(layer.up)
    torch.testing.assert_close(layer.weight, layer.frozen + 2.0 * layer.up @ layer.down)


def test_low_rank_updates_do_not_take_the_place_of_a_mechanism():
    backbone = TimmBackbone(
        "vit_tiny_patch16_224",
        (32, 32),
        depth=1,
        embed_dim=24,
        attention=({"kind": "eca", "places": "blocks.0.mlp.fc2"},),
    )
    with pytest.raises(
        ValueError, match=r"task\.lora\.layers: a mechanism stands on mlp\.fc2 of block 0; leave it out"
    ):
        task(backbone, train="lora", lora={"rank": 2, "layers": ["fc2"]})


def test_an_average_of_low_rank_weights_is_kept_and_predicts():
    made = task(train="lora", optim={"ema_decay": 0.5})
    learn(made, 3, 1e-2)
    average = made.evaluated
    assert average is not made
    assert not average.head.fc.weight.equal(made.head.fc.weight)
    assert average.eval().predict({"image": PIXELS})[0].probabilities.shape == (4,)


def test_the_classifiers_of_a_grid_train_independently():
    together = task(train="grid", grid={"blocks": [1, 2], "pools": ["token_mean"], "lrs": [0.1, 1.0]})
    alone = task(train="grid", grid={"blocks": [2], "pools": ["token_mean"], "lrs": [1.0]})
    assert [str(cell) for cell in together.head.cells][-1] == "blocks 2 token_mean lr 1"
    alone.head.heads[0].load_state_dict(together.head.heads[3].state_dict())
    learn(together, 5, 0.01)
    learn(alone, 5, 0.01)
    torch.testing.assert_close(alone.head.heads[0].weight, together.head.heads[3].weight)
    rates = {name: group["lr_scale"] for group in together.param_groups() for name in group["names"]}
    assert [rates[f"head.heads.{i}.weight"] for i in range(4)] == [0.1, 1.0, 0.1, 1.0]


def test_a_grid_reads_class_tokens_of_the_last_blocks_and_the_last_mean_patch():
    backbone = vit()
    layers = backbone.intermediate(IMAGES, 2)
    expected = torch.cat([layers[0][:, 0], layers[1][:, 0], layers[1][:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(features(layers, "token_mean", 1), expected)
    with pytest.raises(ValueError, match=r"blocks: 4, but the backbone has 2 blocks"):
        task(train="grid")


def test_frozen_parts_are_in_eval_mode_and_trained_blocks_keep_drop_path():
    backbone = vit()
    backbone.set_drop_path(0.5, uniform=True)
    made = task(backbone, train="partial", partial_blocks=1)
    assert [block.training for block in backbone.blocks] == [False, True] and not backbone.training
    learnt = {name.partition(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert learnt == {"blocks", "norm"} and not any(p.requires_grad for p in backbone.blocks[0].parameters())
    assert made.noises == {"drop": (2, 2)}
    dropped = made(batch(drop=torch.zeros(4, 2, 2)), 0)["loss"]
    kept = made(batch(drop=torch.ones(4, 2, 2)), 0)["loss"]
    assert not dropped.equal(kept)


def test_from_an_image_to_its_picture():
    made = task(augment={"rand_augment": 2, "erase": 0.5})
    example = Example("x", "x", np.full((20, 30, 3), 90, np.uint8), 2)
    transform = made.train_transform()
    samples = [transform(example, np.random.default_rng(i)) for i in range(4)]
    losses = made({**made.collate(samples), "rng_step": torch.rand(64)}, 0)
    assert set(losses) == {"loss", "top1_train"} and not losses["top1_train"].requires_grad
    made.eval()
    with torch.no_grad():
        (found,) = made.predict(made.collate([made.eval_transform()(example)]))
    assert found.probabilities.sum() == pytest.approx(1)
    picture = made.picture(example, found)
    assert picture.dtype == np.uint8 and picture.ndim == 3


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="1 class; a classifier needs at least 2"):
        Classification(
            ClassificationConfig.model_validate({}), OpenedBackbone(vit(), (0.5,) * 3, (0.5,) * 3, ""), Classes(["a"])
        )


def test_conflicting_settings_are_all_named():
    section = {"name": "classification", "train": "linear", "lora": {"rank": 2}, "augment": {"mixup": 0.8}, "resize": 8}
    values = {
        "run_dir": "r",
        "task": section,
        "model": {"release": "x", "drop_path_rate": 0.1, "img_size": 16},
        "data": {"train": {"images": "a"}, "val": {"images": "b", "masks": "c"}},
        "optim": {"lr": 1, "global_batch_size": 9, "total_steps": 1, "layer_decay": 0.5},
    }
    with pytest.raises(ConfigError) as error:
        validate(FinetuneConfig, values, source="t.yaml")
    expected = ("task.lora: given, but task.train is linear", "optim.global_batch_size: 9 in 1 micro-batches")
    expected += ("model.drop_path_rate: 0.1", "optim.layer_decay: 0.5", "task.resize: 8 is smaller", "data.val.masks")
    assert all(any(problem.startswith(text) for problem in error.value.problems) for text in expected)
    assert any(problem.endswith("; set optim.layer_decay=1") for problem in error.value.problems)


def test_a_batch_norm_of_one_image_is_refused():
    values = {
        "run_dir": "r",
        "model": {"release": "x"},
        "data": {"train": {"images": "a"}, "val": {"images": "b"}},
        "optim": {"lr": 1, "global_batch_size": 2, "total_steps": 1},
        "engine": {"accumulation_steps": 2},
    }
    for section, refused in (
        ({"name": "classification", "train": "linear"}, True),
        ({"name": "classification", "train": "linear", "batch_norm": False}, False),
        ({"name": "segmentation", "head": {"name": "upernet"}}, True),
        ({"name": "segmentation", "head": {"name": "linear"}}, False),
    ):
        validate(FinetuneConfig, {**values, "task": section, "engine": {}}, source="t.yaml")
        if not refused:
            validate(FinetuneConfig, {**values, "task": section}, source="t.yaml")
            continue
        with pytest.raises(ConfigError, match=r"optim\.global_batch_size: the batch norm .* of one image"):
            validate(FinetuneConfig, {**values, "task": section}, source="t.yaml")


def test_a_resolved_configuration_is_a_valid_one():
    for section in KINDS.values():
        resolved = ClassificationConfig.model_validate(section).model_dump(mode="json")
        assert ClassificationConfig.model_validate(resolved).model_dump(mode="json") == resolved
