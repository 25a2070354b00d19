"""How a run reads its images: with the channels and the range of its source, unless its configuration states others.

No torch here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.config import FinetuneConfig
from finetune.data.reading import Reading
from pretrain.core.configlib import ConfigError
from pretrain.core.files import read_text
from pretrain.core.images import name_problems, range_problems
from pretrain.data.channels import difference, with_names_beside
from pretrain.data.views.values import recorded_range


def with_range_of_source(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with the `data.range` that its source was trained with, where it states none."""
    if config.data.range is not None:
        return config
    data = config.data.model_copy(update={"range": recorded_range(_record(config))})
    return config.model_copy(update={"data": data})


def with_channel_names(config: FinetuneConfig) -> FinetuneConfig:
    """The configuration with the names of its channels: given, next to the images, or those of its source.

    Raises:
        ConfigError: two of these differ, or there is another number of them.
    """
    recorded, data = _record(config).get("channels"), config.data
    try:
        names = with_names_beside(data.channels, data.train.images)
        names = with_names_beside(names, data.val.images)
    except ValueError as error:
        raise ConfigError("data", [str(error)]) from error
    problem = None if names is None or recorded is None else difference(names, recorded)
    if problem:
        where = config.model.release or config.run_dir
        raise ConfigError("data.channels", [f"{problem} as in {where}; give the images in that order"])
    names = names or (None if recorded is None else tuple(recorded))
    if problems := name_problems(names, in_chans(config), model="the backbone's channels"):
        raise ConfigError("data", problems)
    return config.model_copy(update={"data": data.model_copy(update={"channels": names})})


def in_chans(config: FinetuneConfig) -> int:
    """`model.in_chans`, or the channels of the source: of a release those it records, else 3."""
    model = config.model
    return model.in_chans or _record(config).get("model", {}).get("in_chans") or model.args.get("in_chans", 3)


def reading(config: FinetuneConfig) -> Reading:
    """Of the images of a run."""
    return Reading(in_chans(config), config.data.orientation, config.data.range, config.data.max_pixels)


def problems(config: FinetuneConfig) -> list[str]:
    """Settings that do not fit the channels of the images."""
    channels, chosen = in_chans(config), config.evaluate.picture_channels
    found = range_problems(config.data.range, channels, model="the backbone's channels")
    found += config.task.channel_problems(channels, deep=config.data.range is not None)
    for key in ("mean", "std"):
        given = getattr(config.model, key)
        if given is not None and len(given) != channels:
            found.append(f"model.{key}: {len(given)} values for images of {channels} channels")
    if chosen is not None and max(chosen) >= channels:
        found.append(f"evaluate.picture_channels: {list(chosen)}, but the channels are 0 to {channels - 1}")
    return found


def _record(config: FinetuneConfig) -> dict[str, Any]:
    """Of the release that the weights come from; of the run itself where that is gone. A damaged one is reported when
    the weights are opened."""
    run = Path(config.run_dir)
    of_run = (run / "task.json", run / "release" / "fovea.json")
    release = config.model.release
    for path in of_run if release is None else (Path(release) / "fovea.json", *of_run):
        try:
            record = json.loads(read_text(path))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            return record
    return {}
