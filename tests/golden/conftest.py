from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.case import discover

OWN_CASES = Path(__file__).parent / "cases"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=None, help="folder of golden cases (default: tests/golden/cases)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        given = metafunc.config.getoption("--golden-dir", default=None)
        paths = discover(Path(given) if given else OWN_CASES)
        marks = {path: [pytest.mark.processes] if "_2proc" in path.stem else [] for path in paths}
        metafunc.parametrize("golden_case", [pytest.param(path, id=path.stem, marks=marks[path]) for path in paths])
