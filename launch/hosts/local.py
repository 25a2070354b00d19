"""Several processes of this machine under torchrun, restarted when one of them dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.hosts.restarts import StopRequest, keep_running
from pretrain.core.machine.children import child_environment


def run_local(run_dir: Path, program: str, arguments: Sequence[str], *, processes: int, max_restarts: int) -> int:
    """Run `fovea PROGRAM ARGUMENTS` on `processes` processes until the run is done; its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "fovea", program, *arguments]
    return keep_running(run_dir, lambda request: run_once(command, request), max_restarts=max_restarts)


def run_once(command: Sequence[str], request: StopRequest) -> int:
    """Run `command` and wait for its end."""
    # In its own session: on Ctrl-C torchrun kills ranks that save for longer than 30 s, and SIGUSR1 kills it and leaves
    # its ranks running.
    process = subprocess.Popen(command, env=os.environ | child_environment(), start_new_session=True)
    request.end = process.terminate
    return process.wait()
