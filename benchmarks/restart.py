"""Seconds from SIGKILL of a rank to the next step, under `fovea launch local 2`, by phase.

    python -m benchmarks.restart [--kills 5]

A ViT of 2 blocks on the photos of samples/, two ranks over gloo: what is measured is the launcher, the imports and the
resume, not the model. Wall time: only meaningful on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONFIG = """
run_dir: {folder}/run
objective: {{name: mae, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}}
model: {{name: vit_tiny, img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, pos_embed: sincos}}
data: {{shards: samples/grocery/train, num_workers: 1}}
optim: {{lr: 1e-3, global_batch_size: 16, total_steps: 1000000}}
checkpoint: {{every_steps: 20}}
log: {{every_steps: 1}}
"""
PARTS = ("the other rank ends", "torchrun starts", "ranks import and meet", "resume and first step", "all")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = Path(folder) / "run.yaml", Path(folder) / "run"
        config.write_text(CONFIG.format(folder=folder))
        command = [
            sys.executable,
            "-m",
            "fovea",
            "launch",
            "local",
            "2",
            "--max-restarts",
            str(kills),
            str(config),
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            parts = [kill_and_wait(run, run_dir) for _ in range(kills)]
        finally:
            (run_dir / "stop").touch()
            run.wait(120)
    for name, seconds in zip(PARTS, zip(*parts, strict=True), strict=True):
        print(f"{name:24s}{statistics.median(seconds):6.1f} s ({min(seconds):.1f}-{max(seconds):.1f})")
    return 0


def kill_and_wait(run: subprocess.Popen[bytes], run_dir: Path) -> tuple[float, ...]:
    """Seconds of each of PARTS, after one more checkpoint."""
    starts, log = run_dir / "environment.jsonl", run_dir / "metrics.jsonl"
    known, newest = checkpoint(run_dir), lines(starts)
    wait(run, lambda: checkpoint(run_dir) != known)
    (torchrun,) = children(run.pid)
    os.kill(children(torchrun)[-1], signal.SIGKILL)
    times = [time.monotonic()]
    for reached in (
        lambda: children(run.pid) not in ([torchrun], []),
        lambda: len([child for pid in children(run.pid) for child in children(pid)]) >= 2,
        lambda: lines(starts) > newest,
    ):
        wait(run, reached)
        times.append(time.monotonic())
    begun = log.stat().st_size
    wait(run, lambda: log.stat().st_size > begun)
    times.append(time.monotonic())
    return (*(after - before for before, after in itertools.pairwise(times)), times[-1] - times[0])


def checkpoint(run_dir: Path) -> str:
    latest = run_dir / "checkpoints" / "latest"
    return latest.read_text() if latest.exists() else ""


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait(run: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        if run.poll() is not None:
            raise SystemExit(f"the run ended with status {run.returncode}")
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
