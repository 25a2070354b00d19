"""The programs a job can run: for each, the check of its configuration without torch, which returns the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pretrain.core.configlib import ConfigError, read_values


def _pretrain(config: str, overrides: Sequence[str], world_size: int) -> Path:
    from pretrain.__main__ import check

    return Path(check(config, overrides, world_size=world_size)[0].run_dir)


def _finetune(config: str, overrides: Sequence[str], world_size: int) -> Path:
    from finetune.__main__ import check

    return Path(check(config, overrides, world_size=world_size).config.run_dir)


PROGRAMS: dict[str, Callable[[str, Sequence[str], int], Path]] = {"pretrain": _pretrain, "finetune": _finetune}


def chosen_run(words: Sequence[str]) -> tuple[str, str, list[str]]:
    """Program, configuration and overrides of `[pretrain|finetune] CONFIG [key=value ...]`.

    Without the first word the configuration decides: one with `task` and no `objective` is of fine-tuning.

    Raises:
        ValueError: a word without a configuration.
    """
    if words[0] not in PROGRAMS:
        return _kind(words[0], words[1:]), words[0], [*words[1:]]
    if not words[1:]:
        raise ValueError(f"no configuration after {words[0]}")
    return words[0], words[1], [*words[2:]]


def _kind(config: str, overrides: Sequence[str]) -> str:
    with suppress(ConfigError):  # it is reported when the configuration is checked
        values = read_values(config, overrides)
        return "finetune" if "task" in values and "objective" not in values else "pretrain"
    return "pretrain"


def check_program(word: str, config: str, overrides: Sequence[str], *, world_size: int) -> Path:
    """The absolute run folder of a configuration that can run on `world_size` processes.

    Raises:
        ConfigError, ValueError: it cannot; the message names every problem.
    """
    return PROGRAMS[word](config, overrides, world_size).absolute()


def device_of(config: str, overrides: Sequence[str]) -> str:
    """`engine.device` of a configuration that may be invalid; "auto" by default."""
    with suppress(ConfigError, AttributeError):
        return (read_values(config, overrides).get("engine") or {}).get("device", "auto")
    return "auto"
