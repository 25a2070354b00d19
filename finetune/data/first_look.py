"""A few examples of each set are read before a run starts: what fails there would fail on every process later."""

from __future__ import annotations

import numpy as np

from finetune.data.examples import BadExample, Examples
from pretrain.core.configlib import ConfigError

LOOKED_AT = 16
_UNLUCKY = 1 / 8  # share of a few examples that may be unusable by chance


def look(examples: Examples, limit: float, *, source: str) -> None:
    """Read up to LOOKED_AT examples, evenly spaced; those that cannot be used become findings.

    Args:
        limit: `data.max_bad_fraction`.

    Raises:
        ConfigError: a larger share of them than `limit`, and than one in eight, cannot be used.
    """
    places: list[int] = np.linspace(0, len(examples) - 1, min(LOOKED_AT, len(examples))).astype(int).tolist()
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
