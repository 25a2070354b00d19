"""A rank of the standard library for tests of the watchdog: python -m tests.engine.watchdog.fake_rank HOW PHASE STEP

It prints what a watchdog needs to know of it, goes through a first step, and then HOW:
    silent  enters PHASE of STEP and stays there, with a data worker that stays in `decode`
    busy    beats on in PHASE of STEP
    leaves  ends as a run does
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from pretrain.core import heartbeat
from pretrain.engine.watchdog.__main__ import EXIT_HUNG
from pretrain.engine.watchdog.processes import end_by_signal, started


def decode() -> None:
    heartbeat.show_stacks_on_signal()
    print("ready", flush=True)
    rank = os.getppid()
    while os.getppid() == rank:
        time.sleep(0.1)


def main(how: str, phase: str, step: str) -> None:
    if how == "silent":
        code = "from tests.engine.watchdog.fake_rank import decode; decode()"
        worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert worker.stdout is not None and worker.stdout.readline()
    heart = heartbeat.begin()
    heartbeat.show_stacks_on_signal()
    end_by_signal(EXIT_HUNG)
    print(json.dumps({"pid": os.getpid(), "start": started(os.getpid()), "fd": heart.fd}), flush=True)
    for at in range(1, int(step) + 1):
        heartbeat.mark("data", at)
    heartbeat.mark(phase, int(step))
    while how != "leaves":
        time.sleep(0.05)
        if how == "busy":
            heartbeat.alive()
    heartbeat.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
