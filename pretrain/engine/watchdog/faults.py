"""`faults.jsonl` of a run: faults and their hosts, for people and for the program that requeues the run. No torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.core.ranks import variable

_FILE = "faults.jsonl"


@dataclass(frozen=True)
class Fault:
    """kind: "hang" or "replicas". hosts, ranks: faulty ones, if known. job, restart: SLURM job id, restart count."""

    kind: str
    text: str
    hosts: list[str]
    ranks: list[int]
    job: str = ""
    restart: int = 0
    time: str = ""


def add_fault(run_dir: Path, kind: str, text: str, *, hosts: list[str], ranks: list[int]) -> None:
    """Append a fault of the current attempt."""
    job, restart = os.environ.get("SLURM_JOB_ID", ""), variable(os.environ, "SLURM_RESTART_COUNT", 0)
    fault = Fault(kind, text, hosts, ranks, job, restart, time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    with (run_dir / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(fault)) + "\n")


def read_faults(run_dir: Path, *, job: str, restart: int) -> list[Fault]:
    """The faults of one attempt, oldest first; an incomplete line is skipped."""
    path = run_dir / _FILE
    found: list[Fault] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError, TypeError):
            found.append(Fault(**json.loads(line)))
    return [fault for fault in found if (fault.job, fault.restart) == (job, restart)]
