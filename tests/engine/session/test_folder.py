"""May a run's folder be resumed with a configuration?"""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.core.configlib import Config, ConfigError
from pretrain.engine.session.folder import as_resumed, check_same_run, run_values, write_records


class Log(Config):
    every: int = 1


class Data(Config):
    shards: str = "a"
    orientation: str = "exif"


class Settings(Config):
    run_dir: str = ""
    log: Log = Log()
    log_base: int = 2
    rate: float = 0.1
    data: Data = Data()


def started(folder: Path) -> Path:
    write_records(folder, Settings(), {"fingerprint": "a" * 64, "num_samples": 3}, world_size=1, device="cpu")
    return folder


def test_a_free_section_frees_its_keys_and_no_key_that_begins_like_it(tmp_path: Path):
    folder, data = started(tmp_path), {"data": "a" * 64}
    check_same_run(folder, Settings(log=Log(every=5)), data, free=("log",))
    with pytest.raises(ConfigError) as caught:
        check_same_run(folder, Settings(log_base=3, rate=1.0), data, free=("log",))
    assert caught.value.problems[:2] == [
        "log_base: the run was started with 2, now 3",
        "rate: the run was started with 0.1, now 1.0",
    ]


def test_other_data_are_refused_and_so_is_a_record_that_is_cut_short(tmp_path: Path):
    folder = started(tmp_path)
    with pytest.raises(ConfigError, match="data: the data differ"):
        check_same_run(folder, Settings(), {"data": "b" * 64}, free=())
    (folder / "data.json").write_text('{"finger')
    with pytest.raises(ConfigError, match=r"data\.json: "):
        check_same_run(folder, Settings(), {"data": "a" * 64}, free=())


def test_a_run_older_than_a_key_keeps_what_it_did(tmp_path: Path):
    folder, data = started(tmp_path), {"data": "a" * 64}
    new = {"run_dir": str(folder), "data": {"shards": "a"}}
    assert as_resumed(new) == new  # this run knows the key
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(", orientation: exif", ""))
    assert run_values(folder)["data"] == {"shards": "a", "orientation": "stored"}
    assert as_resumed(new)["data"]["orientation"] == "stored"
    check_same_run(folder, Settings(data=Data(orientation="stored")), data, free=("run_dir",))
    with pytest.raises(ConfigError, match=r"data\.orientation: the run was started with 'stored', now 'exif'"):
        check_same_run(folder, Settings(), data, free=("run_dir",))
    given = {"run_dir": str(folder), "data": {"orientation": "exif"}}
    assert as_resumed(given) == given
