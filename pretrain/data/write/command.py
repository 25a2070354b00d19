"""`fovea data write`: image files, folders of frames or video files to shards."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

from pretrain.core.files import write_json
from pretrain.core.images import MAX_PIXELS
from pretrain.core.text import shown
from pretrain.data import channels
from pretrain.data.depths import look_at_values
from pretrain.data.shards.dataset import Dataset
from pretrain.data.terminal import human, positive, progress, size
from pretrain.data.write.shards import WriteSettings, Written, write


def add_to(commands: Any) -> None:
    """The parser of the command."""
    cores = len(os.sched_getaffinity(0))
    add = commands.add_parser("write", help="image files, clips or videos (a folder, or a CSV of files) to shards")
    add.add_argument("source", type=Path, help="folder of images, or .csv with a column filename [label, class_name]")
    add.add_argument("out", type=Path, help="folder for the shards")
    add.add_argument("--name", default="train", help="shards are NAME-000000.tar ... (default: train)")
    clips = add.add_mutually_exclusive_group()
    clips.add_argument("--clips", action="store_true", help="each folder of images is a clip, its images the frames")
    clips.add_argument("--video", action="store_true", help="video files instead of images, each a clip (needs PyAV)")
    add.add_argument("--fps", type=rate, metavar="N", help="with --video: frames a second (default: all)")
    add.add_argument(
        "--clip-frames", type=positive, metavar="N", help="cut longer videos and folders into clips of N frames each"
    )
    sides = add.add_mutually_exclusive_group()
    sides.add_argument(
        "--size", type=positive, metavar="N", help="shrink to a shorter side of N pixels (default: keep bytes)"
    )
    sides.add_argument("--tile", type=positive, metavar="N", help="cut into squares of N pixels, each a sample")
    add.add_argument(
        "--overlap", type=int, default=0, metavar="N", help="pixels that neighbouring tiles share (default: 0)"
    )
    add.add_argument(
        "--quality", type=int, choices=range(1, 101), default=90, metavar="1..100", help="of resized JPEG, WebP"
    )
    by = add.add_mutually_exclusive_group()
    by.add_argument(
        "--shard-size", type=size, default="100MB", metavar="SIZE", help="approximate size (default: 100MB)"
    )
    by.add_argument("--samples-per-shard", type=positive, metavar="N", help="or exactly this number of files")
    add.add_argument(
        "--labels", choices=("auto", "none"), default="auto", help="auto: sub-folders, or the CSV's columns"
    )
    add.add_argument("--classes", type=Path, metavar="JSON", help="classes.json whose ids to use (a validation set's)")
    add.add_argument("--shuffle-seed", type=int, default=0, metavar="N", help="order of the samples (default: 0)")
    add.add_argument("--no-shuffle", action="store_true", help="keep the order of the names")
    add.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        metavar="N",
        help=f"skip larger images (default: {MAX_PIXELS}); with --size, JPEGs are decoded at 1/2 to 1/8 instead",
    )
    add.add_argument(
        "--channels", metavar="NAMES", help=f"of the images, in order, separated by commas: written to {channels.FILE}"
    )
    add.add_argument(
        "--pages",
        choices=("refuse", "channels"),
        default="refuse",
        help="a TIFF or DICOM of several pages: skip it (default), or its pages are the channels of one image",
    )
    add.add_argument("--strict", action="store_true", help="an unreadable file is an error")
    add.add_argument("--workers", type=positive, default=cores, metavar="N", help=f"processes (default: {cores})")
    add.set_defaults(run=run)


def rate(text: str) -> float:
    """The type of an argument: a number above 0."""
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return float(text)


def run(arguments: argparse.Namespace) -> int:
    """Write the shards and say what was written."""
    frames_of = "folders" if arguments.clips else "videos" if arguments.video else None
    if arguments.fps is not None and not arguments.video:
        raise ValueError("--fps: is of video files; give --video")
    if arguments.clip_frames is not None and frames_of is None:
        raise ValueError("--clip-frames: is of clips; give --clips or --video")
    if arguments.tile is not None and frames_of is not None:
        raise ValueError("--tile: cuts images, not clips; leave it out")
    if not 0 <= arguments.overlap < (arguments.tile or 1):
        raise ValueError(f"--overlap {arguments.overlap}: must be 0 or more and less than --tile")
    settings = WriteSettings(
        name=arguments.name,
        size=arguments.size,
        quality=arguments.quality,
        shard_size=arguments.shard_size,
        samples_per_shard=arguments.samples_per_shard,
        labels=arguments.labels,
        shuffle_seed=None if arguments.no_shuffle else arguments.shuffle_seed,
        strict=arguments.strict,
        max_pixels=arguments.max_pixels,
        pages=arguments.pages,
        tile=arguments.tile,
        overlap=arguments.overlap,
        frames_of=frames_of,
        fps=arguments.fps,
        clip_frames=arguments.clip_frames,
    )
    names = None if arguments.channels is None else tuple(arguments.channels.split(","))
    names = channels.with_names_beside(names, str(arguments.out))
    start = time.monotonic()
    with progress() as bar:
        task = bar.add_task("writing shards", total=None)
        written = write(
            arguments.source,
            arguments.out,
            settings,
            workers=arguments.workers,
            classes=arguments.classes,
            planned=lambda shards, files: bar.update(task, total=shards),
            done=lambda receipt: bar.advance(task),
        )
    if names is not None:
        write_json(arguments.out / channels.FILE, names)
    _report_written(written, arguments.out, settings, time.monotonic() - start)
    return 0


def _report_written(written: Written, out: Path, settings: WriteSettings, seconds: float) -> None:
    if written.ignored:
        listed = ", ".join(f"{shown(suffix)} {count}" for suffix, count in written.ignored.most_common(5))
        print(f"ignored {written.ignored.total()} other files ({listed})")
    for name, reason in written.skipped[:5]:
        print(f"skipped {shown(name)}: {shown(reason)}")
    if len(written.skipped) > 5:
        print(f"... and {len(written.skipped) - 5} more, in {out / 'skipped.txt'}")
    for name, scale in written.reduced[:5]:
        print(f"reduced {shown(name)}: above --max-pixels, decoded at 1/{scale} of its sides before its resize")
    if len(written.reduced) > 5:
        print(f"... and {len(written.reduced) - 5} more decoded at a smaller scale")
    labels = "no labels"
    if written.labelled:
        labels = f"{len(written.classes)} classes" if written.classes else "integer labels"
        labels += f", {written.unlabelled} images without a label" if written.unlabelled else ""
    resumed = f", {written.resumed} of them written before" if written.resumed else ""
    what = "clips" if settings.frames_of else "images" if settings.tile is None else "tiles"
    print(
        f"{written.samples} {what} in {len(written.shards)} shards{resumed}, {human(written.bytes)}, {labels}, "
        f"{len(written.skipped)} skipped, {seconds:.1f} s: {out / settings.name}-*.tar"
    )
    deep = look_at_values(Dataset.open(written.shards))
    if deep is not None:
        print(f"{deep}; train with data.range={deep.suggested}, or a narrower one, to keep their bits")
