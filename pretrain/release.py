"""`fovea release RUN OUT`: the backbone of a run's newest checkpoint, as a folder that timm loads.

    fovea release RUN OUT          write the release; one in OUT is replaced
    fovea release RUN OUT --prune 0.02     without the branches of general blocks whose mean p |g| is below 0.02
    fovea release verify FOLDER... compare releases of backbones and tasks, and exports, with their manifests
    fovea release seal FOLDER...   write the manifest of the files as they are: after your change, or for version 0.1.0

A run folder whose name is one of these words is given as ./verify or ./seal.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, validate
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.manifest import MANIFEST
from pretrain.core.record import read_rows
from pretrain.datasets import open_data
from pretrain.engine.checkpoint.commit import CheckpointError, newest_complete, read_manifest
from pretrain.engine.session.folder import last_start, read_data, run_values
from pretrain.models.release.manifest import (
    RECORD,
    DamagedReleaseError,
    NotFiniteError,
    compare,
    files_to_seal,
    write_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor

_BOUND, _IMAGES = 0.05, 64


@dataclass(frozen=True)
class Prune:
    """What to drop, and what that may cost.

    Attributes:
        threshold: branches whose mean p |g| is below it are dropped.
        bound: largest change of the tokens of an image, as a part of their norm.
        shards: of the images it is measured on; None: those of the run. images: how many.
    """

    threshold: float
    bound: float
    shards: str | None
    images: int


def from_run(run_dir: Path, out: Path, prune: Prune | None = None) -> str:
    """Write the release of the newest complete checkpoint of `run_dir` into `out`; return a report.

    Raises:
        ConfigError: `run_dir` is not a run folder. CheckpointError: no complete checkpoint.
        ValueError: `out` contains other files, or pruning changes the features by too much.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(str(run_dir), ["not a run folder: it has no config.yaml"])
    config = validate(PretrainConfig, run_values(run_dir), source=str(run_dir / "config.yaml"))
    data, start = read_data(run_dir), last_start(run_dir)
    checkpoint = newest_complete(run_dir / "checkpoints")
    from safetensors.torch import load_file

    from pretrain.models.release.folder import write_release
    from pretrain.objectives.base import Horizon
    from pretrain.start import build_objective

    steps = plan(config, num_samples=data["num_samples"], world_size=1)
    objective = build_objective(config, Horizon(steps.total_steps, steps.steps_per_epoch))
    objective.load_state_dict(load_file(checkpoint / "model.safetensors"))
    step = read_manifest(checkpoint).step
    record = {
        "recipe": config.model_dump(mode="json"),
        "orientation": config.data.orientation,
        "range": config.data.range,
        "channels": config.data.channels,
        "data": {"fingerprint": data["fingerprint"], "images": data["num_samples"]},
        "metrics": {"step": step, **_last_metrics(run_dir / "metrics.jsonl", step, config)},
        "commit": start["commit"],
        "versions": start["versions"],
    }
    backbone, heads, lines = objective.backbone, objective.heads_state(), []
    if prune is not None:
        from pretrain.models.release.pruned import pruned, pruning_report

        images = _images(config, prune)
        copies = objective.backbone_prefixes[1:]
        backbone, heads, facts = pruned(
            backbone, heads, images, copies=copies, threshold=prune.threshold, bound=prune.bound
        )
        record["pruned"], lines = facts, [pruning_report(facts)]
    write_release(
        out,
        backbone,
        objective=config.objective.name,
        extra_state=heads,
        record=record,
        mean=config.mean,
        std=config.std,
        graphs=config.checkpoint.release_graphs,
    )
    opened = f"timm.create_model('local-dir:{out}', pretrained=True)"
    if not (out / "config.json").is_file():
        opened = f"pretrain.models.release.folder.read_release('{out}').build()"
    return "\n".join([*lines, f"released step {step} as {out}: {opened}{_graphs(out)}"])


def _graphs(folder: Path) -> str:
    """The graphs of a release that timm cannot open, and what is lacking; "" for others."""
    graphs = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("graphs")
    if graphs is None:
        return ""
    lacking = (f"no {name} ({reason})" for name, reason in graphs["lacking"].items())
    return "".join(f"; {part}" for part in (*graphs["files"], *lacking))


def _images(config: PretrainConfig, prune: Prune) -> Tensor:
    """Evenly spaced images [n, C, H, W] of the given shards, or of those of the run, normalized."""
    import torch

    from pretrain.data.loader.eval_images import EvalImages
    from pretrain.data.shards.dataset import Dataset

    found = EvalImages(
        Dataset.open(prune.shards) if prune.shards else open_data(config.data),
        config.model.size,
        in_chans=config.model.in_chans,
        mean=config.mean,
        std=config.std,
        batch_size=prune.images,
        orientation=config.data.orientation,
        value_range=config.data.range,
        max_samples=prune.images,
        labelled=False,
    )
    return torch.cat([images for images, _ in found])


def _last_metrics(path: Path, step: int, config: PretrainConfig) -> dict[str, float]:
    """The last measured accuracies of the online probe up to `step`, by the name of their protocol."""
    if config.probe is None:
        return {}
    protocols = {
        "knn": f"{config.probe.k}-NN top-1, cosine, T={config.probe.temperature}, {config.probe.val_shards}",
        "linear": f"linear top-1, logistic regression, L2 chosen on a fifth of train, {config.probe.val_shards}",
    }
    scores: dict[str, float] = {}
    for row in read_rows(path):
        for name, value in row.items() if row["step"] <= step else ():
            probe, _, kind = name.partition("/")
            if probe in protocols and kind != "pixels":
                scores[f"{kind} {protocols[probe]}"] = value
    return scores


def verify(folder: Path) -> str:
    """Compare a release or an export with its manifest, and check that its weights are finite; a one-line report.

    Raises:
        DamagedReleaseError, NotFiniteError: it cannot be used. ValueError: it is none, or has no manifest.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not any((folder / name).is_file() for name in (MANIFEST, RECORD)):
        raise ValueError(f"{folder}: neither a release nor an export: it has no {MANIFEST} and no {RECORD}")
    files = compare(folder)
    if files is None:
        raise ValueError(f"{folder}: not compared: written without hashes; `fovea release seal {folder}` adds them")
    _check_weights(folder, [file.name for file in files])
    size = sum(file.size for file in files) / 1e6
    return f"{folder}: {len(files)} files, {size:.1f} MB, as they were written"


def seal(folder: Path) -> str:
    """Write the manifest of a release as it is; a one-line report.

    Raises:
        NotFiniteError: its weights cannot be used. ValueError: it is no release.
    """
    files = files_to_seal(folder)
    _check_weights(folder, files)
    write_manifest(folder, files)
    return f"{folder}: {MANIFEST} lists {', '.join(files)}"


def _check_weights(folder: Path, files: Iterable[str]) -> None:
    from pretrain.models.importers.files import read_safetensors
    from pretrain.models.release.folder import check_finite

    for name in files:
        if name.endswith(".safetensors"):
            check_finite(folder, read_safetensors(folder / name))


def _prune(chosen: argparse.Namespace) -> Prune | None:
    given = (chosen.prune_bound, chosen.prune_images, chosen.prune_shards)
    if chosen.prune is None:
        if given != (_BOUND, _IMAGES, None):
            raise ValueError("--prune-bound, --prune-images and --prune-shards: nothing is pruned without --prune 0.02")
        return None
    if not chosen.prune > 0 or not chosen.prune_bound >= 0 or chosen.prune_images < 1:
        raise ValueError("--prune and --prune-images must be above 0, --prune-bound 0 or more")
    return Prune(chosen.prune, chosen.prune_bound, chosen.prune_shards, chosen.prune_images)


WORDS: dict[str, Callable[[Path], str]] = {"verify": verify, "seal": seal}


def _each(word: str, arguments: list[str]) -> int:
    """One line per folder. Exit status 1: a folder is damaged; else 2: a folder is no release, or has no manifest."""
    parser = argparse.ArgumentParser(prog=f"fovea release {word}", description=WORDS[word].__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a release, or an export")
    status = 0
    for folder in parser.parse_args(arguments).folders:
        try:
            print(WORDS[word](folder))
        except ValueError as error:
            print(error, file=sys.stderr)
            damaged = isinstance(error, DamagedReleaseError | NotFiniteError)
            status = 1 if damaged or status == 1 else 2
    return status


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: written, or as written. 1: damaged. 2: wrong folder. 3: no complete checkpoint."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in WORDS:
        return _each(arguments[0], arguments[1:])
    parser = argparse.ArgumentParser(
        prog="fovea release", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("out", type=Path, help="the folder to write; a release in it is replaced")
    parser.add_argument("--prune", type=float, metavar="USE", help="drop branches whose mean p |g| is below it")
    parser.add_argument(
        "--prune-bound",
        type=float,
        default=_BOUND,
        help=f"largest change of an image's tokens, as a part of their norm (default {_BOUND})",
    )
    parser.add_argument("--prune-shards", help="of the images it is measured on (default: those of the run)")
    parser.add_argument("--prune-images", type=int, default=_IMAGES, help=f"how many (default {_IMAGES})")
    chosen = parser.parse_args(arguments)
    try:
        print(from_run(chosen.run, chosen.out, _prune(chosen)))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 3
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command("fovea release", main))
