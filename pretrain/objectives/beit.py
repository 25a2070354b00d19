"""BEiT: mask blocks of patches, predict their visual tokens, which a tokenizer provides.

Bao et al. 2021, "BEiT: BERT Pre-Training of Image Transformers", section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import Backbone
from pretrain.models.pictures import token_pictures
from pretrain.models.teachers.frozen import Fingerprint
from pretrain.models.tokenizers.tokenizer import Tokenizer, open_tokenizer
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of, mean_over_ranks, pooled
from pretrain.objectives.configs.beit import BEiTConfig


class BEiT(Objective[BEiTConfig]):
    """Batch: "image" [b, 1, C, H, W], the same crop in [0, 1] for the tokenizer, "tokenizer_image" [b, 1, C, h, w],
    and "mask" bool [b, N], True where a patch is masked; with drop path its uniform random numbers "drop_path"
    [b, depth, 2].

    The head is applied to masked patches only: the others have no loss. Checkpoints store the tokenizer's fingerprint,
    not its weights.

    Args:
        tokenizer: an open tokenizer; default: that of `config.tokenizer`.

    Raises:
        ConfigError: the tokenizer cannot be read, or does not fit the backbone's grid.
    """

    head_prefixes = ("lm_head.", "mask_token")
    kept_prefixes = ("fingerprint.",)

    def __init__(self, config: BEiTConfig, backbone: Backbone, horizon: Horizon, *, tokenizer: Tokenizer | None = None):
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
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.mask_dim))
        self.lm_head = nn.Linear(backbone.embed_dim, tokenizer.num_tokens)
        for weight in (self.mask_token, self.lm_head.weight):
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(self.lm_head.bias)

    @property
    def backbone(self) -> Backbone:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images, mask = images_of(batch, "image"), batch["mask"]
        targets = self.tokenizer.tokens(images_of(batch, "tokenizer_image"))[mask]
        tokens = self.encoder(images, drop=batch.get("drop_path"), mask=mask, mask_token=self.mask_token)
        logits = self.predict(tokens, mask)
        total = F.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.detach().argmax(-1) == targets).sum()
        loss, accuracy = mean_over_ranks(torch.stack([total, correct.float()]), mask.sum())
        features = pooled(self.encoder, tokens)
        return {"loss": loss, "accuracy": accuracy.detach(), "feature_std": feature_std(features)}

    def predict(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Normalized tokens [b, P + N, D] -> fp32 logits [m, K] of the m patches that `mask` [b, N] selects."""
        return self.lm_head(tokens[:, self.encoder.num_prefix_tokens :][mask]).float()

    def param_groups(self) -> list[ParamGroup]:
        """Weight decay applies to every parameter of two or more dimensions, with relative positions and mask token,
        but not to class token and absolute positions."""
        return param_groups.split(self, no_decay_names=param_groups.tokens_and_positions(self))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, its visible patches, and, if the tokenizer can decode, the
        image decoded from its tokens, those of masked patches as predicted."""
        images, mask = images_of(batch, "image")[:8], batch["mask"][:8]
        tokens = self.encoder(images, mask=mask, mask_token=self.mask_token)
        ids = self.tokenizer.tokens(images_of(batch, "tokenizer_image")[:8])
        ids[mask] = self.predict(tokens, mask).argmax(-1)
        decoded = self.tokenizer.decode(ids.reshape(-1, *self.encoder.grid_size))
        patch = self.encoder.patch_size
        title = "input | masked" if decoded is None else "input | masked | predicted tokens"
        return {title: token_pictures.masked_sheet(images, mask, patch_size=patch, mean=mean, std=std, decoded=decoded)}
