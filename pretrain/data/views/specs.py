"""Specifications of views, noises and masks, which an objective requests for each image; without torch.

An objective lists `ViewSpec`s, `Noise`s and masks (the kinds of `Mask` are in masks.py). The loader draws their random
numbers on the host, keyed by sample position, and sends those of the views along as one float32 vector per view
instance (`Param`), so that the device part of the augmentation is a pure function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import permutations
from typing import Literal


class Param(IntEnum):
    """Layout of a view instance's parameter vector."""

    FLIP = 0  # 1: mirror left-right
    JITTER = 1  # 1: colour jitter is on
    ORDER = 2  # index into JITTER_ORDERS
    BRIGHTNESS = 3  # factor, 1: unchanged
    CONTRAST = 4  # factor, 1: unchanged
    SATURATION = 5  # factor, 1: unchanged
    HUE = 6  # shift as a fraction of the colour circle, 0: unchanged
    GRAY = 7  # 1: to grayscale, in all channels
    SIGMA = 8  # Gaussian blur in pixels, 0: none
    SOLARIZE = 9  # 1: invert values of 128/255 and more


NUM_PARAMS = len(Param)
JITTER_OPS = (Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION, Param.HUE)
JITTER_ORDERS: tuple[tuple[Param, ...], ...] = tuple(permutations(JITTER_OPS))


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter with a probability: factors in [max(0, 1 - x), 1 + x], hue shift in [-hue, hue]."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    prob: float = 1.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check(f"ColorJitter.{name}", getattr(self, name), 0, float("inf"))
        _check("ColorJitter.hue", self.hue, 0, 0.5)
        _check("ColorJitter.prob", self.prob, 0, 1)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with probability `prob`, sigma in pixels uniform in [sigma_min, sigma_max]."""

    prob: float
    sigma_min: float = 0.1
    sigma_max: float = 2.0

    def __post_init__(self) -> None:
        _check("Blur.prob", self.prob, 0, 1)
        if not 0 < self.sigma_min <= self.sigma_max:
            raise ValueError(f"Blur needs 0 < sigma_min <= sigma_max, got {self.sigma_min} and {self.sigma_max}")


@dataclass(frozen=True)
class ViewSpec:
    """`count` random crops of one image or clip, and their colour changes.

    name           entry of the batch; views of one name and size are stacked in list order
    size           (height, width) in pixels
    frames         0: of an image. Else of a clip: this many frames, `stride` apart, from a random start; crop, flip and
                   colours are those of all its frames, which follow each other in the batch
    scale, ratio   RandomResizedCrop: range of the area as a fraction of the image, range of width / height
    hflip, grayscale, solarize   probabilities
    normalize      False: pixels in [0, 1] instead of the run's mean and standard deviation
    same_as        name of other views: the same crops, flips and colours at this size and interpolation, as BEiT's
                   tokenizer sees the image of the student. Fields taken from there cannot be set here.
    colours        False: with `same_as`, without colour changes, blur and solarization
    """

    name: str
    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    count: int = 1
    frames: int = 0
    stride: int = 1
    hflip: float = 0.5
    jitter: ColorJitter | None = None
    grayscale: float = 0.0
    blur: Blur | None = None
    solarize: float = 0.0
    normalize: bool = True
    same_as: str | None = None
    colours: bool = True

    def __post_init__(self) -> None:
        where = f"view {self.name!r}"
        _check_name(self.name)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"{where}: size must be (height, width) in pixels, got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"{where}: scale must be 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"{where}: ratio must be 0 < low <= high, got {self.ratio}")
        if self.interpolation not in ("bicubic", "bilinear", "lanczos"):
            raise ValueError(f"{where}: interpolation must be bicubic, bilinear or lanczos, got {self.interpolation!r}")
        if self.count < 1:
            raise ValueError(f"{where}: count must be at least 1, got {self.count}")
        if self.frames < 0 or self.stride < 1:
            raise ValueError(
                f"{where}: frames must be at least 0 and stride at least 1, got {self.frames} and {self.stride}"
            )
        for name in ("hflip", "grayscale", "solarize"):
            _check(f"{where}: {name}", getattr(self, name), 0, 1)
        if not self.colours and self.same_as is None:
            raise ValueError(f"{where}: colours=False needs same_as; without it leave the colours at 0")
        if self.same_as is not None:
            given = [f.name for f in fields(self) if f.name not in _OWN and getattr(self, f.name) != f.default]
            if given:
                raise ValueError(
                    f"{where}: {', '.join(given)} come from view {self.same_as!r} (same_as); do not set them"
                )

    @property
    def num_images(self) -> int:
        """Images of it in the batch."""
        return self.count * max(1, self.frames)


_OWN = (
    "name",
    "size",
    "interpolation",
    "normalize",
    "same_as",
    "colours",
)  # what a view with `same_as` sets itself


@dataclass(frozen=True)
class Noise:
    """float32 numbers uniform in [0, 1) of `shape` per sample, for instance to rank patches.

    of_step   the same numbers for all samples of a step
    """

    name: str
    shape: tuple[int, ...]
    of_step: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        if any(side < 1 for side in self.shape):
            raise ValueError(f"noise {self.name!r}: shape must be positive, got {self.shape}")


@dataclass(frozen=True)
class Mask:
    """The base of the masks of masks.py: random patches of a `grid` (rows, columns)."""

    name: str
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        _check_name(self.name)
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"mask {self.name!r}: grid must be (rows, columns) of patches, got {self.grid}")

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def entries(self) -> tuple[str, ...]:
        """Its entries in the batch."""
        return (self.name,)


InputSpec = ViewSpec | Noise | Mask
RESERVED_NAMES = frozenset({"position", "bad"})


def stacks(specs: Sequence[InputSpec]) -> dict[str, list[tuple[int, ViewSpec]]]:
    """Batch entry name -> its (index in `specs`, ViewSpec)s in list order. Checks the complete list.

    A view with `same_as` is listed as those views, with its own size and their indices.

    Raises ValueError for views of one name that differ in size or normalization, for images next to clips, for a
    `same_as` that names no view, and for a noise or a mask that shares its name.
    """
    if len({view.frames > 0 for view in specs if isinstance(view, ViewSpec) and view.same_as is None}) > 1:
        raise ValueError("views of clips (frames above 0) next to views of images: give all of them frames, or none")
    entries: dict[str, list[tuple[int, ViewSpec]]] = {}
    for index, spec in enumerate(specs):
        if isinstance(spec, ViewSpec):
            entry = entries.setdefault(spec.name, [])
            if entry and (entry[0][1].size, entry[0][1].normalize) != (spec.size, spec.normalize):
                what = "size" if entry[0][1].size != spec.size else "normalize"
                raise ValueError(
                    f"views named {spec.name!r} differ in {what}: {getattr(entry[0][1], what)} and "
                    f"{getattr(spec, what)}; use two names"
                )
            entry += [(index, spec)] if spec.same_as is None else _seen_again(spec, specs)
    others = drawn_names(specs)
    for name in others:
        if name in entries or others.count(name) > 1:
            raise ValueError(f"the name {name!r} of a noise or mask is used twice")
    return entries


def drawn_names(specs: Sequence[InputSpec]) -> list[str]:
    """Batch entries that hold random numbers or masks instead of images."""
    noises = [spec.name for spec in specs if isinstance(spec, Noise)]
    return noises + [name for spec in specs if isinstance(spec, Mask) for name in spec.entries]


def _seen_again(spec: ViewSpec, specs: Sequence[InputSpec]) -> list[tuple[int, ViewSpec]]:
    found = [(i, other) for i, other in enumerate(specs) if isinstance(other, ViewSpec) and other.name == spec.same_as]
    if not found or any(view.same_as is not None for _, view in found):
        views = ", ".join(sorted({view.name for view in specs if isinstance(view, ViewSpec) and view.same_as is None}))
        raise ValueError(
            f"view {spec.name!r}: same_as {spec.same_as!r} must name a view without same_as; one of: {views}"
        )
    own = {name: getattr(spec, name) for name in _OWN} | {"same_as": None, "colours": True}
    plain = {} if spec.colours else {"jitter": None, "grayscale": 0.0, "blur": None, "solarize": 0.0}
    return [(index, replace(view, **own, **plain)) for index, view in found]


def check_channels(specs: Sequence[InputSpec], in_chans: int) -> None:
    """Raise ValueError for colour operations that need RGB images."""
    for spec in specs:
        if in_chans == 3 or not isinstance(spec, ViewSpec):
            continue
        used = {
            "jitter.saturation": spec.jitter is not None and spec.jitter.saturation > 0,
            "jitter.hue": spec.jitter is not None and spec.jitter.hue > 0,
            "grayscale": spec.grayscale > 0,
        }
        names = [name for name, on in used.items() if on]
        if names:
            raise ValueError(
                f"view {spec.name!r}: {', '.join(names)} need 3 channels, the images have {in_chans}; set to 0"
            )


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def _check_name(name: str) -> None:
    if not name.isidentifier() or name in RESERVED_NAMES:
        raise ValueError(f"name {name!r} must be an identifier other than {', '.join(sorted(RESERVED_NAMES))}")
