"""`fovea pretrain init SHARDS --gpus N --hours H --out pretrain.yaml`: a configuration for these images and this time.

Method, size and length follow from the number of images and the time of a step, by the formulas of `fovea launch plan`;
what is written passes `fovea pretrain pretrain.yaml --check` as it is, and has its reasons in comments.
"""

from __future__ import annotations

import argparse
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch.init.machine import Target, target
from launch.init.methods import USES, Candidate
from launch.init.output import write_new
from launch.init.text import Choice, render, values_of, with_overrides
from launch.plan.command import IMAGES_PER_CORE
from launch.plan.hardware import GPUS, UTILIZATION, find_gpu
from launch.plan.machine import count_gpus
from launch.plan.scale import scale
from pretrain.__main__ import check, describe
from pretrain.config import PretrainConfig
from pretrain.core.configlib import read_values, validate
from pretrain.core.machine.resources import size_text
from pretrain.core.machine.terminal import safe_output
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.write.images import UnreadableImageError, image_sides

LOOKED_AT = 200  # images whose sides are read
_FREE = 0.85  # share of a GPU's memory that is used: the estimate is not exact
_STEPS_AN_EPOCH = 10
_SAVE_SECONDS = 1800


@dataclass(frozen=True)
class Budget:
    """peak: operations per second of all ranks. decoded: images per second that the cores decode. measured: images per
    second that the user gives, instead of both. why: of the peak."""

    seconds: float
    ranks: int
    where: Target
    peak: float
    decoded: float
    measured: float | None
    why: str

    def rate(self, flops: float) -> float:
        """Images per second, of which each takes `flops`."""
        return self.measured or min(UTILIZATION * self.peak / flops, self.decoded)


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: written. 2: the data cannot be used; a sentence names the way out."""
    chosen = _parser().parse_intermixed_args(arguments)
    return write_new(Path(chosen.out), partial(_made, chosen), next_command=_command(chosen))


def _made(chosen: argparse.Namespace) -> tuple[str, list[str]]:
    """The text of the configuration, and what is said about it.

    Raises:
        ConfigError, ValueError: the shards, the machine or an override cannot be used.
    """
    dataset = Dataset.open(chosen.shards)
    shorter = _shorter_side(dataset)
    budget = _budget(chosen)
    overrides = read_values({}, chosen.overrides)
    candidate, values, cost = _choose(chosen, dataset.num_samples, shorter, budget)
    choices = _choices(chosen, candidate, values, cost, dataset.num_samples, shorter, budget)
    choices = with_overrides(choices, overrides)
    config, _, steps = check(values_of(choices), world_size=budget.ranks)
    check(values_of(choices), world_size=1)
    return render(_head(chosen, candidate), choices), [describe(config, steps)]


def _choose(
    chosen: argparse.Namespace, images: int, shorter: float, budget: Budget
) -> tuple[Candidate, dict[str, Any], Any]:
    """The largest network that there are images and time for, its values, and the cost of a step."""
    from launch.plan.cost import count

    allowed = [candidate for candidate in USES[chosen.use] if images >= candidate.images]
    for candidate in allowed:
        values = candidate.values(shorter)
        values |= {"run_dir": f"runs/{Path(chosen.out).stem}", "data": _data(chosen, budget)}
        cost = count(validate(PretrainConfig, values, source=str(candidate.file)))
        if budget.rate(cost.flops) * budget.seconds >= candidate.wanted(images) or candidate is allowed[-1]:
            return candidate, values, cost
    raise AssertionError("the last candidate is for any number of images")


def _choices(
    chosen: argparse.Namespace,
    candidate: Candidate,
    values: dict[str, Any],
    cost: Any,
    images: int,
    shorter: float,
    budget: Budget,
) -> list[Choice]:
    rate = budget.rate(cost.flops)
    batch, per_rank, accumulation, why_batch = _batch(values, cost, images, budget)
    scaled = scale(values, gpus=budget.ranks, batch_per_gpu=per_rank, accumulation=accumulation)
    reasons = {change.key: f"Recipe: {_short(change.old)}; {change.why}." for change in scaled.changes}
    reasons["optim.global_batch_size"] = why_batch
    values = scaled.values
    passes = min(rate * budget.seconds / images, candidate.most)
    hours = passes * images / rate / 3600
    steps = max(1, round(passes * (images // batch)))
    optim = values["optim"]
    for key in ("epochs", "total_steps", "warmup_epochs", "warmup_steps"):
        optim.pop(key, None)
    optim |= {"total_steps": steps, "warmup_steps": max(1, steps // 20)}
    source = "--images-per-second" if budget.measured else budget.why
    limit = "" if passes < candidate.most else f"; its authors report no more than {candidate.most:g} passes"
    reasons["optim.total_steps"] = (
        f"{_number(passes)} passes over {images} images: {hours:.3g} h of the {chosen.hours:g} h{limit}. Estimated: "
        f"{rate:.0f} images/s at {cost.flops / 1e9:.3g} GFLOP each ({source}; decoding: {budget.decoded:.0f}/s). "
        f"`fovea launch check {shlex.quote(chosen.out)} --probe-steps 20` measures it."
    )
    reasons["optim.warmup_steps"] = "A twentieth of the run, as MAE's 40 of 800 epochs."
    every = max(1, min(steps, round(_SAVE_SECONDS * rate / batch)))
    values["checkpoint"] = {"every_steps": every}
    reasons["checkpoint.every_steps"] = "Half an hour of work at most is lost with a machine."
    values["log"] = {"every_steps": max(1, min(50, steps // 20)), "pictures_every_steps": max(1, steps // 5)}
    values["engine"] = {"precision": "bf16" if budget.where.bf16 else "fp32", "accumulation_steps": accumulation}
    sections = [
        Choice("run_dir", values["run_dir"]),
        Choice("objective", values["objective"], _method_reason(chosen.use, values["objective"]["name"])),
        Choice("model", values["model"], _size_reason(candidate, images, shorter, rate, budget)),
        Choice("data", values["data"], f"{budget.where.cores} cores."),
    ]
    for section in ("optim", "engine", "checkpoint", "log"):
        for key, value in values[section].items():
            name = f"{section}.{key}"
            sections.append(Choice(name, value, reasons.get(name, "")))
    return sections


def _batch(values: dict[str, Any], cost: Any, images: int, budget: Budget) -> tuple[int, int, int, str]:
    """Global batch, micro-batch of a rank, accumulation, and why."""
    from launch.plan.memory import Footprint

    recipe, ranks = values["optim"]["global_batch_size"], budget.ranks
    most = max(ranks, images // _STEPS_AN_EPOCH)
    share = 1 << int(np.log2(max(1, min(recipe, most) // ranks)))
    found = Footprint(cost.trained, cost.fixed, cost.optimizer, cost.per_batch, cost.per_image)
    room = _FREE * budget.where.memory
    parts = 1
    while share // parts > 1 and found.total(images=share // parts) > room:
        parts *= 2
    if found.total(images=share // parts) > room:
        raise ValueError(
            f"{budget.where.name}: one image of {values['model']['name']} does not fit into "
            f"{size_text(budget.where.memory)}; choose a GPU with more memory, --gpu NAME"
        )
    need = size_text(found.total(images=share // parts))
    why = f"{ranks} x {share // parts} images x {parts} accumulation: about {need} of {size_text(budget.where.memory)}"
    less = f", and {_STEPS_AN_EPOCH} steps an epoch or more" if recipe > most else ""
    return share * ranks, share // parts, parts, f"The recipe has {recipe}. {why}{less}."


def _method_reason(use: str, name: str) -> str:
    if name == "dino":
        return "DINO: its features are used as they are (--use frozen); a step costs more than MAE's."
    if use == "frozen":
        return (
            "MAE, although features are to be used as they are: DINO needs more images or time than there are. Use "
            "the mean of the patches (`fovea probe` tries both)."
        )
    return (
        "MAE: the cheapest step of all methods, no large batch, no collapse; best where the network is fine-tuned. For "
        "features that are used as they are: --use frozen."
    )


def _size_reason(candidate: Candidate, images: int, shorter: float, rate: float, budget: Budget) -> str:
    passes, least = _number(rate * budget.seconds / images), _number(candidate.wanted(images) / images)
    return (
        f"{candidate.model}: the largest network for {images} images and {passes} passes in the time at hand (rule of "
        f"thumb: {candidate.images or 'any number of'} images, {least} passes or more). Shorter sides of the images: "
        f"{shorter:.0f} px in the median. Recipe: {candidate.file}."
    )


def _data(chosen: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    workers = max(1, min(8, budget.where.cores // budget.ranks - (budget.ranks == 1)))
    return {"shards": chosen.shards, "num_workers": workers}


def _shorter_side(dataset: Dataset) -> float:
    """Of the images, in the median. ValueError: no image is among those looked at."""
    reader, found = Reader(dataset), list[int]()
    for number in np.linspace(0, dataset.num_samples - 1, min(LOOKED_AT, dataset.num_samples)).astype(int).tolist():
        with suppress(BadSample, UnreadableImageError):  # the run counts and lists them
            sample = reader.read(*dataset.locate(number), only=IMAGE_EXTENSIONS)
            data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
            if data is not None:
                found.append(min(image_sides(data)))
    reader.close()
    if not found:
        raise ValueError(f"{dataset.paths[0]} ...: no image can be read (members: {', '.join(dataset.extensions[:5])})")
    return float(np.median(found))


def _budget(chosen: argparse.Namespace) -> Budget:
    for flag, value, good in (("--gpus", chosen.gpus, chosen.gpus >= 0), ("--hours", chosen.hours, chosen.hours > 0)):
        if not good:
            raise ValueError(f"{flag} {value}: give a number above 0 (--gpus 0: the CPU cores)")
    ranks = max(1, chosen.gpus)
    if chosen.gpus and chosen.gpu is None and not (count_gpus() or chosen.images_per_second):
        raise ValueError(f"--gpus {chosen.gpus}: no GPU is here; name that of the run: --gpu {' | '.join(GPUS)}")
    where = target(chosen.gpu)
    where = replace(where, cores=chosen.cores or where.cores)
    if not chosen.gpus:
        where = Target(f"{where.cores} CPU cores", False, target(None).memory, where.cores, where.bf16)
    if where.gpu and chosen.gpu is not None:
        gpu = find_gpu(chosen.gpu)
        peak, why = gpu.bf16 * 1e12 * ranks, f"{UTILIZATION:.0%} of {ranks} x {gpu.bf16:g} TFLOP/s"
    else:
        peak = _measured_peak(where)
        why = f"{UTILIZATION:.0%} of {peak / 1e9:.0f} GFLOP/s, that a product of matrices has here"
        peak *= ranks
    decoded = float(where.cores * IMAGES_PER_CORE)
    return Budget(chosen.hours * 3600, ranks, where, peak, decoded, chosen.images_per_second, why)


def _measured_peak(where: Target) -> float:
    """Operations per second of products of matrices, on this GPU or these cores."""
    import torch

    device = "cuda" if where.gpu and torch.cuda.is_available() else "cpu"
    kind, side = (torch.bfloat16 if where.bf16 else torch.float32), 4096 if device == "cuda" else 768
    one = torch.ones(side, side, dtype=kind, device=device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        float((one @ one)[0, 0])  # the number waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _head(chosen: argparse.Namespace, candidate: Candidate) -> list[str]:
    machines = f"{chosen.gpus} GPUs" if chosen.gpus else "CPU cores"
    return [
        f"{candidate.model} on {chosen.shards}, written by `fovea pretrain init` for {machines} and "
        f"{chosen.hours:g} hours. Each choice has its reason above it; times are estimates, not measured.",
        f"  fovea pretrain {shlex.quote(chosen.out)} --check",
        f"  {_command(chosen)}",
    ]


def _command(chosen: argparse.Namespace) -> str:
    out = shlex.quote(chosen.out)
    return f"fovea launch local {chosen.gpus} {out}" if chosen.gpus > 1 else f"fovea pretrain {out}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fovea pretrain init",
        description=__doc__,
        epilog="key=value sets a key of the configuration. Official recipes: configs/pretrain/.",
    )
    parser.add_argument("shards", metavar="SHARDS", help="a folder or pattern of indexed shards")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for instance model.img_size=96")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of one machine; 0: its CPU cores")
    parser.add_argument("--hours", type=float, required=True, help="time at hand")
    parser.add_argument("--out", required=True, help="the configuration, a new YAML file")
    parser.add_argument("--use", choices=USES, default="finetune", help="what the network is for; default: finetune")
    parser.add_argument("--gpu", metavar="NAME", help=f"{', '.join(GPUS)}; default: that of this machine")
    parser.add_argument("--cores", type=int, help="that decode images; default: those of this machine")
    parser.add_argument("--images-per-second", type=float, help="measured, over all GPUs, instead of an estimate")
    return parser
