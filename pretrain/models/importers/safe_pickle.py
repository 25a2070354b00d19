"""Tensors of a torch pickle whose classes are foreign or no longer exist, without importing or calling any of them.

`torch.load(weights_only=True)` refuses a pickled module altogether. Here every class and function of the file becomes
an inert record that keeps what it was given; only tensors are rebuilt, by code of this file.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_MODULE_PARTS = ("_parameters", "_buffers", "_modules")


class Record:
    """An object of the file: the name of its class, and its content in the pickle. It does nothing."""

    qualified_name = ""

    state: Any
    elements: list[Any]
    items: dict[Any, Any]

    def __new__(cls, *arguments: Any, **keywords: Any) -> Record:
        made = super().__new__(cls)
        made.state, made.elements, made.items = None, [*arguments, *keywords.values()], {}
        return made

    def __init__(self, *arguments: Any, **keywords: Any):
        """Not called by every pickle."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        self.elements.append(value)

    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value


def read_tensors(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a file written by `torch.save`, on the CPU, by its path in the saved object.

    Keys of mappings, positions in lists, and names of submodules, parameters and buffers are joined by dots: a saved
    module gives the names of its state dict, a saved {"model": state dict} the same below "model.". Other values are
    left out.

    Raises:
        ValueError: no such file, or not one of torch's formats; the file is damaged, or refers to what it lacks.
    """
    return dict(_walk(read_object(path)[0], "", set()))


def read_object(path: Path | str) -> tuple[Any, tuple[str, ...]]:
    """The saved object with a `Record` for each object of a class, and the names of these classes and functions.

    Raises:
        ValueError: as `read_tensors`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    names: dict[str, None] = {}
    try:
        content = _read_zip(path, names) if zipfile.is_zipfile(path) else _read_legacy(path, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # a pickle can fail in any way; none of them runs code of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{path}: not a readable torch file ({reason}); nothing in it was executed") from error
    return content, tuple(names)


class _Unpickler(pickle.Unpickler):
    """`storage(dtype, key, numel)` gives the flat tensor behind a storage of the file; `names` gathers those of foreign
    classes and functions."""

    def __init__(self, file: Any, storage: Callable[[torch.dtype, str, int], Tensor] | None, names: dict[str, None]):
        super().__init__(file, encoding="utf-8")
        self._storage, self._names = storage, names

    def find_class(self, module: str, name: str) -> Any:
        # A new object each time: an opcode can set attributes of it.
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return type(name, (Record,), {"dtype": _DTYPES[name]})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda *arguments: _tensor(*arguments)
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *rest: data
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):  # a tensor with attributes
            return lambda rebuild, kind, arguments, state: rebuild(*arguments)
        if (module, name) == ("torch", "Size"):
            return lambda sizes=(): tuple(sizes)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        self._names[f"{module}.{name}"] = None
        return type(name.rpartition(".")[2] or "Unnamed", (Record,), {"qualified_name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or not pid:
            raise ValueError(f"a reference of a form torch does not write: {str(pid)[:80]}")
        if pid[0] == "module" and len(pid) == 4:  # class, and its source as text
            return pid[1]
        if pid[0] != "storage" or self._storage is None:
            raise ValueError(f"a reference of a form torch does not write: {str(pid)[:80]}")
        kind, key, _, numel = pid[1:5]
        flat = self._storage(kind.dtype, str(key), int(numel))
        if len(pid) > 5 and pid[5] is not None:
            _, offset, size = pid[5]
            return flat[offset : offset + size]
        return flat


def _tensor(flat: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """A view of a storage; torch checks that it stays inside."""
    if not isinstance(flat, Tensor):
        raise ValueError("a tensor without a storage")
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    flat = flat.view(dtype) if dtype is not None else flat  # an untyped storage is bytes
    return torch.as_strided(flat, tuple(size), tuple(stride), int(offset))


def _read_zip(path: Path, names: dict[str, None]) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("not a file of torch.save: it has no data.pkl (a TorchScript archive is not read)")
        root = pickles[0].removesuffix("data.pkl")
        if entries.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("written on a big-endian machine, which is not read")
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
            if key not in storages:
                entry = entries.get(f"{root}data/{key}")
                if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"storage {key} is missing or compressed")
                raw = bytearray(archive.read(entry))
                storages[key] = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
            return storages[key].view(dtype)

        if entries[pickles[0]].compress_type != zipfile.ZIP_STORED:
            raise ValueError("data.pkl is compressed")
        return _Unpickler(io.BytesIO(archive.read(pickles[0])), storage, names).load()


def _read_legacy(path: Path, names: dict[str, None]) -> Any:
    """The format of torch before 1.6: pickles one after the other, then the bytes of each storage."""
    storages: dict[str, Tensor] = {}
    limit = path.stat().st_size

    def storage(dtype: torch.dtype, key: str, numel: int) -> Tensor:
        if key not in storages:
            if not 0 <= numel * dtype.itemsize <= limit:
                raise ValueError(f"storage {key} of {numel} elements is larger than the file")
            storages[key] = torch.empty(numel, dtype=dtype)
        return storages[key]

    with path.open("rb") as file:
        if _Unpickler(file, None, names).load() != _LEGACY_MAGIC:
            raise ValueError("not a file of torch.save")
        if _Unpickler(file, None, names).load() != _LEGACY_PROTOCOL:
            raise ValueError("of a version of torch.save that is not read")
        _Unpickler(file, None, names).load()  # about the machine
        content = _Unpickler(file, storage, names).load()
        for key in _Unpickler(file, None, names).load():
            (numel,) = struct.unpack("<q", file.read(8))
            flat = storages.get(str(key))
            if flat is None or numel != len(flat):
                raise ValueError(f"storage {key} has {numel} elements, the tensors need another number")
            raw = file.read(numel * flat.dtype.itemsize)
            if len(raw) != numel * flat.dtype.itemsize:
                raise ValueError(f"the file ends within storage {key}")
            if raw:
                flat.copy_(torch.frombuffer(bytearray(raw), dtype=flat.dtype))
    return content


def _walk(value: Any, name: str, above: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors below `value`; `above` are the containers around it, as a file can contain a cycle."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in above:
        return
    above = above | {id(value)}
    for key, inner in _children(value):
        yield from _walk(inner, f"{name}.{key}" if name and key else f"{name}{key}", above)


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Record):
        state = value.state
        if isinstance(state, Mapping) and any(part in state for part in _MODULE_PARTS):
            for part in _MODULE_PARTS:
                yield from _children(state.get(part) or {})
            return
        yield from ((str(key), inner) for key, inner in value.items.items())
        yield from ((str(at), inner) for at, inner in enumerate(value.elements))
        yield "", state
    elif isinstance(value, Mapping):
        yield from ((str(key), inner) for key, inner in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(at), inner) for at, inner in enumerate(value))
