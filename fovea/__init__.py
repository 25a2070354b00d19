"""Fovea from Python: load backbones and tasks, extract features, open shards, start runs, read metrics.

Importing this package imports no torch; the first use of a name does. Every name is documented in docs/api.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fovea.weights import load as load
    from pretrain.probes.extract import FeatureExtractor as FeatureExtractor
    from pretrain.probes.extract import ImageFeatures as ImageFeatures

_HOMES = {
    "load": "fovea.weights",
    "FeatureExtractor": "pretrain.probes.extract",
    "ImageFeatures": "pretrain.probes.extract",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fovea' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
