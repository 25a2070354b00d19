"""What can be explained: a network with a score for each image, of whatever task, behind one interface.

An explanation is of one answer: the class of a classifier, the best detection of a detector, the largest class of a
segmenter. A backbone gives no answer; its score is how far its vector is on the way from that of the blurred image to
that of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data.examples import Example
from finetune.data.transforms.images import EvalTransform
from finetune.heads.pooled.grid import GridHead
from finetune.predictions import Classes
from finetune.tasks.base import Task
from finetune.tasks.classification import Classification
from finetune.tasks.opened import OpenedBackbone
from pretrain.data.views.augment import blur
from pretrain.models.backbones.contract import Backbone

BLUR = 1 / 8  # standard deviation of the blur, of the shorter side: nothing is left to recognize
FEWEST, USUAL = 4, 14  # cells a side: fewer than the first become as many as the second

Grid = tuple[int, int]


@dataclass(frozen=True)
class Aim:
    """What is explained of one image.

    text     in words, "apple 0.83"
    label    index of its class in the classes; None: it has none
    reads    what the score reads: box, query, pixels or vectors; None: nothing but the class
    box      float [4] of a detection, x1, y1, x2, y2 in pixels of the canvas
    """

    text: str
    label: int | None = None
    reads: Any = None
    box: Tensor | None = None


class Subject:
    """Base of the subjects.

    Attributes:
        kind: "backbone" or the name of a task. title: in words. protocol: how images are prepared and what is scored.
        network: the module with all weights, in eval mode. backbone: the part whose attention is shown.
        classes: of the labels; empty for a backbone. size: (height, width) of the network's images, the canvas.
        reads_token: the answer reads the class token; else it reads patches.
    """

    kind: str
    title: str
    protocol: str
    network: nn.Module
    backbone: Backbone
    classes: Classes = Classes()
    size: tuple[int, int]
    reads_token = False

    def prepare(self, example: Example) -> Tensor:
        """The image as the network gets it, normalized float32 [C, h, w] of `size`."""
        raise NotImplementedError

    def on_canvas(self, mask: np.ndarray) -> np.ndarray:
        """bool [H, W] of an image -> bool [h, w] of the canvas: where its pixels come to lie."""
        image = np.repeat(mask[:, :, None].astype(np.uint8) * 255, self.backbone.in_chans, axis=2)
        return (self.pixels(Example(0, "", image, None), fill=0)[0] > 127).numpy()

    def aims(self, images: Tensor) -> Sequence[Aim | None]:
        """What is explained of each of the images [b, C, h, w]; None where the network gives no answer."""
        raise NotImplementedError

    def renewed(self, images: Tensor, aims: Sequence[Aim]) -> Sequence[Aim]:
        """The same aims for changed weights of the network."""
        del images
        return aims

    def scores(self, images: Tensor, aims: Sequence[Aim], *, logits: bool = False) -> Tensor:
        """How much each image supports its aim, [b], about 0 to 1. logits: before the softmax, for gradients."""
        raise NotImplementedError

    def place_of(self, aim: Aim) -> Tensor | None:
        """Where on the canvas the answer is, bool [h, w]; None: it has no place."""
        if aim.box is None:
            return None
        x1, y1, x2, y2 = (round(value) for value in aim.box.tolist())
        place = torch.zeros(self.size, dtype=torch.bool)
        place[max(y1, 0) : max(y2, y1 + 1), max(x1, 0) : max(x2, x1 + 1)] = True
        return place

    def to(self, device: torch.device) -> Subject:
        """On a device, in eval mode."""
        self.network.to(device).eval()
        return self

    @property
    def tokens(self) -> Grid | None:
        """(rows, columns) of the patch tokens of the canvas; None: it has no patch tokens."""
        if "patches" not in self.backbone.provides:
            return None
        p = self.backbone.patch_size
        return -(-self.size[0] // p), -(-self.size[1] // p)

    @property
    def cells(self) -> Grid:
        """(rows, columns) in which maps are compared: the patches; where there are few, a finer grid."""
        tokens = self.tokens
        if tokens is not None and min(tokens) >= FEWEST:
            return tokens
        return min(USUAL, self.size[0]), min(USUAL, self.size[1])

    def substrate(self, images: Tensor) -> Tensor:
        """The images with nothing left to see: blurred, [b, C, h, w]."""
        sigma = max(min(self.size) * BLUR, 1.0)
        radius = min(round(3 * sigma), (min(self.size) - 1) // 2)
        return blur(images, images.new_full((len(images), 1, 1, 1), sigma), radius)

    def follow(self, aims: Sequence[Aim]) -> Callable[[Tensor], Tensor]:
        """Images [b, C, h, w] -> their scores [b, 1]: the model that deletion and insertion follow."""
        return lambda images: self.scores(images, aims)[:, None]

    def pixels(self, example: Example, *, fill: int | None = None) -> Tensor:
        """The image on the canvas, [C, h, w] in 0 to 255; `fill` is the value around it, by default the network's."""
        raise NotImplementedError


class BackboneSubject(Subject):
    """A backbone without a task: its score is how much of its vector's difference to the blurred image is there.

    With f the vector of an image, f0 of the whole and fb of the blurred one: (f - fb) (f0 - fb) / |f0 - fb|^2, which
    is 1 for the image and 0 for the blurred one.
    """

    kind = "backbone"

    def __init__(self, opened: OpenedBackbone):
        self.network = self.backbone = opened.backbone.eval()
        self.title, self.size = opened.title, self.backbone.img_size
        self.reads_token = self.backbone.class_token
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (opened.mean, opened.std))
        self._transform = EvalTransform(self.size)
        self.protocol = (
            f"{self._transform.in_words()}; score: the share of the vector's difference between the blurred image and "
            "the image"
        )

    def prepare(self, example: Example) -> Tensor:
        return (self.pixels(example).float() / 255 - self._mean) / self._std

    @torch.no_grad()
    def aims(self, images: Tensor) -> Sequence[Aim | None]:
        whole, blurred = (self.backbone.forward_cls(x).float() for x in (images, self.substrate(images)))
        return [Aim("the vector of the image", reads=(b, f - b)) for f, b in zip(whole, blurred, strict=True)]

    def renewed(self, images: Tensor, aims: Sequence[Aim]) -> Sequence[Aim]:
        return [aim for aim in self.aims(images) if aim is not None]

    def scores(self, images: Tensor, aims: Sequence[Aim], *, logits: bool = False) -> Tensor:
        del logits
        vectors = self.backbone.forward_cls(images).float()
        start, step = (torch.stack([aim.reads[i] for aim in aims]) for i in (0, 1))
        return ((vectors - start) * step).sum(1) / step.square().sum(1).clamp(min=1e-12)

    def pixels(self, example: Example, *, fill: int | None = None) -> Tensor:
        return self._transform(replace(example, target=None))["image"]


class TaskSubject(Subject):
    """Base of the fine-tuned tasks."""

    def __init__(self, task: Task, title: str):
        self.task = self.network = task.eval()
        self.kind, self.title = task.config.name, title
        self.backbone, self.classes, self.size = task.bare_backbone, task.classes, task.input_size

    def prepare(self, example: Example) -> Tensor:
        device = self.task.mean.device
        return self.task.normalize(self.pixels(example)[None].to(device))[0].cpu()


class ClassifierSubject(TaskSubject):
    """A classifier: the score is the probability of the class that it names."""

    task: Classification

    def __init__(self, task: Classification, title: str):
        super().__init__(task, title)
        self.protocol = f"{task.preparation()}; score: probability of the predicted class"
        head = task.head
        pool = head.cells[int(head.best)].pool if isinstance(head, GridHead) else getattr(head, "pool", "mean")
        self.reads_token = pool == "token" and self.backbone.class_token

    @torch.no_grad()
    def aims(self, images: Tensor) -> Sequence[Aim | None]:
        best, labels = self.task.probabilities(self._logits(images)).max(1)
        rows = zip(best.tolist(), labels.tolist(), strict=True)
        return [Aim(f"{self.classes[label]} {share:.2f}", label) for share, label in rows]

    def scores(self, images: Tensor, aims: Sequence[Aim], *, logits: bool = False) -> Tensor:
        found = self._logits(images)
        found = found if logits else self.task.probabilities(found)
        labels = torch.tensor([aim.label for aim in aims], device=found.device)
        return found.gather(1, labels[:, None])[:, 0]

    def _logits(self, images: Tensor) -> Tensor:
        found = self.task.logits(images).float()
        return found[int(self.task.head.best)] if isinstance(self.task.head, GridHead) else found

    def pixels(self, example: Example, *, fill: int | None = None) -> Tensor:
        return self.task.eval_transform()(replace(example, target=None))["image"]
