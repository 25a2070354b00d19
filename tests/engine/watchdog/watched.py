"""Real ranks inside a real session: python -m tests.engine.watchdog.watched HOW RUN_DIR; see test_watching."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pretrain.core.distributed import World
from pretrain.engine.config import EngineConfig
from pretrain.engine.loop import fit
from pretrain.engine.session.session import exit_status, session
from tests.engine.scenarios import build
from tests.engine.toys import Toy, batches

WATCH = {"start_seconds": 120, "step_seconds": 5, "save_seconds": 60, "probe_seconds": 60}


def hold_the_gil(feed: Iterator[Any], at: int) -> Iterator[Any]:
    for index, batch in enumerate(feed):
        if index == at:
            # PyDLL calls C with the GIL held; a read, unlike a sleep, resumes after a signal.
            ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
        yield batch


def main(how: str, run_dir: str) -> int:
    os.environ["SLURMD_NODENAME"] = f"n{int(os.environ['RANK']) + 1}"

    def body(world: World) -> int:
        engine = build(world, Toy(), "ddp")
        feed = batches("toy", start=0, accumulation=1, world=world.world_size, rank=world.rank)
        if how == "gil" and world.rank == 1:
            feed = hold_the_gil(feed, 5)

        def examine(step: int, _: Any) -> None:
            if how == "weights" and world.rank == 1 and step == 10:
                with torch.no_grad():
                    engine.trainable.last.weight[0, 0] += 1e-6

        def save(step: int) -> None:
            (Path(run_dir) / f"saved-{step}").touch()

        fit(
            engine,
            engine.trainable,
            feed,
            total_steps=20,
            log=lambda step, result: None,
            save=save,
            probe=lambda step: None,
            requests=lambda: 0,
            log_every=1,
            save_every=5,
            examine=examine,
            replicas_every=1000,
            say=lambda said: print(said, flush=True),
        )
        return 0

    config = EngineConfig.model_validate({"device": "cpu", "watch": WATCH})
    return exit_status(lambda: session(run_dir, config, body))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
