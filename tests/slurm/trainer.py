"""A trainer of the standard library: steps, checkpoints, markers and signals like those of a run, and planted faults.

Its weights are a hash over the steps, so that equal weights mean the same steps, each once. A step ends when all ranks
have reached it, as in a run; a rank whose peer is gone waits, deaf to everything. Faults come from FAKE_* variables:
    FAKE_STEP_SECONDS   of one step
    FAKE_CRASH          "STEP:RANK:TIMES:HOW": that rank ends so at that step, the first TIMES attempts ("kill", "exit")
    FAKE_CRASH_ON       "NODE:HOW": the ranks on that node end so three steps after each start
    FAKE_DEAF           signals and the `stop` file are ignored
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

SAVE_EVERY = 10


def main() -> int:
    program, config, *overrides = sys.argv[1:]
    values = yaml.safe_load(Path(config).read_text())
    changed = dict(override.split("=", 1) for override in overrides)
    run = Path(changed.get("run_dir", values["run_dir"]))
    total = int(changed.get("optim.total_steps", values["optim"]["total_steps"]))
    rank, restart = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    asked: list[int] = []
    deaf = "FAKE_DEAF" in os.environ
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if deaf else lambda received, _: asked.append(received))
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    step, weights = newest(checkpoints)
    print(f"{program} rank {rank} on {os.environ['SLURMD_NODENAME']} starts at step {step}", flush=True)
    attempt = run / f".attempt-{os.environ['SLURM_JOB_ID']}-{restart}"
    attempt.mkdir(parents=True, exist_ok=True)
    first = step
    while step < total:
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.1")))
        step += 1
        weights = hashlib.sha256(f"{weights} {step}".encode()).hexdigest()
        crash(step, first, rank, restart)
        wants = not deaf and (bool(asked) or (rank == 0 and (run / "stop").exists()))
        stop = meet(attempt, rank, step, wants)
        if rank:
            if stop:
                return 85
            continue
        with (run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")
        if step % SAVE_EVERY == 0 or step == total or stop:
            save(checkpoints, step, weights)
        if stop:
            (run / "stop").unlink(missing_ok=True)
            (run / "PREEMPTED").write_text(f"step {step}\n")
            return 85
    if rank == 0:
        (run / "DONE").write_text(f"step {step}\n")
        print(f"done {weights}", flush=True)
    return 0


def meet(attempt: Path, rank: int, step: int, wants: bool) -> bool:
    """Wait until every rank has reached this step; whether one of them stops there."""
    temporary = attempt / f".{rank}"
    temporary.write_text(f"{step} {int(wants)}")
    temporary.rename(attempt / f"{rank}-{step}")
    (attempt / f"{rank}-{step - 2}").unlink(missing_ok=True)
    said = []
    for other in range(int(os.environ["SLURM_NTASKS"])):
        while not (path := attempt / f"{other}-{step}").exists():
            time.sleep(0.005)
        said.append(path.read_text().endswith("1"))
    return any(said)


def crash(step: int, first: int, rank: int, restart: int) -> None:
    at, who, times, how = os.environ.get("FAKE_CRASH", "0:0:0:exit").split(":")
    node, _, node_how = os.environ.get("FAKE_CRASH_ON", ":").partition(":")
    if step >= int(at) > 0 and rank == int(who) and restart < int(times):
        end(how)
    if node == os.environ["SLURMD_NODENAME"] and step == first + 3:
        end(node_how)


def end(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("planted fault")


def newest(checkpoints: Path) -> tuple[int, str]:
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        if (folder / "MANIFEST.json").exists():
            return int(folder.name[5:]), (folder / "weights").read_text()
    return 0, ""


def save(checkpoints: Path, step: int, weights: str) -> None:
    temporary = checkpoints / f".tmp-{step}-{os.getpid()}"
    temporary.mkdir()
    (temporary / "weights").write_text(weights)
    (temporary / "MANIFEST.json").write_text("{}")
    temporary.rename(checkpoints / f"step-{step:08d}")


if __name__ == "__main__":
    sys.exit(main())
