"""ZeRO 0 to 3 (Rajbhandari et al. 2020) through DeepSpeed, without its clipping, precision, checkpoints, schedules.

Clipping per tensor, skipping a step on all ranks, and checkpoints that load at any world size need the partitions of
gradients and optimizer state that each rank owns. They are read from attributes of DeepSpeed's ZeRO optimizers
(0.19.8), which are listed in `_INTERNALS` and checked at the start.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from pretrain.core.distributed import World
from pretrain.core.trainable import Batch, Trainable
from pretrain.engine.autocast import Autocast
from pretrain.engine.config import EngineConfig, OptimConfig
from pretrain.engine.optim.fragments import Fragment
from pretrain.engine.optim.head_warmup import HeadWarmup
from pretrain.engine.optim.optimizer import build_optimizer
from pretrain.engine.plan import Plan
from pretrain.engine.step import StepEngine

_INTERNALS = {
    0: (),
    1: (
        "round_robin_bit16_groups",
        "single_partition_of_fp32_groups",
        "partition_size",
        "averaged_gradients",
        "all_grad_tensors",
        "refresh_fp32_params",
        "micro_step_id",
        "cpu_offload",
    ),
    3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_to_group_id",
        "averaged_gradients",
        "offload_optimizer",
    ),
}
_INTERNALS[2] = _INTERNALS[1]


class DeepSpeedEngine(StepEngine):
    """Raises ValueError for a model that cannot be trained at this stage."""

    def __init__(
        self,
        trainable: Trainable,
        *,
        optim: OptimConfig,
        config: EngineConfig,
        plan: Plan,
        world: World,
        seed: int,
        head_warmup: HeadWarmup | None = None,
    ):
        self._stage = config.zero_stage
        super().__init__(
            trainable, optim=optim, config=config, plan=plan, world=world, seed=seed, head_warmup=head_warmup
        )
        if self._stage == 3:
            _refuse_teacher(self.trainable)
        self._ds = _start_deepspeed(world)
        self._shapes = {name: tensor.detach().to("meta") for name, tensor in self.trainable.state_dict().items()}
        self.optimizer = build_optimizer(optim, self.groups)
        module = Autocast(self.trainable, config.precision, world.device, cache=self._stage < 3)
        self._engine, _, _, _ = self._ds.initialize(
            model=module, optimizer=self.optimizer, config=deepspeed_config(config, plan)
        )
        self._zero: Any = self._engine.optimizer
        lacking = [name for name in _INTERNALS[self._stage] if not hasattr(self._zero, name)]
        if lacking:
            raise ValueError(
                f"deepspeed {self._ds.__version__} has no {', '.join(lacking)} in its ZeRO-{self._stage} optimizer; "
                "install deepspeed 0.19.8"
            )
        if self._stage > 0:
            self.optimizer = self._zero.optimizer
        assert len(self.optimizer.param_groups) == len(self.groups)
        self._names = {id(p): n for group in self.groups for n, p in zip(group["names"], group["params"], strict=True)}
        self.fragments = list(self._layout())
        self.owns_fragments = world.rank == 0 or self._stage > 0
        self.partitioned, self.replicated = self._stage > 0, self._stage < 3

    def _layout(self) -> Iterable[Fragment]:
        """This rank's fragments, in the order of DeepSpeed's gradient lists."""
        rank = self.world.rank
        if self._stage == 0:
            for index, group in enumerate(self.groups):
                for param in group["params"]:
                    yield Fragment(self._names[id(param)], index, param.numel(), 0, param.numel(), param, 0)
        elif self._stage < 3:
            # A group is one flat tensor, split equally over ranks; a split point may be inside a parameter.
            for index, params in enumerate(self._zero.round_robin_bit16_groups):
                size, owner, at = self._zero.partition_size[index], self._zero.single_partition_of_fp32_groups[index], 0
                for param in params:
                    low, high = max(at, rank * size), min(at + param.numel(), (rank + 1) * size)
                    if low < high:
                        name = self._names[id(param)]
                        yield Fragment(name, index, param.numel(), low - at, high - at, owner, low - rank * size)
                    at += param.numel()
        else:
            # Each parameter is split equally over ranks; the last part is padded.
            for index, params in enumerate(self._zero.fp16_groups):
                owner, at = self._zero.fp32_partitioned_groups_flat[index], 0
                for param in params:
                    size = param.ds_tensor.ds_numel
                    start, stop = min(rank * size, param.ds_numel), min((rank + 1) * size, param.ds_numel)
                    group = self._zero.sub_group_to_group_id[index]
                    yield Fragment(self._names[id(param)], group, param.ds_numel, start, stop, owner, at)
                    at += size

    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        self._engine.set_gradient_accumulation_boundary(last)
        return super()._micro_step(last=last)

    def _forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self._engine(batch, step)

    def _backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def _gradients(self) -> list[tuple[Fragment, Tensor]]:
        if self._stage == 0:
            return [(fragment, fragment.owner.grad) for fragment in self.fragments if fragment.owner.grad is not None]
        if self._offloads:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()  # DeepSpeed copies gradients to the host on its own streams
            return [(f, f.of(f.owner.grad)) for f in self.fragments if f.owner.grad is not None]
        if self._stage == 3:
            averaged = self._zero.averaged_gradients
            partitions = [part for index in sorted(averaged) for part in averaged[index]]
            return [
                (fragment, part.view(-1)[: fragment.stop - fragment.start])
                for fragment, part in zip(self.fragments, partitions, strict=True)
            ]
        pairs: list[tuple[Fragment, Tensor]] = []
        for index in range(len(self.groups)):
            # The list ends with padding if the last rank's partition is larger than the remaining elements.
            fragments = [fragment for fragment in self.fragments if fragment.group == index]
            pieces = self._zero.averaged_gradients[index][: len(fragments)]
            pairs += zip(fragments, pieces, strict=True)
        assert all(piece.numel() == fragment.stop - fragment.start for fragment, piece in pairs)
        return pairs

    @property
    def _offloads(self) -> bool:
        return self._stage > 0 and bool(self._zero.offload_optimizer if self._stage == 3 else self._zero.cpu_offload)

    def _update(self) -> None:
        self._engine.step()

    def _discard(self) -> None:
        if self._stage == 0:
            self._engine.zero_grad()
            return
        # As DeepSpeed's own `step` does on an overflow.
        self._zero.zero_grad(set_to_none=True)
        if self._offloads:
            self._zero.reset_cpu_buffers()
        if self._stage == 3:
            self._zero.averaged_gradients = {}
            return
        self._zero.micro_step_id = -1
        for index in self._zero.averaged_gradients:
            self._zero.averaged_gradients[index] = None
            self._zero.all_grad_tensors[index] = None

    def close(self) -> None:
        # Hooks on the gradients of ZeRO 1 and 2 hold all of it where Python's collector does not see.
        self._engine.destroy()

    def _model_shapes(self) -> dict[str, Tensor]:
        return self._shapes

    def _model_state(self) -> dict[str, Tensor]:
        state = self.trainable.state_dict()
        if self._stage < 3:
            return state
        for name, param in self.trainable.named_parameters():
            with self._ds.zero.GatheredParameters([param]):
                if self.world.rank == 0:
                    state[name] = param.detach().to("cpu", copy=True)
        return state

    def _set_model_state(self, state: dict[str, Tensor]) -> None:
        if self._stage < 3:
            super()._set_model_state(state)
            if self._stage > 0:
                self._zero.refresh_fp32_params()
            return
        params = dict(self.trainable.named_parameters())
        with torch.no_grad():
            for name, param in params.items():
                with self._ds.zero.GatheredParameters([param], modifier_rank=0):
                    param.copy_(state[name])
            for name, buffer in self.trainable.named_buffers():
                if name in state:
                    buffer.copy_(state[name])
            for fragment in self.fragments:
                whole = state[fragment.name].view(-1)
                fragment.of(fragment.owner).copy_(whole[fragment.start : fragment.stop])


def deepspeed_config(config: EngineConfig, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's config: the user's raw keys, which `EngineConfig` has checked, and those set by Fovea."""
    raw = copy.deepcopy(config.deepspeed)
    zero: dict[str, Any] = raw.pop("zero_optimization", None) or {}
    if config.zero_stage in (1, 2) and not zero.get("offload_optimizer"):
        zero.setdefault("compute_grad_norm", False)  # Fovea computes it before
    return {
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW on the CPU needs no C++ compiler
        **raw,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": 0.0,  # explicit: its default is 1
        "zero_optimization": {**zero, "stage": config.zero_stage},
    }


def _start_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this device, and initialize it with the existing process group.

    The import searches for an accelerator and would use a GPU even if the run is on the CPU.
    """
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.world_size), ("LOCAL_RANK", world.local_rank)):
        os.environ.setdefault(name, str(value))
    deepspeed = import_module("deepspeed")
    deepspeed.utils.logger.setLevel("WARNING")
    # Compiled at first use, which takes minutes and needs a compiler; gloo works without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _refuse_teacher(module: nn.Module) -> None:
    """An averaged copy of the weights is updated from complete parameters, which no rank has under ZeRO-3."""
    weights = [tuple(param.shape) for param in module.parameters() if param.requires_grad and param.ndim > 1]
    copies = {tuple(buffer.shape) for buffer in module.buffers() if buffer.is_floating_point() and buffer.ndim > 1}
    if sum(shape in copies for shape in weights) * 2 > len(weights):
        raise ValueError(
            f"{type(module).__name__} keeps an averaged teacher, which zero_stage 3 cannot update; use zero_stage 2"
        )
