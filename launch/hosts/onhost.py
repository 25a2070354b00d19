"""What `fovea launch hosts` starts on each host over ssh: `check` reports the host's state, `run` runs its ranks.

A request is one line of JSON on standard input, which the launcher then holds open. When it closes, because the
launcher ended or the network failed, the ranks are stopped too: none outlives its run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.plan.machine import count_gpus
from pretrain.core.machine.terminal import safe_output
from pretrain.core.record import git_commit, versions

GRACE_SECONDS = 60.0  # to save and end, after the launcher has ended


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status of the command that was run; 0 after a check."""
    (word,) = sys.argv[1:] if arguments is None else arguments
    request = json.loads(sys.stdin.readline())
    if word == "check":
        print(json.dumps(_check(request)), flush=True)
        return 0
    return _run(request["command"], request["env"])


def _check(request: dict[str, Any]) -> dict[str, Any]:
    """Versions, GPUs, a free port, whether the run folder is the launcher's and the first host's name is known."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    try:
        socket.getaddrinfo(request["master"], port)
        master_error = ""
    except OSError as error:
        master_error = str(error)
    return {
        "name": socket.gethostname(),
        "versions": versions() | {"fovea's commit": git_commit() or "none"},
        "gpus": count_gpus(),
        "port": port,
        "master_error": master_error,
        "sees_run": Path(request["sign"]).exists(),
    }


def _run(command: Sequence[str], env: dict[str, str]) -> int:
    process = subprocess.Popen(command, env=os.environ | env, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_the_launcher, args=(process,), daemon=True).start()
    status = process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # data workers of a rank that was killed
    return status if status >= 0 else 128 - status


def _end_with_the_launcher(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock would be held when Python ends
        pass
    process.terminate()  # DeepSpeed's launcher forwards it to every rank
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
