"""Every attention mechanism, by its debug configuration on samples/: killed at any moment, it ends bitwise the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.models.mechanisms import ATTENTION, MECHANISMS
from tests.runs import ROOT, finish, hashes, kill_all, losses, reached, start, wait_until

DEBUG = ROOT / "configs" / "debug" / "attention"
KINDS = [name for name, entry in MECHANISMS.items() if name != ATTENTION and entry.slots]
STEPS = 6
SHORT = [
    f"optim.total_steps={STEPS}", "optim.warmup_steps=2", "optim.global_batch_size=8", "data.num_workers=0",
    "checkpoint.every_steps=2", "checkpoint.keep=9", "log.every_steps=1", "log.pictures_every_steps=0",
    "log.tensorboard=false",
]  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(kind: str, tmp_path: Path):
    config, undisturbed, killed = DEBUG / f"{kind}.yaml", tmp_path / "undisturbed", tmp_path / "killed"
    status, said = finish(config, f"run_dir={undisturbed}", *SHORT)
    assert status == 0, said
    process = start(config, f"run_dir={killed}", *SHORT)
    try:
        wait_until(lambda: reached(killed) >= 3, process)
    finally:
        kill_all(process)
    assert process.returncode == -9 and not (killed / "DONE").exists(), "the run was over before it could be killed"
    status, said = finish(config, f"run_dir={killed}", *SHORT)
    assert status == 0 and "resumed from" in said, said
    assert hashes(killed, STEPS) == hashes(undisturbed, STEPS)
    assert losses(killed) == losses(undisturbed)
    assert (killed / "release" / "model.safetensors").exists()


def test_each_has_a_debug_configuration_that_places_it_and_says_how_to_run_it():
    assert {path.stem for path in DEBUG.glob("*.yaml")} == set(KINDS)
    for kind in KINDS:
        text = (DEBUG / f"{kind}.yaml").read_text()
        assert kind in [entry["kind"] for entry in yaml.safe_load(text)["model"]["attention"]]
        assert f"fovea pretrain configs/debug/attention/{kind}.yaml" in text
