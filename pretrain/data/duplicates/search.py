"""Duplicates in shards: equal bytes, equal pixels, and images that show the same picture (`near`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.data.duplicates.near import near_pairs, thumbnail
from pretrain.data.formats.stored import DecodeError
from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.exclusion import name_of
from pretrain.data.shards.image_files import IMAGE_EXTENSIONS
from pretrain.data.shards.reader import BadSample, Reader
from pretrain.data.show import decode
from pretrain.data.write.images import UnreadableImageError

Kind = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True)
class Pair:
    """Two images of which one makes the other needless; names are SHARD/KEY. likeness: 1 for bytes and pixels."""

    first: str
    second: str
    kind: Kind
    likeness: float


@dataclass(frozen=True)
class Looks:
    """What is compared of the n images of a data set: names, sha256 of bytes and of pixels, numbers of pixels [n], and
    thumbnails uint8 [n, 64, 64]. unreadable: (name, reason)."""

    names: list[str]
    bytes_sha256: list[bytes]
    pixels_sha256: list[bytes]
    sizes: np.ndarray
    thumbnails: np.ndarray
    unreadable: list[tuple[str, str]]


def look(dataset: Dataset, done: Callable[[], None] = lambda: None) -> Looks:
    """Decode every image once, upright."""
    names, of_bytes, of_pixels, sizes, thumbnails = [], [], [], [], []
    unreadable: list[tuple[str, str]] = []
    reader = Reader(dataset)
    for number in range(dataset.num_samples):
        shard, within = dataset.locate(number)
        name = name_of(dataset.names[shard], reader.key(shard, within))
        try:
            sample = reader.read(shard, within, only=IMAGE_EXTENSIONS)
            pixels = decode(sample)[1]
        except (BadSample, DecodeError, UnreadableImageError) as error:
            unreadable.append((name, str(error)))
        else:
            names.append(name)
            members = b"".join(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
            of_bytes.append(hashlib.sha256(members).digest())
            shape = f"{pixels.shape} {pixels.dtype}".encode()
            of_pixels.append(hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).digest())
            sizes.append(pixels.shape[0] * pixels.shape[1])
            thumbnails.append(thumbnail(pixels))
        done()
    reader.close()
    stacked = np.stack(thumbnails) if thumbnails else np.zeros((0, 64, 64), np.uint8)
    return Looks(names, of_bytes, of_pixels, np.array(sizes, np.int64), stacked, unreadable)


def duplicates(looks: Looks, against: Looks | None, least: float) -> list[Pair]:
    """Pairs within a data set, or of its images (first) with those of `against` (second); the most alike first.

    Args:
        least: of the likeness of near pairs, above 0 to 1; above 1: equal bytes and pixels only.
    """
    other = looks if against is None else against
    found: dict[tuple[int, int], Pair] = {}
    kinds: Sequence[tuple[Kind, list[bytes], list[bytes]]] = (
        ("bytes", looks.bytes_sha256, other.bytes_sha256),
        ("pixels", looks.pixels_sha256, other.pixels_sha256),
    )
    for kind, ours, theirs in kinds:
        first_with = {digest: number for number, digest in reversed(list(enumerate(theirs)))}
        for number, digest in enumerate(ours):
            match = first_with.get(digest)
            if match is None or (against is None and match == number):
                continue
            pair = (match, number) if against is None else (number, match)
            found.setdefault(pair, Pair(looks.names[pair[0]], other.names[pair[1]], kind, 1.0))
    if least <= 1:
        for near in near_pairs(looks.thumbnails, None if against is None else against.thumbnails, least):
            pair = Pair(looks.names[near.a], other.names[near.b], "near", near.likeness)
            found.setdefault((near.a, near.b), pair)
    return sorted(found.values(), key=lambda pair: (-pair.likeness, pair.first, pair.second))


def needless(pairs: Sequence[Pair], looks: Looks, *, within: bool) -> list[str]:
    """Names of images to leave out: of each group of duplicates all but the one with the most pixels (the first of
    several); of pairs with another data set every image of `looks`."""
    if not within:
        return sorted({pair.first for pair in pairs})
    number = {name: position for position, name in enumerate(looks.names)}
    group = list(range(len(looks.names)))

    def root(of: int) -> int:
        while group[of] != of:
            group[of] = group[group[of]]
            of = group[of]
        return of

    for pair in pairs:
        a, b = root(number[pair.first]), root(number[pair.second])
        keep, drop = sorted((a, b), key=lambda one: (-looks.sizes[one], one))
        group[drop] = keep
    return sorted(name for name, position in number.items() if root(position) != position)
