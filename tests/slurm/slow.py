"""`fovea` whose first attempt has steps made longer by SLOW_SECONDS: a test can interrupt it, and its numbers do not
change.

HANG_AT: a rank and a batch, "1:6": in the first attempt this rank holds the GIL there forever.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from typing import Any


def main() -> int:
    if sys.argv[1:3] == ["-m", "fovea"]:
        del sys.argv[1:3]
    if sys.argv[1] == "pretrain":
        from pretrain.loader import PretrainLoader

        batches = PretrainLoader.__iter__

        def slowly(self: PretrainLoader) -> Iterator[Any]:
            rank, _, at = os.environ.get("HANG_AT", ":").partition(":")
            first = "SLURM_RESTART_COUNT" not in os.environ
            for index, batch in enumerate(batches(self)):
                if first and rank == os.environ.get("RANK") and index == int(at):
                    # PyDLL calls C with the GIL held; a read, unlike a sleep, continues after a signal.
                    ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
                time.sleep(float(os.environ["SLOW_SECONDS"]) if first else 0)
                yield batch

        PretrainLoader.__iter__ = slowly
    from launch.cli import main as fovea

    return fovea(sys.argv[1:])


if __name__ == "__main__":  # data workers import this file
    sys.exit(main())
