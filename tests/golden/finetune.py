"""Runs the task classification on the golden fine-tuning cases of MAE and BEiT."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from finetune.config import FinetuneOptim
from finetune.heads.pooled.linear import PooledHead
from finetune.predictions import Classes
from finetune.tasks.classification import Classification
from finetune.tasks.configs import ClassificationConfig
from finetune.tasks.opened import OpenedBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.layers.rel_pos import relative_index
from tests.golden.case import Case, key_third, rel_pos_kind

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "num_classes")
DROPS = {"drop_rate": 0, "attn_drop_rate": 0, "drop_path_rate": 0}


def run_mae(case: Case) -> None:
    ctor = case.take("ctor", *SIZES, "qkv_bias", "qk_scale", neutral=DROPS)
    _options(case, "global_pool")
    backbone = ViT(*_sizes(ctor), pos_embed="learned", qkv_bias=ctor.get("qkv_bias", True), qk_scale=_qk_scale(ctor))
    _run(case, backbone, ctor["num_classes"], mean=case.config["global_pool"])


def run_beit(case: Case) -> None:
    known = ("init_values", "qkv_bias", "qk_scale", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")
    started = "init_scale"  # of the classifier's first weights; here they are loaded
    ctor = case.take("ctor", *SIZES, *known, "use_mean_pooling", started, neutral=DROPS)
    _options(case)
    backbone = ViT(
        *_sizes(ctor),
        pos_embed="learned" if ctor.get("use_abs_pos_emb", True) else "none",
        rel_pos_bias=rel_pos_kind(ctor),
        qkv_bias="no_key" if ctor.get("qkv_bias", True) else False,
        qk_scale=_qk_scale(ctor),
        layer_scale=ctor.get("init_values") or None,
    )
    for name in [name for name in case.below("state") if name.endswith("relative_position_index")]:
        index = case.tensors.pop(f"state/{name}")
        assert index.equal(relative_index(backbone.grid_size, 1)), f"{case.name}: {name}"
    _run(case, backbone, ctor["num_classes"], mean=ctor.get("use_mean_pooling", True))


def ours(name: str) -> str:
    """Our name of a parameter of the official classifiers."""
    if name.startswith("head."):
        return name.replace("head.", "head.fc.")
    if name.startswith("fc_norm."):
        return f"head.{name}"
    return "backbone." + name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")


def _run(case: Case, backbone: ViT, num_classes: int, *, mean: bool) -> None:
    channels = (0.5,) * backbone.in_chans
    classes = Classes([str(number) for number in range(num_classes)])
    config = ClassificationConfig.model_validate({"pool": "mean" if mean else "token"})
    model = Classification(config, OpenedBackbone(backbone, channels, channels, case.name), classes).train()
    model.load_state_dict({ours(name): value for name, value in case.below("state").items()})
    assert isinstance(model.head, PooledHead)
    features = model.head.features(backbone, case["input/images"])
    logits = model.head.classify(features)
    loss = F.cross_entropy(logits, case["input/labels"])
    loss.backward()
    case.check("expect/features", features)
    case.check("expect/logits", logits)
    case.check("expect/logits", model.logits(case["input/images"]))
    case.check("expect/loss", loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expect in case.below("grad").items():
        gradient = gradients[ours(name)]
        assert gradient is not None, f"{name}: no gradient reached it"
        case.check(f"grad/{name}", gradient, zero=key_third(name, expect))
    _check_groups(case, model)


def _check_groups(case: Case, model: Classification) -> None:
    """Learning-rate scale and weight decay of every parameter as in the table of the case."""
    optim = {"global_batch_size": 1, "total_steps": 1, "lr": 1.0, "layer_decay": case.config["layer_decay"]}
    model.prepare(FinetuneOptim.model_validate(optim))
    groups = model.param_groups()
    found = {
        name: (group["lr_scale"], group["weight_decay_scale"] * case.config["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    (table,) = (t for title, t in case.facts["tables"].items() if title.startswith("param -> [lr_scale"))
    assert found.keys() == {ours(name) for name in table}, f"{case.name}: other parameters are trained"
    for name, expected in table.items():
        close = all(abs(a - b) <= 1e-12 for a, b in zip(found[ours(name)], expected, strict=True))
        assert close, f"{case.name}: {name} has {found[ours(name)]}, expected {expected}"


def _sizes(ctor: dict[str, Any]) -> tuple[Any, ...]:
    side = ctor["img_size"]
    size = tuple(side) if isinstance(side, list) else (side, side)
    widths = (ctor["embed_dim"], ctor["depth"], ctor["num_heads"], ctor.get("mlp_ratio", 4.0))
    return size, ctor["patch_size"], ctor.get("in_chans", 3), *widths


def _qk_scale(ctor: dict[str, Any]) -> float | None:
    return ctor.get("qk_scale") or None


def _options(case: Case, *known: str) -> None:
    case.only("ctor", "seed", "batch", "layer_decay", "weight_decay", *known)
