"""Open a shard by its name: the only place that does. Local paths only; remote stores will be added here.

A shard list is data, never a command: no name makes this package start a process or a connection.
"""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.core.files import open_descriptor

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def local_path(url: str) -> Path:
    """The local path that `url` names; ValueError for `pipe:`, any other scheme, an option-like or an empty name."""
    if not url or "\0" in url:
        raise ValueError(f"not a shard name: {url!r}")
    if url.startswith("-"):
        raise ValueError(f"{url!r} starts with '-'; write ./{url} if it is a file")
    scheme = _SCHEME.match(url)
    if scheme is None:
        return Path(url)
    if scheme[1].lower() == "pipe":
        raise ValueError(f"{url!r}: 'pipe:' would run a command and is refused; copy the shards to a local path")
    raise ValueError(
        f"{url!r}: remote stores are not supported yet ({scheme[1]}:); copy the shards to a local path "
        f"(a local name with a colon is written ./{url})"
    )


def open_shard(url: str) -> int:
    """Open a shard for reading; a file descriptor that the caller closes. ValueError when it cannot be opened."""
    path = local_path(url)
    try:
        return open_descriptor(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot open shard: {error.strerror}") from error
