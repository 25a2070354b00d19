"""Every command, by whichever name it is started, ends a fault that is no bug with a sentence and a status."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pretrain.core.machine.command import run_command

ROOT = Path(__file__).parents[3]
# The writer of docs/, and the `fovea` command, which calls it for every word.
OTHERS = {"pretrain/engine/watchdog/__main__.py", "launch/pages/__main__.py", "launch/cli.py"}


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 5, "fovea data: /x: No space left on device"),
        (KeyboardInterrupt(), 130, "fovea data: interrupted"),
    ],
)
def test_a_fault_is_a_sentence_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
):
    assert run_command("fovea data", lambda: raising(error)) == status
    assert said in capsys.readouterr().err


def test_a_bug_is_raised():
    with pytest.raises(AssertionError, match="a bug"):
        run_command("fovea data", lambda: raising(AssertionError("a bug")))


def test_python_m_ends_as_the_command_does():
    bare = {
        str(path.relative_to(ROOT))
        for package in ("pretrain", "finetune", "launch")
        for path in (ROOT / package).rglob("*.py")
        if "sys.exit(main" in path.read_text(encoding="utf-8")
    }
    assert bare - OTHERS == set()
