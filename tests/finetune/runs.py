"""Tiny fine-tuning runs of the real command on real photos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from tests.runs import SHARDS

STEPS = 12
CONFIG = """
run_dir: {run_dir}
task: {{name: classification}}
model: {{release: {release}, drop_path_rate: 0.2}}
data:
  train: {{images: {train}, limit: 80}}
  val: {{images: {val}, limit: 21}}
  num_workers: {workers}
optim: {{lr: 1e-3, total_steps: 12, global_batch_size: 8, warmup_steps: 2, layer_decay: 0.75, ema_decay: 0.9}}
checkpoint: {{every_steps: 3, keep: 10}}
log: {{every_steps: 1, tensorboard: false}}
evaluate: {{every_steps: 6, batch_size: 4, pictures: 2}}
"""


def make_release(folder: Path) -> Path:
    """A release of a ViT of 2 blocks, untrained."""
    torch.manual_seed(7)
    vit = ViT((32, 32), 8, embed_dim=48, depth=2, num_heads=3)
    return write_release(folder, vit, objective="mae", extra_state={}, record={})


def write_config(folder: Path, name: str, *, workers: int = 0) -> Path:
    """A configuration whose run folder is `folder/name`, from the release `folder/backbone`."""
    path = folder / f"{name}.yaml"
    text = CONFIG.format(
        run_dir=folder / name,
        release=folder / "backbone",
        train=SHARDS / "train",
        val=SHARDS / "val",
        workers=workers,
    )
    path.write_text(text)
    return path


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())
