"""A configuration as YAML, with the reason of each choice above it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import yaml

from pretrain.core.text import shown

_WIDTH = 110


@dataclass(frozen=True)
class Choice:
    """A key ("task.head.anchors"), its value, and why it has it; "" where that needs no reason."""

    key: str
    value: Any
    why: str = ""


def with_overrides(choices: Sequence[Choice], overrides: dict[str, Any]) -> list[Choice]:
    """The choices, with values of the command line in place of theirs."""
    given = {choice.key: choice for choice in _leaves(overrides, "")}
    kept = [given.get(choice.key, choice) for choice in choices]
    return [*kept, *(given[key] for key in given.keys() - {choice.key for choice in kept})]


def values_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """The nested mapping of the choices."""
    values: dict[str, Any] = {}
    for choice in choices:
        *sections, key = choice.key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = deepcopy(choice.value)
    return values


def render(head: Sequence[str], choices: Sequence[Choice]) -> str:
    """YAML under comment lines `head`, keys in the order of the first choice of each section."""
    reasons = {choice.key: choice.why for choice in choices}
    return "".join(f"{line}\n" for line in (*_comments(head, ""), *_lines(values_of(choices), reasons, "", "")))


def _lines(values: dict[str, Any], reasons: dict[str, str], prefix: str, indent: str) -> Iterator[str]:
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in reasons or not isinstance(value, dict):
            yield from _comments([reasons[path]] if reasons.get(path) else [], indent)
            yield f"{indent}{key}: {_flow(value)}"
        else:
            yield f"{indent}{key}:"
            yield from _lines(cast(dict[str, Any], value), reasons, f"{path}.", indent + "  ")


def _comments(texts: Sequence[str], indent: str) -> Iterator[str]:
    for text in texts:
        if text.startswith("  "):  # a command
            yield f"{indent}# {shown(text)}"
            continue
        for line in textwrap.wrap(shown(text), _WIDTH - len(indent), break_long_words=False, break_on_hyphens=False):
            yield f"{indent}# {line}"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=2**20, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[Choice]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            yield Choice(f"{prefix}{key}", value, "Given on the command line.")
