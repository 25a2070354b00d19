"""The task detection: every head trains and predicts, predictions lie on the original image, squares are learnt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from finetune.config import FinetuneConfig
from finetune.data.batches import EvalBatches, TrainBatches
from finetune.data.coco import rle
from finetune.data.coco.instances import Instances, no_instances
from finetune.data.examples import DataProblems, Example
from finetune.predictions import Classes
from finetune.tasks.configs import DetectionConfig
from finetune.tasks.detection import Detection
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.configlib import ConfigError, validate
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT

RCNN = {
    "channels": 16, "scales": [2, 1], "anchors": [12, 24, 48], "ratios": [1.0], "rpn_convs": 1, "rpn_batch": 32,
    "before_nms": [100, 100], "proposals": [50, 50], "roi_batch": 16, "box_convs": 0, "box_dim": 32, "mask_convs": 1,
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"name": "faster_rcnn", **RCNN},
    "mask_rcnn": {"name": "mask_rcnn", **RCNN},
    "cascade": {"name": "mask_rcnn", "cascade": True, **RCNN},
    "eomt": {"name": "eomt", "num_queries": 8, "num_blocks": 1, "num_points": 64},
    "detr": {"name": "detr", "num_queries": 8, "width": 16, "depth": 2, "num_heads": 2},
}
CLASSES = Classes(["red", "green"], [3, 8])


class Squares:
    """Images of one or two bright rectangles; the last image has none."""

    def __init__(self, count: int, *, size: tuple[int, int] = (48, 80)) -> None:
        self.count, self.size = count, size
        self.classes, self.fingerprint, self.findings = CLASSES, "squares", DataProblems()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        rng, (height, width) = np.random.default_rng(index), self.size
        image = rng.integers(0, 30, (height, width, 3)).astype(np.uint8)
        if index == self.count - 1:
            return Example(index, str(index), image, no_instances(masks=True))
        masks, labels = [], []
        for half in range(2):
            side = rng.integers(14, 26, 2)
            x = int(rng.integers(0, width // 2 - side[0])) + half * width // 2
            y = int(rng.integers(0, height - side[1]))
            label = int(rng.integers(1, 3))
            image[y : y + side[1], x : x + side[0], label - 1] = 230
            mask = np.zeros(self.size, dtype=np.uint8)
            mask[y : y + side[1], x : x + side[0]] = 1
            masks.append(mask)
            labels.append(label)
        packed = rle.encode(np.stack(masks))
        crowd = np.zeros(2, dtype=bool)
        boxes, areas = rle.boxes(packed), rle.areas(packed)
        return Example(index, str(index), image, Instances(boxes, np.array(labels), crowd, areas, np.arange(2), packed))


def task_of(head: str, *, width: int = 32, **changes: Any) -> Detection:
    torch.manual_seed(0)
    section = {"name": "detection", "head": HEADS[head], "size": 64, "scale": [0.8, 1.2], **changes}
    backbone = ViT((64, 64), 8, embed_dim=width, depth=2, num_heads=2, pos_embed="learned")
    config = validate(DetectionConfig, section, source="test")
    return Detection(config, OpenedBackbone(backbone, (0.5,) * 3, (0.25,) * 3, "a small ViT"), CLASSES)


def train_batches(task: Detection, examples: Squares, batch: int) -> TrainBatches:
    return TrainBatches(
        examples, task.train_transform(), task.collate, seed=0, global_batch=batch, micro_batch=batch, rank=0,
        world_size=1,
        noises=task.noises,
    )  # fmt: skip


def evaluated(task: Detection, examples: Squares, batch: int = 3) -> Any:
    task.eval()
    metric = task.metric(examples)
    batches = EvalBatches(examples, task.eval_transform(), task.collate, batch_size=batch)
    with torch.no_grad():
        for number in range(len(batches)):
            inputs, kept, _ = batches[number]
            assert inputs is not None
            for index, one, found in zip(inputs["index"].tolist(), kept, task.predict(inputs), strict=True):
                metric.update(index, one, found)
    metric.gather()
    return metric.compute()


@torch.no_grad()
def predicted(task: Detection, examples: Squares) -> list[Any]:
    batches = EvalBatches(examples, task.eval_transform(), task.collate, batch_size=len(examples))
    return task.eval().predict(batches[0][0] or {})


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains_all_its_parameters_and_predicts(head: str):
    task, examples = task_of(head, rel_pos=True).train(), Squares(4)
    losses = task(train_batches(task, examples, 4)[0], 0)
    assert losses["loss"].requires_grad
    assert not any(value.requires_grad for name, value in losses.items() if name != "loss")
    losses["loss"].backward()
    silent = [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent
    one = Squares(2, size=(30, 50))
    found = predicted(task, one)
    for each in found:
        assert each.boxes.dtype == np.float32
        assert (each.boxes >= 0).all()
        assert (each.boxes <= np.array([50, 30, 50, 30])).all()
        assert set(each.labels.tolist()) <= {1, 2}
        assert (np.diff(each.scores) <= 0).all()
        assert (each.masks is not None) == task.config.with_masks
        assert all(list(mask["size"]) == [30, 50] for mask in each.masks or [])


def test_stages_of_a_hierarchical_backbone_get_a_norm_each_before_the_pyramid_of_an_r_cnn():
    backbone = TimmBackbone("test_convnext", (64, 64))
    head = {**HEADS["faster_rcnn"], "anchors": [12, 24, 48, 96, 192]}
    config = validate(DetectionConfig, {"name": "detection", "head": head, "size": 64}, source="test")
    task = Detection(config, OpenedBackbone(backbone, (0.5,) * 3, (0.25,) * 3, "a ConvNeXt"), CLASSES).train()
    with torch.no_grad():
        for level in task.dense(torch.randn(1, 3, 64, 64) * 20):
            torch.testing.assert_close(level.std(1, correction=0), torch.ones(level[:, 0].shape), atol=0.05, rtol=0)
    task(train_batches(task, Squares(2), 2)[0], 0)["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("head", ["mask_rcnn", "detr", "eomt"])
def test_a_batch_without_any_object_has_a_loss_and_all_gradients(head: str):
    task, empty = task_of(head).train(), Squares(1)
    loss = task(train_batches(task, empty, 2)[0], 0)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)


def test_detections_on_the_canvas_are_mapped_to_the_original_image(monkeypatch: pytest.MonkeyPatch):
    task, examples = task_of("mask_rcnn", test_size=[96, 128]), Squares(5)

    def know(_: Any, images: Any, *, sizes: Any) -> list[dict[str, torch.Tensor]]:
        known = []
        for number, (height, width) in enumerate(sizes):
            truth = examples[number].target
            scale = torch.tensor([width / 80, height / 48] * 2)
            boxes = torch.from_numpy(truth.boxes) * scale
            found = {"boxes": boxes, "labels": torch.from_numpy(truth.labels), "scores": torch.ones(len(boxes))}
            known.append(found | {"masks": torch.ones(len(boxes), 28, 28)})
        return known

    monkeypatch.setattr(task.head.rcnn, "predict", know)
    scores = evaluated(task, examples, batch=5)
    assert scores.values["box_ap"] == pytest.approx(1.0)
    assert scores.values["mask_ap"] == pytest.approx(1.0)


@pytest.mark.slow
def test_squares_are_learned():
    task, examples = task_of("mask_rcnn", final_norm=True, scale=[1.0, 1.0]), Squares(9)
    batches = train_batches(task, examples, 8)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    before = evaluated(task, examples).values
    task.train()
    for step in range(60):
        torch.manual_seed(step)
        optimizer.zero_grad()
        task(batches[step], step)["loss"].backward()
        optimizer.step()
    after = evaluated(task, examples).values
    assert before["box_ap50"] < 0.2
    assert after["box_ap50"] > 0.6
    assert after["mask_ap50"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("head", "steps"), [("detr", 100), ("eomt", 60)])
def test_queries_overfit_squares_and_find_them_in_the_original_images(head: str, steps: int):
    task, examples = task_of(head, scale=[1.0, 1.0], hflip=0.0), Squares(3)
    task.total_steps = steps
    batches = train_batches(task, examples, 2)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    task.train()
    for step in range(steps):
        optimizer.zero_grad()
        task(batches[step], step)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    scores = evaluated(task, examples).values
    assert scores["box_ap50"] > 0.7
    assert scores["box_ap"] > 0.4
    assert head == "detr" or scores["mask_ap50"] > 0.9


def test_the_same_batch_and_seed_give_the_same_loss_bit_for_bit():
    task = task_of("mask_rcnn").train()
    batches = train_batches(task, Squares(4), 4)
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(task(batches[2], 2)["loss"])
    assert torch.equal(*losses)


def test_a_picture_shows_truth_and_prediction():
    task, examples = task_of("mask_rcnn"), Squares(2)
    picture = task.picture(examples[0], predicted(task, examples)[0])
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 2 * 80


CONFIG = {
    "run_dir": "runs/x",
    "task": {"name": "detection"},
    "model": {"release": "runs/demo/release"},
    "data": {"train": {"images": "a", "annotations": "a.json"}, "val": {"images": "b", "annotations": "b.json"}},
    "optim": {"lr": 1e-3, "global_batch_size": 8, "total_steps": 10},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"train": {"images": "a"}, "val": {"images": "b"}}}, r"data\.train\.annotations: missing"),
        ({"task": {"name": "detection", "scale": [2.0, 1.0]}}, r"task\.scale: \[2\.0, 1\.0\] does not ascend"),
        ({"task": {"name": "detection", "global_blocks": [2]}}, r"task\.global_blocks: given without task\.window"),
        ({"task": {"name": "detection", "head": {"name": "mask_rcnn", "scales": [3]}}}, r"expected some of 4, 2, 1"),
        ({"task": {"name": "detection", "head": {"name": "mask_rccn"}}}, r"did you mean mask_rcnn"),
        ({"task": {"name": "detection", "head": {"name": "detr", "widht": 3}}}, r"unknown key \(did you mean width"),
    ],
)
def test_problems_are_named_by_the_key_of_the_configuration(changes: dict[str, Any], message: str):
    validate(FinetuneConfig, CONFIG, source="x.yaml")
    with pytest.raises(ConfigError, match=message):
        validate(FinetuneConfig, CONFIG | changes, source="x.yaml")
