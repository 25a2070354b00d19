"""The run's folder: the records in it, and the check that a configuration may resume its run."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from pretrain.core.configlib import Config, ConfigError, dump, read_values, validate
from pretrain.core.files import write_json, write_text
from pretrain.core.record import git_commit, versions

METRICS, ALARMS = "metrics.jsonl", "doctor.jsonl"

# (section, key) -> what a run did before the key existed, where it is not the default.
_BEFORE = {("data", "orientation"): "stored"}


def check_same_run(
    folder: Path,
    config: Config,
    fingerprints: Mapping[str, str],
    *,
    free: Collection[str],
    way_out: str = "choose another run_dir, or undo the change",
) -> None:
    """Compare with the configuration and the data of the run in `folder`, if there is one.

    Args:
        fingerprints: of the data sets, by their key in the configuration.
        free: keys or sections that may change when a run resumes, as they affect paths and speed but not the result.

    Raises:
        ConfigError: keys that affect the result differ; each is listed with both values.
    """
    if not (folder / "config.yaml").exists():
        return
    started = validate(type(config), run_values(folder), source=str(folder / "config.yaml"))
    before = flat(started.model_dump(mode="json"))
    now = flat(config.model_dump(mode="json"))
    problems = [
        f"{key}: the run was started with {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    started_on = _fingerprints(read_data(folder), fingerprints)
    problems += [
        f"{key}: the data differ (fingerprint {fingerprint[:12]}, that of the run is {started_on[key][:12]})"
        for key, fingerprint in fingerprints.items()
        if started_on[key] != fingerprint
    ]
    if problems:
        raise ConfigError(f"{folder} cannot resume with this configuration", [*problems, way_out])


def run_values(folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """config.yaml of the run in `folder`, `overrides` applied, not yet validated.

    A key that is newer than the run has the value that the run was trained with.
    """
    path = folder / "config.yaml"
    return _as_the_run(read_values(path, overrides), read_values(path))


def as_resumed(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a configuration; keys that are newer than a run in its `run_dir` are added as that run had them."""
    run_dir = values.get("run_dir")
    path = Path(run_dir) / "config.yaml" if isinstance(run_dir, str) and run_dir else None
    return _as_the_run(values, read_values(path)) if path is not None and path.is_file() else values


def _as_the_run(values: dict[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `_BEFORE` that neither `run` nor they have."""
    found = dict(values)
    for (section, key), before in _BEFORE.items():
        given, of_run = found.get(section), run.get(section)
        if isinstance(given, dict) and isinstance(of_run, dict) and key not in given and key not in of_run:
            found[section] = {**cast(dict[str, Any], given), key: before}
    return found


def write_records(folder: Path, config: Config, data: Mapping[str, Any], *, world_size: int, device: str) -> None:
    """config.yaml and data.json of the run, and one line in environment.jsonl per start. Call on rank 0 only.

    Args:
        data: "fingerprint" and "num_samples" of the data; or a mapping with both for each data set, by its key.
    """
    write_json(folder / "data.json", data)
    write_text(folder / "config.yaml", dump(config))
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "folder": str(Path.cwd()),
        "command": shlex.join(sys.argv),
        "world_size": world_size,
        "device": device,
        "commit": git_commit(),
        "versions": versions(),
    }
    with (folder / "environment.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def read_data(folder: Path) -> dict[str, Any]:
    """The run's data.json. Raises ConfigError when it is missing or damaged."""
    try:
        return json.loads((folder / "data.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(folder), [f"data.json: {error}; it identifies the run's data, copy it too"]) from error


def last_start(folder: Path) -> dict[str, Any]:
    """The last complete line of the run's environment.jsonl. Raises ConfigError when there is none."""
    path = folder / "environment.jsonl"
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        with suppress(ValueError, RecursionError):
            return json.loads(line)
    raise ConfigError(str(folder), ["environment.jsonl: missing or empty; it records how the run was started"])


def started_in(folder: Path) -> Path:
    """The folder that relative paths of the run's configuration are of: where it was last started, if that is on this
    machine; else the current one."""
    try:
        recorded = last_start(folder).get("folder")
    except ConfigError:
        return Path()
    return Path(recorded) if isinstance(recorded, str) and Path(recorded).is_dir() else Path()


def located(values: dict[str, Any], keys: Collection[str], home: Path) -> dict[str, Any]:
    """A copy of `values`, whose relative paths under `keys` ("data.shards"; also in lists) are those of `home`."""
    for key in keys:
        values = _located(values, key.split("."), home)
    return values


def _located(value: Any, parts: Sequence[str], home: Path) -> Any:
    if isinstance(value, list):
        return [_located(item, parts, home) for item in cast(list[Any], value)]
    if isinstance(value, dict) and parts:
        section = cast(dict[str, Any], value)
        return {name: _located(item, parts[1:], home) if name == parts[0] else item for name, item in section.items()}
    return str(home / value) if isinstance(value, str) and not parts and "://" not in value else cast(Any, value)


def _fingerprints(data: Mapping[str, Any], wanted: Collection[str]) -> dict[str, str]:
    """Fingerprints in data.json, by key."""
    if "fingerprint" in data:
        return {key: data["fingerprint"] for key in wanted}
    return {key: data.get(key, {}).get("fingerprint", "") for key in wanted}


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: value
        for name, part in cast(dict[str, Any], values).items()
        for key, value in flat(part, f"{prefix}.{name}".strip(".")).items()
    }
