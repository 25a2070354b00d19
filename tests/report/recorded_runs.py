"""Folders of runs as they lie on a disk, without a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

VERDICT = "the loss diverged: 9.1 is <3> times the largest of the first ten; lower optim.lr"
CONFIG = """
objective: {name: mae}
model: {name: vit_tiny, img_size: 64}
data: {shards: samples/train}
optim: {name: adamw, lr: LR, global_batch_size: 32, total_steps: 200}
"""


def write_run(folder: Path, *, lr: float = 1e-3, alarm: bool = True) -> Path:
    """A stopped run of 100 steps of 200 with an alarm at step 60, probes at 0, 50 and 100, and three frames."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "knn/cls": 0.1, "knn/pixels": 0.07}]
    for step in range(1, 101):
        row = {"step": step, "loss": 1 / step + 0.05 * math.sin(step), "lr": lr, "grad_norm": 1.0 + 1 / step}
        rows.append({**row, "images_per_second": 160.0, "data_wait": 0.25, "loss_once": 1.0} if step == 100 else row)
    rows += [{"step": step, "doctor/rankme": 2.0 + step / 50} for step in range(10, 101, 10)]
    rows += [{"step": 50, "knn/cls": 0.2}, {"step": 100, "knn/cls": 0.3}]
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"ste\x00p": \n[1]\n{"step": 101, "lo')
    (folder / "config.yaml").write_text(CONFIG.replace("LR", str(lr)))
    (folder / "log.txt").write_text(
        "2026-01-01T10:00:00 resumed from runs/x/checkpoints/step-00000040\nstep 100/200  loss 0.0\n"
        "2026-01-01T10:05:00 stopped at step 100 of 200 (SIGTERM); the same command resumes\n"
    )
    (folder / "PREEMPTED").write_text("step 100\n")
    start = {"time": "2026-01-01T09:00:00", "world_size": 2, "device": "cpu", "command": "fovea pretrain x.yaml"}
    (folder / "environment.jsonl").write_text(json.dumps(start) + "\n")
    if alarm:
        (folder / "doctor.jsonl").write_text(
            json.dumps({"step": 60, "rule": "loss_diverged", "verdict": VERDICT}) + "\n"
        )
    film = folder / "pictures" / "film" / "input-masked"
    film.mkdir(parents=True)
    for step in (1, 50, 100):
        Image.fromarray(np.full((60, 40, 3), (200, 2 * step, 40), np.uint8)).save(film / f"{step:08d}.png")
    (film / "00000099.png").write_bytes(b"\x89PNG damaged")
    return folder
