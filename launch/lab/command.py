"""`fovea lab`: trials of every kind of fault on this machine and storage, replayable by kind, number and seed."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from launch.lab.bench import Bench
from launch.lab.kinds import GUARDED_BY, KINDS
from launch.lab.kinds.limits import unmount_below
from launch.lab.results import append, read_results, write_tables
from launch.lab.trial import Trial
from launch.lab.verdicts import EXECUTED, FAILED, HELD, BrokenPromiseError, Result
from pretrain.core.files import new_folder
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.text import shown


class Laboratory:
    """Trials below `place`: what they share in `bench`, a folder each, kept if a trial did not hold."""

    def __init__(self, place: Path):
        self.place = place
        versions = "-".join(f"{name}{version(name)}" for name in ("fovea", "torch"))  # others end with other bits
        self.bench = Bench(place / f"bench-{versions}", self._start)
        self.bench.folder.mkdir(parents=True, exist_ok=True)

    def _start(self, words: Sequence[str]) -> None:
        folder = new_folder(self.bench.folder / "starting")
        trial = Trial("bench", 0, 0, folder, self.bench)
        trial.done(trial.start(*words))
        shutil.rmtree(folder)

    def run(self, kind: str, number: int, seed: int, plants: Sequence[Sequence[str]] = ()) -> Result:
        """One trial, in an empty folder."""
        folder = self.place / f"{kind}-{number}-{seed}"
        unmount_below(folder)  # of a laboratory that was killed
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        trial = Trial(kind, number, seed, folder, self.bench, plants)
        start, verdict, why = time.monotonic(), HELD, ""
        try:
            KINDS[kind].trial(trial)
        except BrokenPromiseError as broken:
            verdict, why = broken.verdict, str(broken)
        except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:  # what was left cannot be read
            verdict, why = FAILED, f"{type(error).__name__}: {error}"
        finally:
            trial.stop()
        if trial.canary.exists():
            verdict, why = EXECUTED, "a command in an input was run"
        if verdict == HELD:
            shutil.rmtree(folder, ignore_errors=True)
        return Result(kind, number, seed, verdict, why, round(time.monotonic() - start, 2))


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: every trial held. 1: one did not. 2: a wrong argument."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.list:
        for name, kind in KINDS.items():
            print(f"{name:16} {kind.fault}: {kind.promise}")
        return 0
    kinds = [name for name in KINDS if chosen.faults == "all" or name in chosen.faults.split(",")]
    unknown = set(chosen.faults.split(",")) - {"all", *KINDS}
    if unknown:
        parser.error(f"unknown kinds {', '.join(map(shown, sorted(unknown)))}; one of {', '.join(KINDS)}")
    if chosen.out is None:
        parser.error("--out DIR is missing")
    chosen.out.mkdir(parents=True, exist_ok=True)
    place = (chosen.on or chosen.out).absolute() / "trials"
    laboratory = Laboratory(place)
    if chosen.replay:
        return _replay(laboratory, chosen.replay, parser)
    if chosen.self_test:
        return _self_test(laboratory, chosen.seed)
    return _run(laboratory, chosen.out, kinds, chosen.trials, chosen.seed)


def _run(laboratory: Laboratory, out: Path, kinds: Sequence[str], trials: int, seed: int) -> int:
    possible = [kind for kind in kinds if KINDS[kind].possible()]
    for kind in sorted({*kinds} - {*possible}):
        print(f"{kind}: left out, this user cannot inject it")
    results = read_results(out)
    ended = {(one.kind, one.number, one.seed) for one in results}
    for number in range(trials):  # all kinds first, so that a laboratory that is stopped has tried all
        for kind in possible:
            if (kind, number, seed) in ended:
                continue
            result = laboratory.run(kind, number, seed)
            append(out, result)
            results.append(result)
            _print(result)
    write_tables(out, results, {name: (kind.fault, kind.promise) for name, kind in KINDS.items()})
    counts = Counter(result.verdict for result in results)
    print(f"{len(results)} trials: {', '.join(f'{count} {verdict}' for verdict, count in counts.items())}")
    print(f"table: {out / 'table.md'}, {out / 'table.html'}")
    return 0 if counts[HELD] == len(results) else 1


def _replay(laboratory: Laboratory, what: str, parser: argparse.ArgumentParser) -> int:
    kind, _, rest = what.partition(":")
    number, _, seed = rest.partition(":")
    if kind not in KINDS or not number.isdigit() or not seed.isdigit():
        parser.error(f"--replay {shown(what)}: not KIND:NUMBER:SEED")
    result = laboratory.run(kind, int(number), int(seed))
    _print(result)
    return 0 if result.verdict == HELD else 1


def _self_test(laboratory: Laboratory, seed: int, *, most: int = 12) -> int:
    """Remove one protection at a time: a kind that depends on it must fail within `most` trials."""
    blind = []
    for protection, kinds in GUARDED_BY.items():
        for kind in kinds:
            results = (laboratory.run(kind, number, seed, [["without", protection]]) for number in range(most))
            found = next((result for result in results if result.verdict != HELD), None)
            print(
                f"without {protection}: {kind} {found.verdict if found else 'held'}{f': {found.why}' if found else ''}"
            )
            if found is None:
                blind.append(f"{kind} without {protection}")
    if blind:
        print(f"the laboratory did not notice: {', '.join(blind)}", file=sys.stderr)
    return 1 if blind else 0


def _print(result: Result) -> None:
    what = f"{result.kind}:{result.number}:{result.seed}"
    print(f"{what:24} {result.verdict:8} {result.seconds:6.1f} s  {shown(result.why)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea lab", description=__doc__)
    parser.add_argument(
        "--faults", default="all", metavar="KINDS", help="kinds with commas between them (default: all)"
    )
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="of each kind (default 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results.jsonl, which is continued, and the tables")
    parser.add_argument("--on", type=Path, metavar="FOLDER", help="where the trials run: your storage (default: DIR)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default 0)")
    parser.add_argument("--replay", metavar="KIND:NUMBER:SEED", help="one trial again")
    parser.add_argument("--self-test", action="store_true", help="remove protections: their kinds must then fail")
    parser.add_argument("--list", action="store_true", help="the kinds and what must hold")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("fovea lab", main))
