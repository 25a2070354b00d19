"""The same recipe on other hardware: what changes with the global batch, by stated rules.

With k = new global batch / old one, and every duration kept in samples:

    learning rate       times k (Goyal et al. 2017) or sqrt(k) (Krizhevsky 2014; DINOv2), as the recipe's own `blr_rule`
    averages            momentum m -> m^k: the average covers as many samples as before (Busbridge et al. 2023)
    steps               warm-up, length and intervals given in steps: divided by k; those given in epochs are kept, and
                        checkpoints are not saved later than before: their interval is what a kill costs

No torch here; `launch.plan.memory` estimates the memory on the new GPUs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pretrain.config import PretrainConfig
from pretrain.core.configlib import Config, ConfigError, read_values, validate, write_values
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output

Rule = Literal["linear", "sqrt", "none"]
FAR = 4.0  # a factor beyond which the rules of the learning rate are known to fail for some recipes


@dataclass(frozen=True)
class Change:
    """One key of the recipe: `old` becomes `new` because of `why`."""

    key: str
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.old)} -> {_short(self.new)}  ({self.why})"


@dataclass(frozen=True)
class Scaled:
    """The recipe for the new batch, what changed, and what no rule covers."""

    values: dict[str, Any]
    changes: list[Change]
    untested: list[str]


def scale(
    values: dict[str, Any],
    *,
    gpus: int,
    batch_per_gpu: int,
    accumulation: int | None = None,
    lr_rule: Rule | None = None,
) -> Scaled:
    """Adapt the values of a valid configuration to `gpus` x `batch_per_gpu` (x accumulation) images a step.

    Args:
        accumulation: micro-batches per step and GPU; default: the smallest that reaches the recipe's global batch,
            at least 1.
        lr_rule: default: the recipe's `optim.blr_rule`.

    Raises:
        ConfigError: the configuration is not valid, before or after.
        ValueError: a count is below 1.
    """
    for name, count in (("gpus", gpus), ("batch_per_gpu", batch_per_gpu), ("accumulation", accumulation or 1)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    config = validate(PretrainConfig, values, source="the recipe")
    old_batch = config.optim.global_batch_size
    accumulation = accumulation or math.ceil(old_batch / (gpus * batch_per_gpu))
    new_batch = gpus * batch_per_gpu * accumulation
    k = new_batch / old_batch
    rule: Rule = lr_rule or config.optim.blr_rule
    changes = [
        Change("optim.global_batch_size", old_batch, new_batch, f"{gpus} x {batch_per_gpu} x {accumulation}"),
        Change(
            "engine.accumulation_steps",
            config.engine.accumulation_steps,
            accumulation,
            "micro-batches per step and GPU",
        ),
        *_learning_rate(config, k, rule),
        *_averages(config, k),
        *_durations(config, k),
    ]
    changes = [change for change in changes if change.new != change.old]
    scaled = _applied(values, changes)
    validate(PretrainConfig, scaled, source="the scaled recipe")
    return Scaled(scaled, changes, _untested(config, k, rule))


def _learning_rate(config: PretrainConfig, k: float, rule: Rule) -> Iterator[Change]:
    optim = config.optim
    own = optim.blr is not None and rule == optim.blr_rule  # the batch is in the recipe's own formula
    factor = {"linear": k, "sqrt": k**0.5, "none": 1.0}[rule]
    why = {"linear": "linear rule: x k", "sqrt": "square-root rule: x sqrt(k)", "none": "kept"}[rule]
    if optim.blr is not None and not own:
        by_formula = k if optim.blr_rule == "linear" else k**0.5
        yield Change("optim.blr", optim.blr, optim.blr * factor / by_formula, f"{why}, over its own {optim.blr_rule}")
    for key in ("lr", "min_lr", "warmup_lr"):
        old = getattr(optim, key)
        if old:
            yield Change(f"optim.{key}", old, old * factor, why)


def _averages(config: PretrainConfig, k: float) -> Iterator[Change]:
    for key in config.objective.step_momenta:
        old = getattr(config.objective, key)
        if 0 < old < 1:
            yield Change(f"objective.{key}", old, old**k, "m^k")


def _durations(config: PretrainConfig, k: float) -> Iterator[Change]:
    keys = ["optim.total_steps", "optim.warmup_steps", "checkpoint.every_steps", "checkpoint.milestone_every_steps"]
    keys += ["log.pictures_every_steps", *(["probe.every_steps"] if config.probe else [])]
    for name, value in config.objective:
        if isinstance(value, Config):
            keys += [f"objective.{name}.{key}" for key in type(value).model_fields if key.endswith("_steps")]
        elif name.endswith("_steps"):
            keys.append(f"objective.{name}")
    for key in keys:
        old = attrgetter(key)(config)
        if isinstance(old, int) and old > 0 and not (key == "checkpoint.every_steps" and k < 1):
            yield Change(key, old, max(1, round(old / k)), "as many samples as before")


def _untested(config: PretrainConfig, k: float, rule: Rule) -> list[str]:
    found = []
    if k == 1:
        return found
    if max(k, 1 / k) > FAR:
        found.append(
            f"the batch changes {max(k, 1 / k):.3g}-fold; the {rule} rule for the learning rate is only trusted up to "
            f"about {FAR:g}: sweep optim.{'lr' if config.optim.lr is not None else 'blr'}"
        )
    if rule == "sqrt":
        found.append("optim.weight_decay: under the square-root rule the decay per sample changes by 1/sqrt(k); kept")
    if config.optim.betas is not None:
        found.append("optim.betas, eps: kept, as the published recipes do (Malladi et al. 2022 would scale them)")
    found += [f"{config.objective.name}: {text}" for text in config.objective.batch_coupled]
    return found


def _applied(values: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    result = deepcopy(values)
    for change in changes:
        *path, key = change.key.split(".")
        section = result
        for part in path:
            section = section.setdefault(part, {})
        section[key] = change.new
    return result


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """`fovea scale`: print what changes and write the recipe. Exit status 2 for a wrong recipe or argument."""
    parser = argparse.ArgumentParser(prog="fovea scale", description="The same recipe on other hardware.")
    parser.add_argument("config", help="the recipe, a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="applied before scaling")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--batch-per-gpu", type=int, required=True, help="images in one micro-batch of one GPU")
    parser.add_argument("--accumulation", type=int, help="micro-batches per step; default: to meet the recipe's batch")
    parser.add_argument("--lr-rule", choices=("linear", "sqrt", "none"), help="default: the recipe's own")
    parser.add_argument("--out", help="the new YAML; default: CONFIG with _GPUSxBATCH added to its name")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory estimate (it imports torch)")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        scaled = scale(
            read_values(chosen.config, chosen.overrides),
            gpus=chosen.gpus,
            batch_per_gpu=chosen.batch_per_gpu,
            accumulation=chosen.accumulation,
            lr_rule=chosen.lr_rule,
        )
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    source = Path(chosen.config)
    out = Path(chosen.out or source.with_name(f"{source.stem}_{chosen.gpus}x{chosen.batch_per_gpu}.yaml"))
    notes = [f"{source.name} for {chosen.gpus} GPUs x {chosen.batch_per_gpu} images, by `fovea scale`"]
    notes += [str(change) for change in scaled.changes] + [f"untested: {line}" for line in scaled.untested]
    try:
        write_values(out, scaled.values, notes=notes)
    except OSError as error:
        print(f"--out {out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print("\n".join([*notes[1:], f"wrote {out}"]))
    if not chosen.no_memory:
        from launch.plan.memory import describe

        config = validate(PretrainConfig, scaled.values, source=str(out))
        try:
            print(describe(config, gpus=chosen.gpus, batch=chosen.batch_per_gpu))
        except ConfigError as error:  # a tokenizer or a teacher that does not exist yet
            print(f"memory not estimated: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("fovea scale", main))
