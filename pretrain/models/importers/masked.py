"""Checkpoints of masked image modelling: MAE, VideoMAE, BEiT, BEiT v2 and its tokenizer, SimMIM, data2vec (vision,
version 1)."""

from __future__ import annotations

from pretrain.models.importers.names import is_vit, mask_token, rename, swin_to_timm, take, to_vit
from pretrain.models.importers.weights import Source, State, Weights, below, under


def mae(state: State, source: Source) -> Weights | None:
    """Encoder and decoder_* in one state; a fine-tuned or released encoder has no decoder and is not this."""
    if not any(name.startswith("decoder_") for name in state):
        return None
    heads = take(state, "decoder_", "mask_token")
    heads = {"decoder." + name.removeprefix("decoder_"): tensor for name, tensor in heads.items()}
    return Weights("mae", to_vit(state, source), heads)


def videomae(state: State, source: Source) -> Weights | None:
    """`encoder` of clips and `decoder` with a head; its positions are computed and not in the file."""
    if "encoder_to_decoder.weight" not in state or "encoder.patch_embed.proj.weight" not in state:
        return None
    heads = {"decoder.mask_token": state["mask_token"], "decoder.embed.weight": state["encoder_to_decoder.weight"]}
    for name, tensor in below(state, "decoder.").items():
        heads[f"decoder.{rename(name).replace('head.', 'pred.', 1)}"] = tensor
    left_out = tuple(n for n in state if not n.startswith(("encoder", "decoder.", "mask_token")))
    return Weights("videomae", to_vit(below(state, "encoder."), source), heads, left_out=left_out)


def beit(state: State, source: Source) -> Weights | None:
    """BEiT, BEiT v2 (`cls_pt_*`) and data2vec, whose head keeps the width."""
    if "lm_head.weight" not in state or not is_vit(state):
        return None
    teacher = below(take(state, "model_ema."), "model_ema.")
    heads = take(state, "lm_head.", "mask_token", "cls_pt_")
    classes, dim = heads["lm_head.weight"].shape
    if classes == dim:
        return _data2vec(state, heads, teacher, source)
    kind = "beit2" if any(name.startswith("cls_pt_") for name in heads) else "beit"
    # The condenser's blocks carry BEiT's names.
    named = {_condenser(name): tensor for name, tensor in heads.items() if not name.endswith("position_index")}
    return Weights(kind, to_vit(state, source), named, left_out=tuple(f"model_ema.{name}" for name in teacher))


def _data2vec(state: State, heads: State, teacher: State, source: Source) -> Weights:
    backbone = to_vit(state, source)
    average = backbone
    if teacher:
        take(teacher, "lm_head.", "mask_token")
        average = to_vit(teacher, source)
    named = {name.replace("lm_head.", "head."): tensor for name, tensor in heads.items()}
    return Weights("data2vec", backbone, named | under("teacher.average.", average))


def simmim(state: State, source: Source) -> Weights | None:
    """`encoder` (ViT or Swin) and a 1 x 1 convolution `decoder.0`."""
    if "decoder.0.weight" not in state or "encoder.patch_embed.proj.weight" not in state:
        return None
    encoder = below(state, "encoder.")
    heads = {"mask_token": mask_token(encoder.pop("mask_token"))}
    weight = state["decoder.0.weight"]
    heads |= {"decoder.weight": weight.flatten(1), "decoder.bias": state["decoder.0.bias"]}
    left_out = tuple(name for name in state if not name.startswith(("encoder.", "decoder.0.")))
    backbone = to_vit(encoder, source) if is_vit(encoder) else swin_to_timm(encoder)
    return Weights("simmim", backbone, heads, left_out=left_out)


def vqkd(state: State, source: Source) -> Weights | None:
    """BEiT v2's tokenizer. Its encoder's `fc_norm` reads every patch, as our last norm does."""
    if "quantize.embedding.weight" not in state or "encode_task_layer.0.weight" not in state:
        return None
    networks = {part: to_vit(_with_norm(below(state, part)), source) for part in ("encoder.", "decoder.")}
    kept = ("encode_task_layer.", "decode_task_layer.")
    heads = {name: tensor for name, tensor in state.items() if name.startswith(kept)}
    quantizer = {"embedding.weight": "codebook", "cluster_size": "cluster_size", "embedding.initted": "initted"}
    heads |= {f"quantize.{ours}": state[f"quantize.{theirs}"] for theirs, ours in quantizer.items()}
    heads |= under("decoder.", networks["decoder."])
    used = {f"quantize.{name}" for name in quantizer}
    left_out = tuple(n for n in state if n not in used and not n.startswith((*networks, *kept)))
    return Weights("vqkd", networks["encoder."], heads, left_out=left_out)


def _with_norm(state: State) -> State:
    return {name.replace("fc_norm.", "norm."): tensor for name, tensor in state.items()}


def _condenser(name: str) -> str:
    prefix = "cls_pt_layers."
    if not name.startswith(prefix):
        return name
    return prefix + rename("blocks." + name.removeprefix(prefix)).removeprefix("blocks.")
