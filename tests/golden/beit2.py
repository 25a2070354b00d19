"""Golden cases of BEiT v2's code: the quantizer, alone and in several processes, and VQ-KD."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.core import distributed
from pretrain.core.distributed import World
from pretrain.models.backbones.vit import ViT
from pretrain.models.teachers.feature_teacher import FeatureTeacher
from pretrain.models.teachers.frozen import Frozen
from pretrain.models.tokenizers.quantizer import Quantizer, kmeans, tally
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import VQKDConfig
from pretrain.objectives.vqkd import VQKD
from tests.golden.case import Case, rel_pos_kind
from tests.golden.ranks import run_ranks

HORIZON = Horizon(total_steps=1, steps_per_epoch=1)


def run_quantizer(case: Case) -> None:
    case.only("world", "steps", "batch", "hw", "ctor")
    results = run_ranks(case, quantize, case.config["world"])
    for key in sorted(case.due):
        owner = int(key.rpartition("_rank")[2]) if "_rank" in key else 0
        if key in results[owner]:
            case.check(key, results[owner][key])
    for rank, result in enumerate(results):
        for key, value in result.items():
            if "_rank" not in key:
                assert torch.equal(value, results[0][key]), f"{case.name}: {key} of rank {rank} differs from rank 0"


def quantize(case: Case, world: World) -> dict[str, Tensor]:
    """All steps of one rank, by the keys of the case."""
    args = case.take(
        "ctor",
        *("n_embed", "embedding_dim", "beta", "decay", "kmeans_init"),
        # eps is of sums that nothing reads; a codebook from a file is in the state, as any other.
        *("eps", "codebook_init_path"),
        neutral={"statistic_code_usage": True},
    )
    start = args.get("kmeans_init", False)
    quantizer = Quantizer(
        args["n_embed"], args["embedding_dim"], decay=args.get("decay", 0.99), beta=args["beta"], kmeans_init=start
    )
    state = case.below("state")
    loaded = {"codebook": "embedding.weight", "cluster_size": "cluster_size", "initted": "embedding.initted"}
    quantizer.load_state_dict({name: state[official] for name, official in loaded.items()})
    rank, result = world.rank, {}
    # What the official state carries along: counts of the k-means start, and a copy of the first codebook.
    counts, first = state["embedding.cluster_size"], state["embedding.embed_avg"]
    for step in range(case.config["steps"]):
        where = f"input/step{step}" + (f"/rank{rank}" if world.world_size > 1 else "")
        z = case[f"{where}/z"].clone().requires_grad_()
        noise = None
        if start and step == 0:
            order = case["draw/kmeans_perm"]
            noise = torch.empty(len(order)).scatter_(0, order, torch.arange(len(order)) / len(order))
            vectors = F.normalize(z.detach().permute(0, 2, 3, 1), dim=-1).flatten(0, -2)
            counts = kmeans(vectors, noise, args["n_embed"])[1]
        done = quantizer(z.permute(0, 2, 3, 1), noise)
        quantizer.remember(done)
        codes = done.codes.permute(0, 3, 1, 2)
        ((codes * case[f"{where}/dzq"]).sum() + done.loss).backward()
        quantizer.update()
        assert z.grad is not None
        mine = {"ids": done.ids.flatten(), "loss": done.loss, "zq": codes, "dz": z.grad}
        result |= {f"expect/step{step}/{name}_rank{rank}": value.detach() for name, value in mine.items()}
        result[f"expect/step{step}/codebook"] = quantizer.codebook.clone()
        result[f"expect/step{step}/cluster_size"] = quantizer.cluster_size.clone()
    quantizer.eval()
    done = quantizer(z.detach().permute(0, 2, 3, 1))
    # The official code counts in evaluation too; here whoever evaluates says so.
    seen = tally(done.vectors, done.ids.flatten(), args["n_embed"])[0]
    quantizer.observe(distributed.all_reduce_sum(seen))
    result |= {f"expect/eval/ids_rank{rank}": done.ids.flatten(), f"expect/eval/loss_rank{rank}": done.loss}
    result["expect/eval/cluster_size"] = quantizer.cluster_size.clone()
    final = {"weight": quantizer.codebook, "initted": quantizer.initted, "cluster_size": counts, "embed_avg": first}
    return result | {f"expect/final/embedding.{name}": value.clone() for name, value in final.items()}


class GivenFeatures(FeatureTeacher):
    """Says what the case says."""

    def __init__(self, features: Tensor):
        Frozen.__init__(self)
        self.given, self.embed_dim = features, features.shape[-1]

    def features(self, images: Tensor) -> Tensor:
        return self.given


def run_vqkd(case: Case) -> None:
    case.only(
        "batch", "img_size", "patch_size", "n_code", "code_dim", "out_dim", "decay", "enc", "dec", "kmeans_init",
        "in_chans", "rec_loss_type",
    )  # fmt: skip
    assert case.config.get("rec_loss_type", "cosine") == "cosine", "the official code has no other"
    assert not case.config.get("kmeans_init", False), f"{case.name}: the case gives no random numbers of k-means"
    widths = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    flags = ("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "qkv_bias", "qk_scale", "init_values")
    encoder, decoder = case.take("enc", *widths, *flags), case.take("dec", *widths)
    size = (case.config["img_size"],) * 2
    vit = ViT(
        size,
        case.config["patch_size"],
        case.config.get("in_chans", 3),
        pos_embed="learned" if encoder.get("use_abs_pos_emb", True) else "none",
        rel_pos_bias=rel_pos_kind(encoder),
        qkv_bias="no_key" if encoder.get("qkv_bias", True) else False,
        qk_scale=encoder.get("qk_scale") or None,
        layer_scale=encoder.get("init_values") or None,
        **{name: encoder[name] for name in widths if name in encoder},
    )
    config = VQKDConfig(
        teacher="given",
        num_codes=case.config["n_code"],
        code_dim=case.config["code_dim"],
        decay=case.config["decay"],
        kmeans_init=False,
        **{f"decoder_{name}": value for name, value in decoder.items()},
    )
    vqkd = VQKD(config, vit, HORIZON, teacher=GivenFeatures(case["input/target"]))
    dead = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
    state = {name: value for name, value in case.below("state").items() if "relative_position_index" not in name}
    vqkd.load_state_dict({ours(name): value for name, value in state.items() if name not in dead})
    images = case["input/images"] * 2 - 1  # what the official code makes of pixels in [0, 1]
    batch = {"image": images[:, None], "teacher_image": images[:, None]}
    losses = vqkd.train()(batch, 0)
    losses["loss"].backward()
    case.check("expect/loss", losses["loss"])
    case.check("expect/train_total_loss", losses["loss"])
    case.check("expect/train_quant_loss", losses["loss_quant"])
    case.check("expect/train_rec_loss", losses["loss_rec"])
    gradients = {name: parameter.grad for name, parameter in vqkd.named_parameters()}
    for name in case.below("grad"):
        gradient = gradients[ours(name)]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient)
    vqkd.after_step(1)
    case.check("expect/codebook_after", vqkd.quantize.codebook)
    with torch.no_grad():
        case.check("expect/eval_codebook_indices_after", vqkd.eval().encode(images, {})[1].ids)


def ours(name: str) -> str:
    """Our name of a tensor of the official model. Its last norm reads the patches only; ours reads all tokens."""
    name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
    name = name.replace("fc_norm.", "norm.").replace("quantize.embedding.weight", "quantize.codebook")
    return name.replace("quantize.embedding.initted", "quantize.initted")
