"""What the trials of one laboratory share: tiny shards of random photos, a configuration, an undisturbed run, releases.

Everything is made from fixed seeds, once per `--out`, and never changed: a trial copies what it damages.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STEPS, EVERY, SHARDS, SAMPLES, SIDE = 12, 3, 6, 8, 40
_PRETRAIN = f"""
run_dir: run
objective: {{name: mae, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}}
model: {{name: vit_tiny, img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}}
data: {{shards: SHARDS, num_workers: 0, block_shards: 2, max_bad_fraction: 0.5}}
optim: {{lr: 1e-3, global_batch_size: 8, total_steps: {STEPS}, warmup_steps: 2}}
engine: {{device: cpu}}
checkpoint: {{every_steps: {EVERY}, keep: 10}}
log: {{every_steps: 1, pictures_every_steps: 0, tensorboard: false}}
"""
_FINETUNE = """
run_dir: tuned
task: {name: classification}
model: {release: RELEASE}
data: {train: {images: SHARDS}, val: {images: SHARDS}, num_workers: 0}
optim: {lr: 1e-3, total_steps: 2, global_batch_size: 8, warmup_steps: 0}
engine: {device: cpu}
log: {every_steps: 1, tensorboard: false}
evaluate: {every_steps: 2, batch_size: 8, pictures: 0}
"""


@dataclass
class Bench:
    """folder: where it lies. start: runs a command to its end, for the undisturbed run (launch/lab/trial.py)."""

    folder: Path
    start: Callable[[Sequence[str]], None]

    @cached_property
    def shards(self) -> Path:
        """Indexed shards `train-00000N.tar` of random JPEGs with labels 0 and 1."""
        folder = self.folder / "shards"
        if not (folder / "dataset.json").exists():
            write_shards(folder)
        return folder

    def pretraining(self, shards: Path | None = None) -> str:
        """The text of a configuration whose run folder is `run`, relative to the current folder."""
        return _PRETRAIN.replace("SHARDS", str(self.shards if shards is None else shards))

    def finetuning(self, release: Path | None = None) -> str:
        release = self.release if release is None else release
        return _FINETUNE.replace("SHARDS", str(self.shards)).replace("RELEASE", str(release))

    @cached_property
    def run(self) -> Path:
        """The folder of an undisturbed run, done."""
        return self._run("undisturbed", [])

    def _run(self, name: str, overrides: Sequence[str]) -> Path:
        folder = self.folder / name
        if not (folder / "DONE").exists():
            shutil.rmtree(folder, ignore_errors=True)
            config = self.folder / f"{name}.yaml"
            config.write_text(self.pretraining(), encoding="utf-8")
            self.start(["pretrain", str(config), f"run_dir={folder}", *overrides])
        return folder

    @cached_property
    def release(self) -> Path:
        """The backbone of the undisturbed run."""
        return self.run / "release"

    @cached_property
    def weights(self) -> dict[str, str]:
        """sha256 by file of the undisturbed run's last checkpoint."""
        return hashes(self.run)


def write_shards(folder: Path, *, shards: int = SHARDS) -> None:
    """Shards of random photos, indexed."""
    from pretrain.data.shards.index import build_index

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"train-{shard:06d}.tar" for shard in range(shards)]
    for shard, path in enumerate(paths):
        members: list[tuple[str, bytes]] = []
        for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
            members += [(f"{number:06d}.jpg", photo(number)), (f"{number:06d}.cls", str(number % 2).encode())]
        path.write_bytes(tar_of(members))
    build_index([str(path) for path in paths])


def photo(seed: int, *, image_format: str = "JPEG") -> bytes:
    """An encoded image of random pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def tar_of(members: Sequence[tuple[str, bytes] | tarfile.TarInfo]) -> bytes:
    """A tar of (name, content) pairs, or of entries that are no files."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            entry = tarfile.TarInfo(member[0])
            entry.size = len(member[1])
            tar.addfile(entry, io.BytesIO(member[1]))
    return file.getvalue()


def hashes(run: Path, step: int = STEPS) -> dict[str, str]:
    """sha256 by file of a checkpoint: weights and optimizer state."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text("utf-8"))
    return {file["name"]: file["sha256"] for file in manifest["body"]["files"]}


def logged(run: Path) -> dict[int, list[float]]:
    """The losses in metrics.jsonl by step; more than one of a step: it was logged twice."""
    losses: dict[int, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        if "loss" in row:
            losses.setdefault(int(row["step"]), []).append(row["loss"])
    return losses
