"""A non-finite step, written down so that it can be computed again: RUN/captures/step-N/

capture.json says what was not finite, in which micro-batches, which samples they held, and which of them are to blame;
model.safetensors holds the parameters and buffers of that moment. `fovea replay` reads both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.core.configlib import Precision
from pretrain.core.files import new_folder, publish_folder, write_json

FILE = "capture.json"
FORMAT = 1
MOST_WEIGHTS = 8  # captures of a run that hold weights: a sample that breaks every epoch must not fill the disk


@dataclass(frozen=True)
class Part:
    """One micro-batch of the step.

    Attributes:
        samples: "shard/key" of each position. culprits: positions that break it by themselves.
    """

    rank: int
    micro_batch: int
    loss_finite: bool
    positions: tuple[int, ...]
    samples: tuple[str, ...]
    culprits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Capture:
    """A step whose loss or gradient was not finite.

    Attributes:
        step: completed steps before it; the log counts it as step + 1.
        first_bad: the first loss that was not finite, or the first parameter with such a gradient.
        losses: means over ranks and micro-batches; None where not finite.
        config_sha256, fingerprint: of the run's config.yaml and data.
        checkpoint: the newest one at or before the step, {"folder", "step"}; None before the first.
        weights: the file that holds the model at that moment, and its size; None when it was not to be written.
        passed_over: candidates not taken by position, as the run had it then.
    """

    step: int
    seed: int
    world_size: int
    micro_batch: int
    accumulation_steps: int
    precision: Precision
    loss_scale: float
    first_bad: str
    losses: Mapping[str, float | None]
    parts: Sequence[Part]
    config_sha256: str
    fingerprint: str
    checkpoint: Mapping[str, Any] | None
    weights: str | None
    weights_bytes: int
    passed_over: Mapping[int, int] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def suspects(self) -> list[Part]:
        """Micro-batches that may be broken: those with a loss that is not finite; all of them when none is."""
        return [part for part in self.parts if not part.loss_finite] or list(self.parts)

    @property
    def culprits(self) -> tuple[int, ...]:
        """Positions to pass over: those found, else all of the suspects."""
        found = sorted(position for part in self.parts for position in part.culprits)
        return tuple(found or sorted(position for part in self.suspects for position in part.positions))


def folder_of(run_dir: Path, step: int, rewinds: int) -> Path:
    """Where the capture of a step is put; a step that is taken again after a rewind has another one."""
    return run_dir / "captures" / (f"step-{step + 1:08d}" + (f"-rewind-{rewinds}" if rewinds else ""))


def may_hold_weights(run_dir: Path) -> bool:
    """Whether the run has fewer than MOST_WEIGHTS captures with weights."""
    return len(list((run_dir / "captures").glob("step-*/*.safetensors"))) < MOST_WEIGHTS


def begin(folder: Path) -> Path:
    """A new folder to write the capture `folder` into."""
    return new_folder(folder, token="new")


def seal(temporary: Path, folder: Path, capture: Capture) -> None:
    """Write capture.json and give the folder its name; an older capture of the same step is replaced."""
    write_json(temporary / FILE, asdict(capture), indent=1)
    publish_folder(temporary, folder)


def read(folder: Path) -> Capture:
    """Raises ValueError when `folder` holds no capture that this version reads."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = sorted(str(path) for path in (folder / "captures").glob("step-*"))
        hint = f"; those of this run: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder}: no capture there ({FILE}: {error}){hint}") from None
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder}: capture format {values.get('format')}, this program reads {FORMAT}")
    parts = [
        Part(**{**part, **{key: tuple(part[key]) for key in ("positions", "samples", "culprits")}})
        for part in values["parts"]
    ]
    passed_over = {int(position): skipped for position, skipped in values["passed_over"].items()}
    return Capture(**{**values, "parts": parts, "passed_over": passed_over})
