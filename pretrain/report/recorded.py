"""What the folder of a run tells about it: what is missing is left out, what is damaged is skipped and counted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.core.configlib import ConfigError, read_values
from pretrain.core.files import read_bytes
from pretrain.core.page.chart import Points, is_number, points
from pretrain.core.record import readable_lines, readable_rows
from pretrain.engine.session.film import frames
from pretrain.engine.session.folder import ALARMS, METRICS, flat

_PROGRESS = re.compile(r"^step (\d{1,15})/(\d{1,15})  ")
_SAID = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d) (.*)$")
# What a line of the log says of a step: (pattern with the step as its first group, kind of the event).
_EVENTS = (
    (re.compile(r"^resumed from .*step-(\d{1,15})$"), "resumed"),
    (re.compile(r"^rewound from step (\d{1,15}) to step \d+"), "rewound"),
    (re.compile(r"^stopped at step (\d{1,15}) "), "stopped"),
    (re.compile(r"^step (\d{1,15}): (?:loss|gradient) was not finite"), "skipped"),
    (re.compile(r"^released step (\d{1,15}) "), "released"),
)
UNTRAINED = 0  # the step of the probe of the untrained network
PROBES = ("knn/", "linear/")
PIXELS = "pixels"  # the accuracy of raw pixels, measured once


@dataclass(frozen=True)
class Event:
    """What happened at a step. kind: "alarm", or one of `_EVENTS`; text: in words."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True)
class Recorded:
    """A run as its folder tells it.

    Attributes:
        rows: of metrics.jsonl, merged by step, in order.
        config: config.yaml, keys as "optim.lr"; empty if it is missing or damaged. config_text: the same as written.
        starts: of environment.jsonl, one for each start.
        events: in order of step.
        said: the lines of log.txt that have a time.
        total_steps: of the whole run; None if the log does not say.
        pictures: by name; each (step, file) in order, or the newest alone with step None, of a run without a film.
        problems: what was skipped or could not be read, as sentences.
    """

    folder: Path
    rows: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    starts: Sequence[Mapping[str, Any]] = ()
    events: Sequence[Event] = ()
    said: Sequence[str] = ()
    total_steps: int | None = None
    pictures: Mapping[str, Sequence[tuple[int | None, Path]]] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    @cached_property
    def names(self) -> list[str]:
        """The names of all values of the rows, in order of their appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

    def points(self, name: str) -> Points:
        return points(self.rows, name)

    def last(self, name: str) -> float | None:
        values = self.points(name)
        return values[-1][1] if values else None

    def at(self, step: int, name: str) -> float | None:
        return next((value for known, value in self.points(name) if known == step), None)

    @cached_property
    def probes(self) -> list[str]:
        """Names of accuracies of frozen features: "knn/cls", ..."""
        return [name for name in self.names if name.startswith(PROBES) and not name.endswith("/" + PIXELS)]

    def number(self, key: str) -> float | None:
        """A number of the configuration."""
        value = self.config.get(key)
        return value if is_number(value) else None

    @cached_property
    def images(self) -> float | None:
        """Images seen, those of repeated epochs counted again."""
        batch = self.number("optim.global_batch_size")
        return None if batch is None else batch * self.step

    @cached_property
    def seconds(self) -> tuple[float, float]:
        """Of training, and of these spent waiting for data: from the speed that is logged. Starting, and steps that
        were computed again after a restart, are not in them.
        """
        batch, before, total, waited = self.number("optim.global_batch_size") or 0.0, 0, 0.0, 0.0
        for row in self.rows:
            speed, wait = row.get("images_per_second"), row.get("data_wait")
            if is_number(speed) and speed > 0:
                seconds = (row["step"] - before) * batch / speed
                total += seconds
                waited += seconds * (wait if is_number(wait) else 0.0)
                before = row["step"]
        return total, waited

    @property
    def ranks(self) -> int:
        """Processes of the last start."""
        size = self.starts[-1].get("world_size") if self.starts else None
        return size if isinstance(size, int) and size > 0 else 1

    @property
    def device(self) -> str:
        return str(self.starts[-1].get("device", "unknown device")) if self.starts else "unknown device"


def read_run(folder: Path) -> Recorded:
    """The run in `folder`.

    Raises:
        ConfigError: it is no folder of a pretraining run.
    """
    if not (folder / METRICS).exists() and not (folder / "config.yaml").exists():
        raise ConfigError(str(folder), [f"not a run folder: it has neither {METRICS} nor config.yaml"])
    problems: list[str] = []
    config = _config(folder, problems)
    if "task.name" in config:
        page = folder / "report" / "index.html"
        raise ConfigError(str(folder), [f"a fine-tuning run: its evaluation writes its page, {page}"])
    rows, skipped = readable_rows(folder / METRICS)
    _count(problems, METRICS, skipped)
    alarms, skipped = readable_lines(folder / ALARMS)
    _count(problems, ALARMS, skipped)
    starts, skipped = readable_lines(folder / "environment.jsonl")
    _count(problems, "environment.jsonl", skipped)
    lines = _text(folder / "log.txt").splitlines()
    said = [line for line in lines if _SAID.match(line)]
    progress = [found for line in lines if (found := _PROGRESS.match(line))]
    events = [
        *(Event(row["step"], "alarm", str(row.get("verdict", ""))) for row in alarms if type(row.get("step")) is int),
        *(event for line in said if (event := _event(line)) is not None),
    ]
    return Recorded(
        folder,
        rows=rows,
        config=config,
        config_text=_text(folder / "config.yaml"),
        starts=starts,
        events=sorted(events, key=lambda event: event.step),
        said=said,
        total_steps=int(progress[-1][2]) if progress else None,
        pictures=_pictures(folder / "pictures"),
        problems=problems,
    )


def _config(folder: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        return flat(read_values(folder / "config.yaml"))
    except ConfigError as error:
        problems.append(" ".join(str(error).split()))
        return {}


def _count(problems: list[str], name: str, skipped: int) -> None:
    if skipped:
        problems.append(f"{name}: {skipped} damaged or half-written line{'s' if skipped > 1 else ''} skipped")


def _text(path: Path) -> str:
    return read_bytes(path).decode("utf-8", "replace") if path.exists() else ""


def _event(line: str) -> Event | None:
    found = _SAID.match(line)
    assert found is not None
    for pattern, kind in _EVENTS:
        if step := pattern.match(found[2]):
            return Event(int(step[1]), kind, f"{found[2]} ({found[1]})")
    return None


def _pictures(folder: Path) -> Mapping[str, Sequence[tuple[int | None, Path]]]:
    """Those of the film; of other names the newest."""
    filmed = {path.name: list(frames(path).items()) for path in sorted((folder / "film").glob("*")) if path.is_dir()}
    newest = {path.stem: [(None, path)] for path in sorted(folder.glob("*.png"))}
    return {**newest, **{name: found for name, found in filmed.items() if found}}
