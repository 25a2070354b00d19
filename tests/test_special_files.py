"""Pipes, sockets, devices, folders and links to themselves, where a file is expected: named, never opened."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.data.examples import BadExample
from finetune.data.files import Files
from finetune.predict import main as predict
from finetune.release import open_task, write_release
from fovea.__main__ import main as fovea
from pretrain.core.files import SpecialFileError, open_file, read_bytes
from pretrain.data.__main__ import main as data
from pretrain.models.release.manifest import WEIGHTS
from tests.data.photos import ramps, stored
from tests.finetune.small_tasks import small_task


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            opened.bind(f"/proc/self/fd/{folder}/{path.name}")  # its path is limited to 107 bytes
        finally:
            os.close(folder)


KINDS: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": _socket,
    "a device": lambda path: path.symlink_to("/dev/null"),  # /dev/zero would fill the memory of a failing test
    "a folder": lambda path: path.mkdir(),
}
LOOP = "Too many levels of symbolic links"


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """What opens a pipe waits for a writer that does not come: an error then."""

    def waited(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_all(folder: Path, suffix: str) -> list[str]:
    """One of every kind but a folder, and a link to itself; their names, sorted."""
    for kind, make in KINDS.items():
        if kind != "a folder":
            make(folder / f"{kind.split()[-1]}{suffix}")
    (folder / f"loop{suffix}").symlink_to(folder / f"loop{suffix}")
    return sorted(path.name for path in folder.glob(f"*{suffix}"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str):
    KINDS[kind](tmp_path / "x")
    (tmp_path / "link").symlink_to(tmp_path / "x")
    for name in ("x", "link"):
        with pytest.raises(SpecialFileError, match=f"is {kind}, not a regular file"):
            open_file(tmp_path / name)
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "good").symlink_to(tmp_path / "file")
    assert read_bytes(tmp_path / "good") == b"content"


def test_writing_shards_skips_what_is_no_file_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "photos").mkdir()
    special = make_all(tmp_path / "photos", ".jpg")
    (tmp_path / "photos" / "good.jpg").write_bytes(stored(ramps(30, 20), 1))
    assert data(["write", str(tmp_path / "photos"), str(tmp_path / "out"), "--workers", "1"]) == 0
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in skipped) == special
    for reason in ("is a named pipe", "is a socket", "is a device", LOOP):
        assert any(reason in line for line in skipped), skipped


def test_a_list_may_name_what_is_no_file(tmp_path: Path):
    special = make_all(tmp_path, ".jpg")
    (tmp_path / "good.jpg").write_bytes(stored(ramps(30, 20), 1))
    rows = ["file,label", *(f"{name},{label}" for label, name in enumerate([*special, "good.jpg", "absent.jpg"]))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert data(["write", str(tmp_path / "list.csv"), str(tmp_path / "out"), "--workers", "1"]) == 0
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in skipped) == sorted([*special, "absent.jpg"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [["index"], ["verify"], ["show"]], ids=lambda words: words[0])
def test_a_shard_that_is_no_file_is_refused(
    tmp_path: Path, kind: str, words: list[str], capsys: pytest.CaptureFixture[str]
):
    KINDS[kind](tmp_path / "x.tar")
    out = ["--out", str(tmp_path / "sheet.png")] if words == ["show"] else []
    assert data([*words, str(tmp_path), *out]) == 2
    assert f"x.tar is {kind}, not a shard" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("word", ["pretrain", "finetune"])
def test_a_configuration_that_is_no_file_is_refused(
    tmp_path: Path, kind: str, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    KINDS[kind](tmp_path / "x.yaml")
    monkeypatch.setattr("sys.argv", ["fovea", word, str(tmp_path / "x.yaml")])
    assert fovea() == 2
    assert f"is {kind}" in capsys.readouterr().err


def test_images_that_are_no_files_are_unusable_examples(tmp_path: Path):
    special = make_all(tmp_path, ".png")
    files = Files.open(tmp_path)
    assert list(files) == special
    for name in special:
        for read in (files.read, lambda name: files.head(name, 10)):
            with pytest.raises(BadExample, match=LOOP if "loop" in name else "not a regular file"):
                read(name)


def test_prediction_names_images_that_are_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    release = write_release(tmp_path / "release", small_task("classification"), {"source": {"title": "a test"}})
    (tmp_path / "photos").mkdir()
    special = make_all(tmp_path / "photos", ".jpg")
    (tmp_path / "photos" / "good.jpg").write_bytes(stored(ramps(40, 30), 1))
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict([str(release), str(tmp_path / "photos"), *arguments]) == 0
    said = capsys.readouterr().err
    for name in special:
        assert f"{name}: cannot be read: " in said
    assert predict([str(release), str(tmp_path / "photos" / "pipe.jpg"), *arguments]) == 2
    assert "pipe.jpg is a named pipe, not an image file" in capsys.readouterr().err


@pytest.mark.parametrize("name", [WEIGHTS, "fovea.json", "MANIFEST.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_release_with_a_special_file_is_refused(tmp_path: Path, kind: str, name: str):
    release = write_release(tmp_path / "release", small_task("classification"), {"source": {"title": "a test"}})
    (release / name).unlink()
    KINDS[kind](release / name)
    with pytest.raises(ValueError, match=name):
        open_task(release)


def test_weights_that_are_a_pipe_are_refused_without_a_manifest_too(tmp_path: Path):
    release = write_release(tmp_path / "release", small_task("classification"), {"source": {"title": "a test"}})
    for name in (WEIGHTS, "MANIFEST.json"):
        (release / name).unlink()
    record = release / "fovea.json"
    record.write_text(record.read_text().replace('"manifest"', '"manifest_before"'))
    os.mkfifo(release / WEIGHTS)
    with pytest.raises(OSError, match="is a named pipe"):
        open_task(release)
