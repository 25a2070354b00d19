"""`fovea launch check CONFIG [key=value ...]`: find problems before a GPU is used; also a job's first step."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.config import FinetuneConfig
from launch.check import preflight
from launch.check.preflight import JobShape
from launch.check.trial import run_steps
from launch.plan import task_cost
from launch.plan.cost import count
from launch.plan.hardware import find_gpu
from launch.plan.machine import Machine
from launch.programs import PROGRAMS, chosen_run, device_of
from pretrain.config import Plan, PretrainConfig, batch_bytes
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.command import run_command
from pretrain.core.machine.resources import GIB
from pretrain.core.machine.terminal import safe_output
from pretrain.core.ranks import variable
from pretrain.core.record import read_rows
from pretrain.engine.session import needs
from pretrain.engine.session.needs import Finding

# On nodes: srun itself returns 2 for a node where the program does not exist.
EXIT_IMPOSSIBLE = 78


@safe_output()
def main(arguments: list[str]) -> int:
    """Exit status 0: it can run (warnings may be printed). 2, on nodes 78: it cannot run; the reasons are printed."""
    parser = _parser()
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.on_nodes and chosen.probe_steps:
        parser.error("--probe-steps is for use before a job; inside a job the run itself measures it")
    given = [chosen.program, *chosen.run] if chosen.program else chosen.run
    try:
        chosen.program, chosen.config, chosen.overrides = chosen_run(given)
    except ValueError as error:
        parser.error(str(error))
    if chosen.on_nodes and variable(os.environ, "SLURM_PROCID", 0):
        return _on_nodes(chosen, 0)
    try:
        found = list(_findings(chosen))
    except (ConfigError, ValueError) as error:
        found = [Finding("error", str(error))]
    for finding in found:
        print(finding, file=sys.stderr if finding.level == "error" else sys.stdout, flush=True)
    status = 2 if any(finding.level == "error" for finding in found) else 0
    return _on_nodes(chosen, status) if chosen.on_nodes else status


def _on_nodes(chosen: argparse.Namespace, status: int) -> int:
    """Every rank takes part, even if rank 0 has found an error: the others would wait for it."""
    from launch.check.nodecheck import check_nodes

    return max(EXIT_IMPOSSIBLE if status else 0, check_nodes(device=device_of(chosen.config, chosen.overrides)))


def _findings(chosen: argparse.Namespace) -> Iterator[Finding]:
    job = _job_shape(chosen)
    if chosen.program == "pretrain":
        yield from _pretrain(chosen, job)
    else:
        yield from _finetune(chosen, job)


def _pretrain(chosen: argparse.Namespace, job: JobShape) -> Iterator[Finding]:
    from pretrain.__main__ import check

    config, dataset, plan = check(chosen.config, chosen.overrides, world_size=job.ranks)
    machine = _machine(chosen, config)
    if job.gpu_memory is None and config.engine.device != "cpu" and machine.gpu_memory:
        job = replace(job, gpu_memory=float(machine.gpu_memory))
    yield from preflight.batch_facts(config, plan, dataset, job)
    yield from preflight.run_folder(config, {config.data.key: dataset.fingerprint}, free=_free_keys)
    yield from preflight.sources(config)
    yield from preflight.workers(config, plan, job, machine)
    reading = preflight.reading(config, job, batch=batch_bytes(config, plan.micro_batch))
    yield from _of_reading(reading, machine)
    yield from preflight.limits(job)
    estimate = None
    if not chosen.quick:
        cost = count(config)
        yield from preflight.memory(config, plan, cost, job)
        yield from _disk(config, plan, cost.checkpoint, machine)
        estimate = preflight.estimated_rate(cost, job, bf16=config.engine.precision != "fp32")
    yield from _duration(chosen, config, plan, job, machine, estimate)


def _finetune(chosen: argparse.Namespace, job: JobShape) -> Iterator[Finding]:
    """As for pretraining, except memory and time, which are not estimated for tasks (--probe-steps measures time)."""
    from finetune.__main__ import check
    from finetune.locate import problem_of

    config, train, val, plan = check(chosen.config, chosen.overrides, world_size=job.ranks)
    machine = _machine(chosen, config)
    yield from preflight.task_facts(config, plan, len(val), job)
    yield from preflight.run_folder(
        config, {"data.train": train.fingerprint, "data.val": val.fingerprint}, free=_free_keys_of_a_task
    )
    if (problem := problem_of(config.model)) is not None:
        yield Finding("error", problem)
    yield from preflight.workers(config, plan, job, machine)
    yield from preflight.limits(job)
    cost = task_cost.count(config, train, plan) if problem is None and not chosen.quick else None
    yield from _of_reading(preflight.reading(config, job, batch=cost.batch if cost else 0), machine)
    if cost:
        yield from _disk(config, plan, cost.checkpoint, machine)
    if problem is None:
        yield from _duration(chosen, config, plan, job, machine, None)


def _of_reading(reading: needs.Reading, machine: Machine) -> Iterator[Finding]:
    for question in (needs.open_files, needs.shared_memory, needs.host_memory):
        yield from question(reading, machine)


def _disk(config: PretrainConfig | FinetuneConfig, plan: Plan, size: float, machine: Machine) -> Iterator[Finding]:
    return needs.disk(config.checkpoint, plan.total_steps, size, machine, run_dir=config.run_dir)


def _free_keys() -> Sequence[str]:
    from pretrain.run import FREE_KEYS

    return FREE_KEYS


def _free_keys_of_a_task() -> Sequence[str]:
    from finetune.run import FREE_KEYS

    return FREE_KEYS


def _duration(
    chosen: argparse.Namespace,
    config: PretrainConfig | FinetuneConfig,
    plan: Plan,
    job: JobShape,
    machine: Machine,
    estimate: float | None,
) -> Iterator[Finding]:
    """From the best source: measured now, given by the user, logged by the run, or estimated."""
    if chosen.probe_steps:
        ranks = min(job.ranks_per_node, machine.gpus) if machine.gpus and config.engine.device != "cpu" else 1
        batch = ranks * plan.micro_batch * config.engine.accumulation_steps
        trial = run_steps(
            *(chosen.program, chosen.config, chosen.overrides),
            steps=chosen.probe_steps,
            ranks=ranks,
            batch=batch,
            run_dir=Path(config.run_dir),
        )
        yield from preflight.waiting(config, trial.waited)
        rate = trial.images_per_second / ranks * job.ranks
        source = f"measured: {trial.steps} steps of {ranks} of the {job.ranks} ranks here, without the network"
    elif chosen.images_per_second:
        rate, source = chosen.images_per_second, "--images-per-second"
    else:
        rate, source = _logged_rate(config), "this run so far"
        if rate is None:
            rate, source = estimate, f"assumed: {preflight.UTILIZATION:.0%} of the GPU's peak"
    if rate:
        yield from preflight.duration(config, plan, job, rate, source)
    else:
        yield Finding("fact", "time     not predicted: give --probe-steps 20, --gpu NAME or --images-per-second")


def _logged_rate(config: PretrainConfig | FinetuneConfig) -> float | None:
    """The median rate that the run logged, if it has run."""
    try:
        rows = read_rows(Path(config.run_dir) / "metrics.jsonl")[-50:]
    except ConfigError:  # a damaged log, which the run repairs when it resumes
        return None
    rates = sorted(row["images_per_second"] for row in rows if "images_per_second" in row)
    return rates[len(rates) // 2] if rates else None


def _job_shape(chosen: argparse.Namespace) -> JobShape:
    """From the flags, or inside a job from SLURM."""
    gpu = find_gpu(chosen.gpu) if chosen.gpu else None
    if chosen.on_nodes:
        nodes = variable(os.environ, "SLURM_JOB_NUM_NODES", 1)
        ranks = variable(os.environ, "SLURM_NTASKS", 1) // nodes
    else:
        nodes, ranks = chosen.nodes, chosen.gpus_per_node
    for flag, value in (("--nodes", nodes), ("--gpus-per-node", ranks)):
        if value < 1:
            raise ValueError(f"{flag} {value}: at least 1; on CPUs, --gpus-per-node is the number of ranks")
    memory = gpu.memory * GIB * 0.98 if gpu else None
    return JobShape(nodes, ranks, memory, gpu, limit=_seconds(chosen.time), margin=chosen.margin)


def _machine(chosen: argparse.Namespace, config: PretrainConfig | FinetuneConfig) -> Machine:
    """This machine; inside a job, with the cores of all its ranks here, not only this rank's share."""
    machine = Machine.here(Path(config.run_dir))
    if chosen.on_nodes:
        return replace(machine, cpus=variable(os.environ, "SLURM_CPUS_ON_NODE", machine.cpus))
    return machine


def _seconds(text: str) -> float:
    """SLURM's MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]]; "" is no limit."""
    if not text:
        return 0
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"--time {text}: expected minutes, h:mm:ss or days-hours, for instance 24:00:00")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea launch check", description=__doc__)
    parser.add_argument("run", nargs="+", metavar="[pretrain|finetune] CONFIG [key=value ...]")
    parser.add_argument("--program", choices=PROGRAMS, help="of a job; default: by the kind of the configuration")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1, help="ranks of a node, one per GPU")
    parser.add_argument("--gpu", metavar="NAME", help="h200, h100, a100, ...: sets its memory and speed")
    parser.add_argument("--time", default="", help="the job's limit, as sbatch takes it")
    parser.add_argument("--margin", type=float, default=300, help="seconds before the limit at which the run is saved")
    parser.add_argument("--images-per-second", type=float, help="measured, over all ranks")
    parser.add_argument("--probe-steps", type=int, default=0, metavar="N", help="measure: take N real steps here")
    parser.add_argument("--quick", action="store_true", help="skip memory and operations (they import torch)")
    parser.add_argument("--on-nodes", action="store_true", help="inside a job: also measure the nodes, on every rank")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("fovea launch check", lambda: main(sys.argv[1:])))
