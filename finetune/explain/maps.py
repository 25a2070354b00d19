"""Maps of what an answer depends on, one number for each cell of the image: the table of methods.

attention              of the last layer, or of the one asked for, mean over its heads
rollout                the product of all layers' attention (Abnar & Zuidema 2020); the same for every class
relevance              attention times its gradient for the answer, through all layers (Chefer et al. 2021)
occlusion              the fall of the score when a window is blurred (Zeiler & Fergus 2014, section 4.2)
integrated_gradients   gradients on the way from the blurred image (Sundararajan et al. 2017), by captum
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.explain.subjects import Aim, Grid, Subject
from pretrain.models.explain.recording import attention_layers, recorded_attention
from pretrain.models.explain.rollout import relevance, rollout

WINDOWS = 8  # a side, of occlusion
IG_STEPS, IG_AT_ONCE = 32, 8


class NotExplainableError(ValueError):
    """A method cannot explain this network; the message says why."""


@dataclass(frozen=True)
class Method:
    """What computes a map, float32 [b, *cells]: (subject, images [b, C, h, w], aims, attention layer or None) -> it.

    needs_attention: it reads attention layers. whole_image: of the network's answer as a whole, not of one class.
    """

    compute: Callable[[Subject, Tensor, Sequence[Aim], str | None], Tensor]
    needs_attention: bool
    words: str


def attention_of(subject: Subject, images: Tensor, aims: Sequence[Aim]) -> dict[str, Tensor]:
    """The attention of the backbone's layers for `images`, by name, without gradients."""
    with recorded_attention(subject.backbone) as maps, torch.no_grad():
        subject.scores(images, aims)
        return dict(maps)


def read_rows(subject: Subject, maps: Tensor, aims: Sequence[Aim]) -> Tensor:
    """Attention [b, h, t, s] of b images -> what its readers see of each patch, [b, h, N].

    They are the class token; without it the patches of the detected box or of the explained pixels, or else all.

    Raises:
        NotExplainableError: the layer does not attend from tokens to the patches of the whole image.
    """
    count, (t, s) = _patch_count(subject, maps.shape[-1]), maps.shape[2:]
    if t not in (1, s) or len(maps) != len(aims):
        raise NotExplainableError("it attends within windows or to pooled tokens, not between the patches of an image")
    prefix = s - count
    if subject.reads_token or t == 1:
        return maps[:, :, 0, prefix:]
    rows = torch.stack([_readers(subject, aim) for aim in aims]).to(maps)
    return torch.einsum("bn,bhns->bhs", rows, maps[:, :, prefix:])[:, :, prefix:]


def on_grid(subject: Subject, values: Tensor) -> Tensor:
    """Values of the patches [b, N] -> of the cells [b, rows, columns]."""
    tokens = subject.tokens
    assert tokens is not None
    return to_cells(values.unflatten(1, tokens), subject.cells)


def to_cells(values: Tensor, cells: Grid) -> Tensor:
    """Maps [b, h, w] of any size -> [b, *cells]: means of smaller pixels, or interpolated between larger ones."""
    if tuple(values.shape[1:]) == cells:
        return values.float()
    if values.shape[1] >= cells[0] and values.shape[2] >= cells[1]:
        return F.adaptive_avg_pool2d(values[:, None].float(), cells)[:, 0]
    return F.interpolate(values[:, None].float(), size=cells, mode="bilinear", align_corners=False)[:, 0]


def lacking(subject: Subject, method: str) -> str | None:
    """Why `method` cannot explain this subject; None: it can, as far as one sees without computing it."""
    if METHODS[method].needs_attention and (not attention_layers(subject.backbone) or subject.tokens is None):
        return f"{type(subject.backbone).__name__} ({subject.backbone.title}) has no attention between patches"
    if method == "integrated_gradients":
        try:
            import captum  # pyright: ignore[reportMissingImports]  # noqa: F401
        except ModuleNotFoundError:
            return 'captum is not installed: pip install "fovea[explain]", or pip install captum'
    return None


def _attention(subject: Subject, images: Tensor, aims: Sequence[Aim], layer: str | None) -> Tensor:
    with recorded_attention(subject.backbone) as maps, torch.no_grad():
        subject.scores(images, aims)
    chosen = maps.get(layer) if layer is not None else list(maps.values())[-1]
    if chosen is None:
        raise NotExplainableError(f"{layer} is not computed for this answer")
    return on_grid(subject, read_rows(subject, chosen, aims).mean(1))


def _rollout(subject: Subject, images: Tensor, aims: Sequence[Aim], layer: str | None) -> Tensor:
    with recorded_attention(subject.backbone) as maps, torch.no_grad():
        subject.scores(images, aims)
    shares = _chained(subject, rollout, [_square(m) for m in maps.values()])
    return on_grid(subject, read_rows(subject, shares[:, None], aims)[:, 0])


def _relevance(subject: Subject, images: Tensor, aims: Sequence[Aim], layer: str | None) -> Tensor:
    """The row of the class token, as in the official code, or the mean of the patches' rows, without their own columns.

    Where the answer has a place in the image, each token of the last block counts as much as the answer reads of it:
    the positive part of token times gradient.
    """
    tokens: list[Tensor] = []
    with recorded_attention(subject.backbone) as maps, torch.enable_grad(), _outputs_of_blocks(subject, tokens):
        # The images require the gradient, so that frozen networks have one too.
        score = subject.scores(images.detach().requires_grad_(True), aims, logits=True).sum()
        recorded = list(maps.values())
        wanted = [*recorded, *tokens[-1:]]
        found = torch.autograd.grad(score, wanted, allow_unused=True)
    gradients = [torch.zeros_like(m) if g is None else g for m, g in zip(wanted, found, strict=True)]
    squares = [[_square(m.detach()) for m in group[: len(recorded)]] for group in (recorded, gradients)]
    total = _chained(subject, relevance, *squares)
    prefix = total.shape[1] - _patch_count(subject, total.shape[1])
    placed = all(subject.place_of(aim) is not None for aim in aims)
    if not placed or not tokens or tokens[-1].shape[1] != total.shape[1]:
        own = total - torch.eye(total.shape[1], device=total.device)
        return on_grid(subject, read_rows(subject, own[:, None], aims)[:, 0])
    read = (gradients[-1] * tokens[-1].detach()).sum(-1).clamp(min=0)
    read = read / read.sum(1, keepdim=True).clamp(min=1e-30)
    return on_grid(subject, torch.einsum("bt,bts->bs", read, total)[:, prefix:])


def _occlusion(subject: Subject, images: Tensor, aims: Sequence[Aim], layer: str | None) -> Tensor:
    """Windows of whole cells, at most `WINDOWS` a side, are replaced by the blurred image."""
    rows, columns = (_edges(cells, length) for cells, length in zip(subject.cells, subject.size, strict=True))
    falls = images.new_zeros(len(images), len(rows) - 1, len(columns) - 1)
    with torch.no_grad():
        blurred, whole = subject.substrate(images), subject.scores(images, aims)
        for i, (top, bottom) in enumerate(pairwise(rows)):
            for j, (left, right) in enumerate(pairwise(columns)):
                hidden = images.clone()
                hidden[:, :, top:bottom, left:right] = blurred[:, :, top:bottom, left:right]
                falls[:, i, j] = whole - subject.scores(hidden, aims)
    return to_cells(falls, subject.cells)


def _integrated_gradients(subject: Subject, images: Tensor, aims: Sequence[Aim], layer: str | None) -> Tensor:
    from captum.attr import IntegratedGradients  # pyright: ignore[reportMissingImports]

    found = []
    for image, blurred, aim in zip(images, subject.substrate(images), aims, strict=True):

        def score(some: Tensor, aim: Aim = aim) -> Tensor:
            return subject.scores(some, [aim] * len(some), logits=True)

        with torch.enable_grad():
            given: dict[str, Any] = {"n_steps": IG_STEPS, "internal_batch_size": IG_AT_ONCE}
            found.append(IntegratedGradients(score).attribute(image[None], baselines=blurred[None], **given)[0])
    return to_cells(torch.stack(found).detach().sum(1), subject.cells)


def _chained(subject: Subject, combine: Callable[..., Tensor], *maps: Sequence[Tensor]) -> Tensor:
    for values in maps[0]:
        _patch_count(subject, values.shape[-1])
    try:
        return combine(*maps)
    except ValueError as error:
        raise NotExplainableError(str(error)) from error


def _square(values: Tensor) -> Tensor:
    """[b, h, 1, s], of a last block that computes the class token only, as the first row of zeros [b, h, s, s]."""
    return values if values.shape[2] != 1 else F.pad(values, (0, 0, 0, values.shape[3] - 1))


def _readers(subject: Subject, aim: Aim) -> Tensor:
    """How much each patch [N] belongs to what was explained, summing to 1: of all patches where it is no place."""
    grid = subject.tokens
    assert grid is not None
    area = subject.place_of(aim)
    shares = torch.ones(grid) if area is None else F.adaptive_avg_pool2d(area[None, None].float().cpu(), grid)[0, 0]
    return (shares / shares.sum().clamp(min=1e-12)).flatten()


@contextmanager
def _outputs_of_blocks(subject: Subject, outputs: list[Tensor]) -> Iterator[None]:
    """Inside it the tokens [b, s, D] after each block are appended to `outputs`, in the order of computation."""
    blocks = subject.backbone.trunk.blocks if "layers" in subject.backbone.provides else ()
    add: Any = outputs.append
    hooks = [block.register_forward_hook(lambda _, __, out: add(out)) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _patch_count(subject: Subject, tokens: int) -> int:
    assert subject.tokens is not None
    count = subject.tokens[0] * subject.tokens[1]
    if tokens != count + subject.backbone.num_prefix_tokens:
        raise NotExplainableError(
            f"a layer attends between {tokens} elements, not the {count} patches of an image and its "
            f"{subject.backbone.num_prefix_tokens} prefix tokens"
        )
    return count


def _edges(cells: int, length: int) -> list[int]:
    """Edges in pixels of the windows along a side: each of equally many cells but the last."""
    each = -(-cells // WINDOWS)
    return [round(min(cell, cells) * length / cells) for cell in range(0, cells + each, each)]


METHODS: dict[str, Method] = {
    "attention": Method(_attention, True, "attention of one layer"),
    "rollout": Method(_rollout, True, "the product of all layers' attention"),
    "relevance": Method(_relevance, True, "attention times gradient, through all layers"),
    "occlusion": Method(_occlusion, False, "fall of the score when a window is blurred"),
    "integrated_gradients": Method(_integrated_gradients, False, "gradients from the blurred image to the image"),
}
