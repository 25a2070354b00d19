"""The network that `fovea probe` measures: a release or an official checkpoint, and the same network untrained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD, Orientation, ValueRange
from pretrain.data.loader.eval_images import EvalImages
from pretrain.data.shards.dataset import Dataset
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.sizes import SIZES
from pretrain.models.backbones.vit import ViT
from pretrain.models.importers import Grid, load_official, load_strict
from pretrain.models.importers.facts import recipe
from pretrain.models.importers.weights import some
from pretrain.models.release.folder import Release, backbone_of, read_release
from pretrain.models.tokenizers.tokenizer import RELEASED, Normalized, from_release
from pretrain.probes.features import Features, backbone_features

# Initial positions of an untrained network of the kind; the weights contain a table only.
_FIXED_POSITIONS = {"mae": "sincos", "mocov3": "sincos_rows_first", "ijepa": "sincos"}

# Size and patch of a network in pixels -> the size of the images it reads.
Sizing = Callable[[tuple[int, int], int | None], tuple[int, int]]


class Network(nn.Module):
    """Normalized images [b, C, H, W] -> features of a backbone; of a tokenizer also "tokens" [b, K], the share of the
    patches that have each token."""

    def __init__(self, backbone: ImageEncoder, tokenizer: Normalized | None = None):
        super().__init__()
        self.backbone, self.tokenizer = backbone, tokenizer

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        features = backbone_features(self.backbone, images)
        if self.tokenizer is None:
            return features
        return features | {"tokens": self.tokenizer.shares(images)}


@dataclass(frozen=True)
class Subject:
    """`network` is in eval mode; `untrained(seed)` builds it with initial weights. size: (h, w) in pixels.

    frames, stride: of clips, those it was trained on; 0: it reads images.

    orientation, value_range: how the photos are read, for a release as those it was trained on. lines: what was changed
    in the weights to read them.
    """

    title: str
    network: Network
    untrained: Callable[[int], Network]
    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    orientation: Orientation = "exif"
    value_range: ValueRange | None = None
    frames: int = 0
    stride: int = 1
    lines: tuple[str, ...] = ()

    def images(
        self,
        shards: str | Sequence[str],
        *,
        resize: int | None = None,
        batch_size: int = 256,
        max_samples: int | None = None,
        num_workers: int = 0,
    ) -> EvalImages:
        """Labelled images or clips as the network reads them; see `EvalImages`."""
        return EvalImages(
            Dataset.open(shards),
            self.size,
            in_chans=self.in_chans,
            mean=self.mean,
            std=self.std,
            batch_size=batch_size,
            resize=resize,
            orientation=self.orientation,
            value_range=self.value_range,
            frames=self.frames,
            stride=self.stride,
            max_samples=max_samples,
            num_workers=num_workers,
        )


def open_release(folder: Path, size: Sizing | None = None) -> Subject:
    """A folder written by `fovea release`.

    Args:
        size: of the images, from the size and the patch of the network; default: its own.

    Raises:
        ValueError: it is no release, or is damaged.
    """
    release = read_release(folder)
    chosen = _chosen(release, size)

    def network(*, trained: bool) -> Network:
        tokenizer = from_release(release, trained=trained) if release.kind in RELEASED else None
        backbone = tokenizer.encoder if tokenizer else _resized(release, chosen, trained=trained)
        return Network(backbone, tokenizer)

    trained = network(trained=True)
    backbone = trained.backbone
    return Subject(
        title=f"{release.kind}, {folder}",
        network=trained.eval(),
        untrained=_seeded(lambda: network(trained=False)),
        size=backbone.img_size,
        in_chans=backbone.in_chans,
        mean=tuple(release.record["mean"]),
        std=tuple(release.record["std"]),
        orientation=recorded_orientation(release.record),
        value_range=recorded_range(release.record),
        frames=release.model.get("num_frames", 0),
        stride=release.record.get("recipe", {}).get("objective", {}).get("frame_stride", 1),
    )


def _chosen(release: Release, size: Sizing | None) -> tuple[int, int]:
    own = release.model["img_size"]
    chosen = own if size is None else size(own, release.model.get("patch_size"))
    if chosen != own and release.kind in RELEASED:
        raise ValueError(f"a tokenizer reads images of its own size, {own[0]} x {own[1]} px")
    return chosen


def _resized(release: Release, size: tuple[int, int], *, trained: bool) -> ImageEncoder:
    """The backbone of a release for images of `size`; its position tables are resampled."""
    if size == release.model["img_size"]:
        return release.build() if trained else release.untrained()
    backbone = backbone_of({**release.model, "img_size": size})
    if trained:
        load_strict(backbone, release.backbone, grid=release.grid, pos_resize=release.pos_resize)
    return backbone


def open_official(
    path: Path, size: Sizing | None = None, *, prefix: str | None = None, grid: Grid | None = None
) -> Subject:
    """A checkpoint of an official code or of timm, with ImageNet's mean and standard deviation.

    Args:
        size: see `open_release`. prefix, grid: see `load_official`.

    Raises:
        ValueError: it is no ViT of a known size.
    """
    weights = load_official(path, prefix=prefix, grid=grid)
    facts, first = weights.facts, weights.backbone.get("patch_embed.proj.weight")
    if facts is not None and first is not None:
        width, depth, channels = facts.embed_dim, facts.depth, first.shape[1]
        if (width, depth) not in {(size["embed_dim"], size["depth"]) for size in SIZES.values()} or channels != 3:
            raise ValueError(
                f"{path}: {channels} channels, width {width}, {depth} blocks: not an RGB ViT of a known size "
                f"({', '.join(SIZES)}); continue pretraining from it (init.official) and probe that release"
            )
    arguments = recipe(weights)
    if "pos_embed" in weights.backbone:
        arguments["pos_embed"] = _FIXED_POSITIONS.get(weights.kind, "learned")
    if size is not None:
        arguments["img_size"] = size(arguments["img_size"], arguments["patch_size"])
    backbone = ViT(**arguments)
    report = load_strict(
        backbone,
        weights.backbone,
        grid=weights.grid,
        left_out=weights.left_out,
        converted=weights.converted,
        pos_resize=weights.pos_resize,
        facts=weights.facts,
    )
    title = f"{weights.kind}, {path}"
    untrained = _seeded(lambda: Network(ViT(**arguments)))
    network = Network(backbone).eval()
    return Subject(
        title,
        network,
        untrained,
        arguments["img_size"],
        arguments["in_chans"],
        IMAGENET_MEAN,
        IMAGENET_STD,
        lines=tuple(f"{what}: {some(names)}" for what, names in report.changes().items()),
    )


def _seeded(build: Callable[[], Network]) -> Callable[[int], Network]:
    def untrained(seed: int) -> Network:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().eval()

    return untrained
