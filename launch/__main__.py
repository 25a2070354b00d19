"""`fovea launch local N CONFIG ...`: torchrun on this machine, restarted when a process dies."""

from __future__ import annotations

import argparse
import os
import sys

from pretrain.config import PretrainConfig
from pretrain.configlib import ConfigError, load_config


def main(arguments: list[str] | None = None) -> int:
    """Validate the configuration, then become torchrun. Exit status 2 for a wrong configuration."""
    parser = argparse.ArgumentParser(prog="fovea launch", description=__doc__)
    places = parser.add_subparsers(dest="place", required=True)
    local = places.add_parser("local", help="processes of this machine")
    local.add_argument("processes", type=int, help="how many; one per GPU")
    local.add_argument("config")
    local.add_argument("overrides", nargs="*", metavar="key=value")
    local.add_argument("--max-restarts", type=int, default=3, help="times the run is restarted after a process died")
    chosen = parser.parse_args(arguments)
    try:
        load_config(PretrainConfig, chosen.config, chosen.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.processes < 1:
        print(f"fovea launch: processes must be at least 1, got {chosen.processes}", file=sys.stderr)
        return 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    counts = [f"--nproc_per_node={chosen.processes}", f"--max-restarts={chosen.max_restarts}"]
    os.execv(sys.executable, [*torchrun, *counts, "-m", "pretrain", chosen.config, *chosen.overrides])


if __name__ == "__main__":
    sys.exit(main())
