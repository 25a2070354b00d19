"""Per-channel statistics of ImageNet's training images, pixels in [0, 1]; the default of most models."""

from __future__ import annotations

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
