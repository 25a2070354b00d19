"""Write a safetensors file as a stream, hashed while written, without a second copy in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, cast

import safetensors.torch
import torch
from torch import Tensor

from pretrain.core.files import check_regular
from pretrain.core.manifest import FileRecord, HashedFile

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorSlice(Protocol):
    """A tensor of a file, not yet read; an index reads that part of it."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, part: slice) -> Tensor: ...


class TensorFile(Protocol):
    """The methods of `safetensors.safe_open` that are used here; the library gives them no types."""

    def metadata(self) -> dict[str, str]: ...

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> TensorSlice: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_tensors(path: Path) -> TensorFile:
    """The safetensors file `path`, to be read in parts."""
    check_regular(path)
    return cast(TensorFile, safetensors.safe_open(str(path), framework="pt"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors file `path`, on the CPU."""
    check_regular(path)
    return cast(Any, safetensors.torch).load_file(str(path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> FileRecord:
    """Save `tensors` (any device) to the new file `path`.

    Raises:
        ValueError: a dtype that safetensors does not support.
        OSError: the disk is full or fails.
    """
    with HashedFile(path) as file:
        stream_tensors(file, tensors, metadata)
    return file.record


def stream_tensors(
    file: HashedFile | BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` into an open file; errors as `write_tensors`."""
    # Largest element size first keeps every tensor aligned without gaps, which the format forbids.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name}: cannot save dtype {tensor.dtype}")
        size = math.prod(tensor.shape) * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        tensor = tensors[name].detach().reshape(-1).cpu()
        if tensor.numel():
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
