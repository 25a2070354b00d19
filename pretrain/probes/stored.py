"""Features of a data set in a folder: for each shard a safetensors file with its samples in order, and a manifest.

The manifest is written last: a folder without one is not complete. Numbers are stored as fp32, fp16, or int8 with a
scale per row (the largest size of the row is 127).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.core.files import replacing_file, write_bytes
from pretrain.core.manifest import MANIFEST, ManifestError, difference, files_of, read_body, record_of, render
from pretrain.core.tensorfile import open_tensors, stream_tensors
from pretrain.data.shards.exclusion import name_of

Numbers = Literal["fp32", "fp16", "int8"]
LABELS, SUFFIX, _SCALE = "labels", ".safetensors", ".scale"
_KIND, _FORMAT = "features", 1


@dataclass(frozen=True)
class StoredFeatures:
    """Of n images in the order of the shards.

    Attributes:
        features: fp32 [n, ...] by kind, as `backbone_features` names them. keys: "shard/key" of each image.
        labels: int64 [n]; None: the shards have none. about: the facts given to `seal`.
    """

    features: dict[str, Tensor]
    keys: list[str]
    labels: Tensor | None
    about: dict[str, Any]


def write_features(
    path: Path,
    features: Mapping[str, Tensor],
    *,
    keys: Sequence[str],
    labels: Tensor | None,
    skipped: Sequence[tuple[str, str]],
    numbers: Numbers,
    source: str,
) -> None:
    """Write the features [n, ...] of one shard completely or not at all.

    Args:
        keys: of the n samples. skipped: (key, reason) of samples that could not be used. source: what the numbers come
            from; `is_written` compares it.
    """
    tensors: dict[str, Tensor] = {}
    for name, values in features.items():
        if numbers == "int8":
            scale = values.abs().amax(dim=tuple(range(1, values.ndim)), keepdim=True).clamp(min=1e-30) / 127
            tensors[name], tensors[name + _SCALE] = (values / scale).round().to(torch.int8), scale
        else:
            tensors[name] = values.half() if numbers == "fp16" else values.float()
    if labels is not None:
        tensors[LABELS] = labels
    facts = {"keys": json.dumps(list(keys)), "skipped": json.dumps(list(skipped)), "source": source}
    with replacing_file(path) as file:
        stream_tensors(file, tensors, facts)


def is_written(path: Path, source: str) -> bool:
    """Whether `path` holds features of this source."""
    if not path.is_file():
        return False
    try:
        with open_tensors(path) as file:
            return file.metadata().get("source") == source
    except Exception:  # a damaged file, in the library's own class of errors
        return False


def seal(folder: Path, names: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write the manifest of complete features. names: the files in the order of the shards. about: JSON."""
    records = [record_of(folder / name) for name in names]
    write_bytes(folder / MANIFEST, render(records, {"kind": _KIND, "format": _FORMAT, "about": dict(about)}))


def about(folder: Path) -> dict[str, Any]:
    """The facts of complete features.

    Raises:
        ValueError: the folder holds no features, or not all.
    """
    return _body(folder)["about"]


def read_features(folder: Path, kinds: Sequence[str] | None = None) -> StoredFeatures:
    """All features of a folder, in fp32.

    Args:
        kinds: those that are needed; default: all.

    Raises:
        ValueError: it holds no features or not all, a file is damaged, or a kind is not there (with those that are).
    """
    body = _body(folder)
    features: dict[str, list[Tensor]] = {}
    keys: list[str] = []
    labels: list[Tensor] = []
    for record in files_of(body):
        if damage := difference(folder, record):
            raise ValueError(f"{folder}: {damage}; remove the file and run fovea embed again")
        with open_tensors(folder / record.name) as file:
            shard = record.name.removesuffix(SUFFIX)
            keys += [name_of(shard, key) for key in json.loads(file.metadata()["keys"])]
            tensors = set(file.keys())
            stored = sorted(name for name in tensors if name != LABELS and not name.endswith(_SCALE))
            if missing := [kind for kind in kinds or () if kind not in stored]:
                raise ValueError(f"{folder}: no features {missing[0]!r}; it has {', '.join(stored)}")
            for name in kinds or stored:
                values = file.get_tensor(name).float()
                scale = file.get_tensor(name + _SCALE) if name + _SCALE in tensors else 1.0
                features.setdefault(name, []).append(values * scale)
            if LABELS in tensors:
                labels.append(file.get_tensor(LABELS))
    joined = {name: torch.cat(parts) for name, parts in features.items()}
    return StoredFeatures(joined, keys, torch.cat(labels) if labels else None, body["about"])


def _body(folder: Path) -> dict[str, Any]:
    try:
        body = read_body(folder)
    except ManifestError as error:
        raise ValueError(f"{folder}: no complete features of fovea embed: {error}") from None
    if body.get("kind") != _KIND:
        raise ValueError(f"{folder}: its {MANIFEST} is of something else than features of fovea embed")
    if body.get("format") != _FORMAT:
        raise ValueError(f"{folder}: features of format {body.get('format')}; this version reads {_FORMAT}")
    return body
