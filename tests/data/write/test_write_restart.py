from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.data.__main__ import main
from pretrain.data.shards.dataset import Dataset
from pretrain.data.write.shards import WriteSettings, _only_writer, write
from tests.data.tars import image_bytes, make_folder, samples_of
from tests.runs import LONG


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "images")


def run(*arguments: object) -> int:
    return main(["write", *map(str, arguments), "--workers", "1"])


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.suffix != ".idx"}


def test_the_same_command_again_writes_nothing_and_another_is_refused(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (folder / "cat" / "bad.jpg").write_bytes(b"hello")
    assert run(folder, out, "--samples-per-shard", 7) == 0
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert run(folder, out, "--samples-per-shard", 7) == 0
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == stamps
    assert "4 of them written before" in capsys.readouterr().out
    assert run(folder, out, "--samples-per-shard", 8, "--size", 8) == 2
    error = capsys.readouterr().err
    assert "samples_per_shard: 7 there, 8 now" in error
    assert "size: None there, 8 now" in error
    (folder / "cat" / "new.jpg").write_bytes(image_bytes(77))
    assert run(folder, out, "--samples-per-shard", 7) == 2
    assert "files: 25 there, 26 now" in capsys.readouterr().err
    assert contents(out) == before


def test_a_strict_run_continues_another_and_a_changed_file_is_another_run(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, out, "--samples-per-shard", 7) == 0
    assert run(folder, out, "--samples-per-shard", 7, "--strict") == 0
    assert "4 of them written before" in capsys.readouterr().out
    (folder / "cat" / "cat.0.jpg").write_bytes(image_bytes(99, size=(30, 20)))
    assert run(folder, out, "--samples-per-shard", 7) == 2
    assert "sha256 of names, sizes and labels" in capsys.readouterr().err


def test_shards_of_another_program_are_not_overwritten(folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"precious")
    assert run(folder, tmp_path / "out") == 2
    assert "already holds train-000000.tar" in capsys.readouterr().err
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == b"precious"
    assert run(folder, tmp_path / "out", "--name", "mine") == 0


def test_writers_of_two_names_share_a_folder_and_those_of_one_do_not(folder, tmp_path, capsys):
    out = tmp_path / "out"
    (out / ".write").mkdir(parents=True)
    for name in (".a-000000.tar.7.tmp", ".a-b-000000.tar.7.tmp", ".b-000000.tar.idx.7.tmp"):
        (out / name).touch()
    with _only_writer(out / ".write", "a"):
        assert run(folder, out, "--name", "a") == 2
        assert "another fovea data write --name a is running" in capsys.readouterr().err
        assert run(folder, out, "--name", "b") == 0
        assert sorted(path.name for path in out.glob(".*.tmp")) == [".a-000000.tar.7.tmp", ".a-b-000000.tar.7.tmp"]
    assert run(folder, out, "--name", "a") == 0
    assert Dataset.open(out).num_samples == 48


def test_a_file_system_without_locks_is_named(folder, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run(folder, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/out/.write/train.lock: this file system has no locks (Function not implemented)" in error
    assert "then copy" in error


@pytest.mark.processes
def test_workers_do_not_change_a_byte(folder, tmp_path):
    settings = WriteSettings(samples_per_shard=5)
    for workers in (1, 3):
        write(folder, tmp_path / str(workers), settings, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) == 5 + 3


def wait_for(condition, *, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


@pytest.mark.processes
@pytest.mark.parametrize("shards_before_the_kill", [1, 6])
def test_a_killed_write_is_finished_by_the_same_command_to_the_same_bytes(tmp_path, shards_before_the_kill):
    data = image_bytes(0, size=(640, 480))
    for i in range(150):
        (tmp_path / "in" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / str(i % 3) / f"{i:03d}.jpg").write_bytes(data if i % 40 else b"bad")
    out = tmp_path / "killed"
    options = ["--samples-per-shard", "10", "--workers", "2"]
    command = [sys.executable, "-m", "pretrain.data", "write", str(tmp_path / "in")]
    victim = subprocess.Popen([*command, str(out), *options], stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(out.glob("*.tar"))) >= shards_before_the_kill)
    children = descendants(victim.pid)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert len(list(out.glob("*.tar"))) < 15, "finished before the kill"
    wait_for(lambda: not any(alive(pid) for pid in children))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for again in (out, tmp_path / "undisturbed"):
        assert subprocess.run([*command, str(again), *options], capture_output=True, check=False).returncode == 0
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(out.rglob("*.tmp"))
    assert Dataset.open(out).num_samples == 146


def descendants(pid: int) -> list[int]:
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [d for child in children for d in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.processes
def test_a_full_disk_names_the_shard_and_leaves_nothing_half_written(tmp_path):
    folder = make_folder(tmp_path / "in", size=(200, 150))
    out = tmp_path / "out"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from pretrain.data.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "write", str(folder), str(out), "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"File too large: '{out}/train-000000.tar'" in result.stderr
    assert not [path for path in out.rglob("*") if path.suffix in (".tar", ".tmp", ".idx")]
    assert run(folder, out) == 0
    assert len(samples_of(out)) == 24


@pytest.mark.processes
def test_an_interrupt_prints_how_to_continue_and_leaves_no_worker(tmp_path):
    folder = make_folder(tmp_path / "in", count=60, size=(640, 480))
    out = tmp_path / "out"
    options = ["--samples-per-shard", "5", "--workers", "2"]
    command = [sys.executable, "-m", "pretrain.data", "write", str(folder), str(out), *options]
    # A shell's background job ignores Ctrl-C, and so would all it starts: the tests may run in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        victim = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: list(out.glob("*.tar")))
    children = descendants(victim.pid)
    os.killpg(victim.pid, signal.SIGINT)
    _, error = victim.communicate(timeout=LONG)
    assert victim.returncode == 130
    assert "the same command continues" in error
    assert "Traceback" not in error
    wait_for(lambda: not any(alive(pid) for pid in children))


@pytest.mark.processes
def test_death_at_any_fsync_or_rename_leaves_a_run_that_the_same_command_finishes(tmp_path):
    folder = make_folder(tmp_path / "in", count=4)
    (folder / "cat" / "bad.jpg").write_bytes(b"hello")
    settings = WriteSettings(samples_per_shard=7)
    write(folder, tmp_path / "undisturbed", settings)
    expected = contents(tmp_path / "undisturbed")
    step, finished = 0, False
    while not finished:
        step += 1
        out = tmp_path / str(step)
        finished = write_and_die(folder, out, settings, step)
        for shard in out.glob("*.tar"):
            assert shard.read_bytes() == expected[shard.name]
        write(folder, out, settings)
        assert contents(out) == expected
        assert not list(out.rglob("*.tmp"))
    assert step > 20


def write_and_die(folder: Path, out: Path, settings: WriteSettings, step: int) -> bool:
    """Write in a child that is gone at the `step`-th call that makes something durable; whether it came to its end."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def deadly(function):
            def call(*arguments):
                calls[0] += 1
                if calls[0] == step:
                    os._exit(9)
                return function(*arguments)

            return call

        os.fsync, os.rename, Path.rename = deadly(os.fsync), deadly(os.rename), deadly(Path.rename)
        try:
            write(folder, out, settings)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
