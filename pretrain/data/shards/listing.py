"""A list of shards from brace ranges, globs, folders and lists."""

from __future__ import annotations

import errno
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from pretrain.core.files import kind_of_special
from pretrain.data.shards.image_files import SUFFIXES
from pretrain.data.shards.opener import local_path

MAX_SHARDS = 1_000_000


def expand(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """Shard paths of a folder (every `*.tar` in it, sorted), a glob, a brace range, or a list of these.

    Every shard exists. ValueError names what is missing, what is listed twice, and whatever is not a local path
    (`pipe:` and other schemes are refused).
    """
    items = [spec] if isinstance(spec, str | Path) else list(spec)
    shards = [shard for item in items for shard in _expand_one(str(item))]
    if not shards:
        raise ValueError("the list of shards is empty")
    special = [f"{shard} is {kind}, not a shard" for shard in shards if (kind := kind_of_special(shard))]
    if special:
        raise ValueError("; ".join(special[:5]))
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing and missing == [str(spec)]:
        raise ValueError(f"{missing[0]}: no such file or folder")
    if missing:
        more = f" (and {len(missing) - 5} more)" if len(missing) > 5 else ""
        raise ValueError(f"{len(missing)} of {len(shards)} shards not found: {', '.join(missing[:5])}{more}")
    seen: set[Path] = set()
    for shard in shards:
        path = Path(shard).absolute()
        if path in seen:
            raise ValueError(f"shard listed twice: {shard}")
        seen.add(path)
    return shards


def is_shard(path: Path) -> bool:
    """Whether a file of a folder is a shard: its name ends in .tar, in upper or lower case."""
    return path.suffix.lower() == ".tar" and not path.name.startswith(".")


def gone_shards(
    spec: str | Path | Sequence[str | Path], paths: Sequence[str], listed: Mapping[Path, Iterable[str]]
) -> list[str]:
    """Shards that an index lists and that `spec`, a folder or a glob, does not find.

    paths: what `expand(spec)` found. listed: the file names in the index of each of their folders. (An index in
    another folder does not record the paths of its shards.)
    """
    items = [spec] if isinstance(spec, str | Path) else list(spec)
    there = {Path(path).absolute() for path in paths}
    gone = (folder / name for folder, names in listed.items() for name in names)
    return sorted(str(path) for path in gone if path.absolute() not in there and any(_takes(i, path) for i in items))


def _takes(item: str | Path, path: Path) -> bool:
    """Whether the folder or glob `item` would find `path` if it existed; a brace range names every file."""
    where = local_path(str(item))
    if _is_there(where):
        return where.is_dir() and path.parent == where and is_shard(path)
    return "{" not in str(item) and fnmatch.fnmatchcase(str(path), str(where))


def _expand_one(item: str) -> list[str]:
    path = local_path(item)
    there = _is_there(path)
    if there and path.is_dir():
        shards = sorted(str(shard) for shard in path.iterdir() if is_shard(shard))
        if not shards:
            raise ValueError(f"no *.tar in folder {item}{_images_in(path)}")
        return shards
    if there:
        return [item]
    # counted first: braceexpand builds the complete range before it yields
    if math.prod(_choices(group) for group in re.findall(r"{([^{}]*)}", item)) > MAX_SHARDS:
        raise ValueError(f"{item} names more than {MAX_SHARDS} shards")
    try:
        names = list(braceexpand(item)) if "{" in item else [item]
    except ValueError as error:
        raise ValueError(f"{item}: bad brace expression: {error}") from error
    return [shard for name in names for shard in _glob(name)]


def _images_in(folder: Path) -> str:
    """A hint if it is a folder of photos."""
    first = islice(folder.rglob("*"), 1000)
    if not any(path.suffix.lower() in SUFFIXES for path in first):
        return ""
    return f"; it holds images; `fovea data write {folder} SHARDS` writes them to shards"


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a list in braces may be longer than a file name can be
            return False
        raise


def _choices(group: str) -> int:
    bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", group)
    return abs(int(bounds[2]) - int(bounds[1])) + 1 if bounds else group.count(",") + 1


def _glob(name: str) -> list[str]:
    path = local_path(name)
    magic = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), None)
    if magic is None or _is_there(path):
        return [name]
    found = sorted(str(match) for match in Path(*path.parts[:magic]).glob(str(Path(*path.parts[magic:]))))
    if not found:
        raise ValueError(f"nothing matches {name}")
    return found
