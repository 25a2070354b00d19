"""Files by name: the same out of a folder, a tar and indexed shards."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from finetune.data.examples import BadExample
from finetune.data.files import Files
from pretrain.data.shards.index import build_index
from tests.data.tars import tar_bytes

CONTENT = {"a/x.png": b"mask", "a/x.jpg": b"image", "b.jpg": b"", "readme.txt": b"text"}


def folder_of(root: Path) -> Path:
    for name, data in CONTENT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / ".hidden").write_bytes(b"")
    return root


def tar_of(root: Path, name: str = "set.tar") -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(tar_bytes(CONTENT.items()))
    return root / name


@pytest.mark.parametrize("kind", ["folder", "tar", "shards"])
def test_a_folder_a_tar_and_shards_hold_the_same_files(tmp_path: Path, kind: str):
    where = folder_of(tmp_path / "d") if kind == "folder" else tar_of(tmp_path / "d")
    if kind == "shards":
        build_index([str(where)])
        where = where.parent
    files = Files.open(where)
    assert files.names == tuple(sorted(CONTENT))
    assert {name: files.read(name) for name in files} == CONTENT
    copy = pickle.loads(pickle.dumps(files))
    files.close()
    assert {name: copy.read(name) for name in copy} == CONTENT, "it has opened files of its own"
    assert files.size("b.jpg") == 0 and "b.jpg" in files and "c.jpg" not in files
    assert files.path("b.jpg") == str((tmp_path / "d" if kind == "folder" else tmp_path / "d" / "set.tar") / "b.jpg")
    with pytest.raises(BadExample, match=r"c.jpg: no such file"):
        files.read("c.jpg")


def test_the_fingerprint_depends_on_content_not_on_location(tmp_path: Path):
    one, two = folder_of(tmp_path / "one"), folder_of(tmp_path / "two")
    before = Files.open(one).fingerprint(CONTENT)
    assert before == Files.open(two).fingerprint(CONTENT)
    (two / "b.jpg").write_bytes(b"longer")
    assert before != Files.open(two).fingerprint(CONTENT)
    assert Files.open(one).fingerprint(["a/x.png"]) == Files.open(two).fingerprint(["a/x.png"])
    tars = [Files.open(tar_of(tmp_path / name)) for name in ("t", "u")]
    assert tars[0].fingerprint(CONTENT) == tars[1].fingerprint(CONTENT)
    (tmp_path / "u" / "set.tar").write_bytes(tar_bytes([*CONTENT.items(), ("more.jpg", b"more")]))
    assert tars[0].fingerprint(CONTENT) != Files.open(tmp_path / "u" / "set.tar").fingerprint(CONTENT)


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path: Path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"image")
    files = Files.open(tmp_path)
    with pytest.raises(ValueError, match=r"b'caf\\xe9.jpg' is not UTF-8; rename it"):
        files.fingerprint(files.names)


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "lost+found"))

    monkeypatch.setattr("finetune.data.files.walk", refuse)
    with pytest.raises(ValueError, match=r"lost\+found: cannot be read: Permission denied; make it readable"):
        Files.open(tmp_path)


def test_a_tar_that_changed_during_the_run_is_detected(tmp_path: Path):
    path = tar_of(tmp_path / "d")
    files = Files.open(path)
    path.write_bytes(path.read_bytes().replace(b"image", b"IMAGE"))
    with pytest.raises(BadExample, match="crc32c"):
        files.read("a/x.jpg")


def test_a_tar_of_the_folder_it_was_made_in_holds_what_the_folder_holds(tmp_path: Path):
    members = [(f"./{name}", data) for name, data in CONTENT.items()]
    (tmp_path / "set.tar").write_bytes(tar_bytes([*members, ("./a/._x.jpg", b"of macOS"), ("./.git/b.jpg", b"")]))
    files = Files.open(tmp_path / "set.tar")
    assert {name: files.read(name) for name in files} == CONTENT


def test_one_name_in_two_tars_is_refused(tmp_path: Path):
    tar_of(tmp_path / "d", "one.tar"), tar_of(tmp_path / "d", "two.tar")
    with pytest.raises(ValueError, match=r"a/x.jpg exists twice"):
        Files.open(tmp_path / "d")


@pytest.mark.parametrize(
    ("where", "message"),
    [("nowhere", "no such file or folder"), ("empty", "no files in it"), ("a.zip", "expected a folder, a .tar")],
)
def test_a_path_that_is_no_set_of_files_is_named(tmp_path: Path, where: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=message):
        Files.open(tmp_path / where)
