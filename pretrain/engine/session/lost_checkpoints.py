"""A run whose checkpoints are gone: it must not look like a new one."""

from __future__ import annotations

from pathlib import Path

from pretrain.core import distributed
from pretrain.core.configlib import read_values
from pretrain.core.record import read_rows
from pretrain.engine.checkpoint.commit import CheckpointError


def check_not_started(folder: Path, *, rewound_to_start: bool = False) -> None:
    """Refuse to start at step 0 in the folder of a run whose checkpoints were lost. Collective.

    The run had checkpoints if it ended (DONE, PREEMPTED), or if its log goes beyond the first step that is saved.

    Args:
        rewound_to_start: the run itself removed its checkpoints in a rewind to step 0.

    Raises:
        CheckpointError: the checkpoints are missing.
    """
    trace = _trace_of_checkpoints(folder, in_log=not rewound_to_start) if distributed.rank() == 0 else None
    if problem := distributed.broadcast_object(trace):
        raise CheckpointError(
            f"no checkpoint in {folder / 'checkpoints'}, but {problem}: this run had one. Restore the checkpoints, or "
            "choose another run_dir to start again at step 0"
        )


def _trace_of_checkpoints(folder: Path, *, in_log: bool) -> str | None:
    for marker in ("DONE", "PREEMPTED"):
        if (folder / marker).exists():
            return f"{folder / marker} exists"
    last = max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)
    if in_log and last and (folder / "config.yaml").exists():
        period = read_values(folder / "config.yaml").get("checkpoint", {}).get("every_steps") or last
        if last > period:
            return f"{folder / 'metrics.jsonl'} reaches step {last:.0f} and the run saved every {period} steps"
    return None
