"""Damaged, missing and changing shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from launch.lab.bench import SAMPLES, SHARDS, photo, tar_of
from launch.lab.trial import Trial
from launch.lab.verdicts import SILENT, BrokenPromiseError


def _own(trial: Trial) -> tuple[Path, Path]:
    """A copy of the shards, used by `trial.config` from now on, and one of its tars."""
    folder = trial.folder / "shards"
    shutil.copytree(trial.bench.shards, folder)  # with times: an index is trusted for its shard's time
    trial.write("config.yaml", trial.bench.pretraining(folder))
    return folder, folder / f"train-{trial.rng.randrange(SHARDS):06d}.tar"


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def _verify_names(trial: Trial, folder: Path, name: str) -> None:
    trial.refused(trial.start("fovea", "data", "verify", folder, "--workers", "1"), name, statuses=(1, 2))


def bit_in_a_photo(trial: Trial) -> None:
    """One bit of the content of a photo: it is replaced and named, or the run is refused."""
    folder, shard = _own(trial)
    sample = trial.rng.randrange(SAMPLES)
    key = f"{int(shard.stem.removeprefix('train-')) * SAMPLES + sample:06d}"
    content = shard.read_bytes()
    image = photo(int(key))
    flip(shard, content.index(image) + trial.rng.randrange(len(image)), trial.rng.randrange(8))
    command = trial.start("pretrain", trial.folder / "config.yaml")
    status = command.wait()
    lists = "".join(path.read_text("utf-8") for path in trial.run_dir.glob("bad_samples*"))
    if status == 0 and key not in lists:
        raise BrokenPromiseError(f"a bit of {key} in {shard.name} flipped; the run trained on it", SILENT)
    if status not in (0, 1, 2):
        raise BrokenPromiseError(f"status {status}: {command.last}")
    _verify_names(trial, folder, shard.name)


def bit_in_a_header(trial: Trial) -> None:
    """One bit of the header of a member, which the index has replaced: `verify` names it."""
    folder, shard = _own(trial)
    flip(shard, trial.rng.randrange(136), trial.rng.randrange(8))  # its name, mode, owner and size
    command = trial.start("pretrain", trial.folder / "config.yaml")
    if (status := command.wait()) == 0:
        trial.ended_as_undisturbed()
    elif status != 2:
        raise BrokenPromiseError(f"status {status}: {command.last}")
    _verify_names(trial, folder, shard.name)


def bit_in_an_index(trial: Trial) -> None:
    """One bit of the sidecar of a shard."""
    folder, shard = _own(trial)
    sidecar = next(path for path in folder.iterdir() if shard.name in path.name and path != shard)
    flip(sidecar, trial.rng.randrange(sidecar.stat().st_size), trial.rng.randrange(8))
    trial.refused(trial.start("pretrain", trial.folder / "config.yaml"), shard.name)


def bit_in_the_catalog(trial: Trial) -> None:
    """One bit of dataset.json: refused, or without any effect."""
    folder, _ = _own(trial)
    catalog = folder / "dataset.json"
    flip(catalog, trial.rng.randrange(catalog.stat().st_size), trial.rng.randrange(8))
    command = trial.start("pretrain", trial.folder / "config.yaml")
    if command.wait() == 0:
        trial.ended_as_undisturbed()
    else:
        trial.refused(command, str(folder))


def cut(trial: Trial) -> None:
    """A shard that ends early."""
    folder, shard = _own(trial)
    content = shard.read_bytes()
    shard.write_bytes(content[: trial.rng.randrange(len(content))])
    trial.refused(trial.start("pretrain", trial.folder / "config.yaml"), shard.name)
    _verify_names(trial, folder, shard.name)


def missing(trial: Trial) -> None:
    """A shard that the index lists and the folder lacks."""
    folder, shard = _own(trial)
    shard.unlink()
    trial.refused(trial.start("pretrain", trial.folder / "config.yaml"), shard.name)
    _verify_names(trial, folder, shard.name)


def changed_in_mid_run(trial: Trial) -> None:
    """Shards that are removed or overwritten: named, or without any effect where they are still open."""
    folder, _ = _own(trial)
    command = trial.start("pretrain", trial.folder / "config.yaml", f"data.num_workers={trial.rng.randint(0, 1)}")
    trial.until(trial.reached(trial.rng.randint(1, 6)), command)
    if trial.rng.random() < 0.5:
        shutil.rmtree(folder)
    else:
        for path in folder.glob("*.tar"):
            with path.open("r+b") as file:
                file.write(trial.rng.randbytes(path.stat().st_size))
    if command.wait() != 0:
        trial.refused(command, "train-", statuses=(1, 2, 7))
    elif not any(path.stat().st_size for path in trial.run_dir.glob("bad_samples*")):
        trial.ended_as_undisturbed()


def indexed_at_once(trial: Trial) -> None:
    """Several `fovea data index` in one folder at once lose no row."""
    folder, count = trial.folder / "new", 6
    for shard in range(count):
        trial.write(f"new/train-{shard:06d}.tar", tar_of([(f"{shard:06d}.jpg", photo(shard))]))
    words = ("fovea", "data", "index", "--workers", "1")
    for command in [trial.start(*words, path) for path in sorted(folder.glob("*.tar"))]:
        trial.done(command)
    rows = json.loads((folder / "dataset.json").read_text("utf-8"))["shards"]
    if len(rows) != count:
        raise BrokenPromiseError(f"{len(rows)} of {count} shards are in dataset.json", SILENT)
