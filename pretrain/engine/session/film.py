"""Pictures of a run over time: RUN/pictures/film/NAME/STEP.png, a few for each name. On rank 0 only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

FRAMES = 8


def file_name(name: str) -> str:
    """The name of a picture, as its file or folder is called."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


def add_frames(run_dir: Path, step: int, images: Mapping[str, Tensor]) -> None:
    """Keep uint8 [3, H, W] images as the frames of `step`. Of more than FRAMES of a name the one is removed whose
    neighbours are closest, so that the frames stay spread over the whole run, from its first to its last.
    """
    for name, image in images.items():
        folder = run_dir / "pictures" / "film" / file_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy()).save(folder / f"{step:08d}.png")
        known = frames(folder)
        while len(known) > FRAMES:
            steps = list(known)
            inner = range(1, len(steps) - 1)
            known.pop(steps[min(inner, key=lambda i: steps[i + 1] - steps[i - 1])]).unlink(missing_ok=True)


def drop_frames(run_dir: Path, step: int) -> None:
    """Remove the frames of steps after `step`, which a resumed run computes again."""
    for folder in (run_dir / "pictures" / "film").glob("*"):
        for later in (path for known, path in frames(folder).items() if known > step):
            later.unlink(missing_ok=True)


def frames(folder: Path) -> dict[int, Path]:
    """The frames of one name by their step, in order."""
    numbered = [path for path in folder.glob("*.png") if path.stem.isascii() and path.stem.isdigit()]
    return {int(path.stem): path for path in sorted(numbered, key=lambda path: int(path.stem))}
