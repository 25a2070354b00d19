"""A fine-tuned task as a folder, and back: predicting, exporting and evaluating start from it.

model.safetensors    the weights, those of the moving average if one was kept
fovea.json           the task, its classes, the backbone, the normalization, numbers with their protocol, data, versions
config.json          if timm has a model that computes the same: `timm.create_model("local-dir:FOLDER", ...)`
MANIFEST.json        size and sha256 of these files, compared at every opening
README.md            the model card, generated from fovea.json; not in the manifest, so it may be edited

A run's folder can be opened too: its release, or its newest checkpoint while it has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import Field
from torch import Tensor

from finetune.locate import TASK, check_task_folder
from finetune.predictions import Classes
from finetune.report.card import card
from finetune.tasks import task_class
from finetune.tasks.base import Task
from finetune.tasks.configs import TaskConfig
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.configlib import Config, validate
from pretrain.core.files import replacing_folder, write_json
from pretrain.core.manifest import MANIFEST
from pretrain.core.tensorfile import write_tensors
from pretrain.engine.checkpoint.commit import newest_complete, read_manifest
from pretrain.engine.step import MODEL_FILE
from pretrain.models.backbones.contract import Backbone
from pretrain.models.importers.files import read_safetensors
from pretrain.models.release.folder import backbone_of, check_finite
from pretrain.models.release.manifest import RECORD, WEIGHTS, check_release, write_manifest

FORMAT = 1
_AVERAGE = "ema.average."


class _Section(Config):
    task: TaskConfig = Field(discriminator="name")


def described(task: Task, *, source: Mapping[str, Any]) -> dict[str, Any]:
    """All that rebuilds a task except its weights, as JSON."""
    return {
        "format": FORMAT,
        "task": task.config.model_dump(mode="json"),
        "model": task.bare_backbone.release_model(),
        "classes": list(task.classes),
        "category_ids": list(task.classes.category_ids),
        "mean": _decimals(task.mean),
        "std": _decimals(task.std),
        "source": dict(source),
    }


def _decimals(values: Tensor) -> list[float]:
    """The values as they were given: fp32 has 7 digits."""
    return [float(f"{value:.7g}") for value in values.flatten().tolist()]


def write_release(folder: Path, task: Task, record: Mapping[str, Any]) -> Path:
    """Write the release completely or not at all; an existing release is replaced.

    Args:
        record: "source" of the initial weights, and more for fovea.json: recipe, data, metrics, versions.

    Raises:
        ValueError: the folder contains other files.
        NotFiniteError: a weight is NaN or infinite; nothing was written.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise ValueError(f"{folder}: contains files that are not a release; choose another folder")
    model = task.evaluated
    state, files = model.exported(model.state_dict())
    check_finite(folder, state)
    facts = {**described(task, source=record.get("source", {})), **record, "timm": "config.json" in files}
    facts["manifest"] = MANIFEST
    with replacing_folder(folder) as new:
        write_tensors(new / WEIGHTS, state, {"format": "pt"})
        for name, content in files.items():
            write_json(new / name, content)
        write_json(new / RECORD, facts)
        (new / "README.md").write_text(card(facts), encoding="utf-8", errors="replace")
        write_manifest(new, [WEIGHTS, RECORD, *files])
    return folder


def is_task(folder: Path | str) -> bool:
    """Whether the folder is a release of a fine-tuned task, not that of a backbone alone."""
    record = Path(folder) / RECORD
    return record.is_file() and "task" in _record(record)


def open_task(path: Path | str) -> tuple[Task, dict[str, Any]]:
    """The task in a release or a run's folder, in eval mode on the CPU, and its record.

    Raises:
        ValueError: it is neither, is damaged (a file differs from the manifest), has a newer format, or its weights do
            not fit its task, are NaN or infinite.
        CheckpointError: a run without a complete checkpoint.
    """
    path = Path(path)
    folder = path / "release" if (path / "release" / RECORD).is_file() else path
    check_release(folder)
    if (folder / RECORD).is_file():
        record = _record(folder / RECORD)
        if "task" not in record:
            raise ValueError(f"{folder}: a release of a backbone only; `fovea finetune` trains a task on it")
        if not (folder / WEIGHTS).exists():
            raise ValueError(f"{folder}: a release without its weights, {WEIGHTS}; copy the release again")
        task = _untrained(folder, record)
        return _with(task, task.imported(read_safetensors(folder / WEIGHTS)), folder), record
    check_task_folder(path)
    record = _record(path / TASK)
    checkpoint = newest_complete(path / "checkpoints")
    state = read_safetensors(checkpoint / MODEL_FILE)
    averaged = {name.removeprefix(_AVERAGE): tensor for name, tensor in state.items() if name.startswith(_AVERAGE)}
    record["metrics"] = {"step": read_manifest(checkpoint).step}
    return _with(_untrained(path, record), averaged or state, checkpoint), record


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _untrained(folder: Path, record: Mapping[str, Any]) -> Task:
    if record.get("format") != FORMAT:
        raise ValueError(f"{folder}: format {record.get('format')} of a fine-tuned task; this version reads {FORMAT}")
    section = validate(_Section, {"task": record["task"]}, source=str(folder)).task
    opened = OpenedBackbone(
        cast(Backbone, backbone_of(record["model"])),
        tuple(record["mean"]),
        tuple(record["std"]),
        record["source"].get("title", ""),
        source=record["source"],
    )
    classes = Classes(record["classes"], record["category_ids"])
    return task_class(section.name)(section, opened, classes)


def _with(task: Task, state: Mapping[str, Tensor], source: Path) -> Task:
    check_finite(source, state)
    try:
        task.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{source}: the weights do not fit its task: {error}") from error
    return task.eval()
