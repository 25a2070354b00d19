"""One command writes every generated page."""

from __future__ import annotations

import runpy

import pytest

from launch.pages import backbones, configuration


def test_the_pages_are_written_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path):
    for module in (backbones, configuration):
        copy = tmp_path / module.PAGE.name
        copy.write_bytes(module.PAGE.read_bytes())
        monkeypatch.setattr(module, "PAGE", copy)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    runpy.run_module("launch.pages", run_name="__main__")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
