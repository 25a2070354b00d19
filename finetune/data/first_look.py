"""A few examples of each set are read before a run starts: what fails there would fail on every process later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from finetune.data.examples import BadExample, Examples
from pretrain.core.configlib import ConfigError
from pretrain.core.images import ValueRange
from pretrain.data.depths import measure_values

LOOKED_AT = 16
_UNLUCKY = 1 / 8  # share of a few examples that may be unusable by chance


def look_at_depth(examples: Examples, value_range: ValueRange | None, *, source: str) -> None:
    """Refuse images of more than 8 bits that 8 bits would crush.

    Raises:
        ConfigError: there is no `data.range`, and up to LOOKED_AT files that were measured need one.
    """
    places = _places(examples)

    def files() -> Iterator[bytes]:
        for place in places:
            with suppress(BadExample):
                yield examples.file(place)

    deep = measure_values(files(), looked=len(places)) if value_range is None else None
    if deep is not None and deep.needs_range:
        way_out = f"set it to keep their bits, for instance data.range={deep.suggested}"
        raise ConfigError(source, [f"data.range: missing; {deep}; {way_out}"])


def look(examples: Examples, limit: float, *, source: str) -> None:
    """Read up to LOOKED_AT examples, evenly spaced; those that cannot be used become findings.

    Args:
        limit: `data.max_bad_fraction`.

    Raises:
        ConfigError: a larger share of them than `limit`, and than one in eight, cannot be used.
    """
    places = _places(examples)
    bad: list[BadExample] = []
    for place in places:
        try:
            _ = examples[place]
        except BadExample as error:
            bad.append(error)
            examples.findings.add("unusable example", error.name, "", error.reason)
    if len(bad) > max(limit, _UNLUCKY) * len(places):
        text = f"{len(bad)} of {len(places)} examples that were looked at cannot be used"
        raise ConfigError(source, [f"{text} (data.max_bad_fraction={limit:g})", *map(str, bad[:3])])


def _places(examples: Examples) -> list[int]:
    return np.linspace(0, len(examples) - 1, min(LOOKED_AT, len(examples))).astype(int).tolist()
