"""kill -9 at any moment, then the same command: the run ends with bitwise the state of an undisturbed one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.runs import finish, hashes, kill_all, losses, reached, start, wait_until, write_config

pytestmark = pytest.mark.processes

STEPS = 24
ENGINES = {
    "ddp": ["engine.name=accelerate", "data.num_workers=1"],
    "zero1": ["engine.name=deepspeed", "engine.zero_stage=1"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_of_two_ranks_ends_bitwise_as_an_undisturbed_one(tmp_path: Path, engine: str):
    config = write_config(tmp_path, "dino")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    status, said = finish(config, f"run_dir={undisturbed}", *ENGINES[engine], processes=2)
    assert status == 0, said

    chance = random.Random(engine)
    for earliest in (6, 15):
        process = start(config, f"run_dir={killed}", *ENGINES[engine], processes=2)
        try:
            wait_until(lambda after=earliest: reached(killed) >= after, process)
            time.sleep(chance.uniform(0, 0.2))
        finally:
            kill_all(process)
        assert not (killed / "DONE").exists(), "the run was over before it could be killed"
    status, said = finish(config, f"run_dir={killed}", *ENGINES[engine], processes=2)
    assert status == 0, said

    assert "resumed from" in said
    assert hashes(killed, STEPS) == hashes(undisturbed, STEPS)
    assert losses(killed) == losses(undisturbed), "every step stands in the log once, with the same loss"


def test_a_run_of_two_ranks_goes_on_alone_with_the_same_losses(tmp_path: Path):
    config = write_config(tmp_path, "dino")
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    zero2 = ["engine.name=deepspeed", "engine.zero_stage=2"]
    status, said = finish(config, f"run_dir={whole}")
    assert status == 0, said

    process = start(config, f"run_dir={moved}", *zero2, processes=2)
    try:
        wait_until(lambda: reached(moved) >= 9, process)
    finally:
        kill_all(process)
    status, said = finish(config, f"run_dir={moved}", "engine.name=accelerate")
    assert status == 0, said
    assert losses(moved) == pytest.approx(losses(whole), abs=1e-5)
