"""Damaged checkpoints, logs and releases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from launch.lab.bench import EVERY, STEPS
from launch.lab.kinds.shards import flip
from launch.lab.trial import Command, Trial
from launch.lab.verdicts import SILENT, BrokenPromiseError

_NEWEST = STEPS - EVERY


def _interrupted(trial: Trial) -> list[Path]:
    """The undisturbed run, as if killed after `_NEWEST` steps, in `trial.run_dir`; its checkpoints, oldest first."""
    run = trial.run_dir
    shutil.copytree(trial.bench.run, run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "release", ignore_errors=True)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    _ = trial.config
    return sorted((run / "checkpoints").glob("step-*"))


def _damage(trial: Trial, folder: Path) -> Path:
    """Damage one file of a folder in one of three ways; its path."""
    path = trial.rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    size = path.stat().st_size
    ways: list[Callable[[], object]] = [
        lambda: flip(path, trial.rng.randrange(size), trial.rng.randrange(8)),
        lambda: path.write_bytes(path.read_bytes()[: trial.rng.randrange(size)]),
        path.unlink,
    ]
    trial.rng.choice(ways)()
    return path


def newest_checkpoint(trial: Trial) -> None:
    """The newest is damaged: named, the one before is used, the end is that of the undisturbed run."""
    folder = _interrupted(trial)[-1]
    _damage(trial, folder)
    command = trial.start("pretrain", trial.config)
    trial.done(command)
    if folder.name not in command.said or "damaged, not used" not in command.said:
        raise BrokenPromiseError(f"a damaged {folder.name} was used, or not named: {command.last}", SILENT)
    trial.ended_as_undisturbed()


def all_checkpoints(trial: Trial) -> None:
    """All are damaged: refused with status 3, never step 0 again."""
    folders = _interrupted(trial)
    for folder in folders:
        _damage(trial, folder)
    trial.refused(trial.start("pretrain", trial.config), *(folder.name for folder in folders), statuses=(3,))


def renamed_checkpoint(trial: Trial) -> None:
    """A checkpoint under the name of another step is not used."""
    folder = trial.rng.choice(_interrupted(trial))
    other = folder.with_name(f"step-{trial.rng.choice((2, 5, 7, 10, 11)):08d}")
    folder.rename(other) if trial.rng.random() < 0.5 else shutil.copytree(folder, other)
    command = trial.start("pretrain", trial.config)
    if command.wait() == 0:
        trial.ended_as_undisturbed()
    else:
        trial.refused(command, other.name, statuses=(2, 3))


def lost_checkpoints(trial: Trial) -> None:
    """No checkpoint, but a log: refused, and the log is kept."""
    _interrupted(trial)
    log = (trial.run_dir / "metrics.jsonl").read_bytes()
    shutil.rmtree(trial.run_dir / "checkpoints")
    if trial.rng.random() < 0.5:
        (trial.run_dir / "checkpoints").mkdir()
    trial.refused(trial.start("pretrain", trial.config), "checkpoints", statuses=(2, 3))
    if (trial.run_dir / "metrics.jsonl").read_bytes() != log:
        raise BrokenPromiseError("metrics.jsonl was cut", SILENT)


def damaged_log(trial: Trial) -> None:
    """Lines of metrics.jsonl that are no JSON are dropped and counted; every step stands in it once at the end."""
    _interrupted(trial)
    log = trial.run_dir / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    junk = trial.rng.choice((b"\x00\xff\n", b"[1]\n", b"null\n", b'{"step": \n', b"\x1b[31m{}\n"))
    lines.insert(trial.rng.randrange(len(lines)), junk)
    log.write_bytes(b"".join(lines))
    command = trial.start("pretrain", trial.config)
    trial.done(command)
    if "metrics.jsonl" not in command.said:
        raise BrokenPromiseError(f"a damaged metrics.jsonl is not named: {command.last}", SILENT)
    trial.ended_as_undisturbed()


def damaged_release(trial: Trial) -> None:
    """One bit, a cut or a missing file of a release: named by `verify`, refused by a run and by its check."""
    folder = _release(trial)
    manifest = json.loads((folder / "MANIFEST.json").read_text("utf-8"))["body"]
    for path in folder.iterdir():  # a person may edit the others
        if path.is_file() and path.name not in ("MANIFEST.json", *(file["name"] for file in manifest["files"])):
            path.unlink()
    damaged = _damage(trial, folder)
    trial.refused(trial.start("fovea", "release", "verify", folder), damaged.name, statuses=(1, 2))
    config = trial.write("finetune.yaml", trial.bench.finetuning(folder))
    trial.refused(trial.start("finetune", config, "--check"), str(folder))
    trial.refused(_from_release(trial, folder), str(folder))


def nan_release(trial: Trial) -> None:
    """A release with a NaN weight and a manifest that fits: refused."""
    import torch
    from safetensors.torch import load_file, save_file

    from pretrain.models.release.manifest import files_to_seal, write_manifest

    folder = _release(trial)
    path = folder / "model.safetensors"
    weights = load_file(path)
    tensor = weights[trial.rng.choice(sorted(weights))]
    value = trial.rng.choice((float("nan"), float("inf"), -float("inf")))
    tensor.view(-1)[trial.rng.randrange(tensor.numel())] = torch.tensor(value)
    save_file(weights, path)
    write_manifest(folder, files_to_seal(folder))
    trial.refused(_from_release(trial, folder), "NaN")


def _release(trial: Trial) -> Path:
    return Path(shutil.copytree(trial.bench.release, trial.folder / "release"))


def _from_release(trial: Trial, folder: Path) -> Command:
    return trial.start("pretrain", trial.config, f"init.release={folder}", "init.fresh_heads=true")
