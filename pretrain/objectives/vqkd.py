"""VQ-KD: quantize patches into codes from which the features of a teacher can be predicted.

Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.core.trainable import Batch, ParamGroup
from pretrain.models import param_groups
from pretrain.models.backbones.contract import ImageEncoder
from pretrain.models.backbones.vit import ViT
from pretrain.models.pictures import token_pictures
from pretrain.models.teachers.feature_teacher import FeatureTeacher, open_teacher
from pretrain.models.teachers.frozen import Fingerprint
from pretrain.models.tokenizers.quantizer import Quantized, Quantizer, code_features, cosine_loss, task_layer
from pretrain.objectives.base import Horizon, Objective, feature_std, images_of
from pretrain.objectives.configs.vqkd import VQKDConfig


class VQKD(Objective[VQKDConfig]):
    """Batch: "image" [b, 1, C, H, W], the same crop in [0, 1] for the teacher, "teacher_image" [b, 1, C, h, w]; with
    k-means initialization "kmeans_noise" [b, N]; with drop path its uniform random numbers "drop_path" [b, depth, 2].

    State: `encoder`, a projection to codes `encode_task_layer`, the codebook `quantize` (buffers), a transformer on the
    map of codes `decoder`, a projection to the teacher's features `decode_task_layer`. `after_step` updates codes.

    Args:
        teacher: an open teacher; default: that of `config.teacher`.

    Raises:
        ConfigError: the teacher cannot be read, or its features do not fit the backbone's grid.
    """

    head_prefixes = ("encode_task_layer.", "quantize.", "decoder.", "decode_task_layer.")
    kept_prefixes = ("fingerprint.",)

    def __init__(
        self, config: VQKDConfig, backbone: ImageEncoder, horizon: Horizon, *, teacher: FeatureTeacher | None = None
    ):
        super().__init__()
        del horizon
        self.config = config
        self.encoder = backbone
        self.fingerprint: Fingerprint | None = None
        grid = backbone.grid_size
        if teacher is None:
            size = config.picture_size(grid, backbone.patch_size)
            teacher, self.fingerprint = open_teacher(
                config.teacher, num_heads=config.teacher_heads, size=size, grid=grid, in_chans=backbone.in_chans
            )
        self.teacher = teacher
        self.encode_task_layer = task_layer(backbone.embed_dim, config.code_dim)
        self.quantize = Quantizer(
            config.num_codes, config.code_dim, decay=config.decay, beta=config.beta, kmeans_init=config.kmeans_init
        )
        self.decoder = ViT(
            grid,
            1,
            config.code_dim,
            config.decoder_embed_dim,
            config.decoder_depth,
            config.decoder_num_heads,
            config.decoder_mlp_ratio,
            pos_embed="learned",
            qkv_bias="no_key",
        )
        self.decode_task_layer = task_layer(config.decoder_embed_dim, teacher.embed_dim)
        for network in (backbone, self.decoder):
            network.divide_block_outputs()

    @property
    def backbone(self) -> ImageEncoder:
        return self.encoder

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        target = self.teacher.features(images_of(batch, "teacher_image"))
        features, quantized = self.encode(images_of(batch, "image"), batch)
        if self.training:
            self.quantize.remember(quantized)
        loss_rec = cosine_loss(self.decode(quantized.codes), target)
        perplexity, used = self.quantize.usage(quantized.ids)
        return {
            "loss": quantized.loss + loss_rec,
            "loss_rec": loss_rec.detach(),
            "loss_quant": quantized.loss.detach(),
            "codebook_perplexity": perplexity,
            "codebook_used": used,
            "feature_std": feature_std(features.mean(1)),
        }

    def encode(self, images: Tensor, batch: Batch) -> tuple[Tensor, Quantized]:
        """Normalized images [b, C, H, W] -> projected features [b, N, code_dim], and the same quantized."""
        features = code_features(self.encoder, self.encode_task_layer, images, drop=batch.get("drop_path"))
        return features, self.quantize(features, batch.get("kmeans_noise"))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [b, N, code_dim] -> predictions of the teacher's features [b, N, D]."""
        grid_map = codes.transpose(1, 2).reshape(len(codes), -1, *self.encoder.grid_size)
        return self.decode_task_layer(self.decoder(grid_map)[:, self.decoder.num_prefix_tokens :])

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.quantize.update()

    def discard_pending(self) -> None:
        super().discard_pending()
        self.quantize.discard()

    def param_groups(self) -> list[ParamGroup]:
        """No weight decay for class tokens and positions."""
        return param_groups.split(self, no_decay_names=param_groups.tokens_and_positions(self))

    @torch.no_grad()
    def pictures(
        self, batch: Batch, step: int, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> dict[str, Tensor]:
        """One row per image (8 at most): the input, and the map of its codes, one colour per code."""
        given = {name: value[:8] for name, value in batch.items() if name in ("image", "kmeans_noise")}
        images = images_of(given, "image")
        ids = self.encode(images, given)[1].ids.reshape(-1, *self.encoder.grid_size)
        sheet = token_pictures.code_sheet(images, ids, num_codes=self.config.num_codes, mean=mean, std=std)
        return {"input | codes": sheet}
