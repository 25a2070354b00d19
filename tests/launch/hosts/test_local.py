"""`fovea launch local`: a rank that dies is restarted from the newest checkpoint, a run stopped on request is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.hosts.restarts import StopRequest, keep_running
from pretrain.engine.session.preempt import mark
from tests.runs import LONG, ROOT, children, finish, hashes, kill_all, losses, reached, wait_until, write_config

STEPS = 24
Launch = Callable[..., subprocess.Popen[str]]


def launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fovea", "launch", "local", "2", str(config), *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.processes
def test_a_killed_rank_is_replaced_and_the_final_weights_are_those_of_an_undisturbed_run(tmp_path: Path):
    config, run, undisturbed = write_config(tmp_path, "mae"), tmp_path / "run", tmp_path / "undisturbed"
    process = launch(config)
    try:
        wait_until(lambda: reached(run) >= 6, process)
        (torchrun,) = children(process.pid)
        os.kill(children(torchrun)[-1], signal.SIGKILL)
        said, _ = process.communicate(timeout=LONG)
    finally:
        kill_all(process)
    assert process.returncode == 0, said
    assert "a process ended with status" in said and "resumed from" in said
    assert (run / "environment.jsonl").read_text().count("\n") == 2, "one restart"
    assert finish(config, f"run_dir={undisturbed}", processes=2)[0] == 0
    assert hashes(run, STEPS) == hashes(undisturbed, STEPS)
    assert losses(run) == losses(undisturbed), "every step once"


def attempts(run_dir: Path, *ends: tuple[int, str, str]) -> Callable[[StopRequest], int]:
    """One attempt after another: its status, the checkpoint it left ("" for none), the marker it left."""
    left = list(ends)

    def attempt(request: StopRequest) -> int:
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
        ([(1, "step-4", "PREEMPTED")], 85, "was stopped on request and saved"),
        ([(0, "step-4", "")], 1, "wrote no marker DONE to"),
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


# A run that sees `stop` after half a second and then saves for another; with "deaf", never.
SLOW_TO_SAVE = """
import os, sys, time
while sys.argv[2] == "deaf" or not os.path.exists(sys.argv[1] + "/stop"):
    time.sleep(0.1)
time.sleep(1)
open(sys.argv[1] + "/PREEMPTED", "w").close()
sys.exit(85)
"""
LAUNCHER = """
import sys
from pathlib import Path
from launch.hosts.local import run_once
from launch.hosts.restarts import keep_running
run_dir = Path(sys.argv[1])
print("ready", flush=True)
sys.exit(keep_running(run_dir, lambda request: run_once(sys.argv[2:], request), max_restarts=3))
"""


@pytest.fixture
def slow_to_save() -> Iterator[Launch]:
    """Have the launcher keep such a run going; what is left of both afterwards is killed."""
    started: list[subprocess.Popen[str]] = []

    def launch(run_dir: Path, how: str, *prefix: str) -> subprocess.Popen[str]:
        run = [sys.executable, "-S", "-c", SLOW_TO_SAVE, str(run_dir), how]
        command = [*prefix, sys.executable, "-c", LAUNCHER, str(run_dir), *run]
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        wait_until(lambda: bool(children(process.pid)), process)
        time.sleep(0.2)
        return process

    yield launch
    for process in started:
        kill_all(process)


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_launcher_or_its_terminal_lets_the_run_save(
    tmp_path: Path, number: signal.Signals, slow_to_save: Launch
):
    process = slow_to_save(tmp_path / "run", "hears")
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(LONG) == 85 and (tmp_path / "run" / "PREEMPTED").exists()


@pytest.mark.processes
def test_a_second_signal_ends_the_run_without_a_restart(tmp_path: Path, slow_to_save: Launch):
    process = slow_to_save(tmp_path / "run", "deaf")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: (tmp_path / "run" / "stop").exists(), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=LONG)
    assert process.returncode == -signal.SIGTERM % 256 and "ended before it saved" in said
    assert "restarts left" not in said


@pytest.mark.processes
def test_a_launcher_under_nohup_outlives_its_terminal(tmp_path: Path, slow_to_save: Launch):
    process = slow_to_save(tmp_path / "run", "hears", "nohup")
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None and not (tmp_path / "run" / "stop").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 85


@pytest.mark.parametrize(("written_again", "status"), [(False, 1), (True, 0)])
def test_a_marker_of_an_earlier_launch_is_no_success(tmp_path: Path, written_again: bool, status: int):
    mark(tmp_path, "DONE")
    launch = attempts(tmp_path, (0, "", "DONE" if written_again else ""))
    assert keep_running(tmp_path, launch, max_restarts=0) == status


def test_an_unhandled_request_to_stop_does_not_stop_the_next_run(tmp_path: Path):
    (tmp_path / "stop").touch()
    assert keep_running(tmp_path, attempts(tmp_path, (0, "", "DONE")), max_restarts=0) == 0
    assert not (tmp_path / "stop").exists()
