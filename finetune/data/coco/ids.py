"""Ids and numbers of COCO files as other tools write them: "1" and 1.0 are 1."""

from __future__ import annotations

from typing import Any


def integer(value: Any) -> int | None:
    """An id that is an integer of 64 bits, as a number or as text; None if it is none."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or int(value) != float(value):
            return None
        number = int(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 2**63 else None


def image_id(value: Any) -> int | str | None:
    """The id of an image: text that is not plainly a number ("007", "a") remains text; None if it is neither."""
    number = integer(value)
    if number is not None and (not isinstance(value, str) or value == str(number)):
        return number
    return value if isinstance(value, str) else None


def flag(value: Any) -> bool:
    """iscrowd: 1, 1.0, "1", true."""
    return integer(value) == 1 if not isinstance(value, bool) else value
