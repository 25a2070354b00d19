"""Checks of text that is written to a script, a log or a terminal."""

from __future__ import annotations

import unicodedata

# Control characters, and the two line separators: characters that a shell, a log or a terminal interprets.
_ACTS = frozenset({"Cc", "Zl", "Zp"})


def has_control_characters(text: str) -> bool:
    """Whether `text` contains a control character or a line separator (Unicode categories Cc, Zl, Zp)."""
    return any(unicodedata.category(character) in _ACTS for character in text)
