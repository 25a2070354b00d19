"""`fovea probe RELEASE --train SHARDS --val SHARDS`: frozen features, next to an untrained network and raw pixels.

`fovea probe --features TRAIN VAL` scores what `fovea embed` has stored, without a network.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.probes.features import BOTH, Features, pixel_features
from pretrain.probes.protocol import ProbeRequest, Score, probe, scores, standard_error
from pretrain.probes.stored import read_features
from pretrain.probes.subject import Subject, open_official, open_release

TITLES = {
    "cls": "[CLS]",
    "patch_mean": "mean patch",
    BOTH: "[CLS] + mean patch",
    "pooled": "pooled",
    "tokens": "tokens",
}


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: measured. 2: a wrong release, checkpoint or data set."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if [chosen.release, chosen.official, chosen.features].count(None) != 2:
        parser.error("give a release folder, --official FILE or --features TRAIN VAL")
    if chosen.features is None and not (chosen.train and chosen.val):
        parser.error("--train and --val name the labelled shards")
    try:
        report = measure_stored(chosen) if chosen.features else measure(_subject(chosen), chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if chosen.json else table(report))
    return 0


def _subject(chosen: argparse.Namespace) -> Subject:
    def size(own: tuple[int, int], patch: int | None) -> tuple[int, int]:
        """--img-size, or the part of the network's size that --resize leaves, in complete patches."""
        if chosen.img_size is not None:
            return chosen.img_size, chosen.img_size
        if chosen.resize is None:
            return own
        side = max(chosen.resize // (patch or 1), 1) * (patch or 1)
        return min(own[0], side), min(own[1], side)

    if chosen.release:
        if chosen.prefix is not None or chosen.grid is not None:
            raise ValueError("--prefix and --grid are for --official; a release records its own")
        return open_release(chosen.release, size)
    return open_official(chosen.official, size, prefix=chosen.prefix, grid=chosen.grid and tuple(chosen.grid))


def measure(subject: Subject, chosen: argparse.Namespace) -> dict[str, Any]:
    """The report, as it is written with --json."""
    device = torch.device(chosen.device)
    how = {"resize": chosen.resize, "batch_size": chosen.batch_size}
    how |= {"max_samples": chosen.max_images, "num_workers": chosen.workers}
    train, val = (subject.images(shards, **how) for shards in (chosen.train, chosen.val))
    asked = _asked(chosen)

    def scored(features: Callable[[Tensor], Features]) -> tuple[dict[str, Any], int]:
        found, count = probe(train, val, features, device=device, asked=asked)
        return {kind: _row(score, count) for kind, score in found.items()}, count

    trained, queries = scored(subject.network.to(device))
    untrained, _ = scored(subject.untrained(chosen.seed).to(device))
    pixels, _ = scored(pixel_features)
    height, width = subject.size
    resize = chosen.resize or round(max(subject.size) * 256 / 224)
    return {
        "of": subject.title,
        "train": " ".join(chosen.train),
        "val": " ".join(chosen.val),
        "queries": queries,
        "protocol": [
            f"images: shorter side {resize} px, central {height} x {width} px",
            *([f"clips: {subject.frames} frames, every {subject.stride}, of the middle"] if subject.frames else []),
            *subject.lines,
            *asked.in_words(),
        ],
        "seed_of_untrained": chosen.seed,
        "trained": trained,
        "untrained": untrained,
        "pixels": pixels["pixels"],
    }


def measure_stored(chosen: argparse.Namespace) -> dict[str, Any]:
    """The report of stored features.

    Raises:
        ValueError: the folders hold none, or features of different weights or preparation, or have no labels.
    """
    train, val = (read_features(folder) for folder in chosen.features)
    if train.about["identity"] != val.about["identity"]:
        raise ValueError("--features: the two folders are of different weights or settings; embed both with the same")
    sides = []
    for folder, side in zip(chosen.features, (train, val), strict=True):
        if side.labels is None:
            raise ValueError(f"{folder}: its shards had no labels; write them with labels and embed them again")
        sides.append(({name: values for name, values in side.features.items() if values.ndim == 2}, side.labels))
    asked = _asked(chosen)
    found = scores(*sides, device=torch.device(chosen.device), asked=asked)
    (height, width), resize = train.about["request"]["size"], train.about["request"]["resize"]
    return {
        "of": train.about["title"],
        "train": str(chosen.features[0]),
        "val": str(chosen.features[1]),
        "queries": len(val.keys),
        "protocol": [
            f"images: shorter side {resize} px, central {height} x {width} px; stored as "
            f"{train.about['request']['numbers']}",
            *asked.in_words(),
        ],
        "trained": {kind: _row(score, len(val.keys)) for kind, score in found.items()},
    }


def _asked(chosen: argparse.Namespace) -> ProbeRequest:
    return ProbeRequest(
        tuple(chosen.k),
        chosen.temperature,
        linear=not chosen.no_linear,
        fraction=chosen.fraction,
        per_class=chosen.per_class,
        subset_seed=chosen.subset_seed,
    )


def table(report: dict[str, Any]) -> str:
    """The report as a text table: percent, with the 95 % interval of the sample of queries."""
    rows = [(TITLES[kind], row) for kind, row in report["trained"].items()]
    rows += [
        (f"untrained (seed {report['seed_of_untrained']}), {TITLES[kind]}", row)
        for kind, row in report.get("untrained", {}).items()
    ]
    rows += [("raw pixels", report["pixels"])] if "pixels" in report else []
    width = max(len(title) for title, _ in rows)
    lines = [f"{report['of']}: train {report['train']}, val {report['val']} ({report['queries']} images)"]
    lines += [f"  {line}" for line in report["protocol"]]
    ks = list(rows[0][1]["knn_by_k"])
    lines.append(f"{'':{width}}  " + "  ".join(f"{head:>17}" for head in [*(f"{k}-NN" for k in ks), "linear"]))
    for title, row in rows:
        cells = [*map(_percent, row["knn_by_k"].values()), _percent(row["linear"]) if "linear" in row else "-"]
        penalty = f"  L2 {row['linear']['penalty']:g}" if "linear" in row else ""
        lines.append(f"{title:{width}}  " + "  ".join(f"{cell:>17}" for cell in cells) + penalty)
    return "\n".join(lines)


def _row(score: Score, count: int) -> dict[str, Any]:
    """`knn` is of the first k."""
    by_k = {str(k): _with_error(accuracy, count) for k, accuracy in score.knn.items()}
    row: dict[str, Any] = {"knn": next(iter(by_k.values())), "knn_by_k": by_k}
    if score.linear is not None:
        chosen = {"penalty": score.linear.penalty, "held_out": score.linear.held_out}
        row["linear"] = _with_error(score.linear.accuracy, count) | chosen
    return row


def _with_error(accuracy: float, count: int) -> dict[str, Any]:
    from scipy.stats import binomtest  # slow to import

    # Wilson's holds at 0 and 1 too, where the standard error is 0.
    low, high = binomtest(round(accuracy * count), count).proportion_ci(method="wilson")
    error = standard_error(accuracy, count)
    return {"accuracy": accuracy, "standard_error": error, "interval_95": [float(low), float(high)]}


def _percent(cell: dict[str, Any]) -> str:
    low, high = cell["interval_95"]
    return f"{100 * cell['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea probe", description=__doc__)
    parser.add_argument("release", type=Path, nargs="?", help="a folder written by `fovea release`")
    parser.add_argument("--official", type=Path, metavar="FILE", help="instead: an official or timm checkpoint")
    parser.add_argument("--prefix", help="of --official: prefix of the names to read, where several networks are in it")
    parser.add_argument(
        "--grid", type=_positive, nargs=2, metavar=("ROWS", "COLUMNS"), help="of its positions, if not square"
    )
    parser.add_argument(
        "--features", type=Path, nargs=2, metavar=("TRAIN", "VAL"), help="instead: two folders of `fovea embed`"
    )
    parser.add_argument("--train", nargs="+", metavar="SHARDS", help="labelled shards to learn from")
    parser.add_argument("--val", nargs="+", metavar="SHARDS", help="labelled shards to classify")
    parser.add_argument("--k", type=_positive, nargs="+", default=[20], help="neighbours (default 20; DINO: 10 20 100)")
    parser.add_argument("--temperature", type=_above_0, default=0.07, help="of the neighbours' votes (default 0.07)")
    parser.add_argument("--no-linear", action="store_true", help="neighbours only")
    parser.add_argument("--seed", type=int, default=0, help="of the untrained network (default 0)")
    parser.add_argument("--resize", type=_positive, help="shorter side before the centre crop; default: 256/224 of it")
    parser.add_argument("--img-size", type=_positive, help="side of the crop; default: the network's, or --resize")
    parser.add_argument("--max-images", type=_positive, help="per side, evenly spaced; default: all")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--per-class", type=_positive, metavar="N", help="learn from N train images of each class")
    part.add_argument("--fraction", type=float, metavar="F", help="learn from this part of each class (0.01, 0.1)")
    parser.add_argument("--subset-seed", type=int, default=0, help="chooses them (default 0)")
    parser.add_argument("--batch-size", type=_positive, default=256)
    parser.add_argument("--workers", type=int, default=0, help="reading processes (default 0)")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not available: {str(error).splitlines()[0]}") from None
    return text


if __name__ == "__main__":
    sys.exit(run_command("fovea probe", main))
