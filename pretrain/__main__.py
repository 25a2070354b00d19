"""`fovea pretrain CONFIG [key=value ...]`: check everything, then train."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pretrain.config import Plan, PretrainConfig, plan
from pretrain.core.configlib import ConfigError, ConfigSource, read_values, source_name, validate
from pretrain.core.images import name_problems
from pretrain.core.machine.command import run_command
from pretrain.core.machine.failures import machine_failure
from pretrain.core.machine.terminal import safe_output
from pretrain.core.ranks import read_launch
from pretrain.data.channels import with_names_beside
from pretrain.data.depths import look_at_values
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS, frame_members
from pretrain.datasets import open_data, shares
from pretrain.engine.session.folder import as_resumed
from pretrain.models.release.manifest import source_problem


def check(
    given: ConfigSource, overrides: Sequence[str] = (), *, world_size: int
) -> tuple[PretrainConfig, Dataset, Plan]:
    """Check everything that needs no torch, process group or GPU.

    Raises:
        ConfigError, ValueError: the configuration or the data set is invalid; the message lists all problems.
    """
    source = source_name(given)
    config = validate(PretrainConfig, as_resumed(read_values(given, overrides)), source=source)
    try:
        dataset = open_data(config.data)
    except ValueError as error:
        raise ConfigError(source, str(error).splitlines()) from error
    config = _with_channel_names(config, source)
    if problem := _member_problem(dataset.extensions, clips=config.model.num_frames is not None):
        raise ConfigError(source, [f"{config.data.key}: {problem}"])
    if config.data.range is None and not (Path(config.run_dir) / "config.yaml").exists():
        deep = look_at_values(dataset)
        if deep is not None and deep.needs_range:
            way_out = f"set it to keep their bits, for instance data.range={deep.suggested}"
            raise ConfigError(source, [f"data.range: missing; {deep}; {way_out}"])
    for key in ("train_shards", "val_shards") if config.probe else ():
        labelled = _open(source, f"probe.{key}", getattr(config.probe, key))
        if "cls" not in labelled.extensions:
            problem = f"probe.{key}: no labels (.cls members) in {labelled.paths[0]} ...; remove probe"
            raise ConfigError(source, [problem])
    return config, dataset, plan(config, num_samples=dataset.num_samples, world_size=world_size)


def _member_problem(extensions: Sequence[str], *, clips: bool) -> str | None:
    """Why the samples of a data set cannot be read; a model of clips also reads images."""
    found = frame_members(extensions)
    if found and (clips or set(extensions) & set(IMAGE_EXTENSIONS)):
        return None
    members = ", ".join(extensions[:5]) + (" ..." if len(extensions) > 5 else "")
    lines = [f"no sample has an image member ({', '.join(IMAGE_EXTENSIONS)}), only {members}"]
    if found:
        lines.append("clips are read by a model of clips (model.num_frames)")
    if any("." in extension for extension in extensions):
        lines.append("for names with dots: fovea data index --key-rule last-dot")
    return "; ".join(lines)


def _with_channel_names(config: PretrainConfig, source: str) -> PretrainConfig:
    try:
        names = config.data.channels
        for shards in config.data.sources:
            names = with_names_beside(names, shards)
    except ValueError as error:
        raise ConfigError(source, [f"{config.data.key}: {error}"]) from error
    if problems := name_problems(names, config.model.in_chans, model="model.in_chans"):
        raise ConfigError(source, problems)
    return config.model_copy(update={"data": config.data.model_copy(update={"channels": names})})


def _open(source: str, key: str, shards: str) -> Dataset:
    try:
        return Dataset.open(shards)
    except ValueError as error:
        raise ConfigError(source, [f"{key}: {line}" for line in str(error).splitlines()]) from error


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: done. 85: stopped on request and saved. 2: wrong input. 3: no complete checkpoint."""
    parser = argparse.ArgumentParser(
        prog="fovea pretrain",
        description="Check everything, then pretrain, or resume the run in run_dir.",
        epilog="Every key: docs/configuration.md. While it runs, `touch RUN_DIR/save` saves, `touch RUN_DIR/stop` and "
        "Ctrl-C save and stop (exit status 85); the same command resumes.",
    )
    parser.add_argument("config", help="a YAML file, for instance configs/debug/mae.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for instance optim.epochs=100")
    parser.add_argument("--check", action="store_true", help="print what would run, and stop")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        launch = read_launch(os.environ)
        config, dataset, steps = check(chosen.config, chosen.overrides, world_size=launch.world_size if launch else 1)
    except (ConfigError, ValueError) as error:
        lacking = machine_failure(error)
        print(lacking.text if lacking else error, file=sys.stderr)
        return lacking.status if lacking else 2
    if chosen.check:
        print("\n".join([describe(config, steps), *shares(config, dataset, steps)]))
        return _report_missing(config)
    from pretrain.engine.session.session import exit_status
    from pretrain.run import run

    return exit_status(partial(run, config, dataset, steps))


def _report_missing(config: PretrainConfig) -> int:
    """Report initial weights that do not exist or are damaged; the exit status of a check."""
    if config.init is None or (Path(config.run_dir) / "checkpoints").exists():
        return 0
    key, place = config.init.source
    problem = source_problem(Path(place))
    if problem is None:
        return 0
    print(f"init.{key}: {problem}", file=sys.stderr)
    return 2


def describe(config: PretrainConfig, steps: Plan) -> str:
    """A description of the run, one property per line."""
    model, widths = config.model, config.model.widths()
    return "\n".join(
        [
            f"objective  {config.objective.name}",
            f"model      {model.name} /{model.patch_size}, {widths['embed_dim']} x {widths['depth']} blocks, "
            f"{model.size[0]} x {model.size[1]} px, {model.in_chans} channels",
            f"data       {steps.num_samples} images, {steps.steps_per_epoch} steps an epoch",
            f"batch      {config.optim.global_batch_size} = {steps.world_size} processes x {steps.micro_batch} "
            f"x {config.engine.accumulation_steps} accumulation",
            f"steps      {steps.total_steps}, warm-up {steps.warmup_steps}, peak lr {steps.lr:.3g}",
            f"engine     {config.engine.name}, {config.engine.precision}"
            + (f", ZeRO-{config.engine.zero_stage}" if config.engine.name == "deepspeed" else ""),
            f"run folder {config.run_dir}",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command("fovea pretrain", main))
