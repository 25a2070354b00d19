"""Checkpoints of other projects; the kind of a file is recognized by its parameter names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pretrain.models.importers import distilled, masked
from pretrain.models.importers.files import read_state
from pretrain.models.importers.huggingface import huggingface
from pretrain.models.importers.names import CLASSIFIER, is_vit, square_grid, take, to_vit
from pretrain.models.importers.weights import State, Weights, some

AVERAGES = ("model_ema.", "state_dict_ema.", "ema.")  # of the weights, next to them, as BEiT, timm and others save
KNOWN = "MAE, DINO, iBOT, DINOv2, DINOv3, BEiT, VQ-KD, MoCo v3, SimMIM, I-JEPA, data2vec, timm and Hugging Face ViTs"


def load_official(path: Path | str) -> Weights:
    """Read a checkpoint file and find out by its names what it is.

    Raises:
        ValueError: the file is missing or unreadable, holds more than tensors and plain values, or is of no known kind.
    """
    path = Path(path)
    state = read_state(path)
    for form in FORMS:
        try:
            found = form(dict(state), path)
        except (KeyError, IndexError) as error:
            what = form.__name__.strip("_")
            raise ValueError(f"{path}: an incomplete checkpoint ({what}): it has no {error}") from error
        if found is not None:
            return replace(found, grid=square_grid(found.backbone))
    raise ValueError(f"{path}: not a checkpoint we know ({KNOWN}); its first keys are {some(sorted(state))}")


def _backbone(state: State, source: object) -> Weights | None:
    """A vision transformer alone, or with a classifier."""
    if all(name.startswith("backbone.") for name in state):
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    if not is_vit(state):
        return None
    left_out = take(state, *CLASSIFIER, "mask_token", "masked_embed", "lm_head.", *AVERAGES)
    if "norm.weight" not in state and "fc_norm.weight" in left_out:
        raise ValueError(
            f"{source}: fine-tuned with mean pooling: it has fc_norm, and no norm of the backbone's tokens, which "
            "every use of a backbone here needs"
        )
    return Weights("vit", to_vit(state, source), {}, left_out=tuple(left_out))


# The first that recognizes a state reads it; it may empty its copy.
FORMS: tuple[Callable[[State, object], Weights | None], ...] = (
    huggingface,
    distilled.ijepa,
    distilled.mocov3,
    distilled.dino,
    distilled.dinov2,
    masked.vqkd,
    masked.simmim,
    masked.mae,
    masked.beit,
    _backbone,
)
