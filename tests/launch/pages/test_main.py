"""One command writes every generated page."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.pages.__main__ import DOCS, PAGES, main, outdated


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for name in PAGES:
        (tmp_path / name).write_bytes((DOCS / name).read_bytes())
    return tmp_path


def test_every_generated_page_is_up_to_date():
    assert not outdated(), "run python -m launch.pages"
    assert main(["--check"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("backbones.md", "| own ViT |"), ("configuration.md", "| `run_dir` |")])
def test_an_outdated_page_is_named_and_written_again(
    name: str, part: str, docs: Path, capsys: pytest.CaptureFixture[str]
):
    page = docs / name
    current = page.read_text(encoding="utf-8")
    page.write_text(current.replace(part, "| ? |", 1), encoding="utf-8")
    changed = page.read_bytes()
    assert main(["--check"], docs) == 1
    assert f"{page} is out of date; run python -m launch.pages" in capsys.readouterr().err
    assert page.read_bytes() == changed
    assert main([], docs) == 0
    assert page.read_text(encoding="utf-8") == current and main(["--check"], docs) == 0
