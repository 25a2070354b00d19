"""`fovea launch attempt begin|end`: called by a batch script before and after its ranks. It prints one line:

go RUN_DIR       begin: start the ranks
done             end: the run is complete
requeue [NODES]  requeue this job, excluding NODES
stop             end the job; the reason is on stderr, which is the job's log
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from launch.programs import PROGRAMS, check_program
from launch.slurm.attempts import AttemptLog, RestartDecision, blame, cancel_mark, decide, describe_lost, outcome
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.ranks import variable
from pretrain.engine.watchdog.faults import read_faults


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 with a line; 2 and the line `stop` if the configuration cannot run."""
    parser = argparse.ArgumentParser(prog="fovea launch attempt", description=__doc__)
    moments = parser.add_subparsers(dest="moment", required=True)
    begin = moments.add_parser("begin")
    begin.add_argument("program", choices=PROGRAMS)
    begin.add_argument("config")
    begin.add_argument("overrides", nargs="*", metavar="key=value")
    end = moments.add_parser("end")
    end.add_argument("--status", type=int, required=True, help="of srun")
    end.add_argument("--asked", default="", help="why the ranks were requested to stop")
    end.add_argument("--srun-log", type=Path, help="srun's stderr")
    end.add_argument("run_dir", type=Path)
    for moment in (begin, end):
        moment.add_argument("--nodes", type=_nodes, required=True, help="of this attempt")
        moment.add_argument("--down", type=_nodes, default=[], help="nodes of the cluster that are down")
        moment.add_argument("--partition-nodes", type=_nodes, default=[], help="nodes that the job could use")
        moment.add_argument("--excluded", type=_nodes, default=[], help="nodes that it must not use")
    chosen = parser.parse_args(arguments)
    return _begin(chosen) if chosen.moment == "begin" else _end(chosen)


def _begin(chosen: argparse.Namespace) -> int:
    try:
        ranks = variable(os.environ, "SLURM_NTASKS", 1)
        run_dir = check_program(chosen.program, chosen.config, chosen.overrides, world_size=ranks)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        print("stop")
        return 2
    book = _book(run_dir)
    ended = book.begin(nodes=chosen.nodes, down=chosen.down)
    decision = RestartDecision("go", "")
    if ended and ended[-1].outcome == "lost":
        decision = decide(ended, spare=_spare(chosen))
        if decision.action == "requeue" and not set(decision.exclude) & set(chosen.nodes):
            decision = RestartDecision("go", decision.why)
    if _is_cancelled(run_dir):
        decision = RestartDecision("stop", "cancelled by `fovea launch slurm cancel`")
    if decision.action == "go":
        # Requests and markers of the previous attempt.
        (run_dir / "PREEMPTED").unlink(missing_ok=True)
        (run_dir / "stop").unlink(missing_ok=True)
    return _answer(chosen, decision, f" {run_dir}" if decision.action == "go" else "")


def _end(chosen: argparse.Namespace) -> int:
    run_dir = chosen.run_dir
    log = chosen.srun_log
    node, said = blame(log.read_text(encoding="utf-8", errors="replace") if log and log.exists() else "")
    lost = set(chosen.nodes) & set(chosen.down)
    before = _book(run_dir).done_before()
    how = outcome(run_dir, status=chosen.status, asked=chosen.asked, lost=lost, done_before=before)
    why = chosen.asked.partition(" ")[0]
    if why == "overdue":
        node, said = None, "did not stop in time"
    if how == "lost":
        node, said = describe_lost(lost)
    elif how == "failed" and (faults := read_faults(run_dir, **_attempt())):
        # The run's own record is more exact than srun, which saw all its ranks end at once.
        node, said = (faults[-1].hosts[0] if len(faults[-1].hosts) == 1 else None), faults[-1].text
    elif how != "failed":
        node, said = None, {"signal": "requested by SLURM", "limit": "near the time limit"}.get(why, "")
    attempts = _book(run_dir).end(how, node=node, detail=said or f"exit status {chosen.status}" * (how == "failed"))
    decision = decide(attempts, spare=_spare(chosen))
    if decision.action == "requeue" and _is_cancelled(run_dir):
        decision = RestartDecision("stop", "cancelled by `fovea launch slurm cancel`")
    return _answer(chosen, decision, "")


def _answer(chosen: argparse.Namespace, decision: RestartDecision, more: str) -> int:
    if decision.why:
        excluded = f"; without {', '.join(decision.exclude)}" if decision.exclude else ""
        print(f"fovea launch: {decision.action}: {decision.why}{excluded}", file=sys.stderr)
    # The new list replaces the old one.
    excluded = ",".join(sorted({*chosen.excluded, *decision.exclude})) if decision.exclude else ""
    print(decision.action + more + (f" {excluded}" if decision.action == "requeue" else ""))
    return 0


def _book(run_dir: Path) -> AttemptLog:
    return AttemptLog(run_dir, **_attempt())


def _attempt() -> dict[str, Any]:
    return {"job": os.environ["SLURM_JOB_ID"], "restart": variable(os.environ, "SLURM_RESTART_COUNT", 0)}


def _is_cancelled(run_dir: Path) -> bool:
    return cancel_mark(run_dir, os.environ["SLURM_JOB_ID"]).exists()


def _spare(chosen: argparse.Namespace) -> int:
    return len({*chosen.partition_nodes} - {*chosen.excluded} - {*chosen.down} - {*chosen.nodes})


def _nodes(text: str) -> list[str]:
    return text.replace(",", " ").split()


if __name__ == "__main__":
    sys.exit(run_command("fovea launch attempt", main))
