"""A checkpoint folder is complete or it is not there: whatever dies, and whichever byte is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.core.manifest import write_file
from pretrain.engine.checkpoint import commit
from pretrain.engine.checkpoint.commit import CheckpointError, DamagedError
from tests.runs import LONG

ROOT = Path(__file__).parents[3]

# A process without torch forks a child per kill point. The child commits step 2, prunes step 1, and dies at its k-th
# call to the file system: before it, or, where it writes, after half of it.
KILLS = """
import os, signal, sys
from pathlib import Path
from pretrain.core.manifest import write_file
from pretrain.engine.checkpoint import commit
assert "torch" not in sys.modules

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")

def save(root, step):
    temp = commit.begin(root, step, "a1")
    files = [write_file(temp / name, name.encode() * 40 + bytes([step])) for name in ("model", "optim")]
    commit.seal(temp, commit.step_folder(root, step), step=step, files=files, about={"cursor": step})
    commit.verify(commit.step_folder(root, step))
    commit.prune(root, newest=step, keep_last=1, milestone_every=0)
    commit.point_latest(root, commit.step_folder(root, step))

def die_at(point, half):
    count = 0
    def hook(name, real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == point:
                if half and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for name in CALLS:
        setattr(os, name, hook(name, getattr(os, name)))

root, outcomes = Path(sys.argv[1]), []
for half in (False, True):
    point = 0
    while True:
        point += 1
        where = root / f"{int(half)}-{point}"
        save(where, 1)
        child = os.fork()
        if child == 0:
            die_at(point, half)
            save(where, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
print(point)
"""


@pytest.mark.processes
def test_a_kill_at_any_file_system_call_leaves_a_complete_checkpoint(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=LONG
    )
    assert run.returncode == 0, run.stderr
    points = int(run.stdout)
    assert points > 20
    newest = []
    for half in (0, 1):
        for point in range(1, points):
            root = tmp_path / f"{half}-{point}"
            folders = commit.checkpoints(root)
            manifests = [commit.verify(folder) for folder in folders]  # what is named a checkpoint is one
            newest.append(manifests[0].step)
            assert manifests[0].about == {"cursor": manifests[0].step}
            commit.clean(root)
            assert {path.name for path in root.iterdir()} <= {
                *(folder.name for folder in folders),
                "latest",
            }
            _save(root, 3)  # the next run is not in anybody's way
            assert commit.verify(commit.checkpoints(root)[0]).step == 3
    assert set(newest) == {1, 2}, "kills before and after the commit"


def test_files_reach_the_disk_before_the_manifest_and_the_manifest_before_the_name(tmp_path, monkeypatch):
    calls = []

    def path_of(fd: int) -> str:
        return Path(f"/proc/self/fd/{fd}").readlink().name

    fsync, rename, write = os.fsync, os.rename, os.write
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"fsync {path_of(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(os, "write", lambda fd, data: (calls.append(f"write {path_of(fd)}"), write(fd, data))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {Path(b).name}"), rename(a, b))[1])
    _save(tmp_path / "run", 5)
    order = [
        "write model",
        "fsync model",
        "write optim",
        "fsync optim",
        "write MANIFEST.json",
        "fsync MANIFEST.json",
        "fsync .tmp-step-00000005-x",
        "rename step-00000005",
        "fsync run",
    ]
    assert calls == order


def test_every_damaged_byte_is_noticed(tmp_path):
    folder = _save(tmp_path, 1)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for at in range(len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << (at % 8)
            path.write_bytes(changed)
            with pytest.raises(DamagedError):
                commit.verify(folder)
        path.write_bytes(whole)
    assert commit.verify(folder).step == 1


def test_every_truncation_and_every_lost_file_is_noticed(tmp_path):
    folder = _save(tmp_path, 1)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(DamagedError):
                commit.verify(folder)
        path.unlink()
        with pytest.raises(DamagedError, match=path.name):
            commit.verify(folder)
        path.write_bytes(whole)


def test_a_path_is_never_written_twice(tmp_path):
    write_file(tmp_path / "a", b"1")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"2")


def test_another_format_is_not_called_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "_FORMAT", 99)
    folder = _save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99") as caught:
        commit.verify(folder)
    assert not isinstance(caught.value, DamagedError)


def test_prune_keeps_the_newest_and_the_milestones(tmp_path):
    for step in range(1, 9):
        _save(tmp_path, step)
    gone = commit.prune(tmp_path, newest=8, keep_last=2, milestone_every=3)
    assert [path.name for path in commit.checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (8, 7, 6, 3)]
    assert len(gone) == 4
    assert not list(tmp_path.glob(".trash*"))


def test_the_step_to_rewind_to_outlives_newer_ones_and_a_rewind_takes_back_the_rest(tmp_path):
    for step in range(1, 6):
        (tmp_path / f"step-{step:08d}").mkdir()
    gone = commit.prune(tmp_path, newest=5, keep_last=1, milestone_every=0, protected=2)
    assert gone == [f"step-{step:08d}" for step in (4, 3, 1)]
    assert commit.remove_after(tmp_path, 2) == ["step-00000005"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_clean_removes_what_killed_runs_left_and_nothing_else(tmp_path):
    kept = _save(tmp_path, 1)
    write_file(commit.begin(tmp_path, 2, "dead") / "model", b"half")
    shutil.copytree(kept, tmp_path / ".trash-step-00000000")
    assert commit.clean(tmp_path) == [".tmp-step-00000002-dead", ".trash-step-00000000"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_manifest_is_json_that_names_every_file(tmp_path):
    folder = _save(tmp_path, 1)
    body = json.loads((folder / "MANIFEST.json").read_bytes())["body"]
    assert [file["name"] for file in body["files"]] == ["model", "optim"]
    assert body["about"] == {"cursor": 1}


def _save(root: Path, step: int) -> Path:
    temp = commit.begin(root, step, "x")
    files = [write_file(temp / name, f"{name} of {step}".encode()) for name in ("model", "optim")]
    final = commit.step_folder(root, step)
    commit.seal(temp, final, step=step, files=files, about={"cursor": step})
    return final


def test_a_checkpoint_renamed_to_another_step_is_named(tmp_path):
    commit.begin(tmp_path, 4, "a")
    commit.seal(tmp_path / ".tmp-step-00000004-a", commit.step_folder(tmp_path, 4), step=4, files=[], about={})
    commit.step_folder(tmp_path, 4).rename(commit.step_folder(tmp_path, 7))
    with pytest.raises(DamagedError, match="contains step 4, which does not match its name; rename it back"):
        commit.verify(commit.step_folder(tmp_path, 7))
    commit.step_folder(tmp_path, 7).rename(tmp_path / "copied elsewhere")
    assert commit.verify(tmp_path / "copied elsewhere").step == 4
