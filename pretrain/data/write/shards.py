"""Write image files, or clips of them, as WebDataset shards: in parallel, restartable, the same bytes every time.

The plan (which file goes into which shard) is fixed before the first byte is written and depends on the files and the
arguments alone, so each shard is an independent job, and the same command continues a killed run.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO

from pretrain.core.files import read_bytes, replacing_file, write_bytes
from pretrain.core.images import MAX_PIXELS
from pretrain.core.text import shown
from pretrain.data.labels import classes_json, read_classes
from pretrain.data.shards.index import build_index, index_shard
from pretrain.data.shards.parallel import run_parallel
from pretrain.data.shards.sidecar import sidecar_path, write_sidecar
from pretrain.data.views.decode import reduction
from pretrain.data.write.clips import Clip, FramesOf, clips_of
from pretrain.data.write.images import Pages, UnreadableImageError, prepare
from pretrain.data.write.sources import ImageSource, Sources, find_sources
from pretrain.data.write.tiles import cut

_STATE = ".write"  # arguments and receipts, one small file per shard; a rerun continues from them
_VERSION = 4  # of the plan: raised when the same files and arguments would give other shards
_PROBED, _PROBED_CLIPS = 64, 8
_MAX_FILE = 1 << 30


@dataclass(frozen=True)
class WriteSettings:
    """size: shorter side in pixels, or None to keep every byte; quality: of resized JPEG and WebP.

    A shard holds `samples_per_shard` samples, or about `shard_size` bytes. shuffle_seed: None keeps the sorted order.
    labels: "auto" or "none" (see `find_sources`). strict: an unreadable file is an error, not an entry in skipped.txt.
    max_pixels: a larger image is skipped; with a size, a JPEG is decoded at a smaller scale where that fits.
    pages: of a TIFF or DICOM of several pages, "refuse" skips it.
    tile: side of the squares that an image is cut into, each a sample; overlap: pixels that neighbours share.
    frames_of: samples are clips, from folders of frames or video files; fps, clip_frames: see `clips_of`.
    """

    name: str = "train"
    size: int | None = None
    quality: int = 90
    shard_size: int = 100_000_000
    samples_per_shard: int | None = None
    labels: str = "auto"
    shuffle_seed: int | None = 0
    strict: bool = False
    max_pixels: int = MAX_PIXELS
    pages: Pages = "refuse"
    tile: int | None = None
    overlap: int = 0
    frames_of: FramesOf | None = None
    fps: float | None = None
    clip_frames: int | None = None


@dataclass(frozen=True)
class ShardReceipt:
    """A finished shard: samples in it, its size in bytes, and (file, reason) of each that could not be used.

    reduced: (file, scale) of each that was decoded at 1 / scale of its sides.
    """

    shard: str
    samples: int
    bytes: int
    skipped: list[tuple[str, str]]
    reduced: list[tuple[str, int]]


@dataclass(frozen=True)
class Written:
    """What `write` did; `resumed` shards were complete before it began; `unlabelled` files have no label."""

    shards: list[str]
    samples: int
    bytes: int
    classes: Mapping[int, str]
    labelled: bool
    skipped: list[tuple[str, str]]
    reduced: list[tuple[str, int]]
    ignored: Counter[str]
    resumed: int
    unlabelled: int


def write(
    source: Path,
    out: Path,
    settings: WriteSettings,
    *,
    workers: int = 1,
    classes: Path | None = None,
    planned: Callable[[int, int], None] = lambda shards, files: None,
    done: Callable[[ShardReceipt], None] = lambda receipt: None,
) -> Written:
    """Write the images of a folder or CSV into `out/NAME-000000.tar` ..., then index them.

    Also writes `classes.json` (where there are class names; one already there, or `classes`, gives the ids) and
    `skipped.txt` (file and reason). `planned(shards, files)` is called once, `done` for every shard.
    ValueError: nothing to write, `out` holds shards of other arguments or files, and an unreadable file if strict.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", settings.name):
        raise ValueError(f"--name {settings.name}: letters, digits, _ and - only")
    given = classes or (out / "classes.json" if (out / "classes.json").exists() else None)
    classes_given = read_classes(given) if given else None
    sources = find_sources(source, labels=settings.labels, classes=classes_given, frames_of=settings.frames_of)
    state = out / _STATE
    state.mkdir(parents=True, exist_ok=True)
    with _only_writer(state, settings.name):
        with _shared(state):
            labelled = sources.classes and any(file.label is not None for file in sources.files)
            classes_of_all = _with_those_of(out / "classes.json", sources.classes) if labelled else {}
            _claim(out, settings, sources)
            if classes_of_all:
                write_bytes(out / "classes.json", classes_json(classes_of_all))
        plan = _plan(sources, settings)
        planned(len(plan), len(sources.files))
        jobs: list[tuple[str, list[ImageSource]]] = []
        receipts: dict[str, ShardReceipt] = {}
        for number, files in enumerate(plan):
            shard = f"{settings.name}-{number:06d}.tar"
            receipt = _read_receipt(out, shard)
            if receipt is None:
                jobs.append((shard, files))
            else:
                receipts[shard] = receipt
                done(receipt)
        resumed = len(receipts)
        job = partial(_write_shard, root=sources.root, out=out, settings=settings)
        for (shard, _), receipt in run_parallel(job, jobs, workers=workers):
            receipts[shard] = receipt
            done(receipt)
        ordered = [receipts[shard] for shard in sorted(receipts)]
        samples = sum(receipt.samples for receipt in ordered)
        with _shared(state):
            _write_skipped(out)
        if not samples:
            what = "images" if settings.frames_of is None else settings.frames_of
            raise ValueError(f"{source}: none of {len(sources.files)} {what} can be read; see {out / 'skipped.txt'}")
        shards = [str(out / receipt.shard) for receipt in ordered]
        with _shared(state):
            build_index(shards, workers=workers)
    return Written(
        shards=shards,
        samples=samples,
        bytes=sum(receipt.bytes for receipt in ordered),
        classes=sources.classes,
        labelled=any(file.label is not None for file in sources.files),
        skipped=[entry for receipt in ordered for entry in receipt.skipped],
        reduced=[entry for receipt in ordered for entry in receipt.reduced],
        ignored=sources.ignored,
        resumed=resumed,
        unlabelled=sum(file.label is None for file in sources.files),
    )


@contextmanager
def _only_writer(state: Path, name: str) -> Iterator[None]:
    with (state / f"{name}.lock").open("w") as lock:
        try:
            _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{state.parent}: another fovea data write --name {name} is running in this folder"
            ) from None
        yield


@contextmanager
def _shared(state: Path) -> Iterator[None]:
    """Writers with other names wait while one changes the files they share."""
    with (state / "lock").open("w") as lock:
        _lock(lock, fcntl.LOCK_EX)
        yield


def _lock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:  # Lustre, unless mounted with the option flock
        raise ValueError(
            f"{file.name}: this file system has no locks ({error.strerror}); write to one that has, then copy"
        ) from error


def _with_those_of(path: Path, classes: Mapping[int, str]) -> dict[int, str]:
    """`classes` and those of the folder, which label its other shards. ValueError if they contradict."""
    kept = read_classes(path) if path.exists() else {}
    ids = {name: i for i, name in kept.items()}
    for i, name in classes.items():
        if (kept[i] != name) if i in kept else (name in ids):
            there = f"id {i} is {kept[i]!r}" if i in kept else f"{name!r} has id {ids[name]}"
            raise ValueError(
                f"{path}: {there} there, and now {name!r} has id {i}; give --classes {path}, or choose another folder"
            )
    return kept | dict(classes)


def _claim(out: Path, settings: WriteSettings, sources: Sources) -> None:
    """Store the arguments next to the shards, or check that they equal those of the run to continue."""
    listing = hashlib.sha256()
    for file in sources.files:
        listing.update(f"{file.size} {file.label} ".encode() + os.fsencode(file.name) + b"\0")
    # an unreadable file stops a strict run before its shard is written, so both kinds of run write equal shards
    ours = {"version": _VERSION} | asdict(settings)
    ours |= {"files": len(sources.files), "sha256 of names, sizes and labels": listing.hexdigest()}
    del ours["strict"]
    defaults = asdict(WriteSettings())  # what an earlier version did not record, it did not have
    path = out / _STATE / f"{settings.name}.json"
    if path.exists():
        theirs = json.loads(path.read_bytes())
        differ = [
            f"{key}: {theirs.get(key, defaults.get(key))!r} there, {value!r} now"
            for key, value in ours.items()
            if theirs.get(key, defaults.get(key)) != value
        ]
        if differ:
            raise ValueError(
                f"{out} holds shards named {settings.name} of another run; give the same arguments to continue it, "
                "or another folder or --name:\n  " + "\n  ".join(differ)
            )
    elif shards := sorted(out.glob(f"{settings.name}-{'[0-9]' * 6}.tar")):
        raise ValueError(f"{out} already holds {shards[0].name}, not written by this command; choose another folder")
    else:
        write_bytes(path, json.dumps(ours, indent=1).encode())
    ours_or_shared = re.compile(rf"\.({settings.name}(-\d+\.tar)?|classes|skipped|dataset)(\.\w+)?\.\d+\.tmp")
    for folder in (out, out / _STATE):
        for temp in folder.glob(".*.tmp"):
            if ours_or_shared.fullmatch(temp.name):  # left by a kill
                temp.unlink()


def _plan(sources: Sources, settings: WriteSettings) -> list[list[ImageSource]]:
    """The files of each shard. Depends on the files and the settings alone."""
    files = sources.files
    if settings.shuffle_seed is not None:
        files = sorted(files, key=partial(_shuffle_key, seed=settings.shuffle_seed))
    per_shard = settings.samples_per_shard
    if per_shard is None and any((settings.size, settings.tile, settings.frames_of)):
        probed = _PROBED if settings.frames_of is None else _PROBED_CLIPS
        probe = files[:: max(1, len(files) // probed)][:probed]
        loaded = (_load(sources.root, file, settings)[0] for file in probe)
        kept = [
            sum(_cost(len(data)) + 512 for _, members in some for _, data in members)
            for some in loaded
            if not isinstance(some, str)
        ]
        per_sample = sum(kept) / max(1, len(kept)) + 512
        per_shard = max(1, int(settings.shard_size / per_sample))
    if per_shard is not None:
        return [files[i : i + per_shard] for i in range(0, len(files), per_shard)]
    plan: list[list[ImageSource]] = [[]]
    filled = 0
    for file in files:
        cost = _cost(file.size) + (1024 if file.label is not None else 0)
        if plan[-1] and filled + cost > settings.shard_size:
            plan.append([])
            filled = 0
        plan[-1].append(file)
        filled += cost
    return plan


def _shuffle_key(file: ImageSource, *, seed: int) -> bytes:
    """An order that does not depend on a library's random numbers, so it never changes."""
    return hashlib.blake2b(os.fsencode(file.name), key=str(seed).encode(), digest_size=16).digest()


def _cost(length: int) -> int:
    return 512 + -(-max(0, length) // 512) * 512


def _load(root: Path, file: ImageSource, settings: WriteSettings) -> tuple[list[Clip] | str, int]:
    """The samples of an image, of its tiles or of a clip, or why there is none; and the scale of its decoding."""
    limits = {"quality": settings.quality, "max_pixels": settings.max_pixels}
    try:
        if settings.frames_of is not None:
            how = {"size": settings.size, "fps": settings.fps, "clip_frames": settings.clip_frames}
            return clips_of(root / file.name, file.key, **how, **limits), 1
        if file.size > _MAX_FILE:
            return f"too large: {file.size} bytes", 1
        data = read_bytes(root / file.name)
        if settings.tile is not None:
            tiles = cut(data, tile=settings.tile, overlap=settings.overlap, pages=settings.pages, **limits)
            return [(f"{file.key}/{place}", [(extension, stored)]) for place, extension, stored in tiles], 1
        extension, stored = prepare(data, size=settings.size, pages=settings.pages, **limits)
        scale = 1 if settings.size is None else reduction(data, settings.size, settings.max_pixels)
        return [(file.key, [(extension, stored)])], scale
    except UnreadableImageError as error:
        return str(error), 1
    except OSError as error:
        return f"cannot be read: {error.strerror}", 1


def _write_shard(job: tuple[str, list[ImageSource]], *, root: Path, out: Path, settings: WriteSettings) -> ShardReceipt:
    shard, files = job
    skipped: list[tuple[str, str]] = []
    reduced: list[tuple[str, int]] = []
    samples = 0
    path = out / shard
    with replacing_file(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for item in files:
                loaded, scale = _load(root, item, settings)
                if isinstance(loaded, str):
                    if settings.strict:
                        raise ValueError(f"{root / item.name}: {loaded} (--strict)")
                    skipped.append((item.name, loaded))
                    continue
                for key, members in loaded:
                    for extension, data in members:
                        _add(tar, f"{key}.{extension}", data)
                    if item.label is not None:
                        _add(tar, f"{key}.cls", str(item.label).encode())
                samples += len(loaded)
                if scale > 1:
                    reduced.append((item.name, scale))
        receipt = ShardReceipt(shard, samples, file.tell(), skipped, reduced)
        # first the receipt, then (on leaving) the shard: an existing shard is complete and has a receipt
        write_bytes(_receipt_path(out, shard), json.dumps(asdict(receipt)).encode())
    write_sidecar(sidecar_path(path, None), index_shard(str(path)))  # now, while the shard is in the page cache
    return receipt


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults: time 0, user 0, mode 0644
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _receipt_path(out: Path, shard: str) -> Path:
    return out / _STATE / f"{shard}.json"


def _read_receipt(out: Path, shard: str) -> ShardReceipt | None:
    """The receipt of a shard that is complete."""
    try:
        content = json.loads(_receipt_path(out, shard).read_bytes())
        if (out / shard).stat().st_size != content["bytes"]:
            return None
    except FileNotFoundError:
        return None
    pairs = {key: [tuple(pair) for pair in content.get(key, [])] for key in ("skipped", "reduced")}
    return ShardReceipt(**content | pairs)


def _write_skipped(out: Path) -> None:
    """`skipped.txt`: a line for each file that is in no shard of `out`, with the reason."""
    lines = [
        f"{shown(name)}\t{shown(reason)}"
        for path in sorted((out / _STATE).glob("*.tar.json"))
        for name, reason in json.loads(path.read_bytes())["skipped"]
    ]
    text = "".join(f"{line}\n" for line in lines)
    write_bytes(out / "skipped.txt", text.encode("utf-8"))
