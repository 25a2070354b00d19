"""`fovea finetune CONFIG [key=value ...]`: check everything, then train, evaluate, report and release."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from finetune import channels
from finetune.config import FinetuneConfig
from finetune.data.examples import Examples
from finetune.data.first_look import look, look_at_depth
from finetune.locate import problem_of
from finetune.tasks import open_examples
from pretrain.core.configlib import ConfigError, ConfigSource, read_values, source_name, validate
from pretrain.core.machine.command import run_command
from pretrain.core.machine.failures import machine_failure
from pretrain.core.machine.terminal import safe_output
from pretrain.core.ranks import read_launch
from pretrain.engine.plan import Plan, plan_steps
from pretrain.engine.session.folder import as_resumed


class CheckedRun(NamedTuple):
    config: FinetuneConfig
    train: Examples
    val: Examples
    steps: Plan


def check(given: ConfigSource, overrides: Sequence[str] = (), *, world_size: int) -> CheckedRun:
    """Check everything that can be checked without torch, a process group or a GPU.

    Raises:
        ConfigError, ValueError: the configuration or the data cannot be used; the message lists every problem.
    """
    source = source_name(given)
    config = validate(FinetuneConfig, as_resumed(read_values(given, overrides)), source=source)
    config = channels.with_range_of_source(config)
    if problems := channels.problems(config):
        raise ConfigError(source, problems)
    config = channels.with_channel_names(config)
    train = _open(config, "train", None)
    val = _open(config, "val", train)
    if problems := config.task.class_problems(train.classes):
        raise ConfigError("data.train", problems)
    started = (Path(config.run_dir) / "config.yaml").exists()
    for name, examples in (("data.train", train), ("data.val", val)):
        if not started:
            look_at_depth(examples, config.data.range, source=name)
        look(examples, config.data.max_bad_fraction, source=name)
        examples.findings.check(config.data.strict, source=name)
        examples.findings.check_lost(config.data.max_lost_fraction, source=name)
        if not len(examples):
            listed = examples.findings.lines(5)
            raise ConfigError(source, [f"{name}: no usable image is left", *listed])
    steps, problems = plan_steps(config.optim, config.engine, num_samples=len(train), world_size=world_size)
    if problems:
        raise ConfigError(source, problems)
    return CheckedRun(config, train, val, steps)


def _open(config: FinetuneConfig, name: str, other: Examples | None) -> Examples:
    source = getattr(config.data, name)
    try:
        classes = None if other is None else other.classes
        return open_examples(config.task, source, classes=classes, reading=channels.reading(config))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"data.{name}", str(error).splitlines()) from error


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: done. 85: stopped on request and saved. 1: cannot continue. 2: wrong input. 3: no checkpoint."""
    parser = argparse.ArgumentParser(
        prog="fovea finetune",
        description="Check everything, then train, evaluate, report and release, or resume the run in run_dir.",
        epilog="Every key: docs/configuration.md. While it runs, `touch RUN_DIR/save` saves, `touch RUN_DIR/stop` and "
        "Ctrl-C save and stop (exit status 85); the same command resumes.",
    )
    parser.add_argument("config", help="a YAML file, for instance configs/finetune/grocery_small.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for instance optim.epochs=100")
    parser.add_argument("--check", action="store_true", help="print what would run, build it, and stop")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the newest weights of the run, and stop")
    parser.add_argument("--strict", action="store_true", help="refuse annotations with problems (data.strict=true)")
    chosen = parser.parse_intermixed_args(arguments)
    overrides = [*chosen.overrides, *(["data.strict=true"] if chosen.strict else [])]
    try:
        launch = read_launch(os.environ)
        checked = check(chosen.config, overrides, world_size=launch.world_size if launch else 1)
    except (ConfigError, ValueError) as error:
        lacking = machine_failure(error)
        print(lacking.text if lacking else error, file=sys.stderr)
        return lacking.status if lacking else 2
    if chosen.check:
        print(describe(checked))
        try:
            warnings = warnings_of(checked)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        print("".join(f"{line}\n" for line in warnings), end="")
        return 0
    from finetune.run import measure, run
    from pretrain.engine.session.session import exit_status

    if chosen.evaluate:
        return exit_status(partial(measure, checked.config, checked.val))
    return exit_status(partial(run, *checked))


def warnings_of(checked: CheckedRun) -> list[str]:
    """What the task, built as the run builds it, can hardly learn of its data. Imports torch.

    Raises:
        ConfigError: the weights are missing or damaged, or do not fit the task.
    """
    problem = problem_of(checked.config.model)
    if problem is not None:
        raise ConfigError(checked.config.run_dir, [problem])
    from finetune.run import build_task

    _, task = build_task(checked.config, checked.train, total_steps=checked.steps.total_steps)
    return task.data_warnings(checked.train)


def describe(checked: CheckedRun) -> str:
    """A description of the run, one fact per line."""
    config, train, val, steps = checked
    kind, value = config.model.source
    lines = [
        f"task       {config.task.name}",
        f"model      {kind} {value}" + (", random weights (control)" if config.model.random else ""),
        f"images     {channels.in_chans(config)} channels"
        + (f", data.range {list(config.data.range)}" if config.data.range is not None else ""),
        f"train      {len(train)} images, {len(train.classes)} classes, {steps.steps_per_epoch} steps an epoch",
        f"val        {len(val)} images",
        f"batch      {config.optim.global_batch_size} = {steps.world_size} processes x {steps.micro_batch} "
        f"x {config.engine.accumulation_steps} accumulation",
        f"steps      {steps.total_steps}, warm-up {steps.warmup_steps}, peak lr {steps.lr:.3g}",
        f"engine     {config.engine.name}, {config.engine.precision}"
        + (f", ZeRO-{config.engine.zero_stage}" if config.engine.name == "deepspeed" else ""),
        f"run folder {config.run_dir}",
    ]
    for name, examples in (("train", train), ("val", val)):
        lines += [f"findings   {name}: {count} x {kind}" for kind, count in examples.findings.counts().items()]
        lines += [f"           {line}" for line in examples.findings.lines(5)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command("fovea finetune", main))
