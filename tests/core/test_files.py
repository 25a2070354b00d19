import os
from pathlib import Path

import pytest

from pretrain.core.files import replacing, write_whole


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_the_end(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(fd: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name.partition('.json')[0]}")  # noqa: PTH115
        fsync(fd)

    def renamed(path: Path, target: Path) -> Path:
        calls.append("rename")
        assert path.read_bytes() == b"{}", "nothing waits in a buffer"
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write_whole(tmp_path / "a.json", b"{}")
    assert calls == ["fsync .a", "rename", f"fsync {tmp_path.name}"]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, b"old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"new")
        raise KeyError("in the middle")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]  # noqa: PTH208
