"""A checkpoint file as tensors by name; nothing in it is executed."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.models.importers.weights import State, some
from pretrain.models.release.manifest import check_file


class Inert:
    """Replaces an object that is not a weight (a configuration, a path, a NumPy number). It does nothing."""

    def __init__(self, *arguments: Any):
        del arguments

    def __setstate__(self, state: Any) -> None:
        del state


# What replaces the class or function of this name in a file.
STAND_INS = [
    (Inert, "argparse.Namespace"),
    (Inert, "pathlib.PosixPath"),
    (Inert, "numpy.core.multiarray.scalar"),
    (Inert, "numpy._core.multiarray.scalar"),
    (Inert, "numpy.dtype"),
    (OrderedDict, "yacs.config.CfgNode"),  # of SimMIM
]

# Keys under which trainers save the weights, and parts that wrappers add to names.
CONTAINERS = ("model", "state_dict", "module")
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module"})
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")
NOT_WEIGHTS = ("optimizer", "optim", "opt", "scaler", "lr_scheduler", "scheduler", "fp16_scaler", "loss_scaler")


def read_state(path: Path) -> State:
    """Every weight in the file by one name; those of several models of a checkpoint have its key before their names.

    {"model": state} and the like give the names of the state, {"student": ..., "teacher": ...} give student.* and
    teacher.*; what DDP, FSDP, torch.compile and activation checkpointing add to names is removed.

    Raises:
        ValueError: the file is missing, unreadable or not the one that a manifest of Fovea next to it records, holds
            more than tensors and plain values, or no state dict.
    """
    content = _read(path)
    state: State = {}
    container = next((key for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
    if container is not None:
        _add(state, "", content[container], path)
    elif any(isinstance(value, Tensor) for value in content.values()):
        _add(state, "", content, path)
        content = {}
    for key, value in content.items():
        nested = isinstance(value, Mapping) and key != container and key not in NOT_WEIGHTS
        if nested and any(isinstance(inner, Tensor) for inner in value.values()):
            _add(state, f"{key}.", value, path)
    if not state:
        names = some([str(name) for name in content]) or "(it is empty)"
        raise ValueError(f"{path}: not a state dict; these entries are not tensors: {names}")
    return state


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {_short(error)}") from error


def clean(name: str) -> str:
    """The name without what wrappers add: parts anywhere, "module" at the start or after the key of a model."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(part for at, part in enumerate(parts) if part != "module" or at > 1)


def _add(state: State, prefix: str, content: Mapping[Any, Any], path: Path) -> None:
    other = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if other or not content:
        where = f"{prefix.removesuffix('.')} is " if prefix else ""
        raise ValueError(
            f"{path}: {where}not a state dict; these entries are not tensors: {some(other) or '(it is empty)'}"
        )
    for name, tensor in content.items():
        new = clean(f"{prefix}{name}")
        if new in state:
            raise ValueError(f"{path}: two entries are named {new} once the names of wrappers are removed")
        state[new] = tensor


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the file in it that holds the weights")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    check_file(path)
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path))
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path}: not a readable checkpoint, damaged or cut off: {type(error).__name__}: {_short(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items()}


def _refusal(path: Path, message: str) -> str:
    """Where torch's reader of tensors and plain values stopped; its advice to execute the file is left out."""
    cause = " ".join(message.partition("WeightsUnpickler error:")[2].split())
    if found := _FOREIGN.search(cause):
        return (
            f"{path}: refused, it holds a {found[1]}, which is no tensor and no plain value; nothing in it was "
            "executed. Save the state_dict alone where it was made"
        )
    cause = cause.partition(" Check the documentation")[0] or _short(message)
    return f"{path}: not a checkpoint of tensors and plain values; nothing in it was executed ({cause[:300]})"


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]
