"""Cases of several processes: one function in as many new processes, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.core import distributed
from pretrain.core.distributed import World
from tests.golden.case import Case

Train = Callable[[Case, World], dict[str, Tensor]]
ALONE = World(0, 1, 0, torch.device("cpu"))
DEADLINE = 240  # seconds


def run_ranks(case: Case, train: Train, world: int) -> list[dict[str, Tensor]]:
    """What `train`, a function of a module, returns on each of `world` ranks, in order; one rank is this process."""
    if world == 1:
        return [train(case, ALONE)]
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        processes = [
            context.Process(target=_rank, args=(case.path, train, rank, world, port, out)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=DEADLINE)
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
        assert codes == [0] * world, f"{case.name}: the {world} processes ended with {codes}"
        return [load_file(out / f"rank{rank}.safetensors") for rank in range(world)]


def _rank(path: Path, train: Train, rank: int, world: int, port: int, out: Path) -> None:
    launch = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launch.items()})
    torch.set_num_threads(1)
    try:
        result = train(Case(path), distributed.setup("cpu"))
        save_file({key: value.contiguous() for key, value in result.items()}, out / f"rank{rank}.safetensors")
    finally:
        distributed.close()
