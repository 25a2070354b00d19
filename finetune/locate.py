"""The source of a backbone, recognized by the files of a path. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.config import ModelSource
from pretrain.core.configlib import ConfigError, validate
from pretrain.models.release.manifest import source_problem

RECORD, CONFIG = "fovea.json", "config.json"
TASK = "task.json"  # in a run's folder: what `finetune.release.described` gives, for its checkpoints


def locate(path: str | Path, *, timm: str | None = None, random: bool = False, **options: Any) -> ModelSource:
    """The `ModelSource` of a release, a run that has one, a checkpoint file, or a folder of timm's or Hugging Face's.

    Args:
        timm: the name of timm's model that the weights in `path` are of.
        random: the architecture with random weights; then `path` may also be a name of timm's registry.
        options: further keys of `ModelSource`: img_size, mean, std, args, ...

    Raises:
        ConfigError: there is nothing at `path`, the folder holds none of these, or an option is wrong.
    """
    found: dict[str, Any] = {"timm": timm, "weights": str(path)} if timm else _recognized(Path(path), random=random)
    found |= {key: value for key, value in options.items() if value is not None}
    return validate(ModelSource, {**found, "random": random}, source=str(path))


def check_task_folder(path: Path) -> None:
    """Check that a folder holds a task.

    Raises:
        ValueError: it is neither a release of a task nor one of its runs.
    """
    if not any((path / name).is_file() for name in (RECORD, f"release/{RECORD}", TASK)):
        raise ValueError(f"{path}: neither a release of `fovea finetune` ({RECORD}) nor one of its runs ({TASK})")


def problem_of(model: ModelSource) -> str | None:
    """Why the weights of a source cannot be opened: missing, or not as their manifest records; None: nothing found."""
    key, value = ("weights", model.weights) if model.timm is not None else model.source
    problem = None if value is None else source_problem(Path(value))
    return None if problem is None else f"model.{key}: {problem}"


def _recognized(path: Path, *, random: bool) -> dict[str, Any]:
    if path.is_file():
        return {"official": str(path)}
    for folder in (path, path / "release"):
        if (folder / RECORD).is_file():
            return {"release": str(folder)}
    if (path / CONFIG).is_file():
        return _of_config(path, json.loads((path / CONFIG).read_text(encoding="utf-8")))
    if random and not path.exists():
        return {"timm": str(path)}
    if not path.exists():
        raise ConfigError(str(path), ["no such file or folder; nothing is downloaded"])
    if (path / "config.yaml").is_file():
        raise ConfigError(str(path), [f"a run without a release yet; `fovea release {path} OUT` writes one"])
    raise ConfigError(str(path), [f"no {RECORD} and no {CONFIG} in this folder: expected a release, a run, or weights"])


def _of_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A folder with the config.json of timm or of Hugging Face."""
    if "architecture" not in config:
        return {"huggingface": str(path)}
    arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    size = arguments.pop("img_size", None)
    found = {"timm": config["architecture"], "weights": str(path), "args": arguments}
    return found if size is None else {**found, "img_size": size}
