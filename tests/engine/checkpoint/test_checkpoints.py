"""Checkpoints of a run: which one is loaded, what is said about the others, and what a full disk does."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch

from pretrain.core.distributed import World
from pretrain.engine.accelerate import AccelerateEngine
from pretrain.engine.checkpoint import commit
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.checkpoint.commit import CheckpointError, DamagedError, checkpoints
from tests.engine.scenarios import build, run, whole_state
from tests.engine.toys import Plain, Toy

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def engine() -> AccelerateEngine:
    engine = build(ALONE, Toy(), "ddp")
    run(engine, kind="toy", total_steps=2)
    return engine


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert Checkpoints(tmp_path / "new").find_latest() is None


def test_what_the_caller_said_comes_back(tmp_path, engine):
    about = {"cursor": {"samples": 16}, "config": {"lr": 1e-3}}
    folder = Checkpoints(tmp_path).save(engine, 2, about)
    found = Checkpoints(tmp_path).find_latest()
    assert found is not None
    assert (found.folder, found.step, found.about, found.skipped) == (folder, 2, about, ())
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "empty"])
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(tmp_path, engine, damage):
    saved = Checkpoints(tmp_path)
    saved.save(engine, 2, {})
    newest = saved.save(engine, 4, {})
    _damage(newest, damage)
    found = Checkpoints(tmp_path).find_latest()
    assert found is not None
    assert found.step == 2
    assert len(found.skipped) == 1
    assert "step-00000004" in found.skipped[0]


def test_all_damaged_is_an_error_and_not_step_0(tmp_path, engine):
    saved = Checkpoints(tmp_path)
    for step in (2, 4):
        _damage(saved.save(engine, step, {}), "truncate")
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete:\n.*step-00000004.*\n.*step-00000002"):
        saved.find_latest()


def test_saving_again_replaces_a_damaged_step_and_keeps_a_whole_one(tmp_path, engine):
    saved = Checkpoints(tmp_path)
    folder = saved.save(engine, 4, {"which": 1})
    saved.save(engine, 4, {"which": 2})
    assert saved.verify(folder).about == {"which": 1}
    _damage(folder, "flip")
    saved.save(engine, 4, {"which": 3})
    assert saved.verify(folder).about == {"which": 3}


def test_old_ones_stay_when_the_new_one_cannot_be_read_back(tmp_path, engine, monkeypatch):
    saved = Checkpoints(tmp_path, keep_last=1)
    saved.save(engine, 2, {})
    rename = os.rename

    def rename_and_damage(source, target):
        rename(source, target)
        if Path(target).name == "step-00000004":
            _damage(Path(target), "flip")

    monkeypatch.setattr(os, "rename", rename_and_damage)
    with pytest.raises(DamagedError):
        saved.save(engine, 4, {})
    found = saved.find_latest()
    assert found is not None
    assert found.step == 2


def test_damaged_later_ones_do_not_push_out_what_is_saved_after_falling_back(tmp_path, engine):
    saved = Checkpoints(tmp_path, keep_last=1, milestone_every=3)
    saved.save(engine, 3, {})
    _damage(saved.save(engine, 5, {}), "flip")
    saved.save(engine, 4, {})
    found = saved.find_latest()
    assert found is not None and found.step == 4


def test_a_disk_that_is_full_after_the_commit_is_said_on_every_rank_and_the_new_one_is_whole(
    tmp_path, engine, monkeypatch
):
    saved = Checkpoints(tmp_path, keep_last=1)
    saved.save(engine, 2, {})

    def full(root: Path, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(commit, "point_latest", full)
    with pytest.raises(CheckpointError, match=r"wrote .*step-00000004, but the cleanup .*No space left"):
        saved.save(engine, 4, {})
    assert [commit.verify(path).step for path in checkpoints(tmp_path)] == [4], "room was made first"


@pytest.mark.parametrize("limit", [1000, 3000, 5000])
def test_a_file_that_cannot_grow_leaves_the_checkpoint_before(tmp_path, engine, limit):
    saved = Checkpoints(tmp_path)
    saved.save(engine, 2, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        if limit < 5000:
            with pytest.raises(CheckpointError, match=r"File too large.*earlier checkpoints are unchanged"):
                saved.save(engine, 4, {})
        else:
            saved.save(engine, 4, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found = saved.find_latest()
    assert found is not None
    assert found.step == (2 if limit < 5000 else 4)
    assert not list(tmp_path.glob(".tmp-step*"))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, engine):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"needs the right to mount: {mount.stderr.strip()}")
    try:
        saved = Checkpoints(tmp_path)
        saved.save(engine, 2, {})
        (tmp_path / "ballast").write_bytes(bytes(32 << 10))
        with pytest.raises(CheckpointError, match="No space left"):
            for step in range(3, 30):
                saved.save(engine, step, {})
        found = saved.find_latest()
        assert found is not None
        assert not list(tmp_path.glob(".tmp-step*"))
        (tmp_path / "ballast").unlink()
        saved.save(engine, 99, {})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_checkpoint_of_another_model_is_refused_with_the_differences(tmp_path, engine):
    folder = Checkpoints(tmp_path).save(engine, 2, {})
    wider = build(ALONE, Toy(width=10), "ddp")
    with pytest.raises(CheckpointError, match=r"body\.0\.weight: \[12, 6\] in the checkpoint, \[10, 6\] in this model"):
        wider.load(folder)
    plain = build(ALONE, Plain(), "ddp")
    with pytest.raises(CheckpointError, match=r"centre: \[1, 5\] in the checkpoint, absent in this model"):
        plain.load(folder)


def test_a_refused_checkpoint_changes_nothing(tmp_path, engine):
    folder = Checkpoints(tmp_path).save(engine, 2, {})
    wider = build(ALONE, Toy(width=10), "ddp")
    before = whole_state(wider)
    with pytest.raises(CheckpointError):
        wider.load(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_state(wider).items())
    assert wider.step_count == 0


def test_a_checkpoint_before_the_first_step_loads(tmp_path):
    engine = build(ALONE, Toy(), "ddp")
    folder = Checkpoints(tmp_path).save(engine, 0, {})
    again = build(ALONE, Toy(), "ddp")
    run(again, kind="toy", total_steps=3)  # what it has learnt, and its optimizer's state, is gone
    again.load(folder)
    assert again.step_count == 0
    losses = [[result.losses for result in run(one, kind="toy", total_steps=5)] for one in (engine, again)]
    assert losses[0] == losses[1]


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path, engine):
    folder = Checkpoints(tmp_path).save(engine, 2, {})
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_folders_of_other_names_are_not_checkpoints(tmp_path, engine):
    Checkpoints(tmp_path).save(engine, 2, {})
    for name in ("step-7", "step-00000009.bak", "step-", "step-00000xyz"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def _damage(folder: Path, how: str) -> None:
    target = folder / "model.safetensors"
    whole = bytearray(target.read_bytes())
    if how == "flip":
        whole[len(whole) // 2] ^= 4
        target.write_bytes(whole)
    elif how == "truncate":
        target.write_bytes(whole[:-1])
    elif how == "delete":
        (folder / "optim-rank00000.safetensors").unlink()
    elif how == "manifest":
        (folder / "MANIFEST.json").unlink()
    elif how == "empty":
        for path in folder.iterdir():
            path.unlink()
