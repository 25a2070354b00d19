"""Cases of several processes: one function in as many new processes, over gloo."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.core import distributed
from pretrain.core.distributed import World
from tests.golden.case import Case
from tests.runs import Run, kill_all

Train = Callable[[Case, World], dict[str, Tensor]]
ALONE = World(0, 1, 0, torch.device("cpu"))


def run_ranks(case: Case, train: Train, world: int) -> list[dict[str, Tensor]]:
    """What `train`, a function of a module, returns on each of `world` ranks, in order; one rank is this process."""
    if world == 1:
        return [train(case, ALONE)]
    with tempfile.TemporaryDirectory() as folder:
        ranks = Run(["tests.golden.ranks", str(case.path), train.__module__, train.__name__, folder], processes=world)
        try:
            ranks.wait()
        finally:
            kill_all(ranks)
        codes = [rank.returncode for rank in ranks.ranks]
        assert codes == [0] * world, f"{case.name}: the {world} processes ended with {codes}: {ranks.said[-3000:]}"
        return [load_file(f"{folder}/rank{rank}.safetensors") for rank in range(world)]


def main(path: str, module: str, train: str, out: str) -> None:
    world = distributed.setup("cpu")
    try:
        result = getattr(importlib.import_module(module), train)(Case(Path(path)), world)
        save_file({key: value.contiguous() for key, value in result.items()}, f"{out}/rank{world.rank}.safetensors")
    finally:
        distributed.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
