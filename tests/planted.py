"""`python -m tests.planted COMMAND ...`: the real commands, with a network that makes nan of pictures of one colour."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from launch.cli import main
from pretrain.data.shards.index import build_index
from pretrain.objectives.mae import MAE
from tests.data.tars import image_bytes, tar_bytes

ONE_COLOUR = "000019"
SAMPLES, SHARDS = 8, 6


def write_shards(folder: Any) -> Any:
    """48 noisy pictures, of which ONE_COLOUR is white."""
    folder.mkdir()
    for shard in range(SHARDS):
        keys = [f"{number:06d}" for number in range(shard * SAMPLES, (shard + 1) * SAMPLES)]
        members = [(f"{key}.jpg", white() if key == ONE_COLOUR else image_bytes(int(key))) for key in keys]
        (folder / f"train-{shard:06d}.tar").write_bytes(tar_bytes(members))
    build_index([str(path) for path in sorted(folder.glob("*.tar"))])
    return folder


def white() -> bytes:
    import io

    file = io.BytesIO()
    Image.fromarray(np.full((16, 24, 3), 255, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def plant() -> None:
    """In every MAE built from now on, the first block makes nan of pictures of one colour."""
    build = MAE.__init__

    def planted(self: MAE, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        flat = torch.zeros(0, dtype=torch.bool)

        def look(module: nn.Module, inputs: tuple[dict[str, Tensor], int]) -> None:
            nonlocal flat
            images = inputs[0]["image"][:, 0]
            flat = (images.amax((2, 3)) - images.amin((2, 3))).amax(1) < 1e-3

        def spoil(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.masked_fill(flat.view(-1, 1, 1), float("nan"))

        self.register_forward_pre_hook(look)
        self.backbone.blocks[0].register_forward_hook(spoil)

    MAE.__init__ = planted


if __name__ == "__main__":
    plant()
    sys.exit(main())
