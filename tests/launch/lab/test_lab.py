"""The fault laboratory: a slice of its kinds holds, and each goes red once the protection it tests is removed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launch.lab.command import Laboratory, main
from launch.lab.kinds import GUARDED_BY, KINDS, Kind
from launch.lab.kinds.limits import can_mount
from launch.lab.plants import PROTECTIONS
from launch.lab.results import read_results, write_tables
from launch.lab.trial import Trial
from launch.lab.verdicts import EXECUTED, FAILED, HELD, SILENT, BrokenPromiseError, Result

# A second or two each; the others start many processes.
SLICE = (
    *("kill", "kill-call", "power", "sigterm", "twice", "no-space", "file-size", "photo-bit", "index-bit", "shard-cut"),
    *(
        "shard-missing",
        "checkpoint",
        "checkpoints",
        "lost",
        "log",
        "release",
        "nan",
        "yaml-tags",
        "misspelt",
        "control",
    ),
    *("pipe", "pickle", "names", "special", "boxes", "unknown-ids", "not-json"),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("lab"))


@pytest.mark.processes
def test_a_trial_of_each_cheap_kind_holds_and_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--faults", ",".join(SLICE), "--out", str(tmp_path), "--seed", "7"]
    status = main(words)
    said = capsys.readouterr().out
    assert status == 0, said
    results = read_results(tmp_path)
    assert {result.kind for result in results} == set(SLICE)
    assert main(words) == 0
    assert read_results(tmp_path) == results, "trials that have ended are not repeated"
    assert "| kill | SIGKILL at a random moment |" in (tmp_path / "table.md").read_text()


@pytest.mark.processes
@pytest.mark.parametrize(("protection", "kind"), [(p, k) for p, kinds in GUARDED_BY.items() for k in kinds])
def test_without_a_protection_its_kind_does_not_hold(laboratory: Laboratory, protection: str, kind: str):
    plants = [["without", protection]]
    verdicts = (laboratory.run(kind, number, 0, plants).verdict for number in range(12))
    assert any(verdict in (FAILED, SILENT) for verdict in verdicts)


def broken(trial: Trial) -> None:
    raise BrokenPromiseError(str(trial.rng.random()), SILENT)


def test_a_verdict_says_what_happened_and_a_replay_is_the_same_trial(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    for name, trial in {"canary": lambda trial: trial.canary.touch(), "broken": broken}.items():
        monkeypatch.setitem(KINDS, name, Kind("a fault", "a promise", trial))
    assert laboratory.run("canary", 0, 0).verdict == EXECUTED
    first, again, other = (laboratory.run("broken", number, 5) for number in (1, 1, 2))
    assert first.verdict == SILENT and first.why == again.why != other.why


def test_a_small_disk_that_a_killed_laboratory_left_is_unmounted(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    if not can_mount():
        pytest.skip("needs the right to mount")
    disk = laboratory.place / "left-0-0" / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], check=True)
    monkeypatch.setitem(KINDS, "left", Kind("a fault", "a promise", lambda trial: None))
    assert laboratory.run("left", 0, 0).verdict == HELD
    assert not disk.parent.exists() and str(disk) not in Path("/proc/self/mounts").read_text()


def test_every_protection_has_kinds_that_depend_on_it():
    assert set(GUARDED_BY) == set(PROTECTIONS)
    assert {kind for kinds in GUARDED_BY.values() for kind in kinds} <= set(KINDS)
    assert len(KINDS) >= 31


def test_tables_show_texts_of_unknown_origin_and_a_cut_line_is_dropped(tmp_path: Path):
    why = "\x1b[2J<script>alert(1)</script>|x"
    results = [Result("kill", 0, 3, HELD, "", 1.0), Result("shell", 4, 3, EXECUTED, why, 2.0)]
    write_tables(tmp_path, results, {"kill": ("SIGKILL", "the same end"), "shell": ("$()", "never executed")})
    page, table = (tmp_path / "table.html").read_text(), (tmp_path / "table.md").read_text()
    assert "<script" not in page and "\x1b" not in page + table
    assert "shell:4:3" in table.replace("\\", "") and "\\|x" in table
    line = json.dumps({"kind": "kill", "number": 0, "seed": 3, "verdict": HELD, "why": "", "seconds": 1.0})
    (tmp_path / "results.jsonl").write_text(f"{line}\n{line[:20]}")
    assert read_results(tmp_path) == results[:1]


@pytest.mark.parametrize("words", [["--faults", "kil"], [], ["--out", "x", "--replay", "kill:1"]])
def test_wrong_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2
