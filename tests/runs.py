"""Tiny runs of the real commands; each rank is a process of its own (launch/lab/forks.py)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from launch.lab.forks import Fork
from pretrain.core.machine.children import HOME as ROOT

SHARDS = ROOT / "samples" / "grocery"
LONG = 600.0  # seconds: more than anything takes on a busy machine; only what hangs is ended by it

CONFIG = """
run_dir: {run_dir}
objective: {objective}
model: {{name: vit_tiny, img_size: 32, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, pos_embed: {pos_embed}}}
data: {{shards: {shards}, num_workers: 0, block_shards: 2}}
optim: {{lr: 1e-3, global_batch_size: 16, total_steps: 24, warmup_steps: 4, weight_decay_end: 0.4, {optim}}}
checkpoint: {{every_steps: 4, keep: 10}}
log: {{every_steps: 1, pictures_every_steps: 12}}
"""
OBJECTIVES = {
    "mae": "{name: mae, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 2}",
    "dino": "{name: dino, out_dim: 64, head_hidden_dim: 32, head_bottleneck_dim: 16, local_crops_number: 2, "
    "local_crops_size: 16, freeze_last_layer_epochs: 0}",
}


def write_config(folder: Path, objective: str, *, name: str = "run") -> Path:
    """A configuration of 24 steps whose run folder is `folder/name`."""
    is_dino = objective == "dino"
    text = CONFIG.format(
        run_dir=folder / name,
        objective=OBJECTIVES[objective],
        pos_embed="learned" if is_dino else "sincos",
        shards=SHARDS / "train",
        optim="warmup_form: closed, clip_grad: 3.0, clip_mode: per_tensor" if is_dino else "betas: [0.9, 0.95]",
    )
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


class Run:
    """`python -m COMMAND WORD ...` on every rank of a run, with the environment that torchrun would give it."""

    def __init__(self, words: Sequence[str], *, processes: int = 1):
        self._folder = tempfile.TemporaryDirectory(prefix="run-")
        self.output = Path(self._folder.name) / "output.txt"
        self.ranks = [Fork(words, environment, self.output) for environment in rank_environments(processes)]

    @property
    def pid(self) -> int:
        return self.ranks[0].pid

    @property
    def returncode(self) -> int | None:
        """Of the first rank that failed; 0 when none did; None while a rank is running."""
        codes = [rank.returncode for rank in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    @property
    def said(self) -> str:
        """What all ranks have printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def poll(self) -> int | None:
        for rank in self.ranks:
            rank.poll()
        return self.returncode

    def wait(self, timeout: float = LONG) -> int:
        end = time.monotonic() + timeout
        try:
            codes = [rank.wait(end - time.monotonic()) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over after {timeout} s: {self.said[-4000:]}") from None
        return next((code for code in codes if code), 0)

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            rank.send_signal(number)


def rank_environments(processes: int) -> list[dict[str, str]]:
    """The environment of every rank, as torchrun sets it; without those variables where there is one process."""
    # The tests may themselves be one rank of something.
    outside = {name: value for name, value in os.environ.items() if name not in _variables(0, 1, 0)}
    outside |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if processes == 1:
        return [outside]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [outside | _variables(rank, processes, port) for rank in range(processes)]


def _variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in values.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start(config: Path, *overrides: str, processes: int = 1, command: Sequence[str] = ("pretrain",)) -> Run:
    """`python -m pretrain CONFIG key=value ...` on one rank or several."""
    return Run([*command, str(config), *overrides], processes=processes)


def finish(
    config: Path, *overrides: str, processes: int = 1, command: Sequence[str] = ("pretrain",)
) -> tuple[int, str]:
    """Run to the end: (exit status, what it said)."""
    run = start(config, *overrides, processes=processes, command=command)
    try:
        return run.wait(), run.said
    finally:
        kill_all(run)


def short(steps: int) -> list[str]:
    """Overrides that make a run of a debug configuration this short, with a checkpoint every 2 steps."""
    return [
        f"optim.total_steps={steps}", "optim.warmup_steps=2", "optim.global_batch_size=8", "data.num_workers=0",
        "checkpoint.every_steps=2", "checkpoint.keep=9", "checkpoint.release_graphs=false", "log.every_steps=1",
        "log.pictures_every_steps=0", "log.tensorboard=false",
    ]  # fmt: skip


def check_resume(config: Path, overrides: Sequence[str], folder: Path, *, steps: int) -> None:
    """A run of `steps` steps that is killed after a few and started again ends bitwise as an undisturbed one: both are
    in `folder`, as "killed" and "undisturbed"."""
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    status, said = finish(config, f"run_dir={undisturbed}", *overrides)
    assert status == 0, said
    process = start(config, f"run_dir={killed}", *overrides)
    try:
        wait_until(lambda: reached(killed) >= 3, process)
    finally:
        kill_all(process)
    assert process.returncode == -9 and not (killed / "DONE").exists(), "the run was over before it could be killed"
    status, said = finish(config, f"run_dir={killed}", *overrides)
    assert status == 0 and "resumed from" in said, said
    assert hashes(killed, steps) == hashes(undisturbed, steps)
    assert losses(killed) == losses(undisturbed)
    assert (killed / "release" / "model.safetensors").exists()


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that are still there."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def data_workers(pid: int) -> list[int]:
    """Processes of the fork server that a run started."""
    servers = [child for child in children(pid) if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return [worker for server in servers for worker in children(server)]


def kill_all(process: Run | subprocess.Popen[str]) -> None:
    """SIGKILL to every process of the run, as when a node is lost."""
    started = process.ranks if isinstance(process, Run) else [process]
    family = [part.pid for part in started if part.poll() is None]
    for pid in family:  # grows while it is walked: torchrun gives each worker a process group of its own
        family += children(pid)
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=LONG)


def wait_until(condition: Callable[[], bool], process: Run | subprocess.Popen[str], *, timeout: float = LONG) -> None:
    """Wait while the run is alive; an error if it ends before, or takes too long."""
    end = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            said = process.said if isinstance(process, Run) else process.stdout.read() if process.stdout else ""
            raise AssertionError(f"the run ended early: {said}")
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s")
        time.sleep(0.01)


def rows(run_dir: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that are whole."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reached(run_dir: Path) -> int:
    """The last step in the log."""
    return max((int(row["step"]) for row in rows(run_dir)), default=0)


def losses(run_dir: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in rows(run_dir) if "loss" in row}


def hashes(run_dir: Path, step: int) -> dict[str, str]:
    """sha256 by file of a checkpoint: weights, teacher, centre, and each rank's optimizer state."""
    manifest = json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["body"]["files"]}
