"""Every objective, by its debug configuration on samples/: killed at any moment, it ends bitwise the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pretrain.objectives import OBJECTIVES
from tests.runs import ROOT, check_resume, finish, short

pytestmark = pytest.mark.processes

DEBUG = ROOT / "configs" / "debug"
STEPS = 8
Releases = Callable[[str], Path]
SHORT = short(STEPS)
RELEASE = re.compile(r"runs/debug_(\w+)/release")  # of another objective's debug run


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    """The release of an objective, made when first asked for."""
    made: dict[str, Path] = {}

    def release(objective: str) -> Path:
        if objective not in made:
            run_dir = tmp_path_factory.mktemp("first") / objective
            status, said = finish(DEBUG / f"{objective}.yaml", f"run_dir={run_dir}", *settings(objective, release))
            assert status == 0, said
            made[objective] = run_dir / "release"
        return made[objective]

    return release


def settings(objective: str, release: Releases) -> list[str]:
    """The debug configuration's settings, shortened, and the releases that it reads."""
    section = yaml.safe_load((DEBUG / f"{objective}.yaml").read_text())["objective"]
    given = {key: json.dumps(value) if isinstance(value, list) else str(value) for key, value in section.items()}
    read = {key: RELEASE.sub(lambda found: str(release(found[1])), value) for key, value in given.items()}
    return [*SHORT, *(f"objective.{key}={value}" for key, value in read.items() if value != given[key])]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(objective: str, releases: Releases, tmp_path: Path):
    config, options = DEBUG / f"{objective}.yaml", settings(objective, releases)
    check_resume(config, options, tmp_path, steps=STEPS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_debug_configuration_is_of_its_objective_and_says_how_to_run_it(objective: str):
    text = (DEBUG / f"{objective}.yaml").read_text()
    assert yaml.safe_load(text)["objective"]["name"] == objective
    assert f"fovea pretrain configs/debug/{objective}.yaml" in text
