"""`fovea explain RUN_OR_RELEASE IMAGES... [--out DIR]`: where a network looks, and whether that is true of it.

    index.html                              one page without a server: numbers, verdicts, pictures
    explain.json, explain.csv, explain.md   every number, of each method and of three baselines
    pictures/                               every map over its image
    attention/                              attention of every block and head

RUN_OR_RELEASE is a backbone (of a release, a run, or any source of `fovea finetune`) or a fine-tuned classifier,
detector or segmenter. Methods: attention, rollout, relevance, occlusion, integrated_gradients.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.text import shown
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.engine.checkpoint.commit import CheckpointError

if TYPE_CHECKING:
    from finetune.explain.subjects import Subject
    from finetune.tasks.base import Task


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Explain. Exit status 2: a wrong release, layer, method or image source; 1: the study could not be written."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    for name in ("limit", "batch_size"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(chosen, name)}")
    if not 0 <= chosen.seed < 2**63:
        parser.error(f"--seed must be at least 0, got {chosen.seed}")
    try:
        return _run(chosen)
    except (ValueError, CheckpointError) as error:
        print(f"fovea explain: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fovea explain: {chosen.out}: cannot be written: {error}", file=sys.stderr)
        return 1


def _run(chosen: argparse.Namespace) -> int:
    from finetune.data.reading import Reading
    from finetune.explain.data import open_images
    from finetune.explain.maps import METHODS
    from finetune.explain.page import lines, write_study
    from finetune.explain.study import Plan, explain, possible
    from pretrain.core.machine.device import find_device

    device = find_device(chosen.device)
    for name in chosen.method:
        if name not in METHODS:
            raise ValueError(f"--method {shown(name)}: unknown; one of {', '.join(METHODS)}")
    subject, task, record = open_subject(chosen.task)
    layers = chosen_layers(subject, chosen.layer)
    methods, skipped = possible(subject, chosen.method)
    reading = Reading(subject.backbone.in_chans, recorded_orientation(record), recorded_range(record))
    images = open_images(task, chosen.images, chosen.annotations, reading=reading)
    plan = Plan(
        methods,
        layer=layers[-1] if chosen.layer else None,
        layers=layers,
        limit=chosen.limit,
        seed=chosen.seed,
        batch_size=chosen.batch_size,
    )
    study = explain(subject.to(device), images, plan, device=device, say=partial(print, flush=True))
    study.skipped |= skipped
    facts = {
        "network": chosen.task,
        "images": ", ".join(chosen.images),
        "annotations": chosen.annotations or "none",
        "explained": f"{len(study.explained)} of {len(images)} images, spread over the set",
        "seed": str(chosen.seed),
    }
    page = write_study(Path(chosen.out), study, facts)
    for line in lines(study):
        print(shown(line))
    print(f"page {page}")
    return 0


def open_subject(path: str) -> tuple[Subject, Task | None, dict[str, Any]]:
    """What is in a release or a run's folder: the subject, its task (None: a backbone), and the record.

    Raises:
        ValueError, CheckpointError: it is neither, or it is damaged.
    """
    from finetune.explain.dense_subjects import subject_of_task
    from finetune.explain.subjects import BackboneSubject
    from finetune.locate import locate
    from finetune.release import TASK, is_task, open_task
    from finetune.weights import open_source

    folder = Path(path)
    if is_task(folder) or is_task(folder / "release") or (folder / TASK).is_file():
        task, record = open_task(folder)
        return subject_of_task(task, f"{task.config.name} of {path}"), task, record
    opened = open_source(locate(path))
    return BackboneSubject(opened), None, {"orientation": opened.orientation, "range": opened.value_range}


def chosen_layers(subject: Subject, asked: list[str]) -> list[str]:
    """The attention layers to show, by name: those asked for by name or by number, or else all.

    Raises:
        ValueError: there is no such layer; the message has the names of those that there are.
    """
    from pretrain.models.explain.recording import attention_layers

    names = list(attention_layers(subject.backbone))
    if asked and not names:
        raise ValueError(
            f"--layer {shown(asked[0])}: {subject.backbone.title} has no attention layer; leave --layer out"
        )
    by_number = {str(number): name for number, name in enumerate(names)}
    found = [by_number.get(one, one) for one in asked]
    wrong = next((one for one in found if one not in names), None)
    if wrong is not None:
        raise ValueError(f"--layer {shown(wrong)}: no such attention layer; this one has {', '.join(names)}")
    return found or names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fovea explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", metavar="RUN_OR_RELEASE", help="folder of a release or of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, patterns, or a labelled set")
    parser.add_argument("--out", default="explained", help="folder, replaced if it is of an earlier call")
    parser.add_argument("--annotations", metavar="PATH", help="COCO json, or folder or .tar of label maps")
    parser.add_argument("--method", action="append", default=[], metavar="NAME", help="again for more; default: all")
    parser.add_argument("--layer", action="append", default=[], metavar="NAME", help="attention layer to show, or its "
                        "number, again for more; the last is that of method attention; default: all")  # fmt: skip
    parser.add_argument("--limit", type=int, default=16, help="images to explain, spread over the set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("fovea explain", main))
