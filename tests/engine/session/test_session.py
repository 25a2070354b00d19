"""What a run that ends by a foreseen error says, and with which status."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.engine.config import EngineConfig
from pretrain.engine.session.session import RunError, exit_status, session


def ends(folder: Path, error: Exception) -> int:
    def body(_: Any) -> int:
        raise error

    config = EngineConfig.model_validate({"device": "cpu", "watch": {"enabled": False}})
    return exit_status(lambda: session(str(folder), config, body))


def test_a_disk_that_takes_no_more_is_a_sentence_and_not_a_traceback(tmp_path: Path, capsys):
    assert ends(tmp_path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "data.json"))) == 5
    assert ends(tmp_path, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))) == 5
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/data.json: No space left on device; once it can be written again, the same command resumes",
        f"a file of {tmp_path}: Disk quota exceeded; once it can be written again, the same command resumes",
    ]


def test_a_full_disk_has_its_status_also_when_a_checkpoint_is_written(tmp_path: Path):
    assert ends(tmp_path, CheckpointError("could not write step-8: no space", status=5)) == 5


def test_other_errors_of_the_system_keep_their_traceback(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        ends(tmp_path, FileNotFoundError("gone"))


def test_no_whole_checkpoint_has_a_status_of_its_own_and_the_folder_is_free_again(tmp_path: Path, capsys):
    for _ in range(2):
        assert ends(tmp_path, CheckpointError("no checkpoint is complete")) == 3
    assert capsys.readouterr().err == "no checkpoint is complete\n" * 2


def test_a_program_gets_the_error_with_its_cause_and_status(tmp_path: Path):
    config = EngineConfig.model_validate({"device": "cpu", "watch": {"enabled": False}})

    def body(_: Any) -> int:
        raise CheckpointError("no checkpoint is complete")

    with pytest.raises(RunError, match="no checkpoint is complete") as found:
        session(str(tmp_path), config, body)
    assert found.value.status == 3 and isinstance(found.value.__cause__, CheckpointError)
