"""What every task is: a module that computes losses from batches of labelled images, and predictions from images.

It is independent of engines and optimizers, and draws no random numbers: all of them come with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from finetune.data import batches
from finetune.data.examples import Example, Examples
from finetune.metrics.metric import Metric
from finetune.predictions import Classes, Prediction
from finetune.tasks.groups import task_groups
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.trainable import ParamGroup
from pretrain.models.backbones.contract import Backbone
from pretrain.models.export.outputs import ExportOutput
from pretrain.models.mechanisms.states import MechanismStates
from pretrain.models.teachers.ema import EMA

# For messages: which tasks `finetune.export` can turn into a graph.
EXPORTABLE = "exportable tasks: classification, multi_label, segmentation, depth and detection"


class Task(nn.Module):
    """Base of the tasks: a subclass builds its modules in `__init__` and overrides the methods below.

    Every parameter that requires a gradient must get one in every step (DDP waits for it): freeze the others.

    Args:
        config: the task's section of the configuration.
        opened: the backbone, which a subclass keeps as the submodule named by `backbone_prefix`.
        classes: names of the labels.

    Attributes:
        mean, std: buffers [C, 1, 1] of the normalization, not part of the state.
        backbone_prefix: of the names of the backbone's parameters, with the dot.
        head_prefixes: of the names of parameters that the backbone's weights do not contain; for the match report.
        ema: the moving average of the weights, if one is kept: its `average` is a task of the same class.
    """

    backbone_prefix = "backbone."
    head_prefixes: tuple[str, ...] = ()
    _states: MechanismStates | None = None
    mean: Tensor
    std: Tensor

    def __init__(self, config: Any, opened: OpenedBackbone, classes: Classes):
        super().__init__()
        self.config, self.classes = config, classes
        for name, values in (("mean", opened.mean), ("std", opened.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.ema: EMA[Any] | None = None
        self.total_steps = 1
        self._optim: Any = None

    @property
    def bare_backbone(self) -> Backbone:
        """The backbone itself."""
        return cast(Backbone, self.get_submodule(self.backbone_prefix.removesuffix(".")))

    # Training

    def prepare(self, optim: Any, *, total_steps: int = 1) -> None:
        """Set up training for `total_steps` by a `FinetuneOptim`: learning rates by layer, average of the weights."""
        self._optim, self.total_steps = optim, total_steps
        if optim.ema_decay is not None:
            self.ema = EMA(self)

    def data_warnings(self, train: Examples) -> list[str]:
        """What of the training set this task can hardly learn as it is configured, in lines for --check."""
        return []

    def train_transform(self) -> batches.TrainTransform:
        """The transform of training examples, in a worker: (example, generator) -> tensors by name. Picklable.

        "image" [C, H, W], pixels in 0 to 255, uint8 or float32, is normalized on the device by `normalize`.
        """
        raise NotImplementedError

    @property
    def noises(self) -> dict[str, tuple[int, ...]]:
        """Uniform random numbers that `forward` reads from the batch: their shape for each example, by name."""
        drop = self.bare_backbone.drop_shape
        return {} if drop is None else {"drop": drop}

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Scalars of one micro-batch: "loss" is differentiated, the others are detached and logged. The names are the
        same in every step and on every rank. `step` counts completed optimizer steps."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Once per optimizer step, on every rank; `step` includes it."""
        self._settle(taken=True)
        if self.ema is not None:
            self.ema.update(self, self._optim.ema_decay)
            _copy_statistics(self, self.ema.average)

    def discard_pending(self) -> None:
        """Discard what the forward passes of a skipped step kept for `after_step`."""
        self._settle(taken=False)

    def _settle(self, *, taken: bool) -> None:
        self._states = self._states or MechanismStates(self)
        self._states.settle(taken=taken)

    def no_weight_decay(self) -> set[str]:
        """Names without weight decay besides biases and vectors: class token, registers, positions of the backbone."""
        ends = ("cls_token", "reg_token", "pos_embed")
        prefix = self.backbone_prefix
        return {name for name, _ in self.named_parameters() if name.startswith(prefix) and name.endswith(ends)}

    def param_groups(self) -> list[ParamGroup]:
        """Groups as `pretrain.models.param_groups.split` describes them."""
        optim = self._optim
        return task_groups(
            self,
            self.bare_backbone,
            prefix=self.backbone_prefix,
            no_decay=self.no_weight_decay(),
            layer_decay=1.0 if optim is None else optim.layer_decay,
            head_lr_scale=1.0 if optim is None else optim.head_lr_scale,
        )

    # Inference

    @property
    def evaluated(self) -> Task:
        """The task that predicts: the average of the weights if one is kept."""
        return self if self.ema is None else self.ema.average

    def eval_transform(self) -> batches.EvalTransform:
        """The transform of examples for `predict`, in a worker: tensors by name, and the sizes that lead back."""
        raise NotImplementedError

    def predict(self, batch: dict[str, Any]) -> Sequence[Prediction]:
        """A prediction for each image of a batch of `eval_transform`, in the coordinates of the original images, on
        the CPU. Called in eval mode and without gradients."""
        raise NotImplementedError

    def metric(self, examples: Examples) -> Metric:
        """A new metric for one pass over `examples`."""
        raise NotImplementedError

    def picture(self, example: Example, prediction: Any | None) -> np.ndarray:
        """uint8 [h, w, 3]: the image (of `Example.as_picture`) with its truth, next to it with the prediction, if there
        is one."""
        raise NotImplementedError

    # Export as a graph

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        """The outputs of the task's graph.

        Raises:
            NotExportableError: the task cannot become a graph.
        """
        raise NotImplementedError

    def outputs(self, images: Tensor, /) -> tuple[Tensor, ...]:
        """Normalized images [b, C, H, W] -> the `export_outputs`, from which `predict` makes predictions."""
        raise NotImplementedError

    @property
    def detects(self) -> bool:
        """Whether its graph gives `detections` instead of `outputs`, see `pretrain.models.export.graph.Graph`."""
        return False

    def detections(self, images: Tensor, content: Tensor) -> tuple[Tensor, ...]:
        """Normalized images [b, C, H, W] and int64 [b, 2], (height, width) of the part of each that is no padding ->
        the `export_outputs`."""
        raise NotImplementedError

    @property
    def smallest_side(self) -> int:
        """Pixels of the smallest side of an image that its graph accepts, besides two patches."""
        return 0

    def predict_from(self, compute: Callable[..., tuple[Tensor, ...]]) -> None:
        """Make predictions from the outputs of `compute`, a graph, instead of `outputs` or `detections`."""
        self.outputs = compute

    def at_size(self, size: tuple[int, int]) -> Task:
        """A copy that predicts images at another `input_size`, and scales them with it."""
        raise NotImplementedError

    def prepare_export(self) -> None:
        """Replace what depends on the training progress by its final form.

        Raises:
            NotExportableError: training has not reached it.
        """

    def fixed_size_reason(self) -> str | None:
        """Why the graph accepts one image size only; None: it accepts any."""
        return self.bare_backbone.fixed_size_reason()

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the images that the network gets in `predict`, in pixels."""
        raise NotImplementedError

    def preparation(self) -> str:
        """How `predict` prepares an image for the network, in words."""
        raise NotImplementedError

    def preparation_facts(self) -> dict[str, Any]:
        """What `preparation` says, as JSON: the numbers that a program needs (docs/use.md)."""
        return {}

    def answer_facts(self) -> dict[str, Any]:
        """What makes predictions of the graph's outputs, as JSON."""
        return {}

    @property
    def example_parts(self) -> tuple[str, ...] | None:
        """Files of `finetune.export.examples` that predict with the graph as `predict` does; None: none does."""
        return None

    # Releases

    def exported(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state for a release, and further JSON files by name, with which another library opens the release."""
        return state, {}

    def imported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `exported`: the state with the names of this task."""
        return state

    def collate(self, samples: list[batches.Sample]) -> batches.Batch:
        """A batch of transformed examples."""
        return batches.collate(samples)

    def normalize(self, images: Tensor) -> Tensor:
        """[b, C, H, W] in 0 to 255, uint8 or float32 -> float32, (x / 255 - mean) / std."""
        return (images.float() / 255 - self.mean) / self.std


def _copy_statistics(source: nn.Module, average: nn.Module) -> None:
    """Copy the running statistics of the newest step: they are averages themselves."""
    of_source, of_average = dict(source.named_buffers()), dict(average.named_buffers())
    for name, value in of_source.items():
        if not name.startswith("ema.") and name in of_average:
            of_average[name].copy_(value)
