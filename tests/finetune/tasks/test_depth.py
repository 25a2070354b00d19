"""Depth: both heads learn that dark is far, in metres of the original image."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from finetune.data.batches import EvalBatches, TrainBatches
from finetune.data.examples import DataProblems, Example
from finetune.heads.pixels.depth_bins import DepthBins
from finetune.predictions import Classes
from finetune.tasks.configs.depth import DepthConfig
from finetune.tasks.depth import Depth
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.backbones.vit import ViT


class Walls:
    """Images of walls: the darker, the farther, from 1 to 8 metres; a strip without depth."""

    classes, fingerprint, findings = Classes(), "walls", DataProblems()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        depth = np.full((70, 90), rng.uniform(1, 8), np.float32)
        for _ in range(4):
            top, left = rng.integers(0, 60, 2)
            depth[top : top + 30, left : left + 40] = rng.uniform(1, 8)
        image = np.repeat((255 - 28 * depth)[..., None], 3, axis=2).astype(np.uint8)
        depth[:4] = 0
        return Example(index, f"{index}.png", image, depth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "spacing"),
    [({"name": "linear"}, "uniform"), ({"name": "dpt", "width": 16, "reassembled": (8,) * 4}, "log")],
)
def test_both_heads_learn_planted_depth(head: dict, spacing: str):
    torch.manual_seed(0)
    config = DepthConfig(
        head=head, crop=64, min_depth=0.5, bins=32, bin_spacing=spacing, photometric=False, slide=True, stride=32,
        scale=(0.9, 1.1), flip=True,
    )  # fmt: skip # pyright: ignore
    backbone = ViT((64, 64), 8, embed_dim=48, depth=4, num_heads=3, pos_embed="learned")
    task = Depth(config, OpenedBackbone(backbone, (0.5,) * 3, (0.25,) * 3, "a small ViT"), Classes()).train()
    batches = TrainBatches(
        pickle.loads(pickle.dumps(Walls())), task.train_transform(), task.collate, seed=0, global_batch=4,
        micro_batch=4, rank=0, world_size=1, noises=task.noises,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=3e-3)
    for step in range(50):
        losses = task(batches[step], step)
        optimizer.zero_grad()
        losses["loss"].backward()
        assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
        optimizer.step()
    assert {"loss", "silog", "gradients"} == set(losses)
    evaluated = EvalBatches(Walls(), task.eval_transform(), task.collate, batch_size=8)
    metric = task.eval().metric(Walls())
    batch, examples, _ = evaluated[0]
    assert batch is not None
    with torch.no_grad():
        found = task.predict(batch)
    for i, (example, prediction) in enumerate(zip(examples, found, strict=True)):
        assert prediction.depth.shape == (70, 90) and prediction.depth.dtype == np.float32
        assert prediction.depth.min() >= 0.5 and prediction.depth.max() <= 10
        metric.update(i, example, prediction)
    metric.gather()
    scores = metric.compute()
    assert scores.values["abs_rel"] < 0.35 and scores.values["delta1"] > 0.5, scores.values
    assert "windows of 64 x 64 px every 32, 32, and mirrored" in scores.protocol
    picture = task.picture(Walls()[0], found[0])
    assert picture.ndim == 3 and picture.dtype == np.uint8


def test_depths_outside_the_range_are_not_trained_on():
    config = DepthConfig(head={"name": "linear"}, crop=32, min_depth=1.0, max_depth=4.0, bins=8)  # pyright: ignore
    backbone = ViT((32, 32), 8, embed_dim=32, depth=1, num_heads=2, pos_embed="learned")
    task = Depth(config, OpenedBackbone(backbone, (0.5,) * 3, (0.25,) * 3, "a small ViT"), Classes()).train()
    truth = torch.full((2, 32, 32), 2.0)
    batch = {"image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)}
    losses = []
    for outside in (0.0, 0.9, 4.1, 1000.0):
        truth[:, :9, 5:] = outside
        losses.append(task({**batch, "target": truth}, 0)["loss"].item())
    assert len(set(losses)) == 1


def test_metres_are_not_rounded_under_autocast():
    bins, logits = DepthBins(64, min_depth=1.0, max_depth=80.0, spacing="uniform"), torch.randn(1, 64, 8, 8)
    expected = bins(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bins(logits).equal(expected)


def test_the_section_lists_its_problems():
    with pytest.raises(ValueError, match="bin"):
        DepthConfig(bins=1)
    assert any("min_depth" in line for line in DepthConfig(min_depth=5, max_depth=2).problems(None))
    assert any("stride" in line for line in DepthConfig(crop=64, stride=65).problems(None))
