"""`fovea launch local`: a rank that dies is replaced from the newest checkpoint, a run asked to stop is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import run_forwarding_signals
from launch.restarts import keep_running
from tests.runs import ROOT, children, finish, hashes, kill_all, losses, reached, wait_until, write_config

STEPS = 24


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


def test_a_killed_rank_is_replaced_and_the_final_weights_are_those_of_an_undisturbed_run(tmp_path: Path):
    config, run, undisturbed = write_config(tmp_path, "mae"), tmp_path / "run", tmp_path / "undisturbed"
    process = launch(config)
    try:
        wait_until(lambda: reached(run) >= 6, process)
        (torchrun,) = children(process.pid)
        os.kill(children(torchrun)[-1], signal.SIGKILL)
        said, _ = process.communicate(timeout=300)
    finally:
        kill_all(process)
    assert process.returncode == 0, said
    assert "a process ended with status" in said and "resumed from" in said
    assert (run / "environment.jsonl").read_text().count("\n") == 2, "one restart"
    assert finish(config, f"run_dir={undisturbed}", processes=2, timeout=300)[0] == 0
    assert hashes(run, STEPS) == hashes(undisturbed, STEPS)
    assert losses(run) == losses(undisturbed), "every step once"


def attempts(run_dir: Path, *ends: tuple[int, str, str]) -> Callable[[], int]:
    """One attempt after another: its status, the checkpoint it left ("" for none), the marker it left."""
    left = list(ends)

    def attempt() -> int:
        status, checkpoint, marker = left.pop(0)
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        if checkpoint:
            (run_dir / "checkpoints" / "latest").write_text(checkpoint)
        if marker:
            (run_dir / marker).touch()
        return status

    return attempt


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ([(1, "step-4", ""), (0, "step-8", "DONE")], 0, "3 restarts left"),
        ([(1, "step-4", "PREEMPTED")], 85, "was asked to stop and saved"),
        ([(1, "step-4", ""), (9, "step-4", "")], 9, "again without a new checkpoint"),
        ([(1, f"step-{step}", "") for step in range(4)], 1, "0 restarts left"),
    ],
)
def test_a_run_is_started_again_while_it_makes_progress_and_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: list[tuple[int, str, str]], status: int, said: str
):
    (tmp_path / "PREEMPTED").touch()  # of an earlier command
    assert keep_running(tmp_path, attempts(tmp_path, *ends), max_restarts=3) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_reaches_the_run(number: signal.Signals):
    waits = f"import signal; signal.sigwait([{number:d}]); raise SystemExit(85)"
    blocks = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [{number:d}]); {waits}"
    before = signal.getsignal(number)
    timer = threading.Timer(2.0, os.kill, (os.getpid(), number))
    timer.start()
    assert run_forwarding_signals([sys.executable, "-S", "-c", blocks]) == 85
    assert signal.getsignal(number) == before
