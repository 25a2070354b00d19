"""`channels.json` next to images or shards: the names of their channels, in order, which nothing in most files says."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pretrain.core.files import read_text
from pretrain.core.text import shown
from pretrain.data.shards.opener import local_path

FILE = "channels.json"

Names = tuple[str, ...]


def names_beside(images: str | Sequence[str]) -> Names | None:
    """The names in the folder of a data set, given as a folder, a file in it, a pattern or a list; None without FILE.

    Raises:
        ValueError: the file is no list of names.
    """
    first = local_path(images if isinstance(images, str) else images[0])
    path = (first if first.is_dir() else first.parent) / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: expected a list of names")
    return tuple(found)


def with_names_beside(given: Names | None, images: str | Sequence[str]) -> Names | None:
    """`data.channels` as it is given, else the names in the folder of the images.

    Raises:
        ValueError: both are there and differ, or the file is damaged.
    """
    found = names_beside(images)
    if given is None or found is None:
        return given or found
    if problem := difference(found, given):
        raise ValueError(f"{FILE} next to the images has {problem} as in data.channels; give the images in that order")
    return given


def difference(here: Sequence[str], there: Sequence[str]) -> str | None:
    """How two lists of names differ, in words; None if they do not."""
    if list(here) == list(there):
        return None
    if sorted(here) == sorted(there):
        place = next(n for n, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
        return f"the same channels in another order: channel {place} is {shown(here[place])}, not {shown(there[place])}"
    listed = (", ".join(map(shown, names)) for names in (here, there))
    return "channels {}, not {}".format(*listed)
