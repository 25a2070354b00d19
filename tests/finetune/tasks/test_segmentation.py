"""Segmentation on the nuclei of samples/: every head learns them, and predictions come back in the original size."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from finetune.config import DataSource
from finetune.data.batches import EvalBatches, TrainBatches
from finetune.data.examples import DataProblems, Example
from finetune.data.maps.masks import open_examples
from finetune.heads.pixels.dense_parts import resize
from finetune.predictions import Classes, ClassMap
from finetune.tasks.configs.segmentation import SegmentationConfig
from finetune.tasks.opened import OpenedBackbone
from finetune.tasks.pixel_heads import pixel_loss
from finetune.tasks.segmentation import Segmentation
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

ROOT = Path(__file__).parents[3]
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "upernet": {"name": "upernet", "width": 16, "auxiliary_width": 8},
    "dpt": {"name": "dpt", "width": 16, "reassembled": (8, 8, 8, 8)},
    "eomt": {"name": "eomt", "num_queries": 6, "num_blocks": 2, "num_points": 256},
}


def nuclei(config: SegmentationConfig, limit: int = 8) -> Any:
    images, file = ROOT / "samples/nuclei/train", ROOT / "samples/nuclei/train.json"
    found = open_examples(config, DataSource(images=str(images), annotations=str(file)))  # pyright: ignore[reportCallIssue]
    found.objects.ids = found.objects.ids[:limit]
    return found


class Squares:
    """Images of three colours whose classes are the colours, in rectangles at random places."""

    classes = Classes(["red", "green", "blue"])
    fingerprint, findings = "squares", DataProblems()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        target = np.zeros((72, 88), np.uint8)
        for label in (1, 2, 1, 2):
            top, left = rng.integers(0, 50, 2)
            target[top : top + 24, left : left + 30] = label
        image = np.full((72, 88, 3), 60) + rng.integers(0, 40, (72, 88, 3))
        image += 120 * (target[..., None] == np.arange(3))
        return Example(index, f"{index}.png", image.astype(np.uint8), target)


def configured(head: str, **options: Any) -> SegmentationConfig:
    given = {"head": HEADS[head], "background": "background", "crop": 64, "stride": 64, "resize": 96, **options}
    return SegmentationConfig(**given)


def task_of(config: SegmentationConfig, classes: Classes, *, drop_path: float = 0.0) -> Segmentation:
    torch.manual_seed(0)
    backbone = ViT((64, 64), 8, embed_dim=48, depth=4, num_heads=3, drop_path_rate=drop_path, pos_embed="learned")
    return Segmentation(config, OpenedBackbone(backbone, (0.5,) * 3, (0.25,) * 3, "a small ViT"), classes)


def train_batches(
    task: Segmentation, examples: Any, *, micro: int = 4, rank: int = 0, world_size: int = 1
) -> TrainBatches:
    return TrainBatches(
        examples,
        task.train_transform(),
        task.collate,
        seed=0,
        global_batch=4,
        micro_batch=micro,
        rank=rank,
        world_size=world_size,
        noises=task.noises,
    )


def predictions(task: Segmentation, examples: Any) -> tuple[list[Example], list[ClassMap]]:
    batches = EvalBatches(examples, task.eval_transform(), task.collate, batch_size=3)
    held, found = [], []
    with torch.no_grad():
        for i in range(len(batches)):
            batch, some, failed = batches[i]
            assert batch is not None and not failed
            held += some
            found += task.eval().predict(batch)
    return held, found


def trained(task: Segmentation, examples: Any, *, steps: int, lr: float) -> dict[str, float]:
    """The scores on the images it was trained on."""
    task.train().total_steps = steps
    batches = train_batches(task, pickle.loads(pickle.dumps(examples)))
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad])
    for step in range(steps):
        losses = task(batches[step], step)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        losses["loss"].backward()
        if not step:
            without = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
            assert not without, f"DDP would wait for {without}"
        optimizer.step()
    metric = task.metric(examples)
    for i, (example, prediction) in enumerate(zip(*predictions(task, examples), strict=True)):
        assert prediction.classes.shape == example.target.shape and prediction.classes.dtype == np.uint8
        metric.update(i, example, prediction)
    metric.gather()
    return metric.compute().values


@pytest.mark.slow
@pytest.mark.parametrize(("head", "steps"), [("linear", 20), ("upernet", 40), ("dpt", 40), ("eomt", 60)])
def test_every_head_learns_the_colours_of_squares(head: str, steps: int):
    config = configured(head, scale=(0.8, 1.25), photometric=False, resize=None)
    task = task_of(config, Squares.classes, drop_path=0.1)
    assert trained(task, Squares(), steps=steps, lr=3e-3)["mIoU"] > 0.7


@pytest.mark.slow
def test_a_linear_layer_and_its_backbone_segment_nuclei_in_seconds():
    config = configured("linear", scale=(0.8, 1.25), photometric=False)
    examples = nuclei(config)
    task = task_of(config, examples.classes)
    assert trained(task, examples, steps=40, lr=4e-3)["mIoU"] > 0.6
    protocol = task.metric(examples).protocol
    assert protocol.startswith("shorter side 96 px, windows of 64 x 64 px every 64, 64;")


def test_a_prediction_does_not_depend_on_other_images_of_the_batch():
    config = configured("linear")
    examples = nuclei(config, limit=5)
    task = task_of(config, examples.classes).eval()
    together = predictions(task, examples)[1]
    batches = EvalBatches(examples, task.eval_transform(), task.collate, batch_size=1)
    for i, expected in enumerate(together):
        batch, _, _ = batches[i]
        assert batch is not None
        with torch.no_grad():
            assert (task.predict(batch)[0].classes == expected.classes).all()


def test_a_frozen_backbone_gets_no_gradient_and_is_not_in_the_groups():
    config = configured("linear", frozen=True)
    task = task_of(config, Classes(["background", "nucleus"]), drop_path=0.5).train()
    names = {name for group in task.param_groups() for name in group["names"]}
    layers = [f"head.reader.{layer}.{kind}" for layer in ("norm", "classify") for kind in ("weight", "bias")]
    assert names == set(layers)
    batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "target": torch.zeros(2, 64, 64)}
    task(batch, 0)["loss"].backward()
    assert all(p.grad is None for p in task.dense.parameters())
    assert not task.dense.training


def test_a_skipped_step_does_not_change_the_statistics_of_batch_norm():
    task = task_of(configured("linear"), Classes(["background", "nucleus"])).train()
    batch = {"image": torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8), "target": torch.zeros(2, 64, 64)}
    kept = []
    for end in (task.discard_pending, lambda: task.after_step(1)):
        task(batch, 0)
        end()
        kept.append(task.head.reader.norm.running_mean.abs().sum().item())  # pyright: ignore
    assert kept[0] == 0 < kept[1]


def test_layer_decay_reaches_the_backbone_below_the_head():
    task = task_of(configured("upernet"), Classes(["background", "nucleus"]))
    task.prepare(_optim(layer_decay=0.5, head_lr_scale=2.0))
    scales = {name: group["lr_scale"] for group in task.param_groups() for name in group["names"]}
    assert scales["dense.backbone.blocks.3.mlp.fc1.weight"] == 0.5
    assert scales["dense.backbone.patch_embed.proj.weight"] == 0.5**5
    assert scales["head.reader.classify.weight"] == scales["head.auxiliary.classify.weight"] == 2.0


def _optim(**values: float) -> Any:
    from finetune.config import FinetuneOptim

    return FinetuneOptim(global_batch_size=4, total_steps=10, lr=1e-3, **values)  # pyright: ignore


def test_void_pixels_have_no_gradient_and_half_batches_average_to_the_full_one():
    logits = torch.randn(4, 3, 8, 8, requires_grad=True)
    target = torch.randint(0, 3, (4, 8, 8))
    target[0, :, :5] = 255
    pixel_loss(logits, target).backward()
    assert logits.grad is not None and (logits.grad[0, :, :, :5] == 0).all() and (logits.grad[1] != 0).any()
    halves = [pixel_loss(logits[part], target[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, pixel_loss(logits, target))


@pytest.mark.parametrize("head", ["linear", "upernet", "dpt"])
def test_a_hierarchical_backbone_gives_its_own_pyramid(head: str):
    backbone = TimmBackbone("convnext_atto", (64, 64))
    config = configured(head)
    task = Segmentation(config, OpenedBackbone(backbone, (0.5,) * 3, (0.5,) * 3, "convnext"), Classes(["a", "b", "c"]))
    batch = {
        "image": torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8),
        "target": torch.randint(0, 3, (2, 64, 64)),
    }
    batch |= {name: torch.rand(2, *shape) for name, shape in task.noises.items()}
    task.train()(batch, 0)["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert task.eval().outputs(torch.randn(1, 3, 50, 70))[0].shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ("head", "timm", "size"),
    [*((head, None, (48, 56)) for head in HEADS), ("linear", "test_convnext", (64, 64))],
)
def test_pixels_do_not_shift_in_images_of_incomplete_patches(head: str, timm: str | None, size: tuple[int, int]):
    task = task_of(configured(head), Squares.classes)
    if timm is not None:
        opened = OpenedBackbone(TimmBackbone(timm, (64, 64)), (0.5,) * 3, (0.5,) * 3, timm)
        task = Segmentation(configured(head), opened, Squares.classes)
    images = torch.randn(1, 3, 43, 53)
    padded = F.pad(images, (0, size[1] - 53, 0, size[0] - 43))
    task.eval()
    with torch.no_grad():
        whole = resize(task.outputs(padded)[0], padded.shape[2:])
        torch.testing.assert_close(
            resize(task.outputs(images)[0], (43, 53)), whole[:, :, :43, :53], atol=1e-4, rtol=1e-4
        )


def test_the_picture_shows_truth_and_prediction():
    config = configured("linear")
    examples = nuclei(config, limit=1)
    task, example = task_of(config, examples.classes), examples[0]
    alone = task.picture(example, None)
    both = task.picture(example, ClassMap(example.target))
    assert alone.dtype == both.dtype == np.uint8 and both.shape[1] > alone.shape[1]


def test_one_class_is_refused():
    with pytest.raises(ValueError, match=r"at least two are needed"):
        task_of(configured("linear"), Classes(["nucleus"]))
