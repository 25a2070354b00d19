"""`fovea attention RELEASE_OR_RUN SHARDS`: does each attention module use the image, and what is lost without that?

Writes attention.json, attention.txt and attention.html. Without labels in the shards (.cls): statistics only. Of
general blocks also which classes, and with --task which data sets, use which branches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.attention import page
from finetune.attention.choices import Use, comparisons, use_of
from finetune.attention.judges import Head, Neighbours
from finetune.attention.study import study
from finetune.release import RECORD, is_task, open_task
from finetune.tasks.classification import Classification
from finetune.tasks.multi_label import MultiLabel
from pretrain.core.files import write_json, write_text
from pretrain.core.images import Orientation, ValueRange
from pretrain.core.machine.command import run_command
from pretrain.core.machine.device import find_device
from pretrain.core.machine.terminal import safe_output
from pretrain.data.labels import CLASSES_FILE, read_classes
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.mechanisms.routing import observed_routing
from pretrain.probes.subject import open_release


@dataclass(frozen=True)
class _Opened:
    title: str
    network: nn.Module
    backbone: ImageEncoder
    mean: tuple[float, ...]
    std: tuple[float, ...]
    orientation: Orientation
    value_range: ValueRange | None


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: measured. 2: a wrong release or data set, or nothing to measure in it."""
    chosen = _parser().parse_args(arguments)
    try:
        torch.manual_seed(chosen.seed)
        opened, device = _open(chosen.release), find_device(chosen.device)
        network = opened.network.requires_grad_(False).eval().to(device)
        images, labels = _images(opened, chosen.shards, chosen, device)
        if isinstance(network, Classification):
            judge = Head(network, images, labels, batch_size=chosen.batch_size)
            protocol = judge.in_words()
        else:
            judge = Neighbours(opened.backbone, images, labels, batch_size=chosen.batch_size, k=chosen.k)
            protocol = judge.in_words()
        grid = opened.backbone.grid_size if "patches" in opened.backbone.provides else None
        found = study(
            network,
            judge,
            grid=grid,
            num_prefix_tokens=opened.backbone.num_prefix_tokens,
            seed=chosen.seed,
            log=lambda line: print(line, file=sys.stderr),
        )
        uses = _uses(opened, images, labels, chosen, device)
        compared = comparisons(uses, chosen.seed)
        facts = {
            "network": opened.title,
            "images": " ".join(chosen.shards),
            "accuracy is of": protocol if labels is not None else "nothing: the shards have no labels",
            "seed": str(chosen.seed),
        }
        chosen.out.mkdir(parents=True, exist_ok=True)
        write_json(chosen.out / "attention.json", page.as_json(found, facts, uses, compared))
        write_text(chosen.out / "attention.txt", page.as_text(found, uses, compared) + "\n")
        write_text(chosen.out / "attention.html", page.as_html(found, facts, grid, uses, compared))
    except (ValueError, OSError) as error:
        print(f"fovea attention: {error}", file=sys.stderr)
        return 2
    print(page.as_text(found, uses, compared))
    print(f"wrote {chosen.out / 'attention.html'}")
    return 0


def _open(path: Path) -> _Opened:
    folder = path / "release" if (path / "release" / RECORD).is_file() else path
    if is_task(folder) or not (folder / RECORD).is_file():
        task, record = open_task(folder)
        if not isinstance(task, Classification) or isinstance(task, MultiLabel):
            raise ValueError(f"{folder}: a task of {task.config.name}; give a classifier, or the release of a backbone")
        mean, std = tuple(record["mean"]), tuple(record["std"])
        return _Opened(str(folder), task, task.bare_backbone, mean, std, *_reading(record))
    subject = open_release(folder)
    return _Opened(
        subject.title,
        subject.network,
        subject.network.backbone,
        subject.mean,
        subject.std,
        subject.orientation,
        subject.value_range,
    )


def _reading(record: dict[str, Any]) -> tuple[Orientation, ValueRange | None]:
    return recorded_orientation(record), recorded_range(record)


def _uses(
    opened: _Opened, images: Tensor, labels: Tensor | None, chosen: argparse.Namespace, device: torch.device
) -> list[Use]:
    """Of the branches of general blocks, by the images that were measured and those of each --task; none: the network
    has no such block."""
    found = [_use(opened, " ".join(chosen.shards), chosen.shards, images, labels, chosen.batch_size)]
    if not found[0].blocks:
        if chosen.task:
            raise ValueError("--task compares the use of branches, and the network has no general block; leave it out")
        return []
    for name, shards in chosen.task:
        if name in (use.task for use in found):
            raise ValueError(f"--task: two data sets are named {name}; give each its own name")
        of_task = _images(opened, [shards], chosen, device)
        found.append(_use(opened, name, [shards], *of_task, chosen.batch_size))
    return found


def _use(
    opened: _Opened, task: str, shards: Sequence[str], images: Tensor, labels: Tensor | None, batch_size: int
) -> Use:
    with observed_routing(opened.network) as routing:
        if routing:
            Neighbours(opened.backbone, images, None, batch_size=batch_size)()
    path = Path(Dataset.open(shards).paths[0]).with_name(CLASSES_FILE)
    classes = read_classes(path) if path.is_file() else {}
    return use_of(routing, len(images), task, None if labels is None else labels.cpu().numpy(), classes)


def _images(
    opened: _Opened, shards: Sequence[str], chosen: argparse.Namespace, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """All images, normalized, and their labels; None: they have none."""
    dataset = Dataset.open(shards)
    labelled = "cls" in dataset.extensions
    found = EvalImages(
        dataset,
        opened.backbone.img_size,
        in_chans=opened.backbone.in_chans,
        mean=opened.mean,
        std=opened.std,
        batch_size=chosen.batch_size,
        orientation=opened.orientation,
        value_range=opened.value_range,
        max_samples=chosen.max_images,
        labelled=labelled,
    )
    images, labels = zip(*found, strict=True)
    return torch.cat(images).to(device), torch.cat(labels).to(device) if labelled else None


def _task(text: str) -> tuple[str, str]:
    name, equals, shards = text.partition("=")
    if not (name and equals and shards):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARDS")
    return name, shards


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea attention", description=__doc__)
    parser.add_argument("release", type=Path, metavar="RELEASE_OR_RUN", help="of a backbone, or of a classifier")
    parser.add_argument("shards", nargs="+", metavar="SHARDS")
    parser.add_argument(
        "--task",
        type=_task,
        action="append",
        default=[],
        metavar="NAME=SHARDS",
        help="further images, whose use of the branches of general blocks is compared with that of SHARDS; repeatable",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; created if it does not exist")
    parser.add_argument("--k", type=int, default=20, help="neighbours, of a backbone (default 20)")
    parser.add_argument("--max-images", type=int, default=1000, help="evenly spaced (default 1000)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the resamples and of the shuffling (default 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("fovea attention", main))
