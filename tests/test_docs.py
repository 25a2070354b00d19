"""What the README and the pages point to is there: links, configurations, tests, modules, commands."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "after_demo.txt"]
HEADERS = sorted((ROOT / "configs").glob("*/*.yaml"))
FILES = re.compile(r"\b(?<!/)(?:configs/(?:pretrain|finetune|debug|results)|tests|benchmarks|docs|SLURM)/[\w./*{<-]+")
PLACEHOLDERS = re.compile(r"NAME|[*<{]|/[A-Z]\.yaml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", [*PAGES, *HEADERS], ids=lambda page: page.name)
def test_files_modules_and_commands_that_are_named_are_there(page: Path):
    text = page.read_text(encoding="utf-8")
    for named in FILES.findall(text):
        path = named.rstrip(".,")
        assert PLACEHOLDERS.search(path) or (ROOT / path).exists(), f"{page.name} names {path}"
    for module in re.findall(r"python -m ((?:pretrain|finetune|launch|benchmarks)[\w.]*)", text):
        assert find_spec(module.rstrip(".")) is not None, f"{page.name} runs {module}"
    for word in re.findall(r"^#?\s*fovea (\w+)\b(?!:)|`fovea (\w+)", text, re.MULTILINE):
        assert (word[0] or word[1]) in COMMANDS, f"{page.name} runs fovea {word}"


def test_no_command_is_given_in_the_form_that_runs_a_file_of_the_current_folder():
    for page in [*PAGES, *HEADERS, *(ROOT / "SLURM").iterdir()]:
        text = page.read_text(encoding="utf-8")
        given = re.findall(r"python3? -m (?:pretrain|finetune|launch)(?![\w.])", text)
        assert not given or page.name == "promises.md", page.name  # which says that it is not promised
        assert "-m fovea" not in text or "PYTHONSAFEPATH" in text or page.name == "promises.md", page.name


def test_the_design_page_has_a_line_for_every_folder():
    tree = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("```")[1]
    listed, path = set(), []
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        listed.add("/".join(path))
    packages = {
        str(file.parent.relative_to(ROOT))
        for package in ("fovea", "pretrain", "finetune", "launch")
        for file in (ROOT / package).rglob("*.py")
    }
    assert listed == packages | {"SLURM", "configs", "samples", "tests", "benchmarks"}
