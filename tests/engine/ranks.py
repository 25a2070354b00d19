"""Run a function in real processes, one per rank; `launch` returns what each rank's call returned (JSON).

launch(scenarios.train, world=2, out=tmp_path) runs, as ranks 0 and 1,
    python -m tests.engine.ranks tests.engine.scenarios train OUT
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.runs import Run, kill_all


def launch(function: Callable[..., Any], *, world: int, out: Path, **arguments: Any) -> list[Any]:
    """Results by rank; raises with the output of the ranks when one failed."""
    out.mkdir(parents=True, exist_ok=True)
    words = ["tests.engine.ranks", function.__module__, function.__name__, str(out), json.dumps(arguments)]
    ranks = Run(words, processes=world)
    try:
        ranks.wait()
    finally:
        kill_all(ranks)
    codes = [rank.returncode for rank in ranks.ranks]
    assert not any(codes), f"exit codes {codes} of {function.__name__}:\n{ranks.said[-8000:]}"
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
