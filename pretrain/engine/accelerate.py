"""CPU, one GPU, or one model copy per GPU (DDP), through accelerate."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor, nn

from pretrain.core.distributed import World
from pretrain.core.trainable import Batch, Trainable
from pretrain.engine.autocast import Autocast
from pretrain.engine.config import EngineConfig, OptimConfig
from pretrain.engine.optim.fragments import Fragment
from pretrain.engine.optim.head_warmup import HeadWarmup
from pretrain.engine.optim.optimizer import build_optimizer
from pretrain.engine.plan import Plan
from pretrain.engine.step import StepEngine


class AccelerateEngine(StepEngine):
    """Replicated parameters and optimizer; gradients are all-reduced in the last micro-batch of a step.

    Accelerate applies no mixed precision; `Autocast` does.
    """

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
        super().__init__(
            trainable, optim=optim, config=config, plan=plan, world=world, seed=seed, head_warmup=head_warmup
        )
        # Buffers are teachers and centres, which are computed identically on every rank: no broadcast per step.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        self._accelerator: Any = Accelerator(
            cpu=world.device.type == "cpu", mixed_precision="no", kwargs_handlers=[ddp]
        )
        if self._accelerator.num_processes != world.world_size:
            raise ValueError(
                f"accelerate found {self._accelerator.num_processes} processes, expected {world.world_size}; "
                "unset ACCELERATE_* and MPI variables of another launcher"
            )
        module = Autocast(self.trainable, config.precision, world.device)
        with warnings.catch_warnings():
            # torch renamed the argument `broadcast_buffers`; accelerate uses only the old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._module: nn.Module = self._accelerator.prepare_model(module, device_placement=False)
        self.optimizer = build_optimizer(optim, self.groups)
        self.fragments = [
            Fragment(name, index, param.numel(), 0, param.numel(), param, 0)
            for index, group in enumerate(self.groups)
            for name, param in zip(group["names"], group["params"], strict=True)
        ]
        self.owns_fragments = world.rank == 0

    def _micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        return super()._micro_step(last=last) if last else self._accelerator.no_sync(self._module)

    def _forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self._module(batch, step)

    def _backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def _gradients(self) -> list[tuple[Fragment, Tensor]]:
        return [(fragment, fragment.owner.grad) for fragment in self.fragments if fragment.owner.grad is not None]

    def _update(self) -> None:
        self.optimizer.step()
        self._discard()

    def _discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
