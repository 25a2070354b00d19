"""The package itself: every public name is there, and typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fovea

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", fovea.__all__)
def test_every_public_name_is_there_and_documented(name: str):
    assert name in dir(fovea)
    assert getattr(fovea, name).__doc__
    assert f"`{name}" in (ROOT / "docs" / "api.md").read_text() or f"fovea.{name}" in (ROOT / "docs/api.md").read_text()


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        _ = fovea.lod  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("package", ["fovea", "pretrain", "finetune", "launch"])
def test_the_packages_say_that_they_are_typed(package: str):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/api.md", "docs/backbones.md"])
def test_names_of_the_package_that_pages_use_are_public(page: str):
    used = set(re.findall(r"\bfovea\.([A-Za-z_]\w*)", (ROOT / page).read_text(encoding="utf-8")))
    assert used <= {*fovea.__all__, "json"}
