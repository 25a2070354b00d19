"""Files of class maps as tests write them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune.config import DataSource
from finetune.data.maps import masks
from finetune.tasks.configs.segmentation import SegmentationConfig


def png(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    return out.getvalue()


def photo(size: tuple[int, int] = (6, 8)) -> bytes:
    return png(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))


def ids(*values: int, size: tuple[int, int] = (6, 8)) -> bytes:
    return png(np.resize(np.array(values, np.uint8), size))


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def opened(config: SegmentationConfig | None = None, **source: Any) -> Any:
    return masks.open_examples(config or SegmentationConfig(), DataSource(**{k: str(v) for k, v in source.items()}))
