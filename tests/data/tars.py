"""Small real shards and image files for the tests of the storage floor."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.shards.dataset import Dataset
from pretrain.data.shards.index import build_index
from pretrain.data.shards.reader import Reader


def tar_bytes(
    members: Iterable[tuple[str, bytes] | tarfile.TarInfo], *, tar_format: int = tarfile.PAX_FORMAT, trim: bool = False
) -> bytes:
    """A tar of (name, payload) pairs, or of TarInfo for what is no regular file; `trim` cuts the padding of its end."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
        end = tar.offset
    return file.getvalue()[: end + 1024] if trim else file.getvalue()


def special(name: str, kind: bytes, *, link: str = "") -> tarfile.TarInfo:
    """A link, device, folder ..."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def image_bytes(seed: int, *, size: tuple[int, int] = (24, 16), mode: str = "RGB", image_format: str = "JPEG") -> bytes:
    """An encoded image of random pixels; size is (width, height)."""
    random = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(random.integers(0, 65536, size[::-1], dtype=np.uint16))
    else:
        channels = {"L": 1, "RGB": 3, "CMYK": 4, "RGBA": 4}[mode]
        pixels = random.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
        image = Image.frombytes(mode, size, pixels.tobytes())
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def make_shards(folder: Path, *, shards: int = 3, samples: int = 4, name: str = "train") -> list[str]:
    """Indexed shards of tiny JPEGs with labels."""
    paths = []
    for shard in range(shards):
        members = []
        for sample in range(samples):
            number = shard * samples + sample
            members += [(f"{number:06d}.jpg", image_bytes(number)), (f"{number:06d}.cls", str(number % 3).encode())]
        path = folder / f"{name}-{shard:06d}.tar"
        path.write_bytes(tar_bytes(members))
        paths.append(str(path))
    build_index(paths)
    return paths


def make_dataset(folder: Path, *, shards: int = 3, samples: int = 4) -> Dataset:
    """The same, opened."""
    return Dataset.open(make_shards(folder, shards=shards, samples=samples))


def make_folder(
    root: Path, *, classes: Sequence[str] = ("cat", "dog", "eel"), count: int = 8, size: tuple[int, int] = (24, 16)
) -> Path:
    """Class folders of JPEGs, `cat/cat.0.jpg` and so on."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}.{i}.jpg").write_bytes(image_bytes(c * count + i, size=size))
    return root


def samples_of(shards: Path) -> dict[str, dict]:
    """Every sample by key."""
    dataset = Dataset.open(shards)
    reader = Reader(dataset)
    places = [(shard, i) for shard, count in enumerate(dataset.counts.tolist()) for i in range(count)]
    return {sample["__key__"]: sample for sample in (reader.read(*place) for place in places)}


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that declares its size and holds a few bytes of pixels: to decode it would be to allocate it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    """An npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def flip(path: Path, byte: int, *, mask: int = 0x10) -> None:
    """Flip bits of one byte of a file, in place."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ mask]))
