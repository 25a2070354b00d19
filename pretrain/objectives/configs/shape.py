"""The shape of a model, as the configurations of the objectives see it. No torch here."""

from __future__ import annotations

from typing import Protocol


class ModelShape(Protocol):
    """The properties of a model on which its views depend."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def drop_path_rate(self) -> float: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_frames(self) -> int | None: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def class_token(self) -> bool: ...
    @property
    def rotates(self) -> bool: ...
    @property
    def provides(self) -> frozenset[str]: ...


def patch_grid(model: ModelShape) -> tuple[int, int]:
    """Rows and columns of patches of an image of the model's size."""
    return model.size[0] // model.patch_size, model.size[1] // model.patch_size


def num_patches(model: ModelShape) -> int:
    """Patches of an image of the model's size."""
    rows, columns = patch_grid(model)
    return rows * columns
