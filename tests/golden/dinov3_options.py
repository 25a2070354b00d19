"""The options of DINOv3's official code as settings of Fovea's `dinov2`, optimizer and schedules."""

from __future__ import annotations

import math
from typing import Any

from pretrain.objectives.configs import DINOv2Config
from tests.engine.settings import Settings, settings
from tests.golden.case import UNKNOWN, Case
from tests.golden.dinov3_vit import movement

# Of the official defaults, those that a case may leave out.
DEFAULTS: dict[str, Any] = {
    "dino.loss_weight": 1.0,
    "dino.global_ignore_diagonal": True,
    "dino.head_n_prototypes": 65536,
    "dino.head_bottleneck_dim": 256,
    "dino.head_norm_last_layer": False,
    "dino.head_nlayers": 3,
    "dino.head_hidden_dim": 2048,
    "dino.koleo_loss_weight": 0.1,
    "dino.koleo_loss_distributed": False,
    "dino.koleo_topk": 1,
    "dino.koleo_distributed_replicas": 0,
    "dino.koleo_distributed_loss_group_size": None,
    "dino.reweight_dino_local_loss": False,
    "dino.local_loss_weight_schedule": None,
    "ibot.loss_weight": 1.0,
    "ibot.mask_sample_probability": 0.5,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "ibot.mask_random_circular_shift": False,
    "ibot.separate_head": True,
    "ibot.head_n_prototypes": 65536,
    "ibot.head_bottleneck_dim": 256,
    "ibot.head_norm_last_layer": False,
    "ibot.head_nlayers": 3,
    "ibot.head_hidden_dim": 2048,
    "gram.use_loss": False,
    "gram.loss_weight": 1.0,
    "gram.loss_weight_schedule": None,
    "gram.ema_teacher": False,
    "gram.ckpt": None,
    "gram.it_load_ema_teacher": -1,
    "gram.rep_update": True,
    "gram.update_frequency": 50000,
    "gram.it_first_update": 0,
    "gram.max_updates": None,
    "gram.normalized": True,
    "gram.img_level": False,
    "gram.tokens_used": "all",
    "gram.remove_neg": False,
    "gram.remove_only_teacher_neg": False,
    "gram.global_teacher_resize_method": "bicubic",
    "gram.global_teacher_resize_antialias": False,
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 96,
    "crops.local_crops_number": 8,
    "crops.gram_teacher_crops_size": None,
    "student.patch_size": 16,
    "student.drop_path_rate": 0.3,
    "teacher.momentum_teacher": 0.992,
    "teacher.final_momentum_teacher": 1.0,
    "teacher.warmup_teacher_temp": 0.04,
    "teacher.teacher_temp": 0.07,
    "teacher.warmup_teacher_temp_epochs": 30,
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.batch_size_per_gpu": 64,
    "optim.epochs": 100,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.lr": 0.001,
    "optim.warmup_epochs": 10,
    "optim.min_lr": 1e-6,
    "optim.schedule_trunc_extra": 0.0,
    "optim.clip_grad": 3.0,
    "optim.freeze_last_layer_epochs": 1,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "optim.patch_embed_lr_mult": 0.2,
    "optim.dino_head_wd_multiplier": 1.0,  # never acts
    "optim.layerwise_decay": 0.9,
    "optim.adamw_beta1": 0.9,
    "optim.adamw_beta2": 0.999,
    "optim.multi_tensor_optim": True,  # how, not what, it computes
    "world_size": 1,  # not a key of the official file
}
SCHEDULED = ("lr", "weight_decay", "teacher_temp", "momentum")
PARTS = ("start", "peak", "end", "warmup_epochs", "cosine_epochs", "freeze_last_layer_epochs")
# The student's options are those of its constructor by another name, see `constructor`.
STUDENT = {"block_expansion": "", "arch": "", "layerscale": "layerscale_init"}
RATES = {"linear_wrt_256": lambda batch: batch / 256, "sqrt_wrt_1024": lambda batch: 4 * math.sqrt(batch / 1024)}


class Options:
    """The values of a case's dotted keys, of which all must be known.

    Args:
        given: as in `config.cfg`. processes: their number, where `given` does not say it.
    """

    def __init__(self, case: Case, given: dict[str, Any], *, processes: int = 1):
        schedules = {f"schedules.{name}.{part}" for name in SCHEDULED for part in PARTS}
        known = DEFAULTS.keys() | schedules
        unknown = {key for key in given if key not in known and not key.startswith("student.")}
        assert not unknown, f"{case.name}: options {UNKNOWN}: {sorted(unknown)}"
        self.case, self.given = case, given
        self.values = DEFAULTS | {"world_size": processes} | given

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def epoch_steps(self) -> int:
        return self["train.OFFICIAL_EPOCH_LENGTH"]

    @property
    def total_steps(self) -> int:
        return self["optim.epochs"] * self.epoch_steps

    @property
    def by_phases(self) -> bool:
        """Whether the second version of the schedules is used."""
        return any(key.startswith("schedules.") for key in self.given)

    def phases(self, name: str) -> dict[str, Any]:
        """The settings of a schedule of the second version."""
        found = {part: self.values.get(f"schedules.{name}.{part}") for part in PARTS[:-1]}
        return {key: value for key, value in found.items() if value is not None}

    def optim(self) -> Settings:
        """The optimizer's settings, whose batch is that of all processes."""
        common: dict[str, Any] = {
            "total_steps": self.total_steps,
            "betas": (self["optim.adamw_beta1"], self["optim.adamw_beta2"]),
            "clip_grad": self["optim.clip_grad"] or None,
            "clip_mode": "per_module",
        }
        if not self.by_phases:
            warmup = self["optim.warmup_epochs"] * self.epoch_steps
            extra = self["optim.schedule_trunc_extra"]
            closed = {"cosine_form": "closed", "cosine_extra": extra} if extra else {}
            return settings(
                lr=self["optim.lr"],
                min_lr=self["optim.min_lr"],
                warmup_steps=warmup,
                warmup_form="closed",
                weight_decay=self["optim.weight_decay"],
                weight_decay_end=self["optim.weight_decay_end"],
                **closed,
                **common,
            )
        rate, decay = self.phases("lr"), self.phases("weight_decay")
        for key in ("warmup_epochs", "cosine_epochs"):  # an epoch is a step in `settings`
            decay |= {key: decay[key] * self.epoch_steps} if key in decay else {}
        # The official code scales by the batch of its configuration, whatever the steps are given.
        scale = RATES[self["optim.scaling_rule"]](self["train.batch_size_per_gpu"] * self["world_size"])
        length = rate.get("cosine_epochs")
        return settings(
            lr=rate["peak"] * scale,
            min_lr=rate["end"] * scale,
            warmup_lr=rate["start"],
            warmup_steps=rate.get("warmup_epochs", 0) * self.epoch_steps,
            weight_decay_schedule=decay,
            cosine_form="closed",
            cosine_epochs=None if length is None else length * self.epoch_steps,
            **common,
        )

    def objective(self) -> DINOv2Config:
        """The settings of the objective."""
        moved = {f"rope_{name}": value for name, value in self.movement.items()}
        local = {"local_norm": self.values.get("student.untie_global_and_local_cls_norm", False)}
        return DINOv2Config(**self._heads(), **self._losses(), **self._schedules(), **moved, **local, gram=self._gram())

    @property
    def movement(self) -> dict[str, float | None]:
        """The arguments of `rope.moved_axes`."""
        return movement(self.values, "student.pos_embed_rope_")

    def _heads(self) -> dict[str, Any]:
        assert self["ibot.separate_head"], f"{self.case.name}: heads are always separate"
        assert not self["dino.head_norm_last_layer"] and not self["ibot.head_norm_last_layer"]
        names = {"n_prototypes": "out_dim", "bottleneck_dim": "bottleneck_dim", "nlayers": "nlayers"}
        names["hidden_dim"] = "hidden_dim"
        found = {f"patch_{ours}": self[f"ibot.head_{name}"] for name, ours in names.items()}
        found |= {f"head_{ours}": self[f"dino.head_{name}"] for name, ours in names.items() if ours != "out_dim"}
        found["out_dim"] = self["dino.head_n_prototypes"]
        return {"prototypes": "linear", "separate_patch_head": True, "centering": "sinkhorn_knopp", **found}

    def _losses(self) -> dict[str, Any]:
        assert not self["dino.koleo_distributed_replicas"], f"{self.case.name}: KoLeo over some of the processes"
        assert self["dino.global_ignore_diagonal"], f"{self.case.name}: a crop is never compared with itself here"
        spread = self["dino.koleo_loss_distributed"]
        return {
            "dino_weight": self["dino.loss_weight"],
            "ibot_weight": self["ibot.loss_weight"],
            "koleo_weight": self["dino.koleo_loss_weight"],
            "koleo_scope": "all" if spread else "rank",
            "koleo_neighbours": self["dino.koleo_topk"] if spread else 1,
            "koleo_group": self["dino.koleo_distributed_loss_group_size"] if spread else None,
            "local_crops_number": self["crops.local_crops_number"],
            "local_crops_size": self["crops.local_crops_size"],
            "drop_path_rate": self["student.drop_path_rate"],
            "layerwise_decay": self["optim.layerwise_decay"],
            "patch_embed_lr_mult": self["optim.patch_embed_lr_mult"],
            "mask_exact": True,
            "mask_roll": self["ibot.mask_random_circular_shift"],
            "mask_prob": self["ibot.mask_sample_probability"],
            "mask_ratio": tuple(self["ibot.mask_ratio_min_max"]),
        }

    def _schedules(self) -> dict[str, Any]:
        local = self["dino.local_loss_weight_schedule"] if self["dino.reweight_dino_local_loss"] else None
        found: dict[str, Any] = {"epoch_steps": self.epoch_steps, "local_weight_schedule": local}
        frozen = self.values.get("schedules.lr.freeze_last_layer_epochs", 0) if self.by_phases else None
        found["freeze_last_layer_epochs"] = self["optim.freeze_last_layer_epochs"] if frozen is None else frozen
        if self.by_phases:
            temps, momenta = self.phases("teacher_temp"), self.phases("momentum")
            return found | {"teacher_temp_schedule": temps, "momentum_schedule": momenta}
        if extra := self["optim.schedule_trunc_extra"]:
            first, last = self["teacher.momentum_teacher"], self["teacher.final_momentum_teacher"]
            found["momentum_schedule"] = {"start": first, "peak": first, "end": last, "cosine_extra": extra}
        return found | {
            "warmup_teacher_temp": self["teacher.warmup_teacher_temp"],
            "teacher_temp": self["teacher.teacher_temp"],
            "warmup_teacher_temp_epochs": self["teacher.warmup_teacher_temp_epochs"],
            "momentum_teacher": self["teacher.momentum_teacher"],
            "final_momentum_teacher": self["teacher.final_momentum_teacher"],
        }

    def _gram(self) -> dict[str, Any] | None:
        if not self["gram.use_loss"]:
            return None
        assert self["gram.global_teacher_resize_method"] == "bicubic", f"{self.case.name}: patches are resized bicubic"
        both, of_teacher = self["gram.remove_neg"], self["gram.remove_only_teacher_neg"]
        return {
            "weight": self["gram.loss_weight"],
            "weight_schedule": self["gram.loss_weight_schedule"],
            "teacher": "current" if self["gram.ema_teacher"] else "earlier",
            "release": None if self["gram.ema_teacher"] else self["gram.ckpt"],  # the case holds its weights
            "refresh_steps": 0,  # the cases refresh once, after their last step: see `refreshes`
            "img_size": self["crops.gram_teacher_crops_size"],
            "antialias": self["gram.global_teacher_resize_antialias"],
            "level": "image" if self["gram.img_level"] else "batch",
            "tokens": self["gram.tokens_used"],
            "normalize": self["gram.normalized"],
            "negatives": "zero" if both else "zero_teacher" if of_teacher else "keep",
        }

    def refreshes(self, step: int) -> bool:
        """Whether the Gram teacher is refreshed once `step` steps are completed."""
        every, first = self["gram.update_frequency"], self["gram.it_first_update"]
        return self["gram.rep_update"] and step >= first and step % every == 0

    def constructor(self, size: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the official ViT: `size`, and the options whose name begins with `student.`."""
        found = {"img_size": self["crops.global_crops_size"], "layerscale_init": 1e-5, **size}
        for key, value in self.values.items():
            name = key.removeprefix("student.")
            if key.startswith("student.") and (name := STUDENT.get(name, name)):
                found[name] = value
        return found
