"""The log of a run: progress line, log.txt, metrics.jsonl, TensorBoard. On rank 0 only."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image
from rich.live import Live
from rich.text import Text
from torch import Tensor

from pretrain.core.files import write_text
from pretrain.core.machine.terminal import console
from pretrain.core.record import parse_row, read_rows
from pretrain.core.text import markdown, shown
from pretrain.engine.session.film import file_name
from pretrain.engine.session.folder import ALARMS, METRICS

if TYPE_CHECKING:
    from pretrain.engine.config import LogConfig


class _Board(Protocol):
    """The methods of TensorBoard's `SummaryWriter` that are used here; torch gives them no types."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None: ...

    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Writes the scalars and pictures of a run below `run_dir`.

    After a resume the rows and events after the resumed step are dropped, so each step appears once.

    Args:
        run_dir: metrics.jsonl, log.txt, pictures/ and tensorboard/ go here.
        start_step: the step the run (re)starts from.
        total_steps: for the progress line and the remaining time.
    """

    def __init__(self, run_dir: Path, *, start_step: int, total_steps: int, tensorboard: bool = True):
        self.console = console(stderr=True)
        self.total_steps = total_steps
        self._run_dir = run_dir
        self._first_shown: tuple[int, float] | None = None  # step and time; the startup before it is not counted
        damaged = [problem for name in (METRICS, ALARMS) if (problem := _keep_rows_up_to(run_dir / name, start_step))]
        self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self._text = (run_dir / "log.txt").open("a", encoding="utf-8")
        self._live: Live | None = None
        self._board: _Board | None = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        for problem in damaged:
            self.say(problem)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`; show the line when a loss is among them."""
        row = {"step": step, **values}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if "loss" in values:
            self._show(step, values)

    def rows(self) -> list[dict[str, float]]:
        """All recorded values, including earlier starts of the run: one row per step, in order."""
        return read_rows(self._run_dir / METRICS)

    def row(self, step: int) -> dict[str, float]:
        """All values recorded at `step`, including by an earlier start of the run."""
        found = next((row for row in self.rows() if row["step"] == step), dict[str, float]())
        return {name: value for name, value in found.items() if name != "step"}

    def pictures(self, step: int, images: Mapping[str, Tensor]) -> None:
        """Write uint8 [3, H, W] images to TensorBoard, and the newest of each name as a PNG in pictures/."""
        folder = self._run_dir / "pictures"
        folder.mkdir(exist_ok=True)
        for name, image in images.items():
            if self._board is not None:
                self._board.add_image(name, image, step)
            pixels = image.permute(1, 2, 0).cpu().contiguous().numpy()
            Image.fromarray(pixels).save(folder / f"{file_name(name)}.png")

    def say(self, message: str, *, style: str | None = None) -> None:
        """Print one line to the console and to log.txt; control characters, as of file names, as escapes."""
        message = shown(message)
        self.console.print(message, style=style, soft_wrap=True)
        self._text.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {message}\n")
        self._text.flush()

    def alarm(self, step: int, name: str, verdict: str) -> None:
        """Write an alarm to the console, log.txt, doctor.jsonl, and as scalar and text to TensorBoard."""
        self.say(f"step {step}: ALARM {name}: {verdict}", style="bold red")
        with (self._run_dir / ALARMS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rule": name, "verdict": verdict}) + "\n")
        if self._board is not None:
            self._board.add_scalar(f"alarm/{name}", 1.0, step)
            self._board.add_text("alarm", f"**{name}**: {markdown(verdict)}", step)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        if self._board is not None:
            self._board.close()
        self._metrics.close()
        self._text.close()

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        line = progress_line(step, self.total_steps, values, seconds_left=self._seconds_left(step))
        self._text.write(line + "\n")
        self._text.flush()
        if not self.console.is_terminal:
            print(line, file=sys.stderr, flush=True)
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        self._live.update(Text(line), refresh=True)

    def _seconds_left(self, step: int) -> float | None:
        """Estimated from the speed since the first line; None for the first line."""
        if self._first_shown is None:
            self._first_shown = (step, time.monotonic())
        first_step, first_time = self._first_shown
        if step <= first_step:
            return None
        return (time.monotonic() - first_time) / (step - first_step) * (self.total_steps - step)


def open_log(
    run_dir: Path, config: LogConfig, *, rank: int, start_step: int, total_steps: int, stack: ExitStack
) -> RunLog | None:
    """The log of a run on rank 0, closed with `stack`; None on other ranks."""
    if rank:
        return None
    log = RunLog(run_dir, start_step=start_step, total_steps=total_steps, tensorboard=config.tensorboard)
    stack.callback(log.close)
    return log


def progress_line(step: int, total_steps: int, values: Mapping[str, float], *, seconds_left: float | None) -> str:
    """`step 120/500  loss 0.8123  lr 1.2e-03  412 img/s  data 3%  left 0:04:10`."""
    parts = [f"step {step}/{total_steps}", f"loss {values['loss']:.4f}"]
    if "lr" in values:
        parts.append(f"lr {values['lr']:.2e}")
    if "images_per_second" in values:
        parts.append(f"{values['images_per_second']:.0f} img/s")
    if "data_wait" in values:
        parts.append(f"data {values['data_wait']:.0%}")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"left {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return "  ".join(parts)


def _keep_rows_up_to(path: Path, step: int) -> str | None:
    """Drop the rows of steps that will be repeated, an incomplete last line, and damaged ones; a note about these."""
    if not path.exists():
        return None
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [(line, parse_row(line)) for line in lines]
    damaged = sum(row is None for _, row in rows)
    write_text(path, "".join(f"{line}\n" for line, row in rows if row is not None and row["step"] <= step))
    return f"{path}: {damaged} damaged lines were dropped" if damaged else None
