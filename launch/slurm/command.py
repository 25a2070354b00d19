"""`fovea launch slurm ...`: runs as SLURM jobs.

pretrain|finetune CONFIG [key=value ...]      submit; --dry-run prints it, --test-only has SLURM check it
pipeline CONFIG --finetune CONFIG ...         pretrain, then finetune from its release
status|logs|cancel|resume RUN_OR_JOB
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path

from launch.programs import check_program
from launch.slurm import jobs, scheduler
from launch.slurm.scheduler import SchedulerError
from launch.slurm.template import read_options, read_template, render
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.children import HOME, is_installed
from pretrain.core.machine.terminal import safe_output

# Our flag -> sbatch's option.
SBATCH = ("nodes", "gpus-per-node", "cpus-per-task", "time", "partition", "account", "qos", "mem", "exclude")


@safe_output()
def main(arguments: list[str]) -> int:
    """Exit status 0; 2 for a wrong argument or configuration; 1 if SLURM refuses."""
    word = arguments[0] if arguments else "--help"
    if word not in VERBS:
        if word in ("-h", "--help"):
            print(__doc__)
            return 0
        print(f"fovea launch slurm: unknown word {word!r}; one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[word](word, arguments[1:])
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except SchedulerError as error:
        print(f"fovea launch slurm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has closed the pipe: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _submit(program: str, arguments: list[str]) -> int:
    parser = _parser(program, "submit a run; the job is requeued until the run is done")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    _add_job_options(parser)
    parser.add_argument("--template", type=Path, help="your own copy of the batch script")
    chosen = parser.parse_intermixed_args(arguments)
    script = _script(read_template(program, chosen.template), chosen, program)
    run_dir = check_program(program, chosen.config, chosen.overrides, world_size=_ranks(script))
    script = _placed(script, chosen, run_dir, Path.cwd())
    return _send(chosen, run_dir, program, [chosen.config, *chosen.overrides], script)


def _resume(word: str, arguments: list[str]) -> int:
    parser = _parser(word, "submit the run's last job again, with optional changes")
    parser.add_argument("run", help="run folder or job id")
    _add_job_options(parser)
    chosen = parser.parse_args(arguments)
    run_dir = jobs.find_run(chosen.run)
    if not (before := jobs.submissions(run_dir)):
        raise ValueError(f"{run_dir}: its jobs were submitted by hand; submit the batch script again")
    last = before[-1]
    template = (run_dir / "slurm" / f"{last.job}.sbatch").read_text(encoding="utf-8")
    script = _script(template, chosen, last.program)
    folder = Path(read_options(template)["chdir"])
    if not folder.is_dir():
        raise ValueError(f"{folder}, from which {last.job} was submitted, does not exist; submit the run again")
    with chdir(folder):  # paths of the configuration may be relative to it
        check_program(last.program, last.arguments[0], last.arguments[1:], world_size=_ranks(script))
    script = _placed(script, chosen, run_dir, folder)
    return _send(chosen, run_dir, last.program, last.arguments, script)


def _send(
    chosen: argparse.Namespace,
    run_dir: Path,
    program: str,
    arguments: Sequence[str],
    script: str,
) -> int:
    """Show, validate or submit."""
    if chosen.dry_run:
        print(f"# sbatch --parsable JOB.sbatch {shlex.join(arguments)}")
        print(f"# JOB.sbatch, to be kept in {run_dir}/slurm/:")
        print(script, end="")
        return 0
    if chosen.test_only:
        print(_would_start(script, arguments))
        return 0
    submitted = jobs.submit(run_dir, program, arguments, script)
    print(f"job {submitted.job}\nfovea launch slurm status {run_dir}\nfovea launch slurm logs -f {run_dir}")
    return 0


def _would_start(script: str, arguments: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sbatch"
        path.write_text(script, encoding="utf-8")
        return scheduler.would_start(path, arguments)


def _pipeline(word: str, arguments: list[str]) -> int:
    parser = _parser(word, "pretrain, then finetune from its release")
    parser.add_argument("config", help="of the pretraining")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the pretraining")
    parser.add_argument("--finetune", action="append", required=True, metavar="'CONFIG key=value ...'")
    _add_job_options(parser)
    parser.add_argument("--template", type=Path, help="your own copy of the batch script, for all stages")
    chosen = parser.parse_intermixed_args(arguments)
    stages = [("pretrain", chosen.config, chosen.overrides)]
    release = ""
    plans: list[tuple[str, Path, list[str], str]] = []
    for text in chosen.finetune:
        config, *overrides = shlex.split(text)
        stages.append(("finetune", config, overrides))
    for program, config, overrides in stages:
        script = _script(read_template(program, chosen.template), chosen, program)
        given = [*overrides, *([f"model.release={release}"] if release else [])]
        run_dir = check_program(program, config, given, world_size=_ranks(script))
        release = release or f"{run_dir}/release"
        script = _placed(script, chosen, run_dir, Path.cwd())
        plans.append((program, run_dir, [config, *given], script))
    folders = [run_dir for _, run_dir, _, _ in plans]
    if len(set(folders)) < len(folders):
        raise ValueError(f"two stages share a run folder: {', '.join(map(str, folders))}; give each its run_dir")
    first = ""
    for program, run_dir, given, script in plans:
        options = (
            ["--dependency", f"afterok:{first or 'PRETRAIN'}", "--kill-on-invalid-dep=yes"]
            if program != "pretrain"
            else []
        )
        if chosen.dry_run:
            print(f"# sbatch --parsable {shlex.join(options)} JOB.sbatch {shlex.join(given)}\n{script}")
        elif chosen.test_only:
            print(f"{program}: {_would_start(script, given)}")
        else:
            submitted = jobs.submit(run_dir, program, given, script, options=options)
            first = first or submitted.job
            print(f"job {submitted.job}  {program} {run_dir}")
    return 0


def _status(word: str, arguments: list[str]) -> int:
    parser = _parser(word, "jobs, steps and attempts of a run")
    parser.add_argument("run", nargs="+", help="run folder or job id")
    for run in parser.parse_args(arguments).run:
        print(jobs.status(jobs.find_run(run)))
    return 0


def _logs(word: str, arguments: list[str]) -> int:
    parser = _parser(word, "the newest job's log and that of one rank")
    parser.add_argument("run", help="run folder or job id")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job ends")
    parser.add_argument("-n", "--lines", type=int, default=20, help="last lines of each file (default 20)")
    parser.add_argument("--rank", type=int, default=0)
    chosen = parser.parse_args(arguments)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    try:
        run_dir = jobs.find_run(chosen.run)
        jobs.follow(run_dir, rank=chosen.rank, keep_on=chosen.follow, lines=chosen.lines, write=write)
    except KeyboardInterrupt:
        return 130
    return 0


def _cancel(word: str, arguments: list[str]) -> int:
    parser = _parser(word, "save and stop; the run can be resumed")
    parser.add_argument("run", help="run folder or job id")
    parser.add_argument("--now", action="store_true", help="do not wait for a save")
    chosen = parser.parse_args(arguments)
    print(jobs.cancel(jobs.find_run(chosen.run), now=chosen.now))
    return 0


VERBS: dict[str, Callable[[str, list[str]], int]] = {
    "pretrain": _submit,
    "finetune": _submit,
    "pipeline": _pipeline,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "resume": _resume,
}


def _parser(word: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"fovea launch slurm {word}", description=description)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("the job; default: the values of the batch script")
    for name in SBATCH:
        job.add_argument(f"--{name}", help="0: none" if name == "gpus-per-node" else None)
    job.add_argument("--ranks-per-node", help="default: one per GPU")
    job.add_argument("--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help="any other option of sbatch")
    job.add_argument("--margin", type=int, help="seconds before the time limit at which the run is saved")
    job.add_argument("--launcher", choices=("srun", "torchrun"))
    job.add_argument("--python", help="default: the one that runs this command; `python` in a container")
    job.add_argument("--container", metavar="IMAGE", help="a .sif file (Apptainer), or what pyxis takes")
    job.add_argument("--mount", action="append", default=[], metavar="PATH", help="also visible in the container")
    job.add_argument("--environment", action="append", default=[], metavar="LINE", help="shell line: module load cuda")
    job.add_argument("--no-preflight", action="store_true")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print exactly what would be submitted")
    how.add_argument("--test-only", action="store_true", help="let SLURM validate it, without submitting")


def _script(template: str, chosen: argparse.Namespace, program: str) -> str:
    """The batch script with the chosen options."""
    options: dict[str, str | None] = {}
    for name in SBATCH:
        if (value := getattr(chosen, name.replace("-", "_"))) is not None:
            options[name] = None if (name, value) == ("gpus-per-node", "0") else value
    if ranks := chosen.ranks_per_node or options.get("gpus-per-node"):
        options["ntasks-per-node"] = ranks.rpartition(":")[2]  # also of h200:8
    for option in chosen.sbatch:
        name, _, value = option.lstrip("-").partition("=")
        options[name] = value
    settings: dict[str, str | Sequence[str]] = {"PROGRAM": program}
    if chosen.container or chosen.python or "run" not in chosen:
        settings["PYTHON"] = [chosen.python or ("python" if chosen.container else sys.executable)]
    if chosen.margin is not None:
        options["signal"], settings["MARGIN"] = f"B:USR1@{chosen.margin}", str(chosen.margin)
    if chosen.launcher:
        settings["LAUNCHER"] = chosen.launcher
    if chosen.no_preflight:
        settings["PREFLIGHT"] = "no"
    path = [] if chosen.container else _checkout_on_path(template)
    return render(template, options=options, settings=settings, environment=[*path, *chosen.environment])


def _checkout_on_path(template: str) -> list[str]:
    """The line by which a job finds Fovea where it runs from a checkout, which may not be installed."""
    if is_installed():
        return []
    line = f"export PYTHONPATH={shlex.quote(str(HOME))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [] if line in template.splitlines() else [line]  # a resumed job has it


def _placed(script: str, chosen: argparse.Namespace, run_dir: Path, folder: Path) -> str:
    """Options to run from `folder`, also when the job is resumed from elsewhere; the job's log is in the run folder."""
    log = f"{run_dir}/slurm/job-".replace("%", "%%") + "%j.log"
    settings = _container(chosen.container, run_dir, folder, chosen.mount) if chosen.container else {}
    return render(script, options={"chdir": str(folder), "output": log}, settings=settings)


def _container(image: str, run_dir: Path, folder: Path, mounts: Sequence[str]) -> dict[str, Sequence[str]]:
    """Apptainer runs in front of each command; pyxis (enroot) takes options of srun."""
    mounts = list(dict.fromkeys([str(folder), str(run_dir), *mounts]))
    if image.endswith(".sif"):
        return {"CONTAINER": ["apptainer", "exec", "--nv", "--bind", ",".join(mounts), image]}
    places = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    return {
        "SRUN": ["srun", f"--container-image={image}", f"--container-mounts={places}", f"--container-workdir={folder}"]
    }


def _ranks(script: str) -> int:
    options, counts = read_options(script), []
    for name in ("nodes", "ntasks-per-node"):
        if not re.fullmatch("[1-9][0-9]*", options.get(name, "")):
            raise ValueError(
                f"--{name} {options.get(name, 'is not in the batch script')}: expected one number, as in "
                f"#SBATCH --{name}=8 (--nodes N, and --gpus-per-node N or --ranks-per-node N, write it)"
            )
        counts.append(int(options[name]))
    return counts[0] * counts[1]
