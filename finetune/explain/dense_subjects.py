"""Detectors and segmenters as subjects: the best detection of an image, the largest class of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from finetune.data.examples import Example
from finetune.data.transforms.dense import canvas
from finetune.explain.subjects import Aim, ClassifierSubject, Subject, TaskSubject
from finetune.heads.pixels.dense_parts import resize
from finetune.heads.queries.detr import best_pairs
from finetune.tasks.base import Task
from finetune.tasks.classification import Classification
from finetune.tasks.detection import Detection
from finetune.tasks.detection_heads import DETRAdapter, RCNNAdapter
from finetune.tasks.segmentation import Segmentation

_EPS = 1e-6


class DetectorSubject(TaskSubject):
    """Base of the detectors: the best detection is explained, its box and class stay, and its score is followed."""

    task: Detection

    def __init__(self, task: Detection, title: str):
        super().__init__(task, title)
        self.protocol = f"{task.preparation()}; score: probability of the class of the best detection"

    def scores(self, images: Tensor, aims: Sequence[Aim], *, logits: bool = False) -> Tensor:
        shares = self._shares(images, aims)
        return shares.logit(_EPS) if logits else shares

    def pixels(self, example: Example, *, fill: int | None = None) -> Tensor:
        sample = self.task.eval_transform()(example)
        image, (height, width) = sample["image"], (int(value) for value in sample["content"])
        if fill is not None:
            image[:, height:], image[:, :, width:] = fill, fill
        return image

    def _aim(self, box: Tensor, label: int, score: float, reads: Any) -> Aim:
        """Of a detection: box [4], x1, y1, x2, y2 on the canvas, and the class from 0."""
        return Aim(f"{self.classes[label]} {score:.2f}", label, reads, box.detach().cpu())

    def _shares(self, images: Tensor, aims: Sequence[Aim]) -> Tensor:
        raise NotImplementedError


class BoxSubject(DetectorSubject):
    """Faster, Mask and Cascade R-CNN: the probability that the box head gives to the box."""

    @torch.no_grad()
    def aims(self, images: Tensor) -> Sequence[Aim | None]:
        found = self._rcnn.predict(self.task.dense, images)
        return [
            self._aim(one["boxes"][0], int(one["labels"][0]) - 1, float(one["scores"][0]), one["boxes"][:1])
            if len(one["boxes"])
            else None
            for one in found
        ]

    def _shares(self, images: Tensor, aims: Sequence[Aim]) -> Tensor:
        features = self._rcnn.features(self.task.dense, images)
        boxes = [aim.reads.to(images.device) for aim in aims]
        found = self._rcnn.roi_heads.class_scores(features, boxes, [self.size] * len(images))
        return found.gather(1, _labels(aims, found.device)[:, None] + 1)[:, 0]

    @property
    def _rcnn(self) -> Any:
        assert isinstance(self.task.head, RCNNAdapter)
        return self.task.head.rcnn


class QuerySubject(DetectorSubject):
    """DETR and EoMT: the probability that the query of the detection gives to its class."""

    @torch.no_grad()
    def aims(self, images: Tensor) -> Sequence[Aim | None]:
        places, _ = self.task.outputs(images)
        found: list[Aim | None] = []
        for place, shares in zip(places.float(), self._probabilities(images), strict=True):
            best, queries, labels = best_pairs(shares, 1)
            box = self._box(place[int(queries[0])], images)
            chosen = None if box is None else self._aim(box, int(labels[0]), float(best[0]), int(queries[0]))
            found.append(chosen)
        return found

    def _shares(self, images: Tensor, aims: Sequence[Aim]) -> Tensor:
        shares, rows = self._probabilities(images), torch.arange(len(images), device=images.device)
        queries = torch.tensor([aim.reads for aim in aims], device=images.device)
        return shares[rows, queries, _labels(aims, images.device)]

    def _probabilities(self, images: Tensor) -> Tensor:
        """[b, Q, K]."""
        logits = self.task.outputs(images)[1].float()
        if isinstance(self.task.head, DETRAdapter):
            return self.task.head.detr.loss.scores(logits)
        return logits.softmax(-1)[..., :-1]

    def _box(self, place: Tensor, images: Tensor) -> Tensor | None:
        """Of a query, on the canvas: its box [4], or the smallest around its mask [h, w]; None: an empty mask."""
        if isinstance(self.task.head, DETRAdapter):
            height, width = self.task.dense.covered(images)
            return box_convert(place, "cxcywh", "xyxy") * place.new_tensor([width, height] * 2)
        inside = (resize(place[None, None], self.size)[0, 0] > 0).nonzero()
        if not len(inside):
            return None
        (top, left), (bottom, right) = inside.amin(0).tolist(), inside.amax(0).tolist()
        return place.new_tensor([left, top, right + 1, bottom + 1])


class SegmenterSubject(TaskSubject):
    """A segmenter: the mean probability of the class over the pixels that it was given, which stay.

    The class with most pixels is explained, the background only where there is nothing else. The network sees one
    window of the image, the central one.
    """

    task: Segmentation

    def __init__(self, task: Segmentation, title: str):
        super().__init__(task, title)
        height, width = self.size
        resized = "" if task.config.resize is None else f"shorter side {task.config.resize} px, "
        self.protocol = (
            f"{resized}the central {height} x {width} px; score: mean probability of the class over the pixels of the "
            "class with most pixels, the background aside"
        )

    @torch.no_grad()
    def aims(self, images: Tensor) -> Sequence[Aim | None]:
        found: list[Aim | None] = []
        for shares in self._probabilities(images):
            classes = shares.argmax(0)
            counts = torch.bincount(classes.flatten(), minlength=len(self.classes))
            for index, name in enumerate(self.classes):
                if name.lower() == "background":
                    counts[index] = min(int(counts[index]), 1) if counts.sum() > counts[index] else counts[index]
            label = int(counts.argmax())
            where = classes == label
            share = float(shares[label][where].mean())
            found.append(Aim(f"{self.classes[label]} {share:.2f}", label, where))
        return found

    def scores(self, images: Tensor, aims: Sequence[Aim], *, logits: bool = False) -> Tensor:
        labels = _labels(aims, images.device)
        shares = self._probabilities(images)[torch.arange(len(images), device=images.device), labels]
        where = torch.stack([aim.reads for aim in aims]).to(images.device)
        means = (shares * where).flatten(1).sum(1) / where.flatten(1).sum(1)
        return means.logit(_EPS) if logits else means

    def place_of(self, aim: Aim) -> Tensor | None:
        return aim.reads

    def pixels(self, example: Example, *, fill: int | None = None) -> Tensor:
        """The central window; a smaller image is filled at the right and below."""
        image = self.task.eval_transform()(example)["image"]
        height, width = self.size
        top, left = (
            (have - want) // 2 if have > want else 0 for have, want in zip(image.shape[1:], self.size, strict=True)
        )
        image = image[:, top : top + height, left : left + width]
        around = self.task.fill() if fill is None else (fill,) * len(image)
        filled = canvas(around, self.size, image.dtype)
        filled[:, : image.shape[1], : image.shape[2]] = image
        return filled

    def _probabilities(self, images: Tensor) -> Tensor:
        """[b, K, h, w] of the canvas."""
        found = resize(self.task.outputs(images)[0].float(), self.size)
        if self.task.head.gives_logits:
            return found.softmax(1)
        return found / found.sum(1, keepdim=True).clamp(min=_EPS)


def subject_of_task(task: Task, title: str) -> Subject:
    """The subject of a fine-tuned task.

    Raises:
        ValueError: the task gives no answer that could be explained.
    """
    if isinstance(task, Classification):
        return ClassifierSubject(task, title)
    if isinstance(task, Segmentation):
        return SegmenterSubject(task, title)
    if isinstance(task, Detection):
        return (BoxSubject if isinstance(task.head, RCNNAdapter) else QuerySubject)(task, title)
    raise ValueError(
        f"task {task.config.name}: its answer is no class, and an explanation is of a class; explain a classifier, a "
        "detector or a segmenter"
    )


def _labels(aims: Sequence[Aim], device: torch.device) -> Tensor:
    return torch.tensor([aim.label for aim in aims], device=device)
