"""Several processes of this machine under torchrun, started again when one of them dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

EXIT_PREEMPTED = 85


def run_local(run_dir: Path, program: str, arguments: Sequence[str], *, processes: int, max_restarts: int) -> int:
    """Run `python -m PROGRAM ARGUMENTS` on `processes` processes until the run is done; its exit status.

    A run that ended because it was asked to (marker PREEMPTED) is not started again: status 85. A run whose
    process died is, from its newest checkpoint, at most `max_restarts` times and while it makes progress; then the
    status is torchrun's.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", program, *arguments]
    (run_dir / "PREEMPTED").unlink(missing_ok=True)
    before = None
    for left in range(max_restarts, -1, -1):
        status = _run_forwarding_signals(command)
        if status == 0:
            return 0
        if (run_dir / "PREEMPTED").exists():
            _say(f"{run_dir} was asked to stop and saved; the same command goes on")
            return EXIT_PREEMPTED
        newest = _newest_checkpoint(run_dir)
        if newest == before:
            _say(f"a process ended with status {status}, again without a new checkpoint; not started again")
            return status
        before = newest
        _say(f"a process ended with status {status}; {left} restarts left")
    return status


def _newest_checkpoint(run_dir: Path) -> str:
    latest = run_dir / "checkpoints" / "latest"
    return latest.read_text(encoding="utf-8") if latest.exists() else "none"


def _say(message: str) -> None:
    print(f"fovea launch: {message}", file=sys.stderr, flush=True)


def _run_forwarding_signals(command: Sequence[str]) -> int:
    """Run `command`, passing SIGTERM and SIGUSR1 on to it, and wait for its end."""
    process = subprocess.Popen(command)
    passed_on = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda received, _: process.send_signal(received)) for number in passed_on}
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent it to every process of the group; they save and end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
