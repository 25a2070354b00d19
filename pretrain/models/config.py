"""Configuration of the backbone. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pretrain.configlib import Config
from pretrain.models.sizes import SIZES

Positive = Annotated[int, Field(gt=0)]


class ModelConfig(Config):
    """The vision transformer. `name` gives the widths; any of them can be overridden."""

    name: str = Field("vit_base", description="a size: " + ", ".join(SIZES))
    img_size: Positive | tuple[Positive, Positive] = Field(224, description="pixels, a side or (height, width)")
    patch_size: Positive = 16
    in_chans: Positive = 3
    embed_dim: Positive | None = None
    depth: Positive | None = None
    num_heads: Positive | None = None
    mlp_ratio: float | None = Field(None, gt=0)
    num_registers: int = Field(0, ge=0, description="register tokens (Darcet et al., 2023)")
    pos_embed: Literal["sincos", "learned"] = "sincos"
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    activation_checkpointing: bool = False

    @field_validator("name")
    @classmethod
    def _known_size(cls, name: str) -> str:
        if name not in SIZES:
            raise ValueError(f"unknown size {name!r}; one of {', '.join(SIZES)}")
        return name

    @property
    def size(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def num_blocks(self) -> int:
        return self.widths()["depth"]

    def widths(self) -> dict[str, Any]:
        """embed_dim, depth, num_heads and mlp_ratio, with the overrides applied."""
        given = {key: getattr(self, key) for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
        return SIZES[self.name] | {key: value for key, value in given.items() if value is not None}

    def vit_arguments(self) -> dict[str, Any]:
        """The arguments of `pretrain.models.vit.ViT`."""
        plain = self.model_dump(include={"patch_size", "in_chans", "num_registers", "pos_embed", "drop_path_rate"})
        return {"img_size": self.size, **plain, **self.widths()}

    def problems(self) -> list[str]:
        widths = self.widths()
        found = []
        for side, name in zip(self.size, ("height", "width"), strict=True):
            if side % self.patch_size:
                near = max(1, round(side / self.patch_size)) * self.patch_size
                found.append(
                    f"model.img_size: {name} {side} is not a multiple of patch_size {self.patch_size}; try {near}"
                )
        if widths["embed_dim"] % widths["num_heads"]:
            found.append(f"model.num_heads: {widths['num_heads']} does not divide embed_dim {widths['embed_dim']}")
        if self.pos_embed == "sincos" and widths["embed_dim"] % 4:
            found.append(f"model.embed_dim: sin-cos positions need a multiple of 4, got {widths['embed_dim']}")
        return found
