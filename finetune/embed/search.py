"""`fovea search FEATURES IMAGE...`: the nearest images of a data set, by cosine of features that `fovea embed` stored.

Prints key and cosine of each, and writes a contact sheet: a line for each image, the nearest ones beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.embed.command import PATCHES, Request, features_of, identity
from finetune.locate import locate
from finetune.weights import open_source
from pretrain.core.images import ValueRange
from pretrain.core.machine.device import find_device
from pretrain.core.machine.terminal import safe_output
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.reader import Reader
from pretrain.data.sheet import Cell, draw_sheet
from pretrain.data.show import decode
from pretrain.data.views.pixels import to_images
from pretrain.data.write.images import UnreadableImageError
from pretrain.probes.extract import FeatureExtractor
from pretrain.probes.stored import StoredFeatures, read_features

KINDS = ("cls", "pooled", "patch_mean")


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: found. 2: no complete features, another model, or an image that cannot be read."""
    chosen = _parser().parse_args(arguments)
    try:
        stored = read_features(chosen.features, [chosen.kind] if chosen.kind else None)
        kind = chosen.kind or next(name for name in KINDS if name in stored.features)
        pixels, queries = _queries(chosen, stored, kind)
        found = nearest(stored, kind, queries, chosen.count)
        searched = [Cell(image, path.name, "searched") for path, image in zip(chosen.images, pixels, strict=True)]
        sheet = _sheet(searched, found, stored)
    except ValueError as error:
        print(f"fovea search: {error}", file=sys.stderr)
        return 2
    for image, hits in zip(chosen.images, found, strict=True):
        print(image)
        for hit in hits:
            print(f"  {hit.cosine:.4f}  {hit.key}")
    sheet.save(chosen.out, "PNG")
    print(f"contact sheet: {chosen.out}")
    return 0


@dataclass(frozen=True)
class Hit:
    """key: "shard/key" of a stored image. cosine: of its features and those of the query."""

    key: str
    cosine: float


def nearest(stored: StoredFeatures, kind: str, queries: Tensor, count: int) -> list[list[Hit]]:
    """The `count` images with the largest cosine to each of the features `queries` [q, D], the largest first."""
    bank = torch.nn.functional.normalize(stored.features[kind].flatten(1), dim=1)
    cosines = torch.nn.functional.normalize(queries.flatten(1), dim=1) @ bank.T
    best = cosines.topk(min(count, len(bank)), dim=1)
    return [
        [Hit(stored.keys[number], value) for number, value in zip(numbers, values, strict=True)]
        for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _queries(chosen: argparse.Namespace, stored: StoredFeatures, kind: str) -> tuple[list[np.ndarray], Tensor]:
    """The images, and their features [q, ...], prepared as the stored ones were."""
    request = Request(**stored.about["request"])
    model = chosen.model or Path(stored.about["model"])
    opened = open_source(locate(model, **stored.about["options"]))
    if identity(opened, request) != stored.about["identity"]:
        raise ValueError(f"{model}: not the weights that {chosen.features} is from ({stored.about['title']})")
    extractor = FeatureExtractor(
        opened.backbone, mean=opened.mean, std=opened.std, title=opened.title, device=find_device(chosen.device)
    )
    pixels = to_images(chosen.images, extractor.in_chans, opened.orientation, opened.value_range)
    height, width = request.size
    batch = extractor.prepare(pixels, size=(height, width), crop_pct=max(height, width) / request.resize)
    blocks = [int(kind.removeprefix(PATCHES))] if kind.startswith(PATCHES) else []
    return pixels, features_of(opened.backbone, batch, blocks)[kind]


def _sheet(searched: Sequence[Cell], found: Sequence[Sequence[Hit]], stored: StoredFeatures) -> Image.Image:
    """A row for each image: itself, then its neighbours."""
    dataset = Dataset.open(stored.about["shards"])
    cells: list[Cell] = []
    with closing(Reader(dataset)) as reader:
        for image, hits in zip(searched, found, strict=True):
            cells.append(image)
            for hit in hits:
                pixels = _pixels(reader.named(hit.key), stored.about["reading"]["value_range"])
                cells.append(Cell(pixels, hit.key, f"cosine {hit.cosine:.4f}"))
    return draw_sheet(cells, max(map(len, found)) + 1)


def _pixels(sample: dict[str, Any], value_range: ValueRange | None) -> np.ndarray | str:
    try:
        return decode(sample, value_range)[1]
    except UnreadableImageError as error:
        return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea search", description=__doc__)
    parser.add_argument("features", type=Path, help="folder of `fovea embed`")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files to search for")
    parser.add_argument("--model", type=Path, help="the model that the features are from; default: where it was")
    parser.add_argument("--kind", help=f"which features (default: the first there of {', '.join(KINDS)})")
    parser.add_argument("--count", type=int, default=7, help="neighbours of each image (default 7)")
    parser.add_argument("--out", type=Path, default=Path("search.png"), help="the contact sheet (default search.png)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser
