"""How images become pixels, as configurations and records state it."""

from __future__ import annotations

from typing import Literal

# Per channel of ImageNet's training images, pixels in [0, 1]; the default of most models.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# exif: photos are turned upright by their EXIF orientation. stored: it is ignored.
Orientation = Literal["exif", "stored"]
# auto: the pixels that have the annotated width and height; exif where both have (`finetune.data.orientation`).
DataOrientation = Literal["auto", "exif", "stored"]

# The default of `data.max_pixels`: 150 MB per decoded RGB image in each worker, and several times that while it is
# resized.
MAX_PIXELS = 50_000_000

# (low, high): the stored values that become black and white; or one such pair per channel.
ValueRange = tuple[float, float] | tuple[tuple[float, float], ...]
