"""Golden cases of BEiT's code: the masked model and the discrete VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.rel_pos import bias_of, relative_index
from pretrain.models.tokenizers.dvae import ConvEncoder, gumbel
from pretrain.models.tokenizers.tokenizer import Tokenizer
from pretrain.objectives.base import Horizon
from pretrain.objectives.beit import BEiT
from pretrain.objectives.configs import BEiTConfig, DVAEConfig
from pretrain.objectives.dvae import DVAE
from tests.golden.case import Case, rel_pos_kind

HORIZON = Horizon(total_steps=1, steps_per_epoch=1)


class GivenTokens(Tokenizer):
    """Says what the case says."""

    def __init__(self, tokens: Tensor, num_tokens: int):
        super().__init__()
        self.given, self.num_tokens = tokens, num_tokens

    def tokens(self, images: Tensor) -> Tensor:
        return self.given


def run_pretrain(case: Case) -> None:
    known = {"seed", "batch", "n_mask", "min_num_patches", "max_num_patches", "ctor"}
    case.only(*known)
    args = case.take(
        "ctor",
        *("img_size", "patch_size", "in_chans", "vocab_size", "embed_dim", "depth", "num_heads", "mlp_ratio"),
        *("init_values", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "qkv_bias"),
        *("qk_scale", "init_std"),
        neutral={
            "attn_head_dim": None, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0,
        },
    )  # fmt: skip
    vit = ViT(
        (args["img_size"],) * 2,
        args["patch_size"],
        args.get("in_chans", 3),
        args["embed_dim"],
        args["depth"],
        args["num_heads"],
        args.get("mlp_ratio", 4.0),
        pos_embed="learned" if args.get("use_abs_pos_emb", True) else "none",
        rel_pos_bias=rel_pos_kind(args),
        qkv_bias="no_key" if args.get("qkv_bias", True) else False,
        qk_scale=args.get("qk_scale") or None,
        layer_scale=args.get("init_values") or None,
    )
    tokens, images, mask = case["input/token_ids"], case["input/images"], case["input/bool_masked_pos"]
    config = BEiTConfig(tokenizer="given", num_masking_patches=case.config["n_mask"])
    beit = BEiT(config, vit, HORIZON, tokenizer=GivenTokens(tokens, args["vocab_size"]))
    beit.load_state_dict(
        {ours(name): value for name, value in case.below("state").items() if "position_index" not in name}
    )
    losses = beit({"image": images[:, None], "tokenizer_image": images[:, None], "mask": mask}, 0)
    losses["loss"].backward()
    case.check("expect/loss", losses["loss"])
    case.check("expect/mlm_acc", losses["accuracy"])
    case.check("expect/labels", tokens[mask])
    with torch.no_grad():
        features = vit(images, mask=mask, mask_token=beit.mask_token)
        case.check("expect/logits_masked", beit.predict(features, mask))
        everything = beit.predict(features, torch.ones_like(mask))
        case.check("expect/logits_all", everything.unflatten(0, mask.shape))
    if "expect/relative_position_index" in case.due:
        index = relative_index(vit.grid_size, vit.num_prefix_tokens)
        case.check("expect/relative_position_index", index)
        assert vit.rel_pos_bias is not None
        case.check("expect/rel_pos_bias", bias_of(vit.rel_pos_bias.relative_position_bias_table, index)[0])
    gradients = {name: parameter.grad for name, parameter in beit.named_parameters()}
    for name in case.below("grad"):
        gradient = gradients[ours(name)]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient)


def ours(name: str) -> str:
    """Our name of a parameter of the official model."""
    name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
    return name if name.startswith(("lm_head.", "mask_token")) else f"encoder.{name}"


def run_dvae(case: Case) -> None:
    args = case.take(
        "ctor",
        *("image_size", "num_tokens", "codebook_dim", "num_layers", "hidden_dim", "channels", "smooth_l1_loss"),
        *("temperature", "straight_through", "kl_div_loss_weight"),
    )
    case.only("seed", "batch", "ctor")
    official = {"num_tokens", "codebook_dim", "temperature", "straight_through", "kl_div_loss_weight", "smooth_l1_loss"}
    config = DVAEConfig(**{name: value for name, value in args.items() if name in official})
    config = config.model_copy(update={"temperature_end": config.temperature})
    side, halvings = args["image_size"], args.get("num_layers", 3)
    encoder = ConvEncoder((side, side), 2**halvings, args.get("channels", 3), args.get("hidden_dim", 64))
    dvae = DVAE(config, encoder, HORIZON)

    def ours_dvae(name: str) -> str:
        part, _, rest = name.partition(".")
        number, _, leaf = rest.partition(".")
        if part == "encoder":
            return f"codes.to_logits.{leaf}" if int(number) == 2 * halvings else f"encoder.layers.{rest}"
        return f"codes.{name}"

    dvae.load_state_dict({ours_dvae(name): value for name, value in case.below("state").items()})
    images, exponential = case["input/images"], case["draw/exponential"]
    # In fp64: an exponential number is not to be had back from a uniform one in fp32.
    noise = -torch.expm1(-exponential.double())
    torch.testing.assert_close(gumbel(noise), case["draw/gumbel"].double(), atol=1e-6, rtol=1e-6)
    losses = dvae({"image": images[:, None], "gumbel_noise": noise}, 0)
    losses["loss"].backward()
    case.check("expect/loss", losses["loss"])
    with torch.no_grad():
        logits = dvae.codes.to_logits(encoder.map(images))
        weights = dvae.choose(logits, noise, 0)
        case.check("expect/logits", logits)
        case.check("expect/codebook_indices", logits.argmax(1))
        case.check("expect/codebook_probs", logits.softmax(1))
        case.check("expect/recons", dvae.codes.decode_mixture(weights))
        case.check("expect/decode_of_indices", dvae.reconstruct(images))
    gradients = {name: parameter.grad for name, parameter in dvae.named_parameters()}
    for name in case.below("grad"):
        gradient = gradients[ours_dvae(name)]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient)
