"""`fovea launch WORD ...`: a run on several processes of this machine, or on the nodes of a cluster."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module

from launch.hosts.local import run_local
from launch.programs import check_program, chosen_run
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output

# Words with their own parser -> module.
ELSEWHERE = {
    "slurm": "launch.slurm.command",
    "hosts": "launch.hosts.command",
    "onhost": "launch.hosts.onhost",
    "attempt": "launch.slurm.hooks",
    "check": "launch.check.command",
    "plan": "launch.plan.command",
}


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Run the command of one word; exit status 2 if it cannot run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ELSEWHERE:
        elsewhere: Callable[[list[str]], int] = import_module(ELSEWHERE[arguments[0]]).main
        return elsewhere(arguments[1:])
    return _local(arguments)


def _local(arguments: list[str]) -> int:
    """Check the configuration for this number of processes, then run it. Exit status 2 for a wrong one."""
    parser = argparse.ArgumentParser(prog="fovea launch", description=__doc__)
    places = parser.add_subparsers(dest="place", required=True)
    places.add_parser("slurm", help="submit, show, follow, cancel and resume SLURM jobs")
    places.add_parser("hosts", help="the ranks on machines of a hostfile, over ssh")
    places.add_parser("check", help="find problems before a GPU is used")
    places.add_parser("plan", help="time, memory, storage and failures of a run on many nodes")
    local = places.add_parser("local", help="processes of this machine, restarted when one dies")
    local.add_argument("processes", type=int, help="number of processes; one per GPU")
    local.add_argument(
        "run", nargs="+", metavar="[pretrain|finetune] CONFIG [key=value ...]", help="default: by its kind"
    )
    local.add_argument("--max-restarts", type=int, default=3, help="restarts after a process died (default 3)")
    chosen = parser.parse_args(arguments)
    if chosen.processes < 1:
        parser.error(f"processes must be at least 1, got {chosen.processes}")
    try:
        word, config, overrides = chosen_run(chosen.run)
        run_dir = check_program(word, config, overrides, world_size=chosen.processes)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return run_local(run_dir, word, [config, *overrides], processes=chosen.processes, max_restarts=chosen.max_restarts)


if __name__ == "__main__":
    sys.exit(run_command("fovea launch", main))
