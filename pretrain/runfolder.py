"""The run's folder: what it says about the run, and whether a configuration may go on with it."""

from __future__ import annotations

import json
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

from pretrain.config import Plan, PretrainConfig
from pretrain.configlib import ConfigError, dump, load_config
from pretrain.record import git_commit, versions, write_json, write_text

# What may change when a run goes on: where things are and how fast they go, not what is learnt from what.
FREE_KEYS = (
    *("run_dir", "engine", "checkpoint", "log", "probe", "doctor", "init"),
    *("data.shards", "data.index", "data.num_workers", "data.prefetch"),
)


def check_same_run(config: PretrainConfig, fingerprint: str) -> None:
    """Compare with the configuration and the data that the folder was started with, if it was.

    Raises:
        ConfigError: a key that decides the result is different; every such key with both values.
    """
    folder = Path(config.run_dir)
    if not (folder / "config.yaml").exists():
        return
    # Through the schema: a key that is new since then had its default.
    before = _flat(load_config(PretrainConfig, folder / "config.yaml").model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    problems = [
        f"{key}: the run was started with {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(free + ".") for free in FREE_KEYS)
    ]
    started_on = json.loads((folder / "data.json").read_text(encoding="utf-8"))["fingerprint"]
    if started_on != fingerprint:
        problems.append(f"data.shards: other data (fingerprint {fingerprint[:12]}, the run has {started_on[:12]})")
    if problems:
        way_out = "choose another run_dir (init.checkpoint starts from this run's weights), or undo the change"
        raise ConfigError(f"{folder} cannot go on with this configuration", [*problems, way_out])


def write_records(config: PretrainConfig, steps: Plan, *, fingerprint: str, device: str) -> None:
    """config.yaml and data.json of the run, and one line in environment.jsonl for each start. Rank 0 calls this."""
    folder = Path(config.run_dir)
    write_json(folder / "data.json", {"fingerprint": fingerprint, "num_samples": steps.num_samples})
    write_text(folder / "config.yaml", dump(config))
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "world_size": steps.world_size,
        "device": device,
        "commit": git_commit(),
        "versions": versions(),
    }
    with (folder / "environment.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        key: value for name, part in values.items() for key, value in _flat(part, f"{prefix}.{name}".strip(".")).items()
    }
