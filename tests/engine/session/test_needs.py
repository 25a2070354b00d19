"""What a run needs of its machine is asked before the first step: one sentence with the numbers and the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.core.machine.failures import DiskError, MachineError, failure_of
from pretrain.core.machine.resources import GIB, Resources
from pretrain.engine.config import CheckpointConfig
from pretrain.engine.session import needs
from pretrain.engine.session.needs import Reading

GOOD = Resources(cpus=8, memory=64 * GIB, shm=8 * GIB, open_files=1024, disk=500 * GIB)
READING = Reading(ranks=1, num_workers=4, prefetch=2, batch=2**20, open_shards=64)


class Config:
    def __init__(self, run_dir: Path):
        self.run_dir, self.checkpoint = str(run_dir), CheckpointConfig.model_validate({"keep": 2})


@pytest.mark.parametrize(
    ("lacking", "kind", "words"),
    [
        (
            {"open_files": 70},
            MachineError,
            ("ulimit -n: 70 open files, a rank needs", "raise it with `ulimit -n "),
        ),
        (
            {"memory": 420 * 2**20},
            MachineError,
            ("4 workers (416.0 MiB) x 2 batches of 1.0 MiB need 424.0 MiB of memory", "data.prefetch=1 fits"),
        ),
        ({"memory": 400 * 2**20}, MachineError, ("data.num_workers: 4 workers", "400.0 MiB are free; use fewer")),
        ({"disk": 3 * GIB}, DiskError, ("4 checkpoints need 4.0 GiB, 3.0 GiB are free", "checkpoint.keep=1 fits")),
    ],
)
def test_what_a_machine_lacks_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: dict[str, int], kind: type[Exception], words: list[str]
):
    monkeypatch.setattr(Resources, "here", staticmethod(lambda run_dir: replace(GOOD, **lacking)))
    with pytest.raises(kind) as error:
        needs.check_machines(Config(tmp_path), READING, 10_000, GIB, print)
    assert all(word in str(error.value) for word in words), error.value
    found = failure_of(error.value)
    assert found is not None and found.status == (5 if kind is DiskError else 6)


def test_small_shared_memory_is_a_warning_because_batches_go_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Resources, "here", staticmethod(lambda run_dir: replace(GOOD, shm=5 * 2**20)))
    said: list[str] = []
    needs.check_machines(Config(tmp_path), READING, 10_000, GIB, said.append)
    assert len(said) == 1 and "8.0 MiB of /dev/shm, 5.0 MiB are free" in said[0] and "data.prefetch=1 fits" in said[0]


def test_checkpoints_that_exist_need_no_further_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    monkeypatch.setattr(Resources, "here", staticmethod(lambda run_dir: replace(GOOD, disk=2 * GIB)))
    needs.check_machines(Config(tmp_path), READING, 10_000, GIB, print)


def test_a_short_run_needs_only_the_checkpoints_that_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Resources, "here", staticmethod(lambda run_dir: replace(GOOD, disk=3 * GIB)))
    needs.check_machines(Config(tmp_path), READING, 1000, GIB, print)


def test_this_machine_is_measured(tmp_path: Path):
    here = Resources.here(tmp_path / "not" / "yet")
    assert min(here.cpus, here.memory, here.open_files, here.disk) > 0
