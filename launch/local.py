"""Several processes of this machine under torchrun, started again when one of them dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.restarts import keep_running


def run_local(run_dir: Path, program: str, arguments: Sequence[str], *, processes: int, max_restarts: int) -> int:
    """Run `python -m PROGRAM ARGUMENTS` on `processes` processes until the run is done; its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", program, *arguments]
    return keep_running(run_dir, lambda: run_forwarding_signals(command), max_restarts=max_restarts)


def run_forwarding_signals(command: Sequence[str]) -> int:
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
