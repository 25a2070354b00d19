"""Tiny runs of the real command, as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHARDS = ROOT / "samples" / "grocery"

CONFIG = """
run_dir: {run_dir}
objective: {objective}
model: {{name: vit_tiny, img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, pos_embed: {pos_embed}}}
data: {{shards: {shards}, num_workers: 1, block_shards: 2}}
optim: {{lr: 1e-3, global_batch_size: 16, total_steps: 24, warmup_steps: 4, weight_decay_end: 0.4, {optim}}}
checkpoint: {{every_steps: 4, keep: 10}}
log: {{every_steps: 1, pictures_every_steps: 12}}
"""
OBJECTIVES = {
    "mae": "{name: mae, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}",
    "dino": "{name: dino, out_dim: 64, head_hidden_dim: 32, head_bottleneck_dim: 16, local_crops_number: 2, "
    "local_crops_size: 16, freeze_last_layer_epochs: 0}",
}


def write_config(folder: Path, objective: str, *, name: str = "run") -> Path:
    """A configuration of 24 steps whose run folder is `folder/name`."""
    is_dino = objective == "dino"
    text = CONFIG.format(
        run_dir=folder / name,
        objective=OBJECTIVES[objective],
        pos_embed="learned" if is_dino else "sincos",
        shards=SHARDS / "train",
        optim="warmup_form: closed, clip_grad: 3.0, clip_mode: per_tensor" if is_dino else "betas: [0.9, 0.95]",
    )
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def start(
    config: Path, *overrides: str, processes: int = 1, command: Sequence[str] = ("pretrain",)
) -> subprocess.Popen[str]:
    """`python -m pretrain`, under torchrun for several processes, in a process group of its own."""
    command = [sys.executable, "-m", *command, str(config), *overrides]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *torchrun, *command[1:]]
    # The launcher of the tests may itself be one rank of something.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(
    config: Path,
    *overrides: str,
    processes: int = 1,
    timeout: float = 180,
    command: Sequence[str] = ("pretrain",),
) -> tuple[int, str]:
    """Run to the end: (exit status, what it said)."""
    process = start(config, *overrides, processes=processes, command=command)
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        kill_all(process)
    return process.returncode, said


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are still there."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of the run, as when a node is lost."""
    family = [process.pid]
    for pid in family:  # grows while it is walked: torchrun gives each worker a process group of its own
        family += children(pid)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, timeout: float = 300) -> None:
    """Wait while the run goes on; an error when it ends before, or takes too long."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the run ended early: {process.stdout.read() if process.stdout else ''}")
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s")
        time.sleep(0.01)


def rows(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that are whole."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reached(run_dir: Path) -> int:
    """The last step in the log."""
    return max((int(row["step"]) for row in rows(run_dir)), default=0)


def losses(run_dir: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in rows(run_dir) if "loss" in row}


def hashes(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 by file of a checkpoint: weights, teacher, centre, and each rank's optimizer state."""
    manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["body"]["files"]}
