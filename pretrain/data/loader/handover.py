"""Items from a worker to the run: through shared memory, or through files in private memory where that is full.

DataLoader itself moves values to shared memory in a thread of its queue, where an error loses the item and the run
waits forever. Here it happens where the item is computed, and an error of it is the item's.
"""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import traceback
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.reduction import DupFd, ForkingPickler
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from pretrain.core.machine.failures import MachineError

SHARED_MEMORY = Path("/dev/shm")
_ENDED = "a data worker ended before its batch was read"

Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    def __getitem__(self, index: int) -> Item: ...


@dataclass
class Parcel:
    """An item, or the error that it raised.

    Attributes:
        sent: a pickle of the item with the handles of its memory; None once it was opened.
        item: then the item. error: raised by the item.
        too_large: bytes of an item that did not fit into shared memory.
    """

    sent: bytes | None = None
    item: Any = None
    error: Exception | None = None
    too_large: int = 0

    def opened(self) -> Parcel:
        """The same with its item. MachineError when the worker has ended."""
        if self.sent is not None:
            try:
                item: Any = pickle.loads(self.sent)
                self.item = pickle.loads(_content(item)) if isinstance(item, _MemoryFile) else item
            except (ConnectionError, FileNotFoundError, EOFError) as error:
                raise MachineError(f"{_ENDED} ({error})") from error
            self.sent = None
        return self

    def pin_memory(self) -> Parcel:
        """Called by DataLoader's thread, for a GPU."""
        if self.error is None:
            self.item = pin_memory(self.opened().item)
        return self


class Parcels(Generic[Item]):
    """The items of a worker as parcels; `__getitem__` raises nothing."""

    def __init__(self, items: Items[Item]):
        self._items = items

    def __getitem__(self, index: int) -> Parcel:
        try:
            return _packed(self._items[index])
        except Exception as error:
            error.add_note(f"In a data worker:\n{traceback.format_exc()}")
            return Parcel(error=_sendable(error))


def shared_memory() -> str:
    """The free part of shared memory, for messages."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        return f"{SHARED_MEMORY}: {error.strerror}"
    return f"{SHARED_MEMORY} has {usage.free / 2**20:.3g} of {usage.total / 2**20:.3g} MiB free"


@dataclass(frozen=True)
class _MemoryFile:
    """A file in memory that has no name and is not in /dev/shm."""

    handle: Any  # of multiprocessing, for a file descriptor


def _packed(item: Any) -> Parcel:
    tensors = _tensors(item)
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except (RuntimeError, OSError):
        fd = os.memfd_create("fovea-batch")
        with os.fdopen(fd, "wb") as file:
            pickle.dump(item, file, protocol=pickle.HIGHEST_PROTOCOL)
            file.flush()
            sent = bytes(ForkingPickler.dumps(_MemoryFile(DupFd(fd))))
        return Parcel(sent, too_large=sum(tensor.nbytes for tensor in tensors))
    return Parcel(bytes(ForkingPickler.dumps(item)))


def _content(file: _MemoryFile) -> memoryview:
    with os.fdopen(file.handle.detach(), "rb") as opened:
        return memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))


class _Collector(pickle.Pickler):
    """Pickles everything but tensors, which it collects."""

    def __init__(self) -> None:
        super().__init__(BytesIO(), protocol=5, buffer_callback=lambda _: None)  # arrays are not copied
        self.found: list[Tensor] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            self.found.append(obj)
            return str, ()
        return NotImplemented


def _tensors(item: Any) -> list[Tensor]:
    collector = _Collector()
    collector.dump(item)
    return [tensor for tensor in collector.found if tensor.layout == torch.strided]


def _sendable(error: Exception) -> Exception:
    """`error`, or what it says if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(None)
    return error
