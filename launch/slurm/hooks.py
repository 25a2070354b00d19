"""`fovea launch attempt begin|end`: what a batch script asks before and after its ranks. One line of answer on stdout.

go RUN_DIR       begin: start the ranks
done             end: the run is complete
requeue [NODES]  requeue this job, excluding NODES
stop             leave the job; why is on stderr, that is in the job's log
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
from pretrain.engine.watchdog.faults import read_faults


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 with an answer; 2 where the configuration cannot run, with the answer `stop`."""
    parser = argparse.ArgumentParser(prog="fovea launch attempt", description=__doc__)
    moments = parser.add_subparsers(dest="moment", required=True)
    begin = moments.add_parser("begin")
    begin.add_argument("program", choices=PROGRAMS)
    begin.add_argument("config")
    begin.add_argument("overrides", nargs="*", metavar="key=value")
    end = moments.add_parser("end")
    end.add_argument("--status", type=int, required=True, help="of srun")
    end.add_argument("--asked", default="", help="why the ranks were asked to stop")
    end.add_argument("--srun-log", type=Path, help="what srun said on stderr")
    end.add_argument("run_dir", type=Path)
    for moment in (begin, end):
        moment.add_argument("--nodes", type=_nodes, required=True, help="of this attempt")
        moment.add_argument("--down", type=_nodes, default=[], help="nodes of the cluster that are down")
        moment.add_argument("--partition-nodes", type=_nodes, default=[], help="that the job could have")
        moment.add_argument("--excluded", type=_nodes, default=[], help="nodes that it may not have")
    chosen = parser.parse_args(arguments)
    return _begin(chosen) if chosen.moment == "begin" else _end(chosen)


def _begin(chosen: argparse.Namespace) -> int:
    try:
        ranks = int(os.environ.get("SLURM_NTASKS", "1"))
        run_dir = check_program(chosen.program, chosen.config, chosen.overrides, world_size=ranks)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        print("stop")
        return 2
    book = _book(run_dir)
    ended = book.begin(nodes=chosen.nodes, down=chosen.down)
    verdict = RestartDecision("go", "")
    if ended and ended[-1].outcome == "lost":
        verdict = decide(ended, spare=_spare(chosen))
        if verdict.action == "requeue" and not set(verdict.exclude) & set(chosen.nodes):
            verdict = RestartDecision("go", verdict.why)
    if _is_cancelled(run_dir):
        verdict = RestartDecision("stop", "cancelled by `fovea launch slurm cancel`")
    if verdict.action == "go":
        # Requests and markers of the attempt before; nobody has had time to ask this one.
        (run_dir / "PREEMPTED").unlink(missing_ok=True)
        (run_dir / "stop").unlink(missing_ok=True)
    return _answer(chosen, verdict, f" {run_dir}" if verdict.action == "go" else "")


def _end(chosen: argparse.Namespace) -> int:
    run_dir = chosen.run_dir
    log = chosen.srun_log
    node, said = blame(log.read_text(encoding="utf-8", errors="replace") if log and log.exists() else "")
    lost = set(chosen.nodes) & set(chosen.down)
    how = outcome(run_dir, status=chosen.status, asked=chosen.asked, lost=lost)
    why = chosen.asked.partition(" ")[0]
    if why == "overdue":
        node, said = None, "did not stop in time"
    if how == "lost":
        node, said = describe_lost(lost)
    elif how == "failed" and (faults := read_faults(run_dir, **_attempt())):
        # The run itself knows better than srun, which saw all its ranks end at once.
        node, said = (faults[-1].hosts[0] if len(faults[-1].hosts) == 1 else None), faults[-1].text
    elif how != "failed":
        node, said = None, {"signal": "asked by SLURM", "limit": "near the time limit"}.get(why, "")
    attempts = _book(run_dir).end(how, node=node, detail=said or f"exit status {chosen.status}" * (how == "failed"))
    verdict = decide(attempts, spare=_spare(chosen))
    if verdict.action == "requeue" and _is_cancelled(run_dir):
        verdict = RestartDecision("stop", "cancelled by `fovea launch slurm cancel`")
    return _answer(chosen, verdict, "")


def _answer(chosen: argparse.Namespace, verdict: RestartDecision, more: str) -> int:
    if verdict.why:
        excluded = f"; without {', '.join(verdict.exclude)}" if verdict.exclude else ""
        print(f"fovea launch: {verdict.action}: {verdict.why}{excluded}", file=sys.stderr)
    # The new list takes the place of the old one.
    excluded = ",".join(sorted({*chosen.excluded, *verdict.exclude})) if verdict.exclude else ""
    print(verdict.action + more + (f" {excluded}" if verdict.action == "requeue" else ""))
    return 0


def _book(run_dir: Path) -> AttemptLog:
    return AttemptLog(run_dir, **_attempt())


def _attempt() -> dict[str, Any]:
    return {"job": os.environ["SLURM_JOB_ID"], "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def _is_cancelled(run_dir: Path) -> bool:
    return cancel_mark(run_dir, os.environ["SLURM_JOB_ID"]).exists()


def _spare(chosen: argparse.Namespace) -> int:
    return len({*chosen.partition_nodes} - {*chosen.excluded} - {*chosen.down} - {*chosen.nodes})


def _nodes(text: str) -> list[str]:
    return text.replace(",", " ").split()


if __name__ == "__main__":
    sys.exit(main())
