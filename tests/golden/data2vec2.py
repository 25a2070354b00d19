"""Runs Fovea's own engine on the golden training steps of data2vec 2.0."""

from __future__ import annotations

import torch

from pretrain.models.backbones.vit import ViT
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import Data2Vec2Config
from pretrain.objectives.data2vec2 import Data2Vec2
from tests.engine.settings import Settings, settings
from tests.golden.case import Case, key_third
from tests.golden.dino_steps import RecordingEngine
from tests.golden.ranks import ALONE

OFFICIAL = "modality_encoders.IMAGE."


def run_steps(case: Case) -> None:
    of, chosen = build(case)
    state = {ours(name): value for name, value in case.below("state").items()}
    state["encoder.pos_embed"] = torch.cat(
        [torch.zeros_like(state["encoder.cls_token"]), state.pop("positions")], dim=1
    )
    teacher = {name.replace("encoder.", "teacher.average.", 1): v for name, v in state.items() if "encoder." in name}
    torch.testing.assert_close(of.encoder.pos_embed, state["encoder.pos_embed"])
    of.load_state_dict(state | teacher)
    of.train()
    engine = RecordingEngine(of, **chosen, world=ALONE, seed=0)
    engine.losses, engine.gradients = [], []
    for step in range(case.config["steps"]):
        mask = case[f"input/step{step}/mask"]
        batch = {
            "image": case[f"input/step{step}/images"][:, None],
            "mask": mask,
            "decoder_noise": torch.rand(mask.shape),
        }
        with torch.no_grad():
            target = of.targets(batch["image"][:, 0])[:, None].expand(-1, mask.shape[1], -1, -1)[mask]
        case.check(f"expect/step{step}/target_var", (target.var(dim=0) + 1e-6).sqrt().mean())
        assert not engine.train_step(iter([batch]), step).skipped
        of.after_step(step + 1)
        case.check(f"expect/step{step}/loss", engine.losses[step])
    for name, expect in case.below("grad").items():
        case.check(f"grad/{name}", engine.gradients[0][ours(name)], zero=key_third(name, expect))
    final = of.state_dict()
    for name in case.below("expect/final/student"):
        case.check(f"expect/final/student/{name}", final[ours(name)])
    for name in case.below("expect/final/teacher"):
        where = ours(name).replace("encoder.", "teacher.average.", 1)
        got = final["teacher.average.pos_embed"][:, 1:] if where == "positions" else final[where]
        case.check(f"expect/final/teacher/{name}", got)


def build(case: Case) -> tuple[Data2Vec2, Settings]:
    """Objective and optimizer from the options of the case, all of which must be known."""
    case.only("steps", "batch", "ctor", "hyper")
    ctor = case.take("ctor", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    same = ("clone_batch", "mask_noise_std", "decoder_dim", "decoder_layers", "decoder_kernel", "decoder_groups")
    same += ("average_top_k_layers", "loss_beta")
    hyper = case.take(
        "hyper", *same, "mask_prob", "cls_loss", "ema_decay", "ema_end_decay", "ema_anneal_end_step", "lr",
        "weight_decay", "eps",
    )  # fmt: skip
    assert hyper["mask_noise_std"] == 0, "the official noise is drawn inside the forward pass"
    options = {name: hyper[name] for name in same} | {
        "mask_ratio": hyper["mask_prob"],
        "cls_weight": hyper["cls_loss"] * case.config["batch"] * hyper["clone_batch"],
        "ema_start": hyper["ema_decay"],
        "ema_end": hyper["ema_end_decay"],
        "ema_anneal_steps": hyper["ema_anneal_end_step"],
    }
    vit = ViT(
        (ctor["img_size"],) * 2, ctor["patch_size"], 3, ctor["embed_dim"], ctor["depth"], ctor["num_heads"],
        ctor["mlp_ratio"],
    )  # fmt: skip
    chosen = settings(
        lr=hyper["lr"], schedule="constant", total_steps=9, eps=hyper["eps"], weight_decay=hyper["weight_decay"]
    )
    return Data2Vec2(Data2Vec2Config.model_validate(options), vit, Horizon(case.config["steps"], 1)), chosen


def ours(name: str) -> str:
    """Our name of an entry of the official state dict; "positions" is a part of ours."""
    if not name.startswith(OFFICIAL):
        return f"encoder.{name}"
    name = name.removeprefix(OFFICIAL)
    if name.startswith("decoder.blocks."):
        _, _, layer, _, weight = name.split(".")
        return f"decoder.layers.{layer}.{weight}"
    if name.startswith("decoder."):
        return name
    known = {"extra_tokens": "encoder.cls_token", "fixed_positional_encoder.positions": "positions"}
    return known.get(name) or name.replace("local_encoder.proj", "encoder.patch_embed.proj")
