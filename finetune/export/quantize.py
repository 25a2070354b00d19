"""ONNX in int8, and its accuracy: the task is evaluated with the graph in place of its network.

Weights of matrix products become int8, activations are quantized at run time (dynamic quantization of ONNX Runtime).
Static quantization of all products was measured to break attention; convolutions do not gain from it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from finetune.tasks.base import Task
from pretrain.models.export.graph import Run, Size, quiet


class SizeError(ValueError):
    """A graph does not accept an image of this size; the message names the way out."""


def quantize(path: Path, out: Path) -> None:
    """The ONNX file `path` with int8 weights in its matrix products, written to `out`.

    Raises:
        ValueError: it has none, for instance a convolutional network.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    # The exporter's recorded shapes interfere with the quantizer's shape inference.
    del model.graph.value_info[:]
    with quiet():  # its advice is for other ways to quantize
        quantize_dynamic(model, out, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"], per_channel=True)
    if not any(tensor.data_type == onnx.TensorProto.INT8 for tensor in onnx.load(out).graph.initializer):
        out.unlink()
        raise ValueError(f"{path.name} has no matrix product with weights: int8 changes nothing; leave --int8 out")


def with_graph(task: Task, run: Run, *, patch: int, fixed: Size | None = None, smallest: int = 1) -> Task:
    """A copy of the task whose predictions come from a graph of `finetune.export.graph`.

    Args:
        run: pixels in 0 to 1, and further inputs -> the graph's outputs. patch: sides must be multiples of it.
        fixed: the only size that the graph accepts; None: any, with sides of `smallest` pixels and more.

    Raises:
        SizeError: in `predict`, for an image of another size.
    """
    per_pixel = [output.per_pixel for output in task.export_outputs()]

    def compute(images: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Normalized images, padded to whole patches with the value 0, through the graph."""
        height, width = images.shape[2], images.shape[3]
        padded = F.pad(images, (0, -width % patch, 0, -height % patch))
        if fixed is not None and tuple(padded.shape[2:]) != fixed:
            raise SizeError(
                f"the graph is for images of {fixed[0]} x {fixed[1]}, but one of {height} x {width} was given; "
                "export it for that size (--size)"
            )
        if min(padded.shape[2:]) < smallest:
            raise SizeError(
                f"the graph is for images from {smallest} px on, but one of {height} x {width} was given; enlarge it"
            )
        found = run((padded * task.std + task.mean).contiguous(), *others)
        return tuple(
            value[..., :height, :width] if is_map else value for is_map, value in zip(per_pixel, found, strict=True)
        )

    made = copy.deepcopy(task)
    made.predict_from(compute)
    return made.eval()
