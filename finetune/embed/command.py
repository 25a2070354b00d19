"""`fovea embed MODEL SHARDS... --out DIR`: features of every image of a data set, a file for each shard.

The order is that of the shards. What is finished stays: the same command continues, and started as several processes
(torchrun, srun, mpirun) each takes its share of the shards; the files are the same bytes for any number of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.locate import locate
from finetune.tasks.opened import OpenedBackbone
from finetune.weights import open_source
from pretrain.core.machine.device import find_device
from pretrain.core.machine.terminal import safe_output
from pretrain.core.ranks import read_launch
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.exclusion import TAR
from pretrain.data.shards.reader import Reader
from pretrain.data.views.decode import LABEL_EXTENSION
from pretrain.models.backbones.contract import Backbone
from pretrain.probes.features import Features, backbone_features
from pretrain.probes.stored import SUFFIX, Numbers, is_written, seal, write_features

PATCHES = "patches."


@dataclass(frozen=True)
class Request:
    """What is stored of each image, and how it is prepared.

    size          (h, w) in pixels of the central part, cut after the shorter side was resized to
    resize        that many pixels
    blocks        patch tokens before any norm after these blocks, counted from 1, as "patches.BLOCK" [n, N, D]
    batch_size    images that the network reads at once; the last batch of a shard is smaller
    """

    size: tuple[int, int]
    resize: int
    blocks: tuple[int, ...]
    numbers: Numbers
    batch_size: int


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: all features, or this process's share, are written. 2: a wrong model, data set or folder."""
    chosen = _parser().parse_args(arguments)
    try:
        options = {"timm": chosen.timm, "img_size": chosen.img_size}
        opened = open_source(locate(chosen.model, **options))
        size = opened.backbone.img_size
        resize = chosen.resize or round(max(size) * 256 / 224)
        asked = Request(size, resize, tuple(sorted(set(chosen.blocks))), chosen.numbers, chosen.batch_size)
        launch = read_launch(os.environ)
        share = (launch.rank, launch.world_size) if launch else (0, 1)
        device = find_device(chosen.device)
        dataset = Dataset.open(chosen.shards)
        origin = {"model": str(chosen.model.absolute()), "options": options}
        done, skipped = embed(
            opened, dataset, chosen.out, asked, origin, device=device, workers=chosen.workers, share=share
        )
    except ValueError as error:
        print(f"fovea embed: {error}", file=sys.stderr)
        return 2
    bad = f", {skipped} could not be used and are left out" if skipped else ""
    print(f"{done} images{bad}: {chosen.out}")
    return 0


def embed(
    opened: OpenedBackbone,
    dataset: Dataset,
    out: Path,
    asked: Request,
    origin: dict[str, Any],
    *,
    device: torch.device,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tuple[int, int]:
    """Write what is missing of the features; the process that finds all files written seals the folder.

    Args:
        origin: where the model is from, for the manifest.
        share: (rank, number of processes): rank r takes the shards r, r + number, ...

    Returns:
        The numbers of images embedded and skipped in this call.

    Raises:
        ValueError: two shards of one name, a block that the backbone has not, or `out` holds other features.
    """
    name, count = Counter(dataset.names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} shards are named {name}: their features would be one file; embed them apart")
    network = opened.backbone.requires_grad_(False).eval()
    _check_blocks(network, asked.blocks)
    out.mkdir(parents=True, exist_ok=True)
    numbers_of = identity(opened, asked)
    files = [out / f"{name.removesuffix(TAR)}{SUFFIX}" for name in dataset.names]
    sources = [f"{numbers_of} of {row.sha256}" for row in dataset.rows]
    missing: list[int] = []
    for shard, file in enumerate(files):
        was_there = file.exists()  # asked first: another process may write it now
        if is_written(file, sources[shard]):
            continue
        if was_there:
            raise ValueError(f"{file}: features of other weights, settings or shards, or damaged; choose another --out")
        missing.append(shard)
    network.to(device)
    images = skipped = 0
    rank, processes = share
    for shard in missing:
        if shard % processes != rank:
            continue
        one = _Shard.of(dataset.only(shard), opened, asked, device, workers)
        write_features(
            files[shard],
            one.features,
            keys=one.keys,
            labels=one.labels,
            skipped=one.skipped,
            numbers=asked.numbers,
            source=sources[shard],
        )
        images, skipped = images + len(one.keys), skipped + len(one.skipped)
        print(f"{dataset.names[shard]}: {len(one.keys)} images", file=sys.stderr, flush=True)
    if all(is_written(files[shard], sources[shard]) for shard in missing):
        about = {**origin, "title": opened.title, "identity": numbers_of, "request": vars(asked)}
        about |= {"reading": reading(opened), "shards": [str(Path(path).absolute()) for path in dataset.paths]}
        seal(out, [file.name for file in files], about)
    return images, skipped


def reading(opened: OpenedBackbone) -> dict[str, Any]:
    """How a backbone reads photos: arguments of `EvalImages`."""
    facts = {"in_chans": opened.backbone.in_chans, "mean": opened.mean, "std": opened.std}
    return facts | {"orientation": opened.orientation, "value_range": opened.value_range}


@torch.no_grad()
def features_of(network: Backbone, images: Tensor, blocks: Sequence[int]) -> Features:
    """Of normalized images [b, C, h, w]: `backbone_features`, and the patch tokens after some blocks."""
    found = {name: values.cpu() for name, values in backbone_features(network, images).items()}
    if blocks:
        layers = network.layers(images, [block - 1 for block in blocks])
        for block, tokens in zip(blocks, layers, strict=True):
            found[f"{PATCHES}{block}"] = tokens[:, network.num_prefix_tokens :].float().cpu()
    return found


@dataclass(frozen=True)
class _Shard:
    features: Features
    keys: list[str]
    labels: Tensor | None
    skipped: list[tuple[str, str]]

    @staticmethod
    def of(dataset: Dataset, opened: OpenedBackbone, asked: Request, device: torch.device, workers: int) -> _Shard:
        labelled = LABEL_EXTENSION in dataset.extensions
        images = EvalImages(
            dataset,
            asked.size,
            batch_size=asked.batch_size,
            resize=asked.resize,
            labelled=labelled,
            num_workers=workers,
            **reading(opened),
        )
        parts: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []
        for batch, truth in images:
            labels.append(truth)
            for name, values in features_of(opened.backbone, batch.to(device), asked.blocks).items():
                parts.setdefault(name, []).append(values)
        reader = Reader(dataset)
        bad = {key: reason for _, key, reason in images.bad}
        keys = [key for key in (reader.key(0, sample) for sample in range(dataset.num_samples)) if key not in bad]
        reader.close()
        if len(keys) != sum(map(len, labels)):
            raise ValueError(f"{dataset.paths[0]}: two samples have one key; `fovea data verify` names them")
        if not keys:
            raise ValueError(f"{dataset.paths[0]}: no usable image; the first: {next(iter(bad.values()))}")
        joined = {name: torch.cat(rows) for name, rows in parts.items()}
        return _Shard(joined, keys, torch.cat(labels) if labelled else None, list(bad.items()))


def _check_blocks(network: Backbone, blocks: Sequence[int]) -> None:
    if not blocks:
        return
    if "layers" not in network.provides:
        raise ValueError(f"--blocks: {network.title} does not give the tokens of its blocks")
    if blocks[-1] > network.depth or blocks[0] < 1:
        raise ValueError(f"--blocks: this backbone has the blocks 1 to {network.depth}, got {list(blocks)}")


def identity(opened: OpenedBackbone, asked: Request) -> str:
    """sha256 of the weights and of everything that decides the numbers."""
    digest = hashlib.sha256(json.dumps([vars(asked), reading(opened)], sort_keys=True).encode())
    for name, tensor in sorted(opened.backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea embed", description=__doc__)
    parser.add_argument("model", type=Path, help="a release, a run that has one, or weights of docs/weights.md")
    parser.add_argument("shards", nargs="+", help="indexed shards: a folder, a glob or a list")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of the features")
    parser.add_argument("--timm", metavar="NAME", help="the timm model whose weights MODEL holds")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[], metavar="N", help="patch tokens after these blocks"
    )
    parser.add_argument("--numbers", choices=("fp32", "fp16", "int8"), default="fp32", help="default fp32")
    parser.add_argument("--resize", type=int, help="shorter side before the centre crop; default: 256/224 of it")
    parser.add_argument("--img-size", type=int, help="side of the crop; default: the network's")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="reading processes (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser
