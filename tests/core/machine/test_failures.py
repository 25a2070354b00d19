"""Faults of data, files and machine become a sentence and a status of their kind; bugs do not."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.cli import COMMANDS, main
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.failures import DataError, MachineError, failure_of


def system(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


def test_every_kind_has_its_status():
    kinds = {
        2: [DataError("a mask of mode RGB"), ConfigError("a.yaml", ["lr: missing"])],
        5: [system(errno.ENOSPC), system(errno.EDQUOT, "/a"), system(errno.EROFS, "/a")],
        6: [
            *(MachineError("no workers"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")),
            *(system(errno.EMFILE), system(errno.ENOMEM), system(errno.EAGAIN)),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            RuntimeError("can't start new thread"),
            ImportError("libtorch.so: failed to map segment from shared object"),
        ],
        7: [system(errno.ENOENT, "/a"), system(errno.EACCES, "/a"), system(errno.EIO), system(errno.ESTALE)],
        1: [RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:6")],
    }
    for status, errors in kinds.items():
        for error in errors:
            failure = failure_of(error)
            assert failure is not None and failure.status == status, error
            assert failure.text and (status == 2 or "\n" not in failure.text)


def test_bugs_keep_their_traceback():
    assert not [
        e for e in (KeyError("a"), TypeError(), AssertionError(), OSError("?"), RuntimeError()) if failure_of(e)
    ]


def test_data_that_cannot_be_read_for_lack_of_open_files_is_a_fault_of_the_machine():
    lacking = ValueError("a.tar.idx: cannot read this index")
    lacking.__cause__ = OSError(errno.EMFILE, "Too many open files", "a.tar.idx")
    error = DataError(str(lacking))
    error.__cause__ = lacking
    failure = failure_of(error)
    assert failure is not None and failure.status == 6 and "ulimit -n" in failure.text
    gone = DataError("a.tar: gone")
    gone.__cause__ = FileNotFoundError(errno.ENOENT, "No such file", "a.tar")
    assert (failure_of(gone) or failure).status == 2


def test_the_cause_of_an_error_counts():
    try:
        raise ValueError("wrapped") from system(errno.ENOSPC, "/full")
    except ValueError as error:
        failure = failure_of(error)
    assert failure is not None and "/full: No space left on device" in failure.text


def test_the_limit_of_open_files_is_named():
    of_safetensors = failure_of(RuntimeError("unable to open file <a> in read-only mode: Too many open files (24)"))
    assert of_safetensors is not None and of_safetensors.status == 6 and "ulimit -n" in of_safetensors.text
    failure = failure_of(system(errno.EMFILE, "/a"))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert (
        failure is not None and f"/a: Too many open files: the limit is {limit}; raise it (ulimit -n)" in failure.text
    )


def test_every_command_ends_with_the_sentence_and_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(arguments: list[str]) -> int:
        raise system(errno.ENOSPC, arguments[0])

    monkeypatch.setitem(COMMANDS, "release", full)
    assert main(["release", "/out"]) == 5
    assert capsys.readouterr().err.startswith("fovea release: /out: No space left on device")


@pytest.mark.processes
def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path: Path):
    command = f"{sys.executable} -m fovea doctor --rules | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=600)
    assert done.stderr == "", done.stderr
