"""`fovea report RUN [RUN ...]`: the page of a pretraining run from its folder; a page that compares several."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.core.configlib import ConfigError
from pretrain.core.files import write_text
from pretrain.core.machine.command import run_command
from pretrain.core.machine.failures import EXIT_INPUT
from pretrain.core.machine.terminal import safe_output
from pretrain.report import compare
from pretrain.report.page import write_page
from pretrain.report.recorded import read_run

COMPARISON = Path("comparison.html")


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: the page is written. 2: no folder of a pretraining run."""
    parser = argparse.ArgumentParser(prog="fovea report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a folder of a pretraining run")
    parser.add_argument(
        "--out", type=Path, help=f"the page; default: RUN/report/index.html, of several runs {COMPARISON}"
    )
    chosen = parser.parse_args(arguments)
    try:
        if len(chosen.runs) == 1:
            path = write_page(chosen.runs[0], chosen.out)
        else:
            path = chosen.out or COMPARISON
            page = compare.render([read_run(folder) for folder in chosen.runs])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, page, errors="replace")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_INPUT
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("fovea report", main))
