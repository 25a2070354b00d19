"""Typed configuration: YAML plus `key.sub=value` overrides, validated by frozen pydantic models.

All problems are reported at once, by the key that the user wrote, with the nearest valid name. No torch here, so that
a typo is reported before torch is imported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.core.files import kind_of_special, read_text, write_text
from pretrain.core.text import has_control_characters, shown, shown_lines


class Config(BaseModel):
    """Base of every section: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ConfigError(ValueError):
    """A configuration that cannot run. `problems` holds one line per problem; the command line exits with 2."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{shown(source)}: {count}", *(f"  {shown_lines(problem)}" for problem in self.problems)]
        super().__init__("\n".join(lines))


Positive = Annotated[int, Field(gt=0)]
Precision = Literal["fp32", "bf16", "fp16"]
ConfigType = TypeVar("ConfigType", bound=Config)
ConfigSource = str | Path | Mapping[str, Any] | Config  # a YAML file, or its content


_HOME = re.compile(r"~[\w.-]*/")
_POWER = re.compile(r"[+-]?[\d_]+(\.\d*)?[eE]\+?\d+")
# What other tools call them -> keys of Fovea, of which those that a configuration has are suggested.
_OTHER_NAMES = {
    name: keys.split()
    for names, keys in {
        "learning_rate base_lr init_lr lr0 max_lr": "optim.lr optim.blr",
        "batch_size train_batch_size per_device_train_batch_size batch_size_per_gpu bs": "optim.global_batch_size",
        "epochs num_epochs max_epochs num_train_epochs n_epochs": "optim.epochs",
        "max_steps num_steps max_iters iterations total_iters": "optim.total_steps",
        "warmup num_warmup_steps warmup_iters": "optim.warmup_steps optim.warmup_epochs",
        "wd weight_decay_rate": "optim.weight_decay",
        "grad_clip max_grad_norm gradient_clip_val clip_norm max_norm": "optim.clip_grad",
        "workers n_workers num_data_workers dataloader_num_workers": "data.num_workers",
        "prefetch_factor": "data.prefetch",
        "accum_iter accumulate_grad_batches gradient_accumulation_steps grad_accum_steps": "engine.accumulation_steps",
        "amp fp16 bf16 mixed_precision dtype": "engine.precision",
        "output_dir out_dir save_dir work_dir log_dir exp_dir output out project": "run_dir",
        "data_path data_dir data_root dataset dataset_path train_dir": "data.shards data.train",
        "val_dir val_path": "data.val",
        "arch architecture backbone model_name": "model.name model.release",
        "image_size imgsz input_size img_sz resolution": "model.img_size",
        "pretrained weights checkpoint_path pretrained_weights resume_from": "init.release init.official model.release",
        "gpu gpus devices accelerator": "engine.device",
        "save_every save_freq save_steps save_interval": "checkpoint.every_steps",
        "log_every log_freq logging_steps log_interval print_freq": "log.every_steps",
    }.items()
    for name in names.split()
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses duplicate keys (YAML itself silently keeps the last one)."""


def _construct_unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key: Any = cast(Any, loader).construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            continue  # for instance an unfilled {{placeholder}}: refused below
        if key in seen:
            raise ConfigError("YAML", [f"{key}: given twice (line {key_node.start_mark.line + 1})"])
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_unique_mapping)


def load_config(model: type[ConfigType], given: ConfigSource, overrides: Sequence[str] = ()) -> ConfigType:
    """Read `given`, apply `key.sub=value` overrides in order, and validate as `model`.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong; one message lists all problems.
    """
    return validate(model, read_values(given, overrides), source=source_name(given))


def source_name(given: ConfigSource) -> str:
    """The name of a configuration in errors: its path, or "configuration"."""
    return str(given) if isinstance(given, str | Path) else "configuration"


def read_values(given: ConfigSource, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested mapping of a YAML file, a mapping or a configuration, overrides applied, not yet validated."""
    if isinstance(given, str | Path):
        values = _read_yaml(Path(given))
    else:
        values = given.model_dump(mode="json") if isinstance(given, Config) else deepcopy(dict(given))
    problems = [problem for override in overrides if (problem := _apply(values, override))]
    if problems:
        raise ConfigError(source_name(given), problems)
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        if path.is_dir():
            raise ConfigError(str(path), ["is a folder; give one of the YAML files in it"])
        if (kind := kind_of_special(path)) is not None:
            raise ConfigError(str(path), [f"is {kind}, not a regular file; write the configuration to a file"])
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.5)
        raise ConfigError(str(path), ["no such file" + (f" (did you mean {path.parent / near[0]}?)" if near else "")])
    try:
        values: Any = yaml.load(read_text(path), Loader=_UniqueKeyLoader) or {}
    except ConfigError as error:
        raise ConfigError(str(path), error.problems) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an invalid date, or not UTF-8
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from error
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"expected a mapping of sections, got {type(values).__name__}"])
    return cast(dict[str, Any], values)


def validate(model: type[ConfigType], values: dict[str, Any], *, source: str) -> ConfigType:
    """`values` as `model`, or a ConfigError naming `source` and every problem."""
    if problems := [f"{key}: control character in {text!r}; remove it" for key, text in _controlling(values)]:
        raise ConfigError(source, problems)
    values, problems = _with_homes(values), list[str]()
    for _ in range(2):
        try:
            return model.model_validate(values)
        except ValidationError as error:
            details = error.errors()
            problems = [line for detail in details for line in _sentences(model, values, detail)]
            if not any([_write_out(values, detail) for detail in details]):
                break
    raise ConfigError(source, problems)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, itself a valid input."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=110)


def write_values(path: Path | str, values: dict[str, Any], *, notes: Sequence[str] = ()) -> None:
    """Write `values` as YAML that `read_values` reads back, under comment lines `notes`."""
    head = "".join(f"# {shown(line)}\n" for line in notes)
    body = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)
    write_text(Path(path), head + body)


def _controlling(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every key and string with a control character, which could end a line of a script or of a log."""
    if isinstance(value, str) and has_control_characters(value):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in cast(dict[Any, Any], value).items():
            if isinstance(name, str) and has_control_characters(name):
                yield f"{key or 'config'}: key", name
            else:
                yield from _controlling(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in cast(list[Any], value):
            yield from _controlling(item, key)


def _with_homes(value: Any) -> Any:
    """A copy of `value` in which every string that begins with `~/` or `~USER/` has the path of that home instead.

    A shell expands neither those of a YAML file nor those of `key=~/...`.
    """
    if isinstance(value, str):
        return str(Path(value).expanduser()) if _HOME.match(value) else value
    if isinstance(value, dict):
        return {key: _with_homes(inner) for key, inner in cast(dict[Any, Any], value).items()}
    return [_with_homes(inner) for inner in cast(list[Any], value)] if isinstance(value, list) else value


def _write_out(values: dict[str, Any], detail: Any) -> bool:
    """Replace a text such as 1e3, which YAML 1.1 reads as no number, where an integer is expected; True if replaced."""
    text, *parts = detail["input"], *detail["loc"]
    if detail["type"] != "int_parsing" or not _POWER.fullmatch(str(text)) or not float(text).is_integer():
        return False
    node: Any = values
    for part in parts[:-1]:
        with suppress(KeyError, IndexError, TypeError):  # a part that is no key is the tag of a union
            node = node[part]
    node[parts[-1]] = int(float(text))
    return True


def _apply(values: dict[str, Any], override: str) -> str | None:
    """Set one `a.b=value` in place; the problem as text, or None."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f"{override}: expected key.sub=value"
    try:
        value = _override_value(text.strip())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return f"{override}: value is not valid YAML: {' '.join(str(error).split())}"
    node = values
    for part in parts[:-1]:
        child: Any = node.setdefault(part, {})
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            return f"{override}: {part} is a value, not a section"
        node = cast(dict[str, Any], child)
    node[parts[-1]] = value
    return None


def _override_value(text: str) -> Any:
    """The value of an override: a number, true, false, null, a quoted text, [...] or {...} of YAML, else `text` itself.

    So `#` is no comment and `: ` no mapping in a path.
    """
    if text.startswith(("[", "{", "'", '"')):
        return yaml.load(text, Loader=_UniqueKeyLoader)
    try:
        value: Any = None if " #" in text else yaml.safe_load(text) if text else None
    except (yaml.YAMLError, ValueError):
        return text
    return value if text in ("", "~") or isinstance(value, bool | int | float) or text.lower() == "null" else text


def _sentences(model: type[Config], values: dict[str, Any], detail: Any) -> list[str]:
    """One pydantic error as `key.sub: problem (remedy)`; a validator may report several, one per line."""
    location, kind = tuple(detail["loc"]), detail["type"]
    # A tagged union adds its tag to the path: (objective, mae, mask_ratio). The user never typed it.
    location = tuple(part for part in location if part not in _tags(model) or part in _keys_at(values, location))
    key = ".".join(str(part) for part in location) or "config"
    if kind == "extra_forbidden":
        if owners := _owners(model, detail["loc"]):
            own = next(str(part) for part in reversed(detail["loc"][:-1]) if part in _tags(model))
            return [f"{key}: is an option of {', '.join(owners)}, not of {own}; leave it out"]
        near = _nearest_keys(model, detail["loc"])
        return [f"{key}: unknown key" + (f" (did you mean {' or '.join(near)}?)" if near else "")]
    if kind == "union_tag_invalid":
        expected = [tag.strip().strip("'") for tag in detail["ctx"]["expected_tags"].split(",")]
        near = difflib.get_close_matches(str(detail["ctx"]["tag"]), expected, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return [f"{key}.name: unknown name {detail['ctx']['tag']!r}{hint}; one of {', '.join(expected)}"]
    if kind == "union_tag_not_found":
        return [f"{key}.name: missing; it chooses the {key}"]
    if kind == "missing":
        return [f"{key}: missing"]
    if kind in ("model_type", "model_attributes_type"):
        inside = list(dict.fromkeys(_valid_names(model, (*detail["loc"], ""))))
        hint = f"did you mean {key}.name={detail['input']}?" if "name" in inside else f"its keys: {', '.join(inside)}"
        return [f"{key}: is a section, got the value {detail['input']!r} ({hint})"]
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return [f"{key}: {line}" if location else line for line in message.splitlines()]
    return [f"{key}: {message}, got {detail['input']!r}"]


def _keys_at(values: Any, location: tuple[Any, ...]) -> set[Any]:
    """Every mapping key the user wrote along `location`."""
    keys: set[Any] = set()
    for part in location:
        if isinstance(values, dict):
            section = cast(dict[Any, Any], values)
            keys |= set(section)
            values = section.get(part, section)
    return keys


def sections_in(annotation: Any) -> Iterator[type[Config]]:
    """The Config classes inside an annotation: itself, a union, an Optional, an Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)


def _tags(model: type[Config]) -> set[str]:
    """Every `name` literal of the tagged unions below `model`."""
    tags: set[str] = set()
    for field in model.model_fields.values():
        sections = list(sections_in(field.annotation))
        for section in sections:
            tags |= _tags(section)
            if len(sections) > 1 and "name" in section.model_fields:
                tags |= set(get_args(section.model_fields["name"].annotation))
    return tags


def _owners(model: type[Config], location: tuple[Any, ...]) -> list[str]:
    """Names in the same tagged union as the section of the last part of `location` that have it as an option."""
    sections: list[type[Config]] = [model]
    union: list[type[Config]] = []
    for part in location[:-1]:
        tagged = [section for section in sections if part in _names(section)]
        union = sections if tagged else []
        sections = tagged or [
            inner
            for section in sections
            if part in section.model_fields
            for inner in sections_in(section.model_fields[part].annotation)
        ]
    with_option = (section for section in union if location[-1] in section.model_fields)
    return list(dict.fromkeys(name for section in with_option for name in _names(section)))


def _names(section: type[Config]) -> tuple[str, ...]:
    """The values of `name` that choose a section of a tagged union."""
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def _nearest_keys(model: type[Config], location: tuple[Any, ...]) -> list[str]:
    """Candidates for an unknown key: a similar one in its section, the same one in others, else a less similar one."""
    name, beside = str(location[-1]), _valid_names(model, location)
    paths = set(_paths(model))
    if known := [path for path in _OTHER_NAMES.get(name.lower().replace("-", "_"), ()) if path in paths]:
        return known
    if near := difflib.get_close_matches(name, beside, n=1, cutoff=0.75):
        return near
    endings = ("." + name, "_" + name) if "_" in name else ("." + name,)  # batch_size, global_batch_size
    elsewhere = sorted({path for path in _paths(model) if path.endswith(endings)})
    return elsewhere[:3] or difflib.get_close_matches(name, beside, n=1, cutoff=0.5)


def _paths(model: type[Config]) -> Iterator[str]:
    """Every key of `model`, recursively, by its full path."""
    for name, field in model.model_fields.items():
        yield name
        for section in sections_in(field.annotation):
            yield from (f"{name}.{path}" for path in _paths(section))


def _valid_names(model: type[Config], location: tuple[Any, ...]) -> list[str]:
    """The valid field names of the section that contains the last part of `location`."""
    sections: list[type[Config]] = [model]
    for part in location[:-1]:
        below = [s for section in sections if part in section.model_fields
                 for s in sections_in(section.model_fields[part].annotation)]  # fmt: skip
        tagged = [section for section in sections if part in _names(section)]
        sections = below or tagged or sections
    return [name for section in sections for name in section.model_fields]
