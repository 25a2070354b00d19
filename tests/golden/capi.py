"""Runs Fovea's CAPI on the golden cases of its official code: masks, the clustering on ranks, whole steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.core.distributed import World
from pretrain.models.backbones.vit import ViT
from pretrain.models.heads.cross_predictor import FREQUENCIES
from pretrain.models.layers.free_rope import FreeRope
from pretrain.models.losses.clustering import OnlineClustering, unit
from pretrain.models.teachers.ema import EMA
from pretrain.objectives.base import Horizon
from pretrain.objectives.capi import CAPI
from pretrain.objectives.configs.capi import CAPIConfig
from tests.engine.settings import Settings, schedules_of, settings
from tests.golden.case import Case
from tests.golden.dinov3_steps import RecordingEngine
from tests.golden.ranks import ALONE, run_ranks

SHAPES = {"InverseBlock": "inverse_block", "Block": "block", "Uniform": "random"}
BETAS = (0.9, 0.95)
CLUSTERING_DECAY = 0.01  # torch's default, of which no configuration speaks
PARTS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def run_clustering(case: Case) -> None:
    case.only("positions", "batch", "dim", "clusters", "clustering")
    results = run_ranks(case, clustering_on_rank, len({key.split("/")[0] for key in case.below("input")}))
    for rank, result in enumerate(results):
        for key, value in result.items():
            if not key.startswith("weights/"):
                case.check(key.replace("RANK", f"rank{rank}"), value)
    for key in [key for key in results[0] if key.startswith("weights/")]:
        mean = torch.stack([result[key] for result in results]).mean(0)
        case.check(key.replace("weights/", "grad/mean_over_processes/"), mean)


def clustering_on_rank(case: Case, world: World) -> dict[str, Tensor]:
    options = clustering_options(case)
    modes = {key.split("/")[1] for key in case.below("expect")}
    unknown = modes - {"positionwise", "all_positions"}
    assert not unknown, f"{case.name}: {sorted(unknown)} is not known"
    found = {}
    for mode in sorted(modes):
        options["positionwise"] = mode == "positionwise"
        layer = OnlineClustering(case.config["dim"], case.config["clusters"], **options)
        layer.load_state_dict({n.removeprefix("layer."): value for n, value in case.below("state").items()})
        given = case[f"input/rank{world.rank}/x"].clone().requires_grad_()
        rows = unit(given.transpose(0, 1))
        masses = layer.masses(rows)
        loss = layer.loss(rows, masses).loss
        loss.backward()
        assert given.grad is not None
        found[f"expect/RANK/{mode}/assignments"] = layer.assign(rows, masses).transpose(0, 1)
        found |= {f"expect/RANK/{mode}/loss": loss.detach(), f"grad/RANK/{mode}/x": given.grad}
        found |= {f"weights/{mode}/layer.{name}": gradient(p) for name, p in layer.named_parameters()}
    return found


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def clustering_options(case: Case) -> dict[str, Any]:
    """Of our layer."""
    given = case.take("clustering", "bias", "n_sk_iter", "target_temp", "pred_temp", "positionwise_sk")
    return {
        "bias": given["bias"],
        "iterations": given["n_sk_iter"],
        "target_temp": given["target_temp"],
        "pred_temp": given["pred_temp"],
        "positionwise": given.get("positionwise_sk", True),
    }


def mask_options(case: Case) -> dict[str, Any]:
    """Settings of the objective."""
    config = case.config
    case.take("masking_kwargs", "roll", "min_aspect", "max_aspect")
    kwargs, low = config["masking_kwargs"], config["masking_kwargs"].get("min_aspect", 0.5)
    return {
        "mask_ratio": config["mask_ratio"],
        "predicted_ratio": config["prediction_subsampling"],
        "mask_shape": SHAPES[config["masking"]],
        "mask_aspect": (low, kwargs.get("max_aspect") or 1 / low),
        "mask_roll": kwargs.get("roll", True),
    }


def run_steps(case: Case) -> None:
    for key, value in train(case).items():
        if key in case.tensors:  # targets of the first step alone
            case.check(key, value)
    _check_groups(case, build(case)[0])


def train(case: Case) -> dict[str, Tensor]:
    """Everything our steps can say about the tensors of the case, by their keys."""
    objective, chosen, of_clustering = build(case)
    state = case.below("state")
    own = objective.state_dict()
    objective.load_state_dict({name: ours(state, name, like) for name, like in own.items()})
    objective.train()
    # The official code averages what it never reads of the average.
    unread = torch.nn.ModuleDict({"predictor": objective.predictor, "head": objective.head})
    average = EMA(unread)
    average.average.load_state_dict(
        {name: ours(state, f"ema.{name}", like) for name, like in unread.state_dict().items()}
    )
    engine = RecordingEngine(objective, **chosen, world=ALONE, seed=0)
    first, result = case.config["first_iteration"], {}
    for s in range(case.config["steps"]):
        step = first + s
        rates, own_rates = schedules_of(chosen), schedules_of(of_clustering)
        for group in engine.groups:
            if group["names"][0].startswith("clustering."):
                group["lr_scale"] = own_rates.lr_at(step) / rates.lr_at(step)
        batch = _batch(case, s)
        result |= {f"expect/step{s}/{name}": value for name, value in _targets(objective, batch).items()}
        done = engine.train_step(iter([batch]), step)
        assert not done.skipped
        momentum = objective.momentum(step)
        objective.after_step(step + 1)
        average.update(unread, momentum)
        losses = {"capi_loss": "loss_prediction", "clustering_loss": "loss_clustering"}
        result |= {f"expect/step{s}/{theirs}": engine.losses[name] for theirs, name in losses.items()}
        numbers = {"lr": rates.lr_at(step), "clustering_lr": own_rates.lr_at(step), "momentum": momentum}
        result |= {f"expect/step{s}/{name}": torch.tensor(value) for name, value in numbers.items()}
        if s == 0:
            result |= {f"grad/{name}": theirs(engine.gradients, name, like) for name, like in _below(case, "grad")}
    after = objective.state_dict() | {f"ema.{name}": value for name, value in average.average.state_dict().items()}
    return result | {f"expect/after/{name}": theirs(after, name, like) for name, like in _below(case, "expect/after")}


def _below(case: Case, section: str) -> list[tuple[str, Tensor]]:
    return list(case.below(section).items())


def _targets(objective: CAPI, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        features = objective.features(batch["image"][:, 0])
        targets = objective.targets(features, objective.masses(features), batch["mask_predicted"]).flatten(0, 1)
    return {"targets": targets, "target_entropy": -torch.xlogy(targets, targets).sum(1).mean()}


def build(case: Case) -> tuple[CAPI, Settings, Settings]:
    """Objective, optimizer and the clustering's own schedule, from options of the case, all of which must be known."""
    case.only(
        "batch", "img", "clusters", "steps", "first_iteration", "student_temp", "mask_ratio", "prediction_subsampling",
        "masking", "masking_kwargs", "clustering", "model", "optim",
    )  # fmt: skip
    config, clustering = case.config, clustering_options(case)
    optim = case.take("optim", "total_iters", "lr", "momentum", "clustering_lr", "weight_decay", "multipliers")
    total, decay, multipliers = optim["total_iters"], optim["weight_decay"], dict(optim["multipliers"])
    momentum = _schedule(case, "momentum")
    assert momentum["start_warmup_value"] == 1.0, f"{case.name}: the momentum warms up from 1"
    encoder, decoder = (_transformer(case, f"{part}_kwargs") for part in ("encoder", "decoder"))
    options = CAPIConfig(
        num_clusters=config["clusters"],
        student_temp=config["student_temp"],
        teacher_temp=clustering["target_temp"],
        clustering_temp=clustering["pred_temp"],
        sinkhorn_iterations=clustering["iterations"],
        positionwise=clustering["positionwise"],
        clustering_bias=clustering["bias"],
        clustering_lr_scale=optim["clustering_lr"]["base_value"] / optim["lr"]["base_value"],
        clustering_decay_scale=CLUSTERING_DECAY / decay,
        predictor_embed_dim=decoder["embed_dim"],
        predictor_depth=decoder["depth"],
        predictor_num_heads=decoder["num_heads"],
        final_norm_weights=case.config["model"].get("final_norm_kwargs", {}).get("elementwise_affine", False),
        momentum_teacher=momentum["base_value"],
        final_momentum_teacher=momentum["final_value"],
        momentum_warmup=momentum["warmup_iters"] / total,
        momentum_share=momentum["truncate_cos"],
        norm_decay_scale=multipliers.pop("layernorm_wd_mult"),
        patch_embed_lr_mult=multipliers.pop("patch_embed_lr_mult"),
        frequencies_lr_mult=multipliers.pop("rope_lr_mult"),
        drop_path_rate=encoder["drop_path_rate"],
        **mask_options(case),
    )
    assert not multipliers, f"{case.name}: multipliers {sorted(multipliers)} are not known"
    assert encoder["drop_path_rate"] == decoder["drop_path_rate"], f"{case.name}: one drop path rate is applied"
    objective = CAPI(options, build_vit(case), Horizon(total_steps=total, steps_per_epoch=total))
    for module in objective.modules():  # trained by a learning rate that may be 0: the case has gradients
        if isinstance(module, FreeRope) and module.freqs in set(objective.parameters()):
            module.requires_grad_(True)
    return objective, _optim(case, "lr", decay), _optim(case, "clustering_lr", decay)


def build_vit(case: Case) -> ViT:
    given = case.take(
        "model", "patch_size", "in_chans", "n_registers", "transformers_kwargs", "encoder_kwargs", "decoder_kwargs",
        "norm_layer_kwargs", "final_norm_kwargs",
        neutral={"norm_layer_type": "RMSNorm", "register_coordinates": "edge", "scale_reg_to_visible": True},
    )  # fmt: skip
    assert given.get("out_layer", -1) == -1
    encoder = _transformer(case, "encoder_kwargs")
    vit = ViT(
        (case.config["img"], case.config["img"]),
        given.get("patch_size", 14),
        given.get("in_chans", 3),
        encoder["embed_dim"],
        encoder["depth"],
        encoder["num_heads"],
        class_token=False,
        num_registers=given.get("n_registers", 16),
        pos_embed="rope",
        rope={"frequencies": encoder["frequencies"]},
        qkv_bias=False,
        proj_bias=False,
        ffn_bias=False,
        norm_layer="rms",
        norm_eps=1e-5,
    )
    for key, known in (("norm_layer_kwargs", {"eps": 1e-5}), ("final_norm_kwargs", None)):
        value = given.get(key, known)
        assert known is None or value == known, f"{case.name}: model.{key} {value} is refused"
        assert set(value or {}) <= {"eps", "elementwise_affine"}, f"{case.name}: model.{key} {value} is refused"
    return vit


def _transformer(case: Case, section: str) -> dict[str, Any]:
    model = case.config["model"]
    given = dict(model["transformers_kwargs"]) | dict(model[section])
    block = dict(given.pop("block_kwargs", {}))
    attention = dict(block.pop("attn_kwargs", {}))
    rope = dict(attention.pop("rope_kwargs", {}))
    found = {name: given.pop(name) for name in ("embed_dim", "depth", "drop_path_rate")}
    found["num_heads"] = attention.pop("num_heads")
    found["frequencies"] = (rope.pop("min_freq", FREQUENCIES[0]), rope.pop("max_freq", FREQUENCIES[1]))
    kind = block.pop("drop_path_type", "efficient")
    refused = {"qkv_bias": attention.pop("qkv_bias", False), "proj_bias": attention.pop("proj_bias", False)}
    refused["drop_path_type"] = kind != "efficient"
    left = [*given, *block, *attention, *rope, *(name for name, is_set in refused.items() if is_set)]
    assert not left, f"{case.name}: model has options that the runner refuses: {left}"
    return found


def _schedule(case: Case, name: str) -> dict[str, Any]:
    given = {"start_warmup_value": 0.0, "warmup_iters": 0, "truncate_cos": 1, **case.config["optim"][name]}
    known = {"start_warmup_value", "warmup_iters", "truncate_cos", "base_value", "final_value"}
    unknown = set(given) - known
    assert not unknown, f"{case.name}: optim.{name} has options that the runner refuses: {sorted(unknown)}"
    return given


def _optim(case: Case, name: str, decay: float) -> Settings:
    given = _schedule(case, name)
    return settings(
        lr=given["base_value"],
        min_lr=given["final_value"],
        warmup_lr=given["start_warmup_value"],
        warmup_steps=given["warmup_iters"],
        warmup_form="closed",
        cosine_share=given["truncate_cos"],
        total_steps=case.config["optim"]["total_iters"],
        weight_decay=decay,
        betas=BETAS,
    )


def place(name: str) -> tuple[str, int | None]:
    """Our name of an official tensor, and its place in one that holds several."""
    whole = {
        "student.backbone.mask_token": "predictor.mask_token",
        "student_ema.backbone.mask_token": "ema.predictor.mask_token",
    }
    if name in whole:
        return whole[name], None
    is_average = name.startswith("student_ema.")
    name = name.replace("student_ema.", "student.", 1).replace("teacher.head.layer.", "clustering.", 1)
    name = name.replace(".residual1.fn.", ".attn.").replace(".residual2.fn.", ".mlp.")
    name = re.sub(r"\.residual(\d)\.norm\.", r".norm\1.", name)
    part = next((PARTS[piece] for piece in name.split(".") if piece in PARTS), None)
    of_encoder = {"student.backbone.encoder.": "encoder.", "student.backbone.enc_norm.": "encoder.norm."}
    of_encoder |= {"student.backbone.registers": "encoder.reg_token"}
    of_encoder["student.backbone.patch_embed."] = "encoder.patch_embed.proj."
    for theirs_, ours_ in of_encoder.items():
        if name.startswith(theirs_):
            name = re.sub(r"\.[qkv]_proj\.", ".qkv.", name.replace(theirs_, ours_, 1))
            return (name.replace("encoder.", "teacher.average.", 1) if is_average else name), part
    name = name.replace("student.backbone.decoder.", "predictor.").replace(
        "student.backbone.dec_norm.", "predictor.norm."
    )
    name = name.replace("student.head.last_layer.", "head.").replace(".q_proj.", ".q.")
    name = re.sub(r"\.[kv]_proj\.", ".kv.", name)
    if name.endswith(".q.weight"):
        return (f"ema.{name}" if is_average else name), None
    return (f"ema.{name}" if is_average else name), None if part is None else part - 1


def ours(state: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Our tensor `name`, of the official ones; what the official code does not have keeps the value it starts with."""
    found = sorted((place(theirs)[1] or 0, theirs) for theirs in state if place(theirs)[0] == name)
    if not found:
        assert name.endswith("norm.weight"), name
        return like
    return torch.cat([state[theirs] for _, theirs in found]).reshape(like.shape)


def theirs(found: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The official tensor `name`, of ours."""
    own, part = place(name)
    value = found[own]
    if part is None:
        return value.reshape(like.shape)
    return value[part * len(like) : (part + 1) * len(like)]


def _batch(case: Case, step: int) -> dict[str, Tensor]:
    images = case[f"input/step{step}/images"]
    count = (case.config["img"] // case.config["model"]["patch_size"]) ** 2
    kinds = {"mask_visible": "visible_indices", "mask_predicted": "predict_indices"}
    batch = {"image": images[:, None]}
    for kind, of in kinds.items():
        indices = case[f"input/step{step}/{of}"].view(len(images), -1)
        assert bool((indices // count == torch.arange(len(images))[:, None]).all())
        batch[kind] = indices % count
    drawn = case.below(f"draw/step{step}/drop_path")
    if drawn:
        blocks = len({key.split("/")[0] for key in drawn})
        batch["drop_path"] = torch.stack([_drops(drawn, f"block{i}", len(images)) for i in range(blocks)], dim=1)
    return batch


def _drops(drawn: Mapping[str, Tensor], block: str, images: int) -> Tensor:
    """Uniform numbers [b, 2] whose largest are at the samples that the recorded permutations begin with."""
    orders = [row for key in sorted(drawn) if key.split("/")[0] == block for row in drawn[key].reshape(-1, images)]
    assert len(orders) == 2, f"{block}: a permutation for the attention and one for the MLP"
    columns = [torch.empty(images).scatter_(0, order.long(), torch.linspace(1, 0, images)) for order in orders]
    return torch.stack(columns, dim=1)


def _check_groups(case: Case, objective: CAPI) -> None:
    """Learning rate and weight decay of every parameter of the student, as multiples."""
    ((title, table),) = case.facts["tables"].items()
    assert title == "student parameters: name, lr multiplier, wd multiplier", title
    found = {
        name: (group["lr_scale"], group["weight_decay_scale"])
        for group in objective.param_groups()
        for name in group["names"]
    }
    seen = set()
    for name, rate, decay in table:
        own, _ = place(f"student.{name}")
        seen.add(own)
        assert found[own] == (rate, decay), f"{case.name}: {name} has {found[own]}, not {(rate, decay)}"
    left = {name for name in found if not name.startswith("clustering.")} - seen
    assert not left, f"{case.name}: parameters of ours that are not in the table: {sorted(left)}"
