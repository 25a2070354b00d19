"""Configuration of the backbone. No torch here, except to read the widths of a model of timm's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pretrain.core.configlib import Config, Positive
from pretrain.models import mechanisms
from pretrain.models.backbones import families
from pretrain.models.backbones.sizes import SIZES
from pretrain.models.mechanisms import places, settings
from pretrain.models.mechanisms.settings import Placed

_OF_OUR_VIT = ("num_registers", "pos_embed", "rel_pos_bias", "qkv_bias", "layer_scale", "ffn", "norm_eps")
_OF_OUR_VIT += ("qk_scale", "proj_bias", "ffn_bias", "ffn_topk", "ffn_multiple", "pos_offset")
_OF_OUR_VIT += ("norm_layer", "cls_norm", "rope")
_OF_CLIPS = ("num_frames", "tubelet_size", "time_attention")
_OF_A_TRANSFORMER = ("depth", "num_heads", "mlp_ratio")


class ActivationPenaltyConfig(Config):
    """A term of the loss that is small where few hidden units of the feed-forward networks are active."""

    kind: Literal["l1", "hoyer"] = Field(
        description="l1: mean size of the units; hoyer: (sum |a|)^2 / (n sum a^2) of each token, whatever their scale"
    )
    weight: float = Field(gt=0, description="factor of its mean over tokens and layers")


class RopeConfig(Config):
    """How rotary positions become angles (`models.layers.rope`)."""

    base: float = Field(100.0, gt=1, description="periods are base^(i / n), n = a quarter of a head's channels")
    periods: tuple[float, float] | None = Field(
        None, description="the shortest and the longest of n geometric periods, instead of base"
    )
    normalize: Literal["separate", "max", "min"] = Field(
        "separate", description="length that coordinates are divided by: the axis's own, the longer, the shorter"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the angles; DINOv3's weights come from bf16")
    frequencies: tuple[float, float] | None = Field(
        None,
        description="lowest and highest, in turns per side of the image, as weights of each block; registers stand "
        "around the visible patches; CAPI: [7e-4, 7]",
    )

    @field_validator("periods", "frequencies")
    @classmethod
    def _ascending(cls, given: tuple[float, float] | None) -> tuple[float, float] | None:
        if given is not None and not 0 < given[0] < given[1]:
            raise ValueError(f"must be two numbers 0 < low < high, got {given[0]} and {given[1]}")
        return given

    @model_validator(mode="after")
    def _one_form(self) -> RopeConfig:
        others = {key: getattr(self, key) for key in ("base", "periods", "normalize", "precision")}
        if self.frequencies is not None and (
            changed := [key for key, value in others.items() if value != type(self).model_fields[key].default]
        ):
            raise ValueError(f"{', '.join(changed)}: not read with frequencies; leave out")
        return self


class ModelConfig(Config):
    """The backbone: our vision transformer, where `name` gives the widths and any of them can be overridden; the
    convolutions of a dVAE; or a timm model, whose settings are `args`."""

    name: str = Field("vit_base", description=f"{', '.join([*SIZES, families.CONV])}, or timm/NAME")
    img_size: Positive | tuple[Positive, Positive] = Field(224, description="pixels, a side or (height, width)")
    patch_size: Positive = Field(16, description="pixels; of a timm model its stride, which is filled in")
    in_chans: Positive = 3
    num_frames: Positive | None = Field(None, description="frames of a clip; null: the model is of images")
    tubelet_size: Positive = Field(2, description="frames that become a token together, of a model of clips")
    time_attention: Literal["joint", "divided", "block_causal"] = Field(
        "joint",
        description="of a model of clips; joint: all tokens; divided: over time, then over space (TimeSformer); "
        "block_causal: none to a later time",
    )
    embed_dim: Positive = Field(768, description="default: that of the size")
    depth: Positive = Field(12, description="default: that of the size")
    num_heads: Positive = Field(12, description="default: that of the size")
    mlp_ratio: float = Field(4.0, gt=0, description="default: that of the size")
    class_token: bool = True
    num_registers: int = Field(0, ge=0, description="register tokens (Darcet et al., 2023)")
    pos_embed: Literal["sincos", "sincos_rows_first", "sincos_flat", "learned", "rope", "none"] = Field(
        "sincos",
        description="sincos: as in MAE; sincos_rows_first: as in MoCo v3; rope: rotary, as in DINOv3; sincos_flat: as "
        "in VideoMAE, the default of a model of clips",
    )
    rope: RopeConfig = Field(RopeConfig(), description="of pos_embed: rope")  # pyright: ignore[reportCallIssue]
    pos_offset: float = Field(
        0.1, ge=0, description="added to the new grid where positions are resampled by a factor (objective.pos_resize)"
    )
    rel_pos_bias: Literal["none", "shared", "per_block", "both"] = Field(
        "none", description="relative positions, as in BEiT; both: a table that blocks share, and one of each"
    )
    qkv_bias: bool | Literal["no_key"] = Field(True, description="no_key: of queries and values only, as in BEiT")
    layer_scale: float | None = Field(None, gt=0, description="initial factors on the branches; null: none")
    qk_scale: float | None = Field(None, gt=0, description="of queries times keys; null: 1 / sqrt(channels of a head)")
    proj_bias: bool = Field(True, description="bias of the attention's last layer")
    ffn: Literal["mlp", "swiglu", "relu2", "topk", "identity"] = Field(
        "mlp",
        description="swiglu: as in DINOv2's giant, same number of weights; relu2: squared ReLU; topk: each token keeps "
        "its largest units; identity: blocks of attention alone",
    )
    ffn_topk: float = Field(0.1, gt=0, le=1, description="share of the units that ffn: topk keeps")
    ffn_bias: bool = Field(True, description="biases of the feed-forward network")
    ffn_multiple: Positive = Field(8, description="a swiglu's width is rounded up to a multiple of this number")
    norm_layer: Literal["layer", "rms"] = Field("layer", description="layer norms, or root mean square norms")
    norm_eps: float = Field(1e-6, gt=0)
    cls_norm: bool = Field(False, description="a last norm of class token and registers, apart from the patches'")
    attention: tuple[SerializeAsAny[Placed], ...] = Field(
        (), description="mechanisms in and beside the blocks, {kind, places, start, ...}; see docs/attention.md"
    )
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    activation_checkpointing: bool = False
    activation_penalty: ActivationPenaltyConfig | None = Field(
        None, description="{kind: l1 | hoyer, weight: ...}: added to the loss of any objective, for sparse activations"
    )
    args: dict[str, Any] = Field(
        {}, description="of a timm model: arguments of timm.create_model; of a Swin also ape, patch_norm and qk_scale"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_widths(cls, given: Any) -> Any:
        """Fill in what the name determines: widths of a size, stride and widths of a timm model."""
        if not isinstance(given, Mapping):
            return given
        given = {key: value for key, value in given.items() if value is not None}
        name = given.get("name", "vit_base")
        if not isinstance(name, str):
            return given
        if name in SIZES:
            of_clips = {"pos_embed": "sincos_flat"} if "num_frames" in given else {}
            return {**SIZES[name], **of_clips, **given}
        if name == families.CONV:
            return {"embed_dim": 64, "class_token": False, **given}
        if not name.startswith(families.TIMM):
            return given
        from pretrain.models.backbones.timm_backbone import facts

        found = facts(
            name.removeprefix(families.TIMM),
            img_size=_pair(given.get("img_size", 224)),
            in_chans=given.get("in_chans", 3),
            **(given.get("args") or {}),
        )
        wrong = [key for key, value in found.items() if given.get(key, value) != value]
        if wrong:
            raise ValueError(
                f"{wrong[0]}: {given[wrong[0]]}, but {name} has {found[wrong[0]]}; change it by model.args"
            )
        return given | found

    @field_validator("name")
    @classmethod
    def _known_name(cls, name: str) -> str:
        if name not in SIZES and name != families.CONV and not name.startswith(families.TIMM):
            known = ", ".join([*SIZES, families.CONV])
            raise ValueError(f"unknown size {name!r}; one of {known}, or timm/NAME for a model of timm's")
        return name

    @field_validator("attention", mode="before")
    @classmethod
    def _of_their_kinds(cls, given: Any) -> Any:
        return settings.parse_all(given) if isinstance(given, list | tuple) else given

    @property
    def timm_name(self) -> str | None:
        """The name in timm's registry; None for our own vision transformer."""
        return self.name.removeprefix(families.TIMM) if self.name.startswith(families.TIMM) else None

    @property
    def size(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return _pair(self.img_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def rotates(self) -> bool:
        """Whether it is our ViT with rotary positions whose coordinates training can move."""
        return self.pos_embed == "rope" and self.rope.frequencies is None

    @property
    def provides(self) -> families.Provides:
        """Its capabilities, see `pretrain.models.backbones.families`."""
        if self.timm_name is not None:
            return families.timm_provides(self.timm_name, self.args) - families.lost(self.attention)
        if self.name == families.CONV:
            return families.CONV_PROVIDES
        clips = self.num_frames is not None
        return families.vit_provides(class_token=self.class_token, attention=self.attention, clips=clips)

    def lacking(self, objective: str, needs: families.Provides) -> str | None:
        """Why `objective`, which needs these capabilities, does not work on it; None: it does."""
        for entry in self.attention:
            if missing := needs & families.lost([entry]):
                why = "it reads the grid of all patches" if missing == {"keep"} else "it moves what the patches show"
                sets = ", ".join(name for name, other in mechanisms.MECHANISMS.items() if other.reads == "set")
                lacks = ", ".join(sorted(missing))
                return f"model.attention: {objective} needs {lacks}, but with {entry.kind} {why}; use one of {sets}"
        reads_one_token = self.class_token and self.timm_name is None and not needs & {"patches", "tubes"}
        if reads_one_token and (untrained := places.untrained_last(self.attention, self.depth)):
            return f"model.attention: {untrained}"
        if self.cls_norm and not {"image", "patches"} <= needs:
            return f"model.cls_norm: true, but {objective} does not read both of its last norms; set it to false"
        found = families.lacking(needs, self.provides)
        return found and f"model.name: {objective} on {self.name}: {found}"

    @property
    def other_sizes(self) -> bool:
        """Whether it also encodes images of another size than `img_size`."""
        return self.timm_name is None or families.family_of(self.timm_name).other_sizes

    def widths(self) -> dict[str, Any]:
        """embed_dim, depth, num_heads and mlp_ratio."""
        return self.model_dump(include={"embed_dim", "depth", "num_heads", "mlp_ratio"})

    def vit_arguments(self) -> dict[str, Any]:
        """The arguments of `pretrain.models.backbones.vit.ViT`, or of `video.VideoViT` with `num_frames`."""
        others = {"name", "img_size", "activation_checkpointing", "activation_penalty", "args"}
        plain = self.model_dump(exclude=others | (set(_OF_CLIPS) if self.num_frames is None else set()))
        return {"img_size": self.size, **plain}

    def conv_arguments(self) -> dict[str, Any]:
        """The arguments of `pretrain.models.tokenizers.dvae.ConvEncoder`."""
        return {"img_size": self.size, **self.model_dump(include={"patch_size", "in_chans", "embed_dim"})}

    def timm_arguments(self) -> dict[str, Any]:
        """The arguments of `pretrain.models.backbones.timm_backbone.TimmBackbone`."""
        plain = {"img_size": self.size, "in_chans": self.in_chans, "drop_path_rate": self.drop_path_rate}
        return {"name": self.timm_name, "attention": self.attention, **plain, **self.args}

    def problems(self) -> list[str]:
        found = []
        for side, name in zip(self.size, ("height", "width"), strict=True):
            if side % self.patch_size:
                near = max(1, round(side / self.patch_size)) * self.patch_size
                found.append(
                    f"model.img_size: {name} {side} is not a multiple of patch_size {self.patch_size}; try {near}"
                )
        if self.timm_name is not None:
            return found + self._timm_problems()
        return found + (self._conv_problems() if self.name == families.CONV else self._vit_problems())

    def _vit_problems(self) -> list[str]:
        found = []
        if self.args:
            found.append(f"model.args: are for timm models; give the settings of {self.name} in model")
        if self.pos_embed == "rope" or self.rel_pos_bias != "none":
            try:
                settings.refuse_relative(self.attention)
            except ValueError as error:
                found.append(f"model.attention: {error}: model.pos_embed=learned, model.rel_pos_bias=none")
        found += [f"model.attention: {problem}" for problem in self._attention_problems()]
        found += self._clip_problems()
        if self.activation_penalty is not None and self.ffn == "identity":
            found.append("model.activation_penalty: the blocks have no feed-forward network (model.ffn: identity)")
        if self.ffn_topk != type(self).model_fields["ffn_topk"].default and self.ffn != "topk":
            found.append(f"model.ffn_topk: is read with model.ffn=topk only, and it is {self.ffn}")
        if self.ffn_multiple != type(self).model_fields["ffn_multiple"].default and self.ffn != "swiglu":
            found.append(f"model.ffn_multiple: is read with model.ffn=swiglu only, and it is {self.ffn}")
        if self.rope != RopeConfig() and self.pos_embed != "rope":  # pyright: ignore[reportCallIssue]
            found.append(f"model.rope: is read with model.pos_embed=rope only, and it is {self.pos_embed}")
        if self.cls_norm and not self.class_token:
            found.append("model.cls_norm: true, but the model has no class token; set it to false")
        if self.embed_dim % self.num_heads:
            found.append(f"model.num_heads: {self.num_heads} does not divide embed_dim {self.embed_dim}")
        elif self.pos_embed == "rope" and self.embed_dim // self.num_heads % 4:
            found.append(
                f"model.num_heads: rotary positions need heads of a multiple of 4 channels, {self.num_heads} heads of "
                f"{self.embed_dim} have {self.embed_dim // self.num_heads}"
            )
        if self.pos_embed.startswith("sincos") and self.embed_dim % 4:
            found.append(f"model.embed_dim: sin-cos positions need a multiple of 4, got {self.embed_dim}")
        return found

    def _clip_problems(self) -> list[str]:
        if self.num_frames is None:
            fields = type(self).model_fields
            found = [
                f"model.{key}: is read with model.num_frames only, which is null"
                for key in _OF_CLIPS
                if getattr(self, key) != fields[key].default
            ]
            if self.pos_embed == "sincos_flat":
                found.append("model.pos_embed: sincos_flat is of models of clips; give model.num_frames, or sincos")
            return found
        found = []
        if self.num_frames % self.tubelet_size:
            near = max(1, round(self.num_frames / self.tubelet_size)) * self.tubelet_size
            found.append(
                f"model.num_frames: {self.num_frames} is not a multiple of tubelet_size {self.tubelet_size}; try {near}"
            )
        if self.pos_embed not in ("sincos_flat", "learned", "none"):
            found.append(f"model.pos_embed: {self.pos_embed} is of images; of clips: sincos_flat, learned or none")
        if self.rel_pos_bias != "none":
            found.append(f"model.rel_pos_bias: {self.rel_pos_bias} is of images; a model of clips has none")
        if self.time_attention == "divided" and self.attention:
            found.append("model.time_attention: divided has attention of its own; leave model.attention out")
        reading = [entry.kind for entry in self.attention if entry.reads == "grid" or not entry.entry.keeps_frame]
        if reading:
            found.append(f"model.attention: {', '.join(reading)} reads the grid of an image; leave it out of clips")
        return found

    def _attention_problems(self) -> list[str]:
        found = list(places.problems(self.attention, self.depth))
        if found or not self.attention or self.embed_dim % self.num_heads:
            return found
        from pretrain.models.mechanisms.placement import building_problem  # imports torch

        tried = (building_problem(e, self.embed_dim, self.num_heads, self.grid_size) for e in self.attention)
        return [problem for problem in tried if problem is not None]

    def _conv_problems(self) -> list[str]:
        patch = self.patch_size
        others = ("attention", "drop_path_rate", "activation_checkpointing", "activation_penalty", "args")
        found = self._foreign((*_OF_OUR_VIT, *_OF_CLIPS, *_OF_A_TRANSFORMER, *others))
        if self.class_token:
            found.append(f"model.class_token: true, but {self.name} has none; leave it out")
        if patch < 2 or patch & (patch - 1):
            found.append(
                f"model.patch_size: {patch}, but {self.name} only halves its input; give a power of two above 1"
            )
        return found

    def _timm_problems(self) -> list[str]:
        found = self._foreign(
            (*_OF_OUR_VIT, *_OF_CLIPS, "num_heads", "mlp_ratio"), "set what timm calls it in model.args"
        )
        if self.attention:
            from pretrain.models.backbones.timm_backbone import building_problem

            problem = building_problem(self.timm_arguments())
            found += [] if problem is None else [f"model.attention: {problem}"]
        return found

    def _foreign(self, keys: Iterable[str], way_out: str = "") -> list[str]:
        """Settings that this backbone does not have but that were changed."""
        way_out = f"leave it out, or {way_out}" if way_out else "leave it out"
        return [
            f"model.{key}: {getattr(self, key)!r} is no setting of {self.name}; {way_out}"
            for key in keys
            if getattr(self, key) != type(self).model_fields[key].default
        ]


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
