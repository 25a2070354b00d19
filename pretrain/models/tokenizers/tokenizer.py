"""Tokenizers, from images to visual tokens: releases of `dvae` or `vqkd`, DALL-E's encoder, official VQ-KD weights.

A tokenizer is frozen, computes in fp32, and reads images in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.core.configlib import ConfigError
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import load_strict
from pretrain.models.importers.facts import facts_of, recipe
from pretrain.models.importers.files import read_safetensors
from pretrain.models.importers.safe_pickle import read_tensors
from pretrain.models.importers.weights import Weights, not_finite
from pretrain.models.release.folder import Release, read_release
from pretrain.models.teachers.frozen import Fingerprint, Frozen, digest_of
from pretrain.models.tokenizers.dalle import STRIDE, DalleEncoder
from pretrain.models.tokenizers.dvae import Codes, ConvEncoder
from pretrain.models.tokenizers.quantizer import code_features, nearest, task_layer

Grid = tuple[int, int]
KEY = "objective.tokenizer"
RELEASED = ("dvae", "vqkd")  # the objectives that train a tokenizer


class Tokenizer(Frozen):
    """Images to tokens.

    Attributes:
        num_tokens: size of the vocabulary. in_chans: channels of the images. stride: side of a token in pixels.
        fixed_grid: the only supported grid, or None.
    """

    encoder: Any
    num_tokens: int
    in_chans: int
    stride: int
    fixed_grid: Grid | None = None

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Images in [0, 1], [b, C, H, W] -> token of every patch, int64 [b, N], row-major."""
        with torch.autocast(images.device.type, enabled=False):
            return self.ids(images.float()).flatten(1)

    def ids(self, images: Tensor) -> Tensor:
        """fp32 images -> int64 [b, h, w]."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor | None:
        """Tokens int64 [b, h, w] -> images in [0, 1]; None if the tokenizer has no decoder."""
        del ids
        return None


class Normalized(Tokenizer):
    """A tokenizer whose network reads normalized images. `mean` and `std` are per channel of [0, 1] pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Any, std: Any):
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def shares(self, normalized: Tensor) -> Tensor:
        """Normalized images [b, C, H, W] -> fraction of patches with each token, fp32 [b, num_tokens]."""
        ids = self.tokens(normalized * self.std + self.mean)
        return torch.zeros(len(ids), self.num_tokens, device=ids.device).scatter_add_(
            1, ids, torch.full(ids.shape, 1 / ids.shape[1], device=ids.device)
        )


class DVAETokenizer(Normalized):
    """The most likely code of every patch."""

    def __init__(self, encoder: ConvEncoder, codes: Codes, mean: Any, std: Any):
        super().__init__(mean, std)
        self.num_tokens, self.stride, self.in_chans = len(codes.codebook.weight), encoder.patch_size, encoder.in_chans
        self.encoder, self.codes = encoder, codes
        self.hold(self.encoder)
        self.hold(self.codes)

    def ids(self, images: Tensor) -> Tensor:
        return self.codes.to_logits(self.encoder.map(self.normalize(images))).argmax(1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, enabled=False):
            return (self.codes.decode(ids) * self.std + self.mean).clamp(0, 1)


class VQKDTokenizer(Normalized):
    """The code nearest to the projected feature of every patch."""

    def __init__(self, encoder: ImageEncoder, task: nn.Module, codebook: Tensor, mean: Any, std: Any):
        super().__init__(mean, std)
        self.num_tokens, self.stride, self.in_chans = len(codebook), encoder.patch_size, encoder.in_chans
        self.fixed_grid = cast(Grid, tuple(encoder.grid_size))
        self.encoder, self.task = encoder, task
        self.register_buffer("codebook", codebook.float(), persistent=False)
        self.hold(self.encoder)
        self.hold(self.task)

    def ids(self, images: Tensor) -> Tensor:
        features = code_features(self.encoder, self.task, self.normalize(images))
        features = nn.functional.normalize(features, dim=-1)
        ids = nearest(features.flatten(0, 1), cast(Tensor, self.codebook))
        return ids.view(len(images), *(side // self.stride for side in images.shape[2:]))


class DalleTokenizer(Tokenizer):
    """DALL-E's encoder (Ramesh et al. 2021), the tokenizer of the first BEiT."""

    stride = STRIDE

    def __init__(self, state: Mapping[str, Tensor]):
        super().__init__()
        self.encoder = DalleEncoder.like(state)
        load_strict(self.encoder, state)
        self.num_tokens, self.in_chans = len(state["blocks.output.conv.w"]), state["blocks.input.w"].shape[1]
        self.hold(self.encoder)

    def ids(self, images: Tensor) -> Tensor:
        return self.encoder(images).argmax(1)


def open_tokenizer(path: Path | str, *, size: Grid, grid: Grid, in_chans: int) -> tuple[Tokenizer, Fingerprint]:
    """The tokenizer at `path`, and its fingerprint.

    Args:
        path: release folder of `dvae` or `vqkd`, file of DALL-E's encoder, file of official VQ-KD weights.
        size: (height, width) in pixels of its input images. grid: the required tokens, (rows, columns).

    Raises:
        ConfigError: it is none of these, or its tokens do not fit the grid or the images.
    """
    path = Path(path)
    try:
        digest = digest_of(path)
        tokenizer = from_release(read_release(path)) if path.is_dir() else from_tensors(_read(path))
    except ValueError as error:
        raise ConfigError(KEY, str(error).splitlines()) from error
    problems = []
    given = (size[0] // tokenizer.stride, size[1] // tokenizer.stride)
    if any(side % tokenizer.stride for side in size) or given != grid:
        right = tuple(side * tokenizer.stride for side in grid)
        problems.append(
            f"{path} has one token per {tokenizer.stride} x {tokenizer.stride} px, so images of {size[0]} x "
            f"{size[1]} px give {given[0]} x {given[1]} tokens, but the model has {grid[0]} x {grid[1]} patches; "
            f"set objective.tokenizer_size: [{right[0]}, {right[1]}]"
        )
    if tokenizer.fixed_grid not in (None, grid):
        rows, columns = cast(Grid, tokenizer.fixed_grid)
        problems.append(
            f"{path} was trained on {rows} x {columns} tokens, but the model has {grid[0]} x {grid[1]} patches; "
            "choose model.img_size and model.patch_size with that grid, or train a tokenizer for this one"
        )
    if tokenizer.in_chans != in_chans:
        problems.append(f"{path} reads {tokenizer.in_chans} channels, model.in_chans is {in_chans}")
    if problems:
        raise ConfigError(KEY, problems)
    return tokenizer, Fingerprint(KEY, path, digest)


def from_release(release: Release, *, trained: bool = True) -> Normalized:
    """A tokenizer trained by Fovea; or the same architecture with random initial weights.

    Raises:
        ValueError: the release is of another objective, or incomplete.
    """
    heads, record = release.heads, release.record
    norm = record["mean"], record["std"]
    if release.kind not in RELEASED:
        raise ValueError(
            f"a release of {release.kind} is no tokenizer; train one with objective {' or '.join(RELEASED)}"
        )
    encoder = release.build() if trained else release.untrained()
    if release.kind == "dvae":
        num_tokens, dim = heads["codes.codebook.weight"].shape
        encoder = cast(ConvEncoder, encoder)
        codes = Codes(encoder, num_tokens, dim)
        if trained:
            load_strict(codes, _below(heads, "codes."))
        return DVAETokenizer(encoder, codes, *norm)
    codebook = heads["quantize.codebook"]
    task = task_layer(encoder.embed_dim, codebook.shape[1])
    if trained:
        load_strict(task, _below(heads, "encode_task_layer."))
    else:
        codebook = nn.functional.normalize(torch.randn_like(codebook), dim=-1)
    return VQKDTokenizer(encoder, task, codebook, *norm)


def from_tensors(state: Mapping[str, Tensor]) -> Tokenizer:
    """A published tokenizer, identified by the names of its weights.

    Raises:
        ValueError: the names are not those of a known tokenizer, or the weights do not fit.
    """
    if "blocks.input.w" in state and "blocks.output.conv.w" in state:
        return DalleTokenizer(state)
    if "encode_task_layer.0.weight" in state and "quantize.embedding.weight" in state:
        encoder = {name.replace("fc_norm.", "norm."): tensor for name, tensor in _below(state, "encoder.").items()}
        facts = facts_of("vqkd", encoder, encoder, {})
        vit = ViT(**recipe(Weights("vqkd", encoder, {}, facts=facts)))
        load_strict(vit, encoder)
        codebook = state["quantize.embedding.weight"]
        task = task_layer(vit.embed_dim, codebook.shape[1])
        load_strict(task, _below(state, "encode_task_layer."))
        half = [0.5] * vit.in_chans  # trained on pixels in [-1, 1]
        return VQKDTokenizer(vit, task, codebook, half, half)
    raise ValueError(
        f"not a known tokenizer (DALL-E's encoder, VQ-KD); the first names are {', '.join(sorted(state)[:6])}"
    )


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; of a training checkpoint, those of its model."""
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    if broken := not_finite(state):
        raise ValueError(f"{path}: the weights cannot be used: {broken}")
    for part in ("model.", "state_dict."):
        if any(name.startswith(part) for name in state):
            return _below(state, part)
    return state


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
