"""Fovea from Python: load backbones and tasks, extract features, open shards, start runs, read metrics.

Importing this package imports no torch; the first use of a name does. Every name is documented in docs/api.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.config import FinetuneConfig as FinetuneConfig
    from finetune.config import ModelSource as ModelSource
    from finetune.predictor import Predictor as Predictor
    from fovea.runs import Run as Run
    from fovea.runs import finetune as finetune
    from fovea.runs import pretrain as pretrain
    from fovea.shards import open_shards as open_shards
    from fovea.tasks import load_task as load_task
    from fovea.weights import load as load
    from pretrain.config import PretrainConfig as PretrainConfig
    from pretrain.core.configlib import ConfigError as ConfigError
    from pretrain.data.loader.samples import Sample as Sample
    from pretrain.data.loader.samples import Samples as Samples
    from pretrain.engine.session.session import RunError as RunError
    from pretrain.probes.extract import FeatureExtractor as FeatureExtractor
    from pretrain.probes.extract import ImageFeatures as ImageFeatures

_HOMES = {
    "load": "fovea.weights",
    "FeatureExtractor": "pretrain.probes.extract",
    "ImageFeatures": "pretrain.probes.extract",
    "ModelSource": "finetune.config",
    "open_shards": "fovea.shards",
    "Samples": "pretrain.data.loader.samples",
    "Sample": "pretrain.data.loader.samples",
    "pretrain": "fovea.runs",
    "finetune": "fovea.runs",
    "Run": "fovea.runs",
    "PretrainConfig": "pretrain.config",
    "FinetuneConfig": "finetune.config",
    "ConfigError": "pretrain.core.configlib",
    "RunError": "pretrain.engine.session.session",
    "load_task": "fovea.tasks",
    "Predictor": "finetune.predictor",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fovea' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
