"""Captures a non-finite step so that it can be recomputed: RUN/captures/step-N/

capture.json records which values were not finite, the micro-batches, their samples, and the culprits among these;
model.safetensors contains the parameters and buffers at that step. `fovea replay` reads both.
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
MOST_WEIGHTS = 8  # captures with weights per run: a sample that fails in every epoch must not fill the disk


@dataclass(frozen=True)
class Part:
    """One micro-batch of the step.

    Attributes:
        samples: "shard/key" of each position. culprits: positions that alone make it non-finite.
    """

    rank: int
    micro_batch: int
    loss_finite: bool
    positions: tuple[int, ...]
    samples: tuple[str, ...]
    culprits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Capture:
    """A step with a non-finite loss or gradient.

    Attributes:
        step: completed steps before it; the log counts it as step + 1.
        first_bad: the first non-finite loss, or the first parameter with a non-finite gradient.
        losses: means over ranks and micro-batches; None where not finite.
        config_sha256, fingerprint: of the run's config.yaml and data.
        checkpoint: the newest one at or before the step, {"folder", "step"}; None before the first.
        weights: file with the model at that step, and its size; None if it was not written.
        passed_over: number of skipped candidates by position at that step.
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
        """Micro-batches that may be the cause: those with a non-finite loss; all of them if there is none."""
        return [part for part in self.parts if not part.loss_finite] or list(self.parts)

    @property
    def culprits(self) -> tuple[int, ...]:
        """Positions to skip: the culprits found, else all positions of the suspects."""
        found = sorted(position for part in self.parts for position in part.culprits)
        return tuple(found or sorted(position for part in self.suspects for position in part.positions))


def folder_of(run_dir: Path, step: int, rewinds: int) -> Path:
    """Folder of the capture of a step; a step that is repeated after a rewind has another folder."""
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
    """Read a capture. Raises ValueError if `folder` contains none that this version supports."""
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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
