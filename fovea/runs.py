"""Runs: start or resume them, read what they wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.configlib import ConfigError, ConfigSource, read_values
from pretrain.core.ranks import read_launch
from pretrain.core.record import columns, read_rows


@dataclass(frozen=True)
class Run:
    """A run folder, of pretraining or fine-tuning, finished or not.

    Raises:
        ConfigError: (a ValueError) the folder is not that of a run.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / "config.yaml").is_file():
            raise ConfigError(str(self.folder), ["not a run folder: it has no config.yaml"])

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, which `pretrain` or `finetune` takes again."""
        return read_values(self.folder / "config.yaml")

    @property
    def done(self) -> bool:
        """Whether all steps are done. A run that was stopped resumes when it is started again."""
        return (self.folder / "DONE").exists()

    @property
    def release(self) -> Path | None:
        """The folder of its release; None before the end. `fovea.load` and `fovea.load_task` also take the run."""
        folder = self.folder / "release"
        return folder if folder.is_dir() else None

    def metrics(self) -> list[dict[str, float]]:
        """Everything logged: a row per step."""
        return read_rows(self.folder / "metrics.jsonl")

    def columns(self) -> dict[str, list[float]]:
        """The same as columns of equal length, for a data frame; nan where a step logged no such value."""
        return columns(self.metrics())


def pretrain(config: ConfigSource, overrides: Sequence[str] = ()) -> Run:
    """Check everything, then pretrain in this process, or resume the run in `run_dir`; as `fovea pretrain`.

    Args:
        config: a YAML file, a mapping, or a PretrainConfig.
        overrides: `key.sub=value`, in order.

    Raises:
        ConfigError: (a ValueError) the configuration or the data cannot be used; every problem is listed.
        RunError: the run cannot continue; its `status` is the exit status of the command.
    """
    from pretrain.__main__ import check

    checked = check(config, overrides, world_size=_world_size())
    from pretrain.run import run

    run(*checked)
    return Run(Path(checked[0].run_dir))


def finetune(config: ConfigSource, overrides: Sequence[str] = ()) -> Run:
    """Check everything, then train, evaluate, report and release in this process; as `fovea finetune`.

    Arguments and errors are those of `pretrain`; `config` may be a FinetuneConfig.
    """
    from finetune.__main__ import check

    checked = check(config, overrides, world_size=_world_size())
    from finetune.run import run

    run(*checked)
    return Run(Path(checked.config.run_dir))


def _world_size() -> int:
    launch = read_launch(os.environ)
    return launch.world_size if launch else 1
