"""Names of the classes, and their numbers in the user's files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.predictions import Classes

FILE = "classes.json"


def read_classes(path: Path | str) -> Classes:
    """A json of classes: a list of names, {"0": name, ...}, or {"classes": [{"id": 0, "name": name}, ...]}.

    Raises:
        ValueError: it is none of these, or two classes have one name or one number.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid json: {error}") from error
    pairs = _pairs(found)
    if not pairs:
        raise ValueError(
            f'{path}: no classes; expected a list of names, {{"0": name}} or {{"classes": [{{"id", "name"}}]}}'
        )
    pairs.sort()
    for which, values in (("number", [str(number) for number, _ in pairs]), ("name", [name for _, name in pairs])):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: the {which} {', '.join(twice[:5])} is used by two classes")
    return Classes([name for _, name in pairs], [number for number, _ in pairs])


def numbered(count: int) -> Classes:
    """Classes with numbers and no names."""
    return Classes([str(number) for number in range(count)])


def _pairs(found: Any) -> list[tuple[int, str]]:
    if isinstance(found, dict) and "classes" in found:
        found = found["classes"]
    if isinstance(found, dict) and all(key.lstrip("-").isdigit() for key in found):
        return [(int(key), str(name)) for key, name in found.items()]
    if not isinstance(found, list):
        return []
    if all(isinstance(item, str) for item in found):
        return list(enumerate(found))
    if all(isinstance(item, dict) and isinstance(item.get("id"), int) and "name" in item for item in found):
        return [(item["id"], str(item["name"])) for item in found]
    return []
