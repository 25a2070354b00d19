"""Configuration of the online probe and of the doctor. No torch here."""

from __future__ import annotations

from pydantic import Field

from pretrain.core.configlib import Config, Positive


class ProbeConfig(Config):
    """A k-nearest-neighbour probe on labelled shards while training (Wu et al., 2018; DINO's protocol)."""

    train_shards: str | list[str] = Field(description="the bank: labelled shards")
    val_shards: str | list[str] = Field(description="the queries: labelled shards")
    every_steps: Positive = 1000
    k: Positive = 20
    temperature: float = Field(0.07, gt=0)
    linear: bool = Field(False, description="also a linear classifier; its L2 is chosen on a fifth of the bank")
    batch_size: Positive = 256
    resize: Positive | None = Field(None, description="shorter side before the centre crop; default: 256/224 of it")
    max_images: Positive | None = Field(None, description="per side; default: all")
