"""BEiT v2: predict semantic tokens of masked patches, twice: from the last block's patches, and from an early block's
patches with the last class token, which therefore must aggregate the content of the image.

Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", sections 2.2 and 2.3.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers import rel_pos
from pretrain.models.layers.attention import Block
from pretrain.models.layers.initialize import initialize_linears
from pretrain.models.pictures import token_pictures
from pretrain.models.teachers.frozen import Fingerprint
from pretrain.models.tokenizers.tokenizer import Tokenizer, open_tokenizer
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of, mean_over_ranks
from pretrain.objectives.configs.beit2 import BEiT2Config


class BEiT2(Objective[BEiT2Config]):
    """Batch: that of BEiT; with drop path its uniform random numbers "drop_path" [b, depth + head_layers, 2].

    State in addition to BEiT's: `cls_pt_layers`, the blocks on the last class token and the early patches;
    without a shared head also `cls_pt_norm` and `cls_pt_lm_head`.

    Raises:
        ConfigError: the tokenizer cannot be read, or does not fit the backbone's grid.
    """

    head_prefixes = ("lm_head.", "mask_token", "cls_pt_")
    kept_prefixes = ("fingerprint.",)

    def __init__(self, config: BEiT2Config, backbone: ViT, horizon: Horizon, *, tokenizer: Tokenizer | None = None):
        super().__init__()
        del horizon
        self.config = config
        self.encoder = backbone
        self.fingerprint: Fingerprint | None = None
        if tokenizer is None:
            size = config.picture_size(backbone.grid_size, backbone.patch_size)
            tokenizer, self.fingerprint = open_tokenizer(
                config.tokenizer, size=size, grid=backbone.grid_size, in_chans=backbone.in_chans
            )
        self.tokenizer = tokenizer
        dim = backbone.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.lm_head = nn.Linear(dim, tokenizer.num_tokens)
        self.cls_pt_layers = nn.ModuleList(_condenser(backbone, config, i) for i in range(config.head_layers))
        if not config.shared_lm_head:
            self.cls_pt_norm = nn.LayerNorm(dim, eps=backbone.norm_eps)
            self.cls_pt_lm_head = nn.Linear(dim, tokenizer.num_tokens)
            initialize_linears(self.cls_pt_lm_head, "trunc_normal", bound=0.02)
        initialize_linears(self.lm_head, "trunc_normal", bound=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    @property
    def backbone(self) -> ViT:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, mask = images_of(batch, "image"), batch["mask"]
        targets = self.tokenizer.tokens(images_of(batch, "tokenizer_image"))[mask]
        tokens, completed = self.encode(images, mask, drop=batch.get("drop_path"))
        logits = self.predict(tokens, completed, mask)
        totals = [F.cross_entropy(each, targets, reduction="sum") for each in logits]
        correct = [(each.detach().argmax(-1) == targets).sum().float() for each in logits]
        means = mean_over_ranks(torch.stack([*totals, *correct]), mask.sum())
        loss_patch, loss_cls, accuracy, accuracy_cls = means
        return {
            "loss": loss_patch + loss_cls,
            "loss_patch": loss_patch.detach(),
            "loss_cls": loss_cls.detach(),
            "accuracy": accuracy.detach(),
            "accuracy_cls": accuracy_cls.detach(),
            "feature_std": feature_std(self.encoder.norm(tokens[:, 0])),
        }

    def encode(self, images: Tensor, mask: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] -> raw tokens [b, P + N, D]: of the last block, and of the additional blocks on its class
        token and the early patches."""
        depth, early = self.encoder.depth, self.config.early_layers
        drops = (None, None) if drop is None else (drop[:, :depth], drop[:, depth:])
        indices = sorted({early - 1, depth - 1})
        outputs = self.encoder.layers(images, indices, drop=drops[0], mask=mask, mask_token=self.mask_token)
        first, last = outputs[0], outputs[-1]
        prefix = self.encoder.num_prefix_tokens
        completed, bias = torch.cat([last[:, :prefix], first[:, prefix:]], dim=1), self._bias(images)
        for i, block in enumerate(self.cls_pt_layers):
            completed = block(completed, drop=None if drops[1] is None else drops[1][:, i], bias=bias)
        return last, completed

    def predict(self, tokens: Tensor, completed: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The two outputs of `encode` -> fp32 logits of the m masked patches, each [m, K]."""
        # LayerNorm treats each token alone, so it is computed for the masked ones only.
        rows = [x[:, self.encoder.num_prefix_tokens :][mask] for x in (tokens, completed)]
        if self.config.shared_lm_head:
            first, second = (self.lm_head(self.encoder.norm(x)) for x in rows)
        else:
            first = self.lm_head(self.encoder.norm(rows[0]))
            second = self.cls_pt_lm_head(self.cls_pt_norm(rows[1]))
        return first.float(), second.float()

    def param_groups(self) -> list[ParamGroup]:
        """As BEiT's."""
        return param_groups.split(self, no_decay_names=param_groups.tokens_and_positions(self))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, its visible patches, and two maps of token ids in colours: the
        tokenizer's, and the same with masked patches as predicted."""
        images, mask = images_of(batch, "image")[:8], batch["mask"][:8]
        given = self.tokenizer.tokens(images_of(batch, "tokenizer_image")[:8])
        predicted = given.clone()
        predicted[mask] = self.predict(*self.encode(images, mask), mask)[0].argmax(-1)
        patch, grid, codes = self.encoder.patch_size, self.encoder.grid_size, self.tokenizer.num_tokens
        shown = {
            "input | masked": token_pictures.masked_sheet(images, mask, patch_size=patch, mean=mean, std=std),
        }
        for name, ids in (("tokens", given), ("predicted tokens", predicted)):
            ids = ids.reshape(-1, *grid)
            shown[name] = token_pictures.code_sheet(images, ids, num_codes=codes, mean=mean, std=std)
        return shown

    def _bias(self, images: Tensor) -> Tensor | None:
        """The shared relative-position bias of the encoder, [1, heads, P + N, P + N]."""
        encoder = self.encoder
        if encoder.rel_pos_bias is None:
            return None
        patch = encoder.patch_size
        grid = (images.shape[2] // patch, images.shape[3] // patch)
        table = rel_pos.resize_table(encoder.rel_pos_bias.relative_position_bias_table, encoder.grid_size, grid)
        return rel_pos.bias_of(table, rel_pos.relative_index(grid, encoder.num_prefix_tokens, device=images.device))


def _condenser(backbone: ViT, config: BEiT2Config, index: int) -> Block:
    """A block like the encoder's with index `early_layers + index`, whose drop path rate it uses."""
    block = Block(
        backbone.embed_dim,
        backbone.num_heads,
        mlp_ratio=backbone.mlp_ratio,
        qkv_bias=backbone.qkv_bias,
        layer_scale=backbone.layer_scale,
        ffn=backbone.ffn,
        ffn_bias=backbone.ffn_bias,
        norm_eps=backbone.norm_eps,
        qk_scale=backbone.qk_scale,
        proj_bias=backbone.proj_bias,
    )
    place = config.early_layers + index  # linear layers initialized by torch's default, as officially
    for layer in (block.attn.proj, getattr(block.mlp, "fc2", None)):
        if layer is not None:
            layer.weight.data.div_(math.sqrt(2.0 * (place + 1)))
    rate = cast(Any, backbone.blocks[-1]).drop_rate
    block.drop_rate = rate * place / max(max(backbone.depth, config.early_layers + config.head_layers) - 1, 1)
    return block
