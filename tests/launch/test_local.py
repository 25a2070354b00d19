"""`fovea launch local`: a rank that dies is replaced from the newest checkpoint, a run asked to stop is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, children, kill_all, losses, reached, wait_until, write_config


def launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "launch", "local", "2", str(config), *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def test_a_killed_rank_is_replaced_and_a_stop_is_final(tmp_path: Path):
    config, run = write_config(tmp_path, "mae"), tmp_path / "run"
    process = launch(config, "optim.total_steps=100000")
    try:
        wait_until(lambda: reached(run) >= 6, process)
        (torchrun,) = children(process.pid)
        rank = children(torchrun)[-1]
        os.kill(rank, signal.SIGKILL)
        wait_until(lambda: (run / "environment.jsonl").read_text().count("\n") == 2, process)
        wait_until(lambda: reached(run) >= 12, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=90)
    finally:
        kill_all(process)
    assert process.returncode == 85, said
    assert "a process ended with status" in said and "resumed from" in said
    assert (run / "PREEMPTED").exists()
    assert sorted(losses(run)) == list(range(1, reached(run) + 1)), "every step once"
