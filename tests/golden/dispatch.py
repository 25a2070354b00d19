"""Which runner a case needs, read from the official code it was made with; never from its file name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.golden import (
    beit,
    beit2,
    capi,
    data2vec,
    data2vec2,
    dino,
    dino_steps,
    dinov2,
    dinov2_losses,
    dinov2_vit,
    dinov3,
    dinov3_steps,
    dinov3_vit,
    finetune,
    ibot,
    ijepa,
    lejepa,
    mae,
    masks,
    mocov3,
    optim,
    pixio,
    simmim,
    videomae,
)
from tests.golden.case import Case
from tests.golden.mechanisms import branch, channel, channel_spatial, hamburger, interpret, ram, sam, spatial, temporal

# (repository, a part of source.code, runner): the first line that fits.
RUNNERS: list[tuple[str, str, Callable[[Case], None]]] = [
    ("facebookresearch/mae", "models_mae.py:MaskedAutoencoderViT", mae.run_pretrain),
    ("facebookresearch/mae", "get_2d_sincos_pos_embed", mae.run_sincos),
    ("facebookresearch/mae", "interpolate_pos_embed", mae.run_interpolate),
    ("facebookresearch/mae", "models_vit.py:VisionTransformer", finetune.run_mae),
    ("facebookresearch/mae", "util/lars.py:LARS", optim.run_lars),
    ("facebookresearch/mae", "adjust_learning_rate", mae.run_lr_schedule),
    ("facebookresearch/dino", "main_dino.py:train_one_epoch", dino_steps.run_steps),
    ("facebookresearch/dino", "utils.py:cosine_scheduler", dino.run_schedules),
    ("facebookresearch/dino", "vision_transformer.py:VisionTransformer", dino.run_vit),
    ("facebookresearch/dino", "vision_transformer.py:DINOHead", dino.run_head),
    ("microsoft/unilm (beit/)", "masking_generator.py:MaskingGenerator", masks.run_beit),
    ("microsoft/unilm (beit2/)", "masking_generator.py:MaskingGenerator", masks.run_beit),
    ("bytedance/ibot", "loader.py:ImageFolderMask.__getitem__", masks.run_ibot),
    ("facebookresearch/dinov2", "data/collate.py:collate_data_and_cast", masks.run_dinov2),
    ("facebookresearch/dinov2", "loss/dino_clstoken_loss.py:DINOLoss", dinov2_losses.run_losses),
    ("facebookresearch/dinov2", "models/vision_transformer.py:DinoVisionTransformer", dinov2_vit.run_vit),
    ("facebookresearch/dinov2", "layers/block.py:NestedTensorBlock", dinov2_vit.run_layers),
    ("facebookresearch/dinov2", "train/ssl_meta_arch.py:SSLMetaArch", dinov2.run_objective),
    ("bytedance/ibot", "main_ibot.py:train_one_epoch", ibot.run_steps),
    ("facebookresearch/fairseq", "data2vec2.py:Data2VecMultiModel", data2vec2.run_steps),
    ("facebookresearch/data2vec_vision", "engine_for_cyclical.py:train_one_epoch", data2vec.run_steps),
    ("facebookresearch/ijepa", "src/train.py:main.train_step", ijepa.run_steps),
    ("facebookresearch/ijepa", "masks/multiblock.py:MaskCollator", masks.run_ijepa),
    ("facebookresearch/moco-v3", "moco/builder.py:MoCo_ViT.forward", mocov3.run_steps),
    ("microsoft/SimMIM", "VisionTransformerForSimMIM", simmim.run_vit),
    ("microsoft/SimMIM", "SwinTransformerForSimMIM", simmim.run_swin),
    ("microsoft/unilm (beit/)", "optim_factory.py:LayerDecayValueAssigner", finetune.run_beit),
    ("facebookresearch/dinov2", "utils/utils.py:CosineScheduler", optim.run_dinov2_schedules),
    ("facebookresearch/ijepa", "schedulers.py:WarmupCosineSchedule", optim.run_ijepa_schedules),
    ("facebookresearch/moco-v3", "vits.py:build_2d_sincos_position_embedding", optim.run_mocov3_tables),
    ("microsoft/unilm (beit/)", "modeling_pretrain.py:VisionTransformerForMaskedImageModeling", beit.run_pretrain),
    ("microsoft/unilm (beit/)", "modeling_discrete_vae.py:DiscreteVAE", beit.run_dvae),
    ("microsoft/unilm (beit2/)", "modeling_vqkd.py:VQKD.forward", beit2.run_vqkd),
    ("microsoft/unilm (beit2/)", "norm_ema_quantizer.py:", beit2.run_quantizer),
]

# Later cases say their `kind`.
KINDS: dict[str, Callable[[Case], None]] = {
    "dinov3/gram": dinov3.run_gram,
    "dinov3/losses": dinov3.run_losses,
    "dinov3/losses_2proc": dinov3.run_losses,
    "dinov3/masks": masks.run_dinov3,
    "dinov3/schedules": dinov3_steps.run_schedules,
    "dinov3/ssl_step": dinov3_steps.run_steps,
    "dinov3/ssl_step_2proc": dinov3_steps.run_steps,
    "dinov3/rope": dinov3_vit.run_rope,
    "dinov3/vit": dinov3_vit.run_vit,
    "capi/clustering_2proc": capi.run_clustering,
    "capi/masks": masks.run_capi,
    "capi/step": capi.run_steps,
    "lejepa/sigreg": lejepa.run_sigreg,
    "lejepa/sigreg_2proc": lejepa.run_sigreg_on_ranks,
    "lejepa/minimal": lejepa.run_minimal,
    "lejepa/multicrop": lejepa.run_multicrop,
    "pixio/pretrain": pixio.run_pretrain,
    "pixio/lr": pixio.run_lr,
    "pixio/sampling": pixio.run_sampling,
    "videomae/pretrain": videomae.run_pretrain,
    "videomae/tubes": videomae.run_tubes,
    "channel/se_bias": channel.run_se_bias,
    "channel/se_nobias": channel.run_se_nobias,
    "channel/eca": channel.run_eca,
    "channel/fca": channel.run_fca,
    "channel/xca": channel.run_xca,
    "channel/xca_block": channel.run_xca_block,
    "channel/danet_cam": channel.run_danet_cam,
    "channel_spatial/cbam": channel_spatial.run_cbam,
    "channel_spatial/bam": channel_spatial.run_bam,
    "channel_spatial/coord": channel_spatial.run_coord,
    "channel_spatial/simam": channel_spatial.run_simam,
    "channel_spatial/gc": channel_spatial.run_gc,
    "channel_spatial/lka": channel_spatial.run_lka,
    "channel_spatial/lka_block": channel_spatial.run_lka_block,
    "branch/condconv": branch.run_condconv,
    "branch/dynamic_conv": branch.run_dynamic_conv,
    "branch/selective_kernel": branch.run_selective_kernel,
    "branch/split_attention": branch.run_split_attention,
    "spatial/danet_pam": spatial.run_position,
    "spatial/nonlocal": spatial.run_non_local,
    "spatial/ema_unit": spatial.run_em,
    "spatial/criss_cross": spatial.run_criss_cross,
    "spatial/hamburger": hamburger.run,
    "spatial/external_attention": spatial.run_external,
    "spatial/sasa_paper": spatial.run_stand_alone,
    "spatial/sasa_per_channel": spatial.run_per_channel,
    "spatial/stn_affine": spatial.run_transformer,
    "spatial/deform_conv": spatial.run_deform,
    "spatial/ram": ram.run,
    "temporal/tam": temporal.run_tam,
    "optim/sam": sam.run_sam,
    "interpret/rollout_chefer": interpret.run_rollout_chefer,
    "interpret/deletion_insertion": interpret.run_deletion_insertion,
}


class MissingObjectiveError(AssertionError):
    """The case is of a method that Fovea does not have."""


def run(path: Path) -> None:
    """Compute the case and compare every one of its numbers.

    Raises:
        MissingObjectiveError: nothing in Fovea computes it.
        AssertionError: a number is off, or was never compared.
    """
    case = Case(path)
    source = case.facts["source"]
    for repo, code, runner in RUNNERS:
        if source["repo"] == repo and any(code in part for part in source["code"]):
            runner(case)
            case.finish()
            return
    if runner := KINDS.get(case.facts.get("kind", "")):
        runner(case)
        case.finish()
        return
    raise MissingObjectiveError(f"missing objective: {source['repo']} {', '.join(source['code'])} (case {case.name})")
