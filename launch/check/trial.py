"""A few real steps on this machine, in a temporary folder, to measure the speed of a configuration."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.core.machine.children import child_environment
from pretrain.core.ranks import without_ranks
from pretrain.core.record import read_rows


@dataclass(frozen=True)
class Trial:
    """images_per_second: of all its ranks, without the first quarter of the steps. waited: share of time for data."""

    steps: int
    ranks: int
    images_per_second: float
    waited: float


def run_steps(
    program: str, config: str, overrides: Sequence[str], *, steps: int, ranks: int, batch: int, run_dir: Path
) -> Trial:
    """Take `steps` steps of `batch` images with `ranks` ranks here, then stop the run.

    Args:
        batch: images of a step over all ranks, chosen so that a rank's micro-batch is that of the run.
        run_dir: the run's; temporary files are written next to it, on the same file system.

    Raises:
        ValueError: the run ended before; with the end of its log.
    """
    home = next(folder for folder in run_dir.absolute().parents if folder.exists())
    folder = Path(tempfile.mkdtemp(prefix=".trial-", dir=home))
    changed = [f"run_dir={folder}/run", f"optim.global_batch_size={batch}", "log.every_steps=1"]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *torchrun, "fovea", program, config, *overrides, *changed]
    # Inside a job it is a separate run, not one of the job's ranks.
    env = without_ranks(os.environ)
    try:
        with (folder / "log").open("w+b") as log:
            process = subprocess.Popen(
                command, env=env | child_environment(), stdout=log, stderr=log, start_new_session=True
            )
            try:
                rows = _wait(process, folder, steps)
            finally:
                _end(process, folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counted = rows[len(rows) // 4 :]
    seconds = sum(batch / row["images_per_second"] for row in counted)
    waited = sum(row.get("data_wait", 0.0) for row in counted) / len(counted)
    return Trial(len(rows), ranks, batch * len(counted) / seconds, waited)


def _wait(process: subprocess.Popen[bytes], folder: Path, steps: int) -> list[dict[str, float]]:
    """The rows of the first `steps` steps."""
    while True:
        ended = process.poll() is not None
        log = folder / "run" / "metrics.jsonl"
        rows = [row for row in read_rows(log) if "images_per_second" in row] if log.exists() else []
        if len(rows) >= steps or (ended and rows and (folder / "run" / "DONE").exists()):
            return rows[:steps]
        if ended:
            said = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
            what = f"--probe-steps: the run ended with status {process.returncode} after {len(rows)} steps:"
            raise ValueError("\n  ".join([what, *said]))
        time.sleep(0.2)


def _end(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Request it to stop like any run, and kill it if it does not."""
    if process.poll() is None and run_dir.exists():
        (run_dir / "stop").touch()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
