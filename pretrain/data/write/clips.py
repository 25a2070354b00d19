"""The frames of a clip: the images of a folder, or the pictures of a video file at a chosen rate.

A clip is a sample whose members are numbered: KEY.0000.jpg, KEY.0001.jpg, ... Training then reads the frames that it
shows by their place in the shard, without decoding those before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pretrain.core.files import read_bytes
from pretrain.core.images import MAX_PIXELS
from pretrain.core.text import shown
from pretrain.data.formats.stored import DecodeError, check_size
from pretrain.data.shards.image_files import MIN_DIGITS, SUFFIXES
from pretrain.data.write.images import UnreadableImageError, encoded, prepare, shrunk

FramesOf = Literal["folders", "videos"]
# Suffix -> FFmpeg's name of the format. It is given and not guessed: a playlist, which may name other files and
# addresses, is never opened.
VIDEO_FORMATS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".avi": "avi",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
}
Clip = tuple[str, list[tuple[str, bytes]]]  # key, (extension, bytes) of its members


def clips_of(
    path: Path,
    key: str,
    *,
    size: int | None,
    quality: int,
    max_pixels: int = MAX_PIXELS,
    fps: float | None = None,
    clip_frames: int | None = None,
) -> list[Clip]:
    """The clips of a folder of frames or of a video file.

    Args:
        size: shorter side in pixels of larger frames; None: as they are, a folder's files byte by byte.
        fps: of a video, frames a second; None: all.
        clip_frames: a longer sequence becomes several clips KEY/000000, KEY/000032, ... of this length, by their first
            frames; a shorter rest is left out. None: one clip.

    Raises:
        UnreadableImageError: why it cannot become a clip.
    """
    if path.is_dir():
        frames = _of_folder(path, size, quality, max_pixels)
    else:
        frames = _of_video(path, size, quality, max_pixels, fps)
    if clip_frames is None:
        return [(key, _numbered(list(frames)))]
    found, pending = [], []
    for number, frame in enumerate(frames, start=1):
        pending.append(frame)
        if len(pending) == clip_frames:
            found.append((f"{key}/{number - clip_frames:06d}", _numbered(pending)))
            pending = []
    if not found:
        raise UnreadableImageError(f"{len(pending)} frames, fewer than the {clip_frames} of a clip")
    return found


def frame_files(folder: Path) -> list[Path]:
    """The images directly in a folder, in the order of the numbers in their names: frame_2 before frame_10."""
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(files, key=lambda path: [int(part) if part.isdigit() else part for part in _parts(path.name)])


def _parts(name: str) -> list[str]:
    """Text and digits in turn, so that the order never compares one with the other."""
    return re.split(r"([0-9]+)", name)


def _numbered(frames: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{number:0{MIN_DIGITS}d}.{extension}", data) for number, (extension, data) in enumerate(frames)]


def _of_folder(folder: Path, size: int | None, quality: int, max_pixels: int) -> Iterator[tuple[str, bytes]]:
    for file in frame_files(folder):
        try:
            yield prepare(read_bytes(file), size=size, quality=quality, max_pixels=max_pixels)
        except UnreadableImageError as error:
            raise UnreadableImageError(f"frame {shown(file.name)}: {error}") from error


def _of_video(
    path: Path, size: int | None, quality: int, max_pixels: int, fps: float | None
) -> Iterator[tuple[str, bytes]]:
    import av
    from av.error import FFmpegError

    count, start = 0, None
    try:
        with path.open("rb") as file, av.open(file, "r", format=VIDEO_FORMATS[path.suffix.lower()]) as container:
            if not container.streams.video:
                raise UnreadableImageError("no video stream")
            stream: Any = container.streams.video[0]
            check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
            for frame in container.decode(stream):
                if fps is not None and frame.time is not None:
                    start = frame.time if start is None else start
                    if (frame.time - start) * fps < count - 1e-6:
                        continue
                count += 1
                yield "jpg", encoded(shrunk(_upright(frame), size), "jpg", quality)
    except UnreadableImageError:
        raise
    except DecodeError as error:
        raise UnreadableImageError(str(error)) from error
    except (FFmpegError, ValueError) as error:
        raise UnreadableImageError(f"cannot be decoded: {error}") from error
    if not count:
        raise UnreadableImageError("no picture could be decoded")


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as the file says."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
