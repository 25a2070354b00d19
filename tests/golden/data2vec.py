"""Runs Fovea's own engine on the golden training steps of data2vec."""

from __future__ import annotations

from pretrain.engine.optim.schedules import Schedules
from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import Data2VecConfig
from pretrain.objectives.data2vec import Data2Vec
from tests.engine.settings import Settings, settings
from tests.golden.case import Case, key_third
from tests.golden.dino_steps import RecordingEngine
from tests.golden.ranks import ALONE


class TableOfRates(Schedules):
    """The learning rates that the case lists, one per step."""

    rates: list[float]

    def lr_at(self, step: int) -> float:
        return self.rates[step]


def run_steps(case: Case) -> None:
    of, chosen = build(case)
    state = {ours(name): value for name, value in case.below("state").items()}
    teacher = {name.replace("encoder.", "teacher.average.", 1): v for name, v in state.items() if "encoder." in name}
    of.load_state_dict(state | teacher)
    of.train()
    engine = RecordingEngine(of, **chosen, world=ALONE, seed=0)
    engine.schedules = schedules = TableOfRates(chosen["optim"], chosen["plan"])
    schedules.rates = case.config["hyper"]["lr"]
    engine.losses, engine.gradients = [], []
    for step in range(case.config["steps"]):
        batch = {"image": case[f"input/step{step}/images"][:, None], "mask": case[f"input/step{step}/mask"]}
        assert not engine.train_step(iter([batch]), step).skipped
        of.after_step(step + 1)
        case.check(f"expect/step{step}/loss", engine.losses[step])
    for name, expect in case.below("grad").items():
        case.check(f"grad/{name}", engine.gradients[0][ours(name)], zero=key_third(name, expect))
    final = of.state_dict()
    for name in case.below("expect/final/student"):
        case.check(f"expect/final/student/{name}", final[ours(name)])
    for name in case.below("expect/final/teacher"):
        case.check(f"expect/final/teacher/{name}", final[ours(name).replace("encoder.", "teacher.average.", 1)])
    still = {name for group in of.param_groups() if not group["weight_decay_scale"] for name in group["names"]}
    assert still == {ours(name) for name in case.facts["tables"]["no_decay"]}


def build(case: Case) -> tuple[Data2Vec, Settings]:
    """Objective and optimizer from the options of the case, all of which must be known."""
    case.only("steps", "batch", "ctor", "hyper")
    ctor = case.take("ctor", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "layer_scale")
    hyper = case.take(
        "hyper", "target_layers", "layer_results", "target_layer_norm_last", "post_target_layer_norm", "l1_beta",
        "ema_decay_init", "ema_decay", "ema_start_at", "lr", "weight_decay", "eps", "clip_grad",
    )  # fmt: skip
    depth, count = ctor["depth"], len(hyper["target_layers"])
    assert hyper["target_layers"] == list(range(depth - count, depth)), "only the last layers can be averaged"
    vit = ViT(
        (ctor["img_size"],) * 2, ctor["patch_size"], 3, ctor["embed_dim"], depth, ctor["num_heads"], ctor["mlp_ratio"],
        pos_embed="none", rel_pos_bias="shared", qkv_bias="no_key", layer_scale=ctor["layer_scale"],
    )  # fmt: skip
    options = {
        "num_target_layers": count,
        "target_features": {"end": "block", "fc": "ffn"}[hyper["layer_results"]],
        "target_norm": "layer" if hyper["target_layer_norm_last"] else "none",
        "final_norm": "layer" if hyper["post_target_layer_norm"] else "none",
        "loss_beta": hyper["l1_beta"],
        "ema_start": hyper["ema_decay_init"],
        "ema_end": hyper["ema_decay"],
        "ema_anneal_epochs": hyper["ema_start_at"],
    }
    chosen = settings(
        lr=max(hyper["lr"]),
        total_steps=case.config["steps"],
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        clip_grad=hyper["clip_grad"],
        clip_mode="global",
    )
    return Data2Vec(Data2VecConfig.model_validate(options), vit, Horizon(case.config["steps"], 1)), chosen


def ours(name: str) -> str:
    """Our name of an entry of the official state dict."""
    if name == "mask_token":
        return name
    if name.startswith("lm_head."):
        return name.replace("lm_head.", "head.", 1)
    return "encoder." + name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
