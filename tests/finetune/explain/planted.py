"""A classifier that learned a shortcut: noise photos of two classes, of which one has a tag in its corner."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from finetune.predictions import Classes
from finetune.tasks.classification import Classification
from finetune.tasks.configs.classification import ClassificationConfig
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.backbones.vit import ViT

TAG = (slice(24, 32), slice(24, 32))  # rows and columns of 32 x 32 pixels: one patch of 8
CLASSES = Classes(("plain", "tagged"))


def photos(count: int, *, tagged: Sequence[bool], seed: int) -> np.ndarray:
    """Smooth noise, uint8 [count, 32, 32, 3], with a white tag at the lower right corner of those that are tagged."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 180, (count, 8, 8, 3))
    images = coarse.repeat(4, 1).repeat(4, 2) + rng.integers(-20, 20, (count, 32, 32, 3))
    for image, has_tag in zip(images, tagged, strict=True):
        if has_tag:
            image[TAG] = 250
    return images.clip(0, 255).astype(np.uint8)


@cache
def shortcut_task() -> Classification:
    """Trained until it tells the classes by the tag."""
    torch.manual_seed(0)
    vit = ViT((32, 32), 8, embed_dim=32, depth=2, num_heads=2, pos_embed="learned")
    opened = OpenedBackbone(vit, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "a small ViT")
    task = Classification(ClassificationConfig(name="classification", resize=32), opened, CLASSES)
    labels = torch.arange(64) % 2
    images = task.normalize(torch.from_numpy(photos(64, tagged=(labels == 1).tolist(), seed=0)).permute(0, 3, 1, 2))
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for step in range(60):
        chosen = torch.arange(16) + 16 * (step % 4)
        loss = torch.nn.functional.cross_entropy(task.logits(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (task.logits(images).argmax(1) == labels).float().mean()
    assert right > 0.95, right
    return task.eval()


def write_photos(folder: Path, count: int = 8) -> Path:
    """Folders of the two classes, `count` images each, which the classifier was not trained on."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(photos(count, tagged=[bool(label)] * count, seed=5 + label)):
            Image.fromarray(image).save(folder / name / f"{number}.png")
    return folder
