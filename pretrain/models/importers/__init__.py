"""Checkpoints of other projects, by strict matching: nothing is skipped silently, nothing in a file is executed.

Read, from pickles of tensors and plain values or from safetensors, and recognized by parameter names: checkpoints of
MAE, DINO, iBOT, DINOv2, BEiT and BEiT v2, MoCo v3, SimMIM, I-JEPA and data2vec, complete or the backbone alone, and
backbones of timm, DINOv3 and Hugging Face.
"""

from __future__ import annotations

from pretrain.models.importers.official import load_official
from pretrain.models.importers.safe_pickle import read_tensors
from pretrain.models.importers.strict import load_strict
from pretrain.models.importers.weights import Grid, MatchReport, State, Weights

__all__ = ["Grid", "MatchReport", "State", "Weights", "load_official", "load_strict", "read_tensors"]
