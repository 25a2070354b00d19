"""Every objective of the table, by its debug configuration on samples/: killed at any moment, it ends bitwise the same.

The runs are forked from one server that has imported everything, so a test costs its steps and not its imports; each is
a process of its own that runs the real command and dies by SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.objectives import OBJECTIVES
from tests.runs import ROOT, hashes, losses, reached

DEBUG = ROOT / "configs" / "debug"
STEPS = 8
SHORT = [
    f"optim.total_steps={STEPS}", "optim.warmup_steps=2", "optim.global_batch_size=8", "data.num_workers=0",
    "checkpoint.every_steps=2", "checkpoint.keep=9", "log.every_steps=1", "log.pictures_every_steps=0",
    "log.tensorboard=false",
]  # fmt: skip
# What must be made before: objective -> (whose release, the key that names it).
FIRST = {
    "vqkd": ("mae", "objective.teacher"),
    "beit": ("dvae", "objective.tokenizer"),
    "beit2": ("vqkd", "objective.tokenizer"),
}


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.run", "pretrain.__main__", "tests.test_every_objective"])
    return context


@pytest.fixture(scope="module")
def releases(forks, tmp_path_factory):
    """The release of an objective, made when first asked for."""
    made: dict[str, Path] = {}

    def release(objective: str) -> Path:
        if objective not in made:
            run_dir = tmp_path_factory.mktemp("first") / objective
            assert finish(forks, objective, run_dir, overrides(objective, release)) == 0
            made[objective] = run_dir / "release"
        return made[objective]

    return release


def overrides(objective: str, release) -> list[str]:
    first, key = FIRST.get(objective, ("", ""))
    return [f"{key}={release(first)}"] if first else []


def run(run_dir: Path, objective: str, extra: list[str]) -> None:
    """In the new process: the command, its output in a file."""
    run_dir.parent.mkdir(exist_ok=True, parents=True)
    said = os.open(run_dir.parent / f"{run_dir.name}.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(ROOT)
    sys.exit(main([str(DEBUG / f"{objective}.yaml"), f"run_dir={run_dir}", *SHORT, *extra]))


def start(forks, objective: str, run_dir: Path, extra: list[str]) -> BaseProcess:
    process = forks.Process(target=run, args=(run_dir, objective, extra))
    process.start()
    return process


def finish(forks, objective: str, run_dir: Path, extra: list[str]) -> int | None:
    process = start(forks, objective, run_dir, extra)
    process.join(timeout=180)
    if process.is_alive():
        process.kill()
    if process.exitcode:
        print((run_dir.parent / f"{run_dir.name}.txt").read_text()[-3000:])
    return process.exitcode


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(objective: str, forks, releases, tmp_path: Path):
    extra = overrides(objective, releases)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert finish(forks, objective, undisturbed, extra) == 0
    process = start(forks, objective, killed, extra)
    end = time.monotonic() + 120
    while reached(killed) < 3:
        assert process.is_alive() and time.monotonic() < end, "the run was over before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -9 and not (killed / "DONE").exists()
    assert finish(forks, objective, killed, extra) == 0
    assert "resumed from" in (tmp_path / "killed.txt").read_text()
    assert hashes(killed, STEPS) == hashes(undisturbed, STEPS)
    assert losses(killed) == losses(undisturbed)
    assert (killed / "release" / "model.safetensors").exists()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_debug_configuration_is_of_its_objective_and_says_how_to_run_it(objective: str):
    text = (DEBUG / f"{objective}.yaml").read_text()
    assert yaml.safe_load(text)["objective"]["name"] == objective
    assert f"fovea pretrain configs/debug/{objective}.yaml" in text
