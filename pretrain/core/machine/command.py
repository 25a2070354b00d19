"""The frame of every command, also of `python -m MODULE`: a fault that is no bug is a sentence and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pretrain.core.machine.failures import failure_of


def run_command(name: str, command: Callable[[], int]) -> int:
    """The status that `command` returns; for a fault of the user's data, files or machine that of docs/exit_status.md.

    A bug is raised, and deserves its traceback.
    """
    try:
        return command()
    except KeyboardInterrupt:  # a running run saves and stops instead
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has closed the pipe: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        failure = failure_of(error)
        if failure is None:
            raise
        print(f"{name}: {failure.text}", file=sys.stderr)
        return failure.status
