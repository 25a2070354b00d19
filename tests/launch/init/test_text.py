"""Choices become YAML that is read back, with their reasons above them."""

from __future__ import annotations

import yaml

from launch.init.text import Choice, render, values_of, with_overrides

CHOICES = [
    Choice("run_dir", "runs/a: b"),
    Choice("task.head", {"name": "upernet", "width": 64}, "Reads four maps."),
    Choice("model.release", "#1"),
    Choice("task.crop", [64, 96], "Because\nof \x1b[31m " + "many words " * 20),
]


def test_what_is_written_is_read_back_with_comments_that_end_no_line():
    text = render(["A head.", "  fovea " + "x " * 80], CHOICES)
    assert (
        yaml.safe_load(text)
        == values_of(CHOICES)
        == {
            "run_dir": "runs/a: b",
            "task": {"head": {"name": "upernet", "width": 64}, "crop": [64, 96]},
            "model": {"release": "#1"},
        }
    )
    assert text.startswith("# A head.\n") and "  # Reads four maps.\n  head: {name: upernet, width: 64}\n" in text
    assert "\x1b" not in text and max(map(len, text.splitlines()[2:])) <= 112


def test_values_of_the_command_line_replace_those_of_a_choice_or_are_added():
    chosen = with_overrides(CHOICES, {"task": {"crop": 32, "head": {"width": 8}}, "seed": 1})
    values = values_of(chosen)
    assert values["task"] == {"head": {"name": "upernet", "width": 8}, "crop": 32} and values["seed"] == 1
    assert CHOICES[1].value["width"] == 64
