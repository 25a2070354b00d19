"""Starts the hang detection of a run: heartbeats of all ranks, and one watchdog process per node."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.core import distributed, heartbeat
from pretrain.core.distributed import World
from pretrain.core.machine.children import child_environment
from pretrain.engine.config import WatchConfig
from pretrain.engine.watchdog.__main__ import EXIT_HUNG, Orders
from pretrain.engine.watchdog.processes import end_by_signal, started

_LAST_SECONDS = 2.0
Facts = tuple[str, str, dict[str, int] | None]  # place, host, arguments of `watchdog.Watched`


@contextmanager
def watched(run_dir: Path, settings: WatchConfig, world: World) -> Generator[None, None, None]:
    """Inside this context, a run that hangs is ended with status EXIT_HUNG, its stacks in `run_dir/hangs`.

    Collective: every rank must enter. If a rank cannot be watched, it prints why and runs without a watchdog.
    """
    if not settings.enabled:
        yield
        return
    try:
        mine: dict[str, int] | None = _begin(world)
        place = f"{heartbeat.host_name()} {Path('/proc/self/ns/pid').readlink()}"  # processes in one pid namespace
    except (OSError, AttributeError) as error:
        mine, place = None, ""
        print(f"fovea watch: rank {world.rank} cannot be watched: {error}", file=sys.stderr, flush=True)
    ranks = distributed.all_gather_object((place, heartbeat.host_name(), mine))
    token = distributed.broadcast_object(f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}")
    watchdog = None
    if all(facts for _, _, facts in ranks) and [p for p, _, _ in ranks].index(place) == world.rank:
        watchdog = _start(ranks, place, run_dir, token, settings)
    try:
        yield
    finally:
        heartbeat.end()
        if watchdog is not None:
            assert watchdog.stdin is not None
            with suppress(OSError):
                watchdog.stdin.close()
            # It ends when all its ranks have left; do not wait longer for that.
            with suppress(subprocess.TimeoutExpired):
                watchdog.wait(_LAST_SECONDS)


def _begin(world: World) -> dict[str, int]:
    heart = heartbeat.begin()
    heartbeat.show_stacks_on_signal()
    end_by_signal(EXIT_HUNG)
    return {"rank": world.rank, "pid": os.getpid(), "start": started(os.getpid()), "fd": heart.fd}


def _start(
    ranks: Sequence[Facts], here: str, run_dir: Path, token: str, settings: WatchConfig
) -> subprocess.Popen[bytes] | None:
    nodes = {place: host for place, host, _ in ranks}
    floors = {kind: getattr(settings, f"{kind}_seconds") for kind in heartbeat.KINDS}
    shortest = min(floors.values())
    orders = Orders(
        run_dir=str(run_dir.absolute()),
        token=token,
        node=list(nodes).index(here),
        nodes=list(nodes.values()),
        ranks=[facts for place, _, facts in ranks if place == here and facts],
        floors=floors,
        patience=settings.patience,
        poll=min(1.0, shortest / 10),
        answer=min(180.0, 3 * shortest),
    )
    command = [sys.executable, "-m", "pretrain.engine.watchdog"]
    try:
        environment = os.environ | child_environment()
        process: Any = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        process.stdin.write(json.dumps(asdict(orders)).encode() + b"\n")
        process.stdin.flush()
    except OSError as error:
        print(f"fovea watch: no watchdog on this node: {error}", file=sys.stderr, flush=True)
        return None
    return process
