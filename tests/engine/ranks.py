"""Run a function in real processes, one per rank; `launch` returns what each rank's call returned (JSON).

launch(scenarios.train, world=2, out=tmp_path) runs, as ranks 0 and 1,
    python -m tests.engine.ranks tests.engine.scenarios train OUT
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launch(function: Callable[..., Any], *, world: int, out: Path, timeout: float = 500, **arguments: Any) -> list[Any]:
    """Results by rank; raises with the output of the ranks when one failed."""
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    module = function.__module__
    command = [sys.executable, "-m", "tests.engine.ranks", module, function.__name__, str(out), json.dumps(arguments)]
    processes = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        with (out / f"rank{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        logs = "\n".join((out / f"rank{rank}.log").read_text(errors="replace")[-4000:] for rank in range(world))
        raise AssertionError(f"exit codes {codes} of {function.__name__}:\n{logs}")
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


def main(module: str, function: str, out: str, arguments: str) -> None:
    from pretrain.core import distributed

    world = distributed.setup("cpu")
    try:
        call = getattr(importlib.import_module(module), function)
        result = call(world, Path(out), **json.loads(arguments))
        (Path(out) / f"rank{world.rank}.json").write_text(json.dumps(result))
        distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # the others must not wait for this rank
    distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
