"""Writes a new configuration, or says in a sentence why not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pretrain.core.configlib import ConfigError
from pretrain.core.files import write_text
from pretrain.core.machine.failures import machine_failure
from pretrain.core.text import shown


def write_new(out: Path, make: Callable[[], tuple[str, list[str]]], *, next_command: str) -> int:
    """Write the text that `make` returns and print the lines beside it; the exit status, 2 if nothing was written."""
    try:
        if out.exists():
            raise ValueError(f"--out {out}: exists already; give another name, or remove it")
        text, said = make()
        write_text(out, text)
    except (ConfigError, ValueError) as error:
        lacking = machine_failure(error)
        print(lacking.text if lacking else error, file=sys.stderr)
        return lacking.status if lacking else 2
    except OSError as error:
        print(f"--out {out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print("\n".join([*said, f"wrote {shown(out)}; next: {shown(next_command)}"]))
    return 0
