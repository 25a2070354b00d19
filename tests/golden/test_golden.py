from __future__ import annotations

from pathlib import Path

from tests.golden.dispatch import run


def test_equals_the_official_code(golden_case: Path):
    run(golden_case)
