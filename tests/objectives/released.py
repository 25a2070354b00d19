"""Small releases that some objectives read: tokenizers and teachers with random weights, made once for each shape."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.vit import ViT
from pretrain.models.release.folder import write_release
from pretrain.models.tokenizers.dvae import Codes, ConvEncoder
from pretrain.models.tokenizers.quantizer import task_layer

NUM_TOKENS, CODE_DIM = 16, 4
Size = tuple[int, int]
_FOLDER = tempfile.TemporaryDirectory(prefix="fovea-test-releases-")


def reads(name: str, size: Size, in_chans: int) -> dict[str, Any]:
    """What the configuration of objective `name` needs beside its settings, for patches of 8 px."""
    if name == "beit":
        return {"tokenizer": dvae_release((size[0] // 2, size[1] // 2), 4, in_chans)}
    if name == "beit2":
        return {"tokenizer": vqkd_release(size, 8, in_chans)}
    if name == "vqkd":
        return {"teacher": vit_release(size, 8, in_chans)}
    if name == "distill":
        weights = vit_release(size, 8, in_chans)
        return {"teachers": [{"weights": weights}, {"weights": weights, "patch_weight": 0.0}]}
    return {}


@functools.cache
def dvae_release(size: Size, patch_size: int, in_chans: int, seed: int = 3) -> str:
    """A release of `dvae`."""
    torch.manual_seed(seed)
    encoder = ConvEncoder(size, patch_size, in_chans, 8)
    codes = Codes(encoder, NUM_TOKENS, CODE_DIM)
    torch.nn.init.normal_(codes.to_logits.weight)
    state = {f"codes.{name}": tensor for name, tensor in codes.state_dict().items()}
    return _write(encoder, f"dvae-{seed}", state)


@functools.cache
def vqkd_release(size: Size, patch_size: int, in_chans: int) -> str:
    """A release of `vqkd`: what a tokenizer needs of it."""
    torch.manual_seed(4)
    vit = _vit(size, patch_size, in_chans)
    task = task_layer(vit.embed_dim, CODE_DIM)
    for layer in (task[0], task[2]):
        torch.nn.init.normal_(layer.weight)
    state = {f"encode_task_layer.{name}": tensor for name, tensor in task.state_dict().items()}
    state["quantize.codebook"] = torch.nn.functional.normalize(torch.randn(NUM_TOKENS, CODE_DIM), dim=1)
    return _write(vit, "vqkd", state)


@functools.cache
def vit_release(size: Size, patch_size: int, in_chans: int) -> str:
    """A release of a ViT that any objective could have made."""
    torch.manual_seed(5)
    vit = _vit(size, patch_size, in_chans)
    return _write(vit, "mae", {})


def _vit(size: Size, patch_size: int, in_chans: int) -> ViT:
    return ViT(size, patch_size, in_chans, 16, 1, 2, 2.0, pos_embed="learned")


def _write(backbone: ImageEncoder, title: str, state: dict[str, Any]) -> str:
    folder = Path(_FOLDER.name) / "-".join([title, *map(str, backbone.img_size), str(backbone.in_chans)])
    stats = {"mean": (0.5,) * backbone.in_chans, "std": (0.25,) * backbone.in_chans}
    return str(
        write_release(folder, backbone, objective=title.partition("-")[0], extra_state=state, record={}, **stats)
    )
