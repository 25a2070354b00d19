"""`fovea finetune init TASK DATA --weights W --out task.yaml`: a configuration for these data, with its reasons.

The data are read, and what is written passes `fovea finetune task.yaml --check` as it is.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from finetune.__main__ import check, describe, warnings_of
from finetune.config import DataSource
from finetune.data.coco.box_sizes import box_sizes
from finetune.data.examples import Examples
from finetune.locate import locate
from finetune.tasks import open_examples
from finetune.tasks.configs import (
    ClassificationConfig,
    DepthConfig,
    DetectionConfig,
    SegmentationConfig,
    TaskSection,
)
from launch.init import classification, detection, pixels
from launch.init.machine import Target, target
from launch.init.output import write_new
from launch.init.sources import TASKS, source
from launch.init.text import Choice, render, values_of, with_overrides
from launch.init.training import Backbone, Length, data_choices, open_backbone, shared
from pretrain.core.configlib import read_values, validate
from pretrain.core.machine.terminal import safe_output

HELD_OUT = 0.2  # share of the images for evaluation where no other set is given
_LOST = 0.05  # share of the objects without a usable mask, up to which masks are trained


class Opened(NamedTuple):
    """The training set, and facts that only its opening shows: masks of objects, the class of the background."""

    train: Examples
    masks: bool = False
    background: str | None = None


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: written. 2: the data or the weights cannot be used; a sentence names the way out."""
    chosen = _parser().parse_intermixed_args(arguments)
    return write_new(Path(chosen.out), partial(_made, chosen), next_command=f"fovea finetune {shlex.quote(chosen.out)}")


def _made(chosen: argparse.Namespace) -> tuple[str, list[str]]:
    """The text of the configuration, and what is said about it.

    Raises:
        ConfigError, ValueError: the data, the weights or an override cannot be used.
    """
    where = target(chosen.gpu)
    train, val, why_data = _sources(chosen)
    overrides = read_values({}, chosen.overrides)
    opened = _open(chosen.task, train, overrides)
    model = locate(chosen.weights, timm=chosen.timm)
    backbone = open_backbone(model)
    task, found, frozen = _task(chosen.task, opened, backbone, where, overrides)
    weights = model.model_dump(exclude_defaults=True)
    data = data_choices(train, val, where, why_data)
    choices = [
        Choice("run_dir", f"runs/{Path(chosen.out).stem}"),
        *(choice for choice in task if choice.key.startswith("task.")),
        *(Choice(f"model.{key}", value) for key, value in weights.items()),
        *(choice for choice in task if not choice.key.startswith("task.")),
        *data,
        *shared(backbone, where, found, frozen=frozen),
    ]
    choices = with_overrides(choices, overrides)
    checked = check(values_of(choices), world_size=1)
    from launch.init.memory import accumulation

    parts = accumulation(checked, where)
    choices = with_overrides([*choices, parts], overrides)
    checked = check(values_of(choices), world_size=1)
    return render(_head(chosen, backbone), choices), [describe(checked), *warnings_of(checked)]


def _sources(chosen: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], str]:
    """data.train, data.val, and the reason of the division."""
    train = source(chosen.task, chosen.data, chosen.images, chosen.classes)
    if chosen.val is not None:
        return train, source(chosen.task, chosen.val, chosen.val_images, chosen.classes), ""
    if chosen.val_images is not None:
        raise ValueError(f"--val-images {chosen.val_images}: give their labels too, --val")
    share = chosen.held_out
    why = (
        f"No set for evaluation was given (--val): {share:.0%} of the images, chosen at random, are held out. Pictures "
        "of one scene or video can be in both parts, and the numbers are then too good: `fovea data dups` finds copies."
    )
    return {**train, "without_fraction": share}, {**train, "fraction": share}, why


def _open(task: str, values: dict[str, Any], overrides: dict[str, Any]) -> Opened:
    given = validate(DataSource, values, source=f"fovea finetune init {task}")
    if task == "detection":
        return _open_objects(given)
    if task == "segmentation":
        background = "background" if given.annotations is not None else None
        try:
            train = open_examples(_section(SegmentationConfig, {"background": background}, overrides), given)
        except ValueError:  # of a panoptic json, or of a set that has a class of that name
            train, background = open_examples(_section(SegmentationConfig, {}, overrides), given), None
        return Opened(train, background=background)
    section = ClassificationConfig if task == "classification" else DepthConfig
    return Opened(open_examples(_section(section, {}, overrides), given))


def _open_objects(given: DataSource) -> Opened:
    """With masks, if nearly every object has one."""
    try:
        train = open_examples(DetectionConfig(), given)  # pyright: ignore[reportCallIssue]
        if train.findings.lost["bad mask"] <= _LOST * train.findings.labels:
            return Opened(train, masks=True)
    except ValueError:
        pass  # boxes may still be usable; else the next line says what is wrong
    boxes = validate(DetectionConfig, {"head": {"name": "faster_rcnn"}}, source="task")
    return Opened(open_examples(boxes, given))


def _section(kind: type[TaskSection], values: dict[str, Any], overrides: dict[str, Any]) -> TaskSection:
    """A section of the task with what decides how maps are read, also by override."""
    read = {"void_ids", "reduce_zero_label", "background", "units_per_metre"} & kind.model_fields.keys()
    given = {key: value for key, value in (overrides.get("task") or {}).items() if key in read}
    return validate(kind, {**values, **given}, source="task")


def _task(
    name: str, opened: Opened, backbone: Backbone, where: Target, overrides: dict[str, Any]
) -> tuple[Sequence[Choice], Length, bool]:
    """The section of the task, the length of the run, and whether the backbone is frozen."""
    if name == "classification":
        return classification.choose(opened.train, backbone, where)
    if not backbone.strides:
        raise ValueError(f"{backbone.title} gives no maps, which {name} needs; choose a transformer or a model of timm")
    if name == "detection":
        return *detection.choose(box_sizes(opened.train), backbone, where, masks=opened.masks), False
    if name == "segmentation":
        return *pixels.segmentation(opened.train, backbone, where, opened.background), False
    units = float((overrides.get("task") or {}).get("units_per_metre", 1000.0))
    return *pixels.depth(opened.train, backbone, where, units), False


def _head(chosen: argparse.Namespace, backbone: Backbone) -> list[str]:
    out = shlex.quote(chosen.out)
    return [
        f"{chosen.task.capitalize()} from {backbone.title}, written by `fovea finetune init` for {chosen.data}. Each "
        "choice has its reason above it; the rules are simple, so change what you know better.",
        f"  fovea finetune {out} --check",
        f"  fovea launch check {out} --probe-steps 10    # how long it takes here",
        f"  fovea finetune {out}",
        f"  fovea finetune {out} run_dir=runs/{Path(chosen.out).stem}_random model.random=true    # the control",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fovea finetune init",
        description=__doc__,
        epilog="The data are what data.train reads: docs/finetune.md. key=value sets a key of the configuration.",
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", help="COCO json; folder or tar of maps; labelled shards, class folders or csv")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for instance task.size=512")
    parser.add_argument("--weights", required=True, help="a release, a run, a checkpoint of another project, a folder")
    parser.add_argument("--out", required=True, help="the configuration, a new YAML file")
    parser.add_argument("--images", help="of DATA, where it holds labels only; default: next to a COCO json")
    parser.add_argument("--val", metavar="DATA", help="the set for evaluation; default: a part of DATA is held out")
    parser.add_argument("--val-images", metavar="IMAGES", help="of --val")
    parser.add_argument("--held-out", type=_share, default=HELD_OUT, metavar="SHARE", help="without --val; default 0.2")
    parser.add_argument("--classes", help="json of class names, or labelmap.txt")
    parser.add_argument("--timm", metavar="NAME", help="the model of timm that the weights are of")
    parser.add_argument("--gpu", metavar="NAME", help="h200, a100, ...: for such a GPU; default: this machine")
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text!r}")
    return share
