"""The content of a training loader's batches, their order, and the part that this rank computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.core.images import MAX_PIXELS, Orientation, ValueRange
from pretrain.data.views.specs import InputSpec, check_channels, stacks

Sample = dict[str, Any]
Stage = Callable[[Iterable[Sample]], Iterable[Sample]]


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """Everything that decides the content of a micro-batch, apart from the data set.

    views               crops, noises and masks of one image, see `specs.py`; at least one `ViewSpec`
    mean, std           of the normalization, one number per channel
    seed, block_shards  of the order of samples, see `order.Order`
    global_batch        samples of a step over all ranks
    micro_batch         samples of this rank in one micro-batch
    start_position      samples consumed before the first micro-batch
    augment_on          where colour changes and normalization are computed
    stages              user code on webdataset sample dicts (bytes by extension, `__key__`) before they are decoded: a
                        generator function that yields one sample for each it takes, in order. It must treat samples
                        one by one, as they come in groups that depend on the number of ranks; with workers it must be
                        importable.
    skipped_positions   position -> how many of its candidates, the own sample first, are not used
    max_pixels          of an image, a larger one is a bad sample
    value_range         of images of any depth, whose views are float32; None: 8 bits, uint8
    orientation         exif: photos are turned upright; stored: their EXIF orientation is ignored

    ValueError for sizes that do not divide, and for views the channels do not allow.
    """

    views: Sequence[InputSpec]
    in_chans: int
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    block_shards: int
    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    start_position: int = 0
    augment_on: Literal["device", "worker"] = "device"
    stages: Sequence[Stage] = ()
    skipped_positions: Mapping[int, int] = field(default_factory=dict)
    orientation: Orientation = "exif"
    value_range: ValueRange | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not stacks(self.views):
            raise ValueError("views has no ViewSpec: there is nothing to load")
        check_channels(self.views, self.in_chans)
        if len(self.mean) != self.in_chans or len(self.std) != self.in_chans:
            raise ValueError(f"mean has {len(self.mean)} and std {len(self.std)} numbers for in_chans={self.in_chans}")
        if self.global_batch < 1 or self.micro_batch < 1 or self.global_batch % (self.world_size * self.micro_batch):
            raise ValueError(
                f"global batch size {self.global_batch} is not a multiple of {self.world_size} ranks x "
                f"{self.micro_batch} per GPU"
            )
        if self.augment_on not in ("device", "worker"):
            raise ValueError(f"augment_on must be device or worker, got {self.augment_on!r}")

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in one step."""
        return self.global_batch // self.world_size // self.micro_batch
