"""config.json of Hugging Face: every key that changes what the network computes is read, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.core.files import read_text
from pretrain.models.importers.weights import Facts, Grid
from pretrain.models.layers import rope

CONFIG = "config.json"
# The networks that are read -> the eps of their norms where the file does not name it.
_NORM_EPS = {
    **dict.fromkeys(("vit", "deit", "beit", "data2vec-vision", "ijepa", "vit_mae"), 1e-12),
    **dict.fromkeys(("vit_msn", "dinov2", "dinov2_with_registers"), 1e-6),
    "dinov3_vit": 1e-5,
}
_OF_FACTS = {"model_type", "num_attention_heads", "layer_norm_eps", "hidden_act", "image_size", "patch_size"}
_OF_ROTATIONS = {"rope_theta", "rope_parameters", "rope_scaling"}
# Which weights there are, and their shapes, shows these.
_IN_THE_WEIGHTS = {
    *("hidden_size", "num_hidden_layers", "intermediate_size", "mlp_ratio", "num_channels", "num_register_tokens"),
    *("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias", "use_swiglu_ffn", "use_gated_mlp"),
    *("use_absolute_position_embeddings", "use_relative_position_bias", "use_shared_relative_position_bias"),
    *("layer_scale_init_value", "layerscale_value"),
}
# Of training, of heads, of the classes around the backbone, and of the file itself.
_WITHOUT_EFFECT = {
    *(
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "attention_dropout",
        "drop_path_rate",
        "initializer_range",
    ),
    *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", "use_mask_token", "mask_ratio", "norm_pix_loss"),
    *("pooler_output_size", "pooler_act", "use_mean_pooling", "encoder_stride", "vocab_size", "id2label", "label2id"),
    *("decoder_num_attention_heads", "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size"),
    *("pool_scales", "use_auxiliary_head", "auxiliary_loss_weight", "auxiliary_channels", "auxiliary_num_convs"),
    *("auxiliary_concat_input", "semantic_loss_ignore_index", "add_fpn", "problem_type", "num_labels"),
    *("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"),
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "chunk_size_feed_forward"),
    *("return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder", "tie_word_embeddings"),
}
_KNOWN = _OF_FACTS | _OF_ROTATIONS | _IN_THE_WEIGHTS | _WITHOUT_EFFECT


class Described(NamedTuple):
    """The facts of a config.json, and the rows and columns of its position tables; None: square."""

    facts: Facts
    grid: Grid | None


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a folder; None: there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a configuration of Hugging Face")
    return config


def described(config: Mapping[str, Any], *, embed_dim: int, depth: int) -> Described:
    """The facts in a configuration of a network of this width and depth.

    Raises:
        ValueError: a key is not one that is read here, or its value is of a function that our ViT does not compute; all
            of them are listed.
    """
    kind = config.get("model_type")
    if kind not in _NORM_EPS:
        raise ValueError(f"{CONFIG}: model_type: {kind!r} is not read; those that are: {', '.join(_NORM_EPS)}")
    rotary = kind == "dinov3_vit"
    problems = [
        f"{key}: {value!r} is not known here and may change what the network computes; remove it if it does not"
        for key, value in config.items()
        if key not in _KNOWN and not key.startswith("_") and value not in (None, False, {}, [])
    ]
    act, wanted = config.get("hidden_act", "gelu"), "silu" if config.get("use_gated_mlp") else "gelu"
    if act != wanted and not config.get("use_swiglu_ffn"):  # DINOv2's SwiGLU does not read it
        problems.append(f"hidden_act: {act!r}, and our ViT computes {wanted!r}")
    problems += _of_rotations(config) if rotary else []
    heads, eps = config.get("num_attention_heads"), config.get("layer_norm_eps", _NORM_EPS[kind])
    if not isinstance(heads, int) or heads < 1:
        problems.append(f"num_attention_heads: {heads!r}, a number is needed")
    if not isinstance(eps, int | float):
        problems.append(f"layer_norm_eps: {eps!r}, a number is needed")
    if problems:
        raise ValueError("\n".join(f"{CONFIG}: {problem}" for problem in problems))
    facts = Facts(embed_dim, depth, heads, eps, rotary, source=f"{CONFIG} of {kind}", certain=True)
    return Described(facts, _grid(config))


def _of_rotations(config: Mapping[str, Any]) -> list[str]:
    """Newer versions keep the base in a mapping."""
    problems = []
    for key in ("rope_parameters", "rope_scaling"):
        inner = config.get(key)
        if not isinstance(inner, Mapping):
            continue
        base, form = inner.get("rope_theta", rope.BASE), inner.get("rope_type", inner.get("type", "default"))
        if base != rope.BASE or form != "default" or inner.keys() - {"rope_theta", "rope_type", "type"}:
            problems.append(f"{key}: {dict(inner)!r}, and our ViT rotates with base {rope.BASE:g}")
    base = config.get("rope_theta", rope.BASE)
    return problems if base == rope.BASE else [*problems, f"rope_theta: {base!r}, our ViT rotates with {rope.BASE:g}"]


def _grid(config: Mapping[str, Any]) -> Grid | None:
    size, patch = config.get("image_size"), config.get("patch_size")
    if not isinstance(size, list | tuple) or len(size) != 2:
        return None
    sides = patch if isinstance(patch, list | tuple) else (patch, patch)
    if not all(isinstance(one, int) and one > 0 for one in (*size, *sides)):
        return None
    return size[0] // sides[0], size[1] // sides[1]
