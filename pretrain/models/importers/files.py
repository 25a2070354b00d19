"""A checkpoint file as tensors by name; nothing in it is executed."""

from __future__ import annotations

import builtins
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pretrain.core.files import check_regular
from pretrain.models.importers.safe_pickle import Record, read_object
from pretrain.models.importers.weights import State, some
from pretrain.models.release.manifest import check_file


class Inert:
    """Replaces an object that is not a weight (a configuration, a path, a NumPy number). It does nothing.

    state: what the file gives the object, for an `argparse.Namespace` its values by name.
    """

    state: Any = None

    def __init__(self, *arguments: Any):
        del arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


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
NOT_WEIGHTS = (
    *("optimizer", "optim", "opt", "scaler", "lr_scheduler", "scheduler", "fp16_scaler", "loss_scaler"),
    *("optimizer_states", "lr_schedulers", "callbacks", "loops", "hyper_parameters", "hparams"),  # Lightning
    *("datamodule_hyper_parameters", "message_hub", "meta", "param_schedulers"),  # and mmengine
)
_SETTINGS = ("args", "hyper_parameters", "hparams")  # of the training, where trainers save them
# Modules of Python whose objects trainers save as data. Others reach the system: a file that names them was made to.
_DATA_MODULES = {"argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "functools"}
_DATA_MODULES |= {"logging", "operator", "pathlib", "random", "re", "types", "typing", "uuid", "_codecs"}


class StateFile(NamedTuple):
    """Every weight of a file, the classes of the objects next to them, which were not made, and the settings of the
    training by name."""

    state: State
    foreign: tuple[str, ...]
    settings: dict[str, Any]


def read_state(path: Path) -> State:
    """The weights of `read_file`."""
    return read_file(path).state


def read_file(path: Path) -> StateFile:
    """Every weight in the file by one name; those of several models of a checkpoint have its key before their names.

    {"model": state} and the like give the names of the state, {"student": ..., "teacher": ...} give student.* and
    teacher.*; what DDP, FSDP, torch.compile and activation checkpointing add to names is removed. Objects of classes
    (the callbacks and settings that Lightning and mmengine save) are skipped: no class of a file is imported.

    Raises:
        ValueError: the file is missing, unreadable or not the one that a manifest of Fovea next to it records, holds
            no state dict, or names functions of Python that reach the system.
    """
    content, foreign = _read(path)
    state: State = {}
    settings = _settings(content)
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
        if saved := next((value for value in content.values() if isinstance(value, Record)), None):
            raise ValueError(_refused(path, saved.qualified_name))
        names = some([str(name) for name in content]) or "(it is empty)"
        raise ValueError(f"{path}: not a state dict; these entries are not tensors: {names}")
    return StateFile(state, foreign, settings)


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        check_regular(path)
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file: {_short(error)}") from error


def clean(name: str) -> str:
    """The name without what wrappers add: parts anywhere, "module" at the start or after the key of a model."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(part for at, part in enumerate(parts) if part != "module" or at > 1)


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Values next to the weights that are no tensors and no states, and those within `args` and the like."""
    found = {key: value for key, value in content.items() if key in ("arch", "config")}
    for key in _SETTINGS:
        value = content.get(key)
        inner = value.state if isinstance(value, Inert | Record) else value
        if isinstance(inner, Mapping):
            found = {str(name): setting for name, setting in inner.items()} | found
    return found


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


def _read(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content by key, and the classes of objects in it that were not made."""
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the file in it that holds the weights")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    check_file(path)
    if path.suffix == ".safetensors":
        return dict(read_safetensors(path)), ()
    foreign: tuple[str, ...] = ()
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = " ".join(str(error).partition("WeightsUnpickler error:")[2].split())
        if not _FOREIGN.search(cause):
            cause = cause.partition(" Check the documentation")[0] or _short(error)
            raise ValueError(
                f"{path}: not a checkpoint of tensors and plain values; nothing in it was executed ({cause[:300]})"
            ) from error
        content, foreign = read_object(path)
        if reaching := next(filter(_reaches_the_system, foreign), None):
            raise ValueError(_refused(path, reaching)) from error
        foreign = tuple(name for name in foreign if name.partition(".")[0] not in sys.stdlib_module_names)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(
            f"{path}: not a readable checkpoint, damaged or cut off: {type(error).__name__}: {_short(error)}"
        ) from error
    if isinstance(content, Record):
        raise ValueError(_refused(path, content.qualified_name))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items()}, foreign


def _reaches_the_system(name: str) -> bool:
    """Whether a name of a pickle is of Python itself and no data: os.system, builtins.eval."""
    module, _, attribute = name.rpartition(".")
    if module in ("builtins", "__builtin__"):  # the second is its name in older pickles
        return not isinstance(getattr(builtins, attribute, None), type) and attribute != "getattr"
    root = module.partition(".")[0]
    return root in sys.stdlib_module_names and root not in _DATA_MODULES


def _refused(path: Path, name: str) -> str:
    return (
        f"{path}: refused, it holds a {name}, which is no tensor and no plain value; nothing in it was "
        "executed. Save the state_dict alone where it was made"
    )


def _short(error: object) -> str:
    return " ".join(str(error).split())[:300]
