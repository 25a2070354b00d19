"""Every way of writing a file or a folder gives the same guarantees."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.core import files

ROOT = Path(__file__).parents[2]


def a_file(path: Path, text: str) -> None:
    with files.replacing_file(path) as file:
        file.write(text.encode())


WRITERS: dict[str, Callable[[Path, str], None]] = {
    "file": a_file,
    "bytes": lambda path, text: files.write_bytes(path, text.encode()),
    "text": files.write_text,
    "json": lambda path, text: files.write_json(path, json.loads(text)),
}


def a_folder(folder: Path, text: str) -> None:
    with files.replacing_folder(folder) as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text(text)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fsyncs and renames in their order, by the name of the file or folder, without the temporary part."""
    made: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def plain(name: str) -> str:
        return name.removeprefix(".tmp-").removeprefix(".").partition(f".{os.getpid()}")[0].partition("-")[0]

    def synced(handle: int) -> None:
        made.append(f"fsync {plain(Path(os.readlink(f'/proc/self/fd/{handle}')).name)}")  # noqa: PTH115
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        made.append(f"rename to {target.name}")
        if path.is_file():
            assert path.read_bytes(), "nothing waits in a buffer"
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    return made


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, calls, write):
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder / "a.json", "{}")
    assert calls == ["fsync a.json", "rename to a.json", "fsync run"]


def test_everything_in_a_folder_reaches_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, calls):
    (tmp_path / "run").mkdir()
    a_folder(tmp_path / "run" / "release", "x")
    assert calls == ["fsync inner", "fsync file", "fsync release", "rename to release", "fsync run"]


def test_files_that_their_writer_synced_are_not_synced_again(tmp_path, calls):
    (tmp_path / "run").mkdir()
    new = files.new_folder(tmp_path / "run" / "step", "token")
    (new / "file").write_text("x")
    files.publish_folder(new, tmp_path / "run" / "step", files_synced=True)
    assert calls == ["fsync step", "rename to step", "fsync run"]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_next_to_it(tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    with pytest.raises(KeyError), files.replacing_file(path) as file:
        file.write(b"new")
        raise KeyError("in the middle")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_block_that_fails_leaves_the_old_folder_and_nothing_next_to_it(tmp_path):
    folder = tmp_path / "release"
    a_folder(folder, "old")
    with pytest.raises(KeyError), files.replacing_folder(folder) as new:
        (new / "other").write_text("new")
        raise KeyError("in the middle")
    assert (folder / "inner" / "file").read_text() == "old" and not (folder / "other").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


def test_a_folder_is_replaced_with_all_that_was_in_it(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "of the old one").touch()
    a_folder(folder, "new")
    assert [entry.name for entry in folder.iterdir()] == ["inner"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["release"]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775)])
def test_modes_follow_the_umask(tmp_path, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        for name, write in WRITERS.items():
            write(tmp_path / name, "{}")
            assert (tmp_path / name).stat().st_mode & 0o777 == file_mode, name
        a_folder(tmp_path / "folder", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == folder_mode


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json") as caught:
        files.write_text(tmp_path / "a.json", "new")
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_no_other_module_syncs_or_names_files_in_its_own_way():
    """Allowed: files that are hashed while they are written, and folders that leave by a rename before they go."""
    allowed = {"pretrain/core/files.py", "pretrain/core/manifest.py", "launch/slurm/jobs.py"}
    allowed |= {f"pretrain/engine/checkpoint/{name}.py" for name in ("commit", "checkpoints")}
    allowed |= {"launch/lab/plants.py", "launch/lab/kinds/weights.py"}  # which plant faults into these calls
    own = {
        str(path.relative_to(ROOT))
        for package in ("pretrain", "finetune", "launch")
        for path in (ROOT / package).rglob("*.py")
        if any(call in path.read_text() for call in ("fsync(", ".rename(", "os.replace", "temporary.replace("))
    }
    assert own <= allowed, f"use pretrain.core.files: {sorted(own - allowed)}"


def test_tensors_are_written_by_our_own_writer_which_aborts_no_process_where_memory_is_short():
    """That of safetensors is in Rust: without memory it ends the process with SIGABRT and no sentence."""
    writers = ("safetensors.torch import save", "serialize_file")
    own = {
        str(path.relative_to(ROOT))
        for package in ("pretrain", "finetune")
        for path in (ROOT / package).rglob("*.py")
        if any(name in path.read_text() for name in writers)
    }
    assert not own, f"use pretrain.core.tensorfile.write_tensors: {sorted(own)}"
