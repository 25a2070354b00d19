"""`fovea export`: the graphs compute what the task computes, and what does not is not kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from finetune.export.command import NotEqualError, export, main, val_source
from finetune.export.graph import Graph
from finetune.export.quantize import quantize, with_graph
from finetune.heads.queries.eomt import EoMT
from finetune.release import write_release
from finetune.tasks.base import Task
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.export import graph as graphs
from pretrain.models.export.graph import session
from pretrain.models.export.outputs import NotExportableError
from tests.finetune.small_tasks import CLASSES, small_task

pytestmark = pytest.mark.slow

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
EOMT: dict[str, Any] = {"head": {"name": "eomt", "num_queries": 4, "num_blocks": 1}, "size": 64}


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    """A classifier and the folder of its ONNX and int8 graphs, made by the command."""
    folder = tmp_path_factory.mktemp("classifier")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "val" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 255, (40, 44, 3), np.uint8)).save(folder / "val" / name / f"{i}.png")
    task = small_task("classification")
    release = write_release(folder / "release", task, {"source": {"title": "a test"}})
    arguments = [str(release), str(folder / "out"), "--int8", "--val", f"images={folder / 'val'}"]
    assert main(arguments) == 0
    return task, folder / "out"


def test_onnx_and_torch_export_give_our_logits_at_any_batch_and_image_size(classified: tuple[Task, Path]):
    task, out = classified
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    program = torch.export.load(out / "model.pt2").module()
    for batch, size in ((1, (32, 32)), (3, (32, 32)), (2, (64, 48)), (4, (40, 24))):
        pixels = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            expected = task.logits(task.normalize(pixels))  # pyright: ignore[reportCallIssue]
            again = program(pixels / 255)
        found = session.run(None, {"images": (pixels / 255).numpy()})[0]
        assert found.shape == (batch, len(CLASSES))
        assert np.abs(found - expected.numpy()).max() < 1e-4
        assert (again - expected).abs().max() < 1e-5


def test_export_json_describes_inputs_outputs_and_comparisons(classified: tuple[Task, Path]):
    facts = json.loads((classified[1] / "export.json").read_text())
    assert facts["input"]["shape"] == ["batch", 3, "multiple of 8", "multiple of 8"]
    assert facts["outputs"] == ["logits"] and facts["classes"] == list(CLASSES)
    assert facts["input"]["smallest"] == [16, 16]
    assert {tuple(row["size"]) for row in facts["files"]["model.onnx"]} == {(16, 16), (32, 32), (128, 128), (48, 24)}
    assert len({row["batch"] for row in facts["files"]["model.onnx"]}) == 3
    assert all(row["largest_difference"] < 1e-4 for row in facts["files"]["model.onnx"])


def test_int8_and_float_graphs_are_evaluated_on_the_validation_set(classified: tuple[Task, Path]):
    out = classified[1]
    int8 = json.loads((out / "export.json").read_text())["int8"]
    assert int8["primary"] == "top1" and "12 images" in int8["protocol"]
    assert int8["drop"] == pytest.approx(int8["model.onnx"]["top1"] - int8["model.int8.onnx"]["top1"])
    weights = [t.data_type for t in _initializers(out / "model.int8.onnx")]
    assert 3 in weights  # onnx's INT8
    assert (out / "model.int8.onnx").stat().st_size < (out / "model.onnx").stat().st_size


def _initializers(path: Path) -> Any:
    import onnx

    return onnx.load(path).graph.initializer


def test_predictions_come_from_the_given_graph(classified: tuple[Task, Path]):
    task, _ = classified
    seen: list[Tensor] = []

    def run(pixels: Tensor) -> list[Tensor]:
        seen.append(pixels)
        return [torch.tensor([[0.0, 50.0, 0.0]]).expand(len(pixels), -1)]

    model = with_graph(task, run, patch=8, fixed=None)
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = model.predict({"image": image})
        own = task.predict({"image": image})
    assert [one.probabilities.argmax() for one in found] == [1, 1]  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.allclose(seen[0], image / 255, atol=1e-6)
    assert not np.allclose(own[0].probabilities, found[0].probabilities)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_segmentation_graph_predicts_images_of_incomplete_patches():
    task = small_task("segmentation", head={"name": "linear"}, crop=32, resize=None)
    graph = Graph(task)
    model = with_graph(task, lambda pixels: [graph(pixels)], patch=graph.patch, fixed=None)
    batch = {
        "image": [torch.randint(0, 256, (3, 20, 27), dtype=torch.uint8)],
        "original_size": torch.tensor([[20, 27]]),
    }
    with torch.no_grad():
        ours, theirs = task.predict(batch)[0], model.predict(batch)[0]
    assert (ours.classes == theirs.classes).mean() > 0.97  # pyright: ignore[reportAttributeAccessIssue]


def test_a_graph_of_a_fixed_size_refuses_another():
    task = small_task("classification")
    model = with_graph(task, lambda pixels: [pixels], patch=8, fixed=(32, 32))
    with pytest.raises(ValueError, match="for images of 32 x 32, but one of 48 x 40 was given"):
        model.predict({"image": torch.zeros(1, 3, 48, 40)})


@pytest.mark.parametrize(
    ("vit", "why"),
    [
        ({"pos_resize": "dino"}, "scale factor"),
        ({"pos_embed": "none", "rel_pos_bias": "shared"}, "relative-position"),
        ({"pos_embed": "rope"}, None),
        ({"pos_embed": "rope", "rope": {"frequencies": (7e-4, 7.0)}, "num_registers": 4}, None),
        ({"pos_resize": "antialias"}, None),
    ],
)
def test_any_size_is_accepted_if_positions_are_computed_in_the_graph(vit: dict[str, Any], why: str | None):
    fixed = Graph(small_task("classification", vit=vit)).fixed
    assert fixed is None if why is None else fixed is not None and why in fixed


def test_a_dense_graph_takes_any_batch_and_size():
    graph = Graph(small_task("segmentation", head={"name": "linear"}, crop=32))
    module = graphs.trace(graph, (32, 32)).module()
    checked = graphs.compare(graph, lambda pixels: [module(pixels)], graphs.cases(graph, (32, 32)))
    assert {one.size for one in checked} == {(16, 16), (32, 32), (128, 128), (48, 24)}


@pytest.mark.parametrize("side", [64, 128])
def test_a_graph_traced_at_any_size_takes_fewer_and_more_than_127_patches(side: int):
    """Our attention takes another kernel from 128 tokens on, which a graph must not keep."""
    graph = Graph(small_task("classification"))
    module = graphs.trace(graph, (side, side)).module()
    cases = [(batch, size) for batch in (1, 5) for size in ((16, 16), (80, 80), (96, 96), (4 * side, 4 * side))]
    graphs.compare(graph, lambda pixels: [module(pixels)], cases)


def test_the_largest_compared_size_has_at_most_4096_patches_and_is_no_smaller_than_the_task():
    graph = Graph(small_task("classification"))
    assert (1, (512, 512)) in graphs.cases(graph, (256, 256)) and (1, (800, 800)) in graphs.cases(graph, (800, 800))


TIMM: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, {"name": "detection", **EOMT}),
    "BEiT": ("beit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, {"name": "classification"}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4},
        {"name": "segmentation", "head": {"name": "linear"}, "crop": 64},
    ),
    "ConvNeXt": ("test_convnext", {}, {"name": "depth", "crop": 64}),
}


@pytest.mark.parametrize("family", TIMM)
def test_a_network_of_timms_is_a_graph_of_one_size_and_any_batch(family: str):
    name, arguments, section = TIMM[family]
    graph = finished(small_task(**section, backbone=TimmBackbone(name, (64, 64), **arguments)))
    assert graph.fixed == "TimmBackbone is built for one image size"
    checked = compared_as_traced(graph, (64, 64))
    assert [one.batch for one in checked] == [1, 2, 5]


def test_an_attentive_probe_is_a_graph_of_any_batch():
    assert compared_as_traced(Graph(small_task("classification", train="attentive")), (32, 32))


def compared_as_traced(graph: Graph, size: tuple[int, int]) -> list[graphs.GraphCheck]:
    module = graphs.trace(graph, size).module()

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        found = module(pixels)
        return found if isinstance(found, tuple) else (found,)

    return graphs.compare(graph, run, graphs.cases(graph, size))


def finished(task: Task) -> Graph:
    """As at the end of a run, when no attention is masked any more."""
    for module in task.modules():
        if isinstance(module, EoMT):
            module.mask_probability.zero_()
    return Graph(task)


def test_masks_of_eomt_are_an_onnx_graph_of_any_batch_and_size(tmp_path: Path):
    graph = finished(small_task("detection", vit={"depth": 1}, **{**EOMT, "size": 32}))
    graphs.write_onnx(graph, graphs.trace(graph, (32, 32)), tmp_path / "model.onnx")
    assert graph.fixed is None and tuple(graph.names) == ("masks", "logits")
    graphs.compare(graph, session(tmp_path / "model.onnx"), graphs.cases(graph, (32, 32)))


def test_a_file_instead_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="out: not a folder to write to"):
        export(small_task("classification"), tmp_path / "out", record={})


def test_masked_attention_cannot_be_exported():
    with pytest.raises(NotExportableError, match=r"still masks its attention \(100%.*at the end of its run"):
        Graph(small_task("detection", **{**EOMT, "size": 32}))


def test_a_failing_exporter_is_reported_with_the_name_of_the_network(
    classified: tuple[Task, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: Any, **__: Any) -> None:
        try:
            raise TypeError("no ONNX of aten::something\nwith pages of hints")
        except TypeError as error:
            raise RuntimeError("step 3 of 3") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    assert main([str(classified[1].parent / "release"), str(tmp_path), "--onnx"]) == 2
    assert "ONNX cannot express classification on ViT with this version of torch: no ONNX of aten::something\n" in (
        capsys.readouterr().err
    )
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt2"}


def test_int8_of_a_network_without_matrix_products_is_refused(tmp_path: Path):
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [2.0])
    made = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
    onnx.save(helper.make_model(made), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"model.onnx has no matrix product with weights.*leave --int8 out"):
        quantize(tmp_path / "model.onnx", tmp_path / "model.int8.onnx")
    assert not (tmp_path / "model.int8.onnx").exists()


def test_a_grid_of_classifiers_is_refused():
    with pytest.raises(NotExportableError, match="train=grid"):
        Graph(small_task("classification", train="grid", grid={"blocks": [1]}))


def test_a_graph_that_computes_something_else_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trace = graphs.trace

    def wrong(graph: graphs.Graph, size: tuple[int, int]) -> torch.export.ExportedProgram:
        program = trace(graph, size)
        name = next(name for name in program.state_dict if name.endswith("fc.bias"))
        program.state_dict[name] = torch.nn.Parameter(program.state_dict[name] + 0.01, requires_grad=False)
        return program

    monkeypatch.setattr(graphs, "trace", wrong)
    task = small_task("classification", vit={"pos_resize": "dino"})
    with pytest.raises(NotEqualError, match=r"model.pt2 was removed.*largest difference 1.0e-02"):
        export(task, tmp_path, record={})
    assert not list(tmp_path.glob("model*"))


def test_the_validation_set_is_read_as_in_the_run(tmp_path: Path):
    data = {"val": {"images": "here"}, "orientation": "auto"}
    assert val_source(tmp_path, {"recipe": {"data": data}, "orientation": "exif"}, [])[1] == "auto"
    assert val_source(tmp_path, {"orientation": "exif"}, ["images=here"])[1] == "exif"


def test_the_validation_set_is_the_one_of_the_run_with_keys_replaced(tmp_path: Path):
    record = {"recipe": {"data": {"val": {"images": "here", "annotations": None, "limit": 5}}}}
    found, orientation = val_source(tmp_path, record, ["limit=3"])
    assert (found.images, found.limit, orientation) == ("here", 3, "stored")  # the record is older than the key
    with pytest.raises(ValueError, match="names no validation set"):
        val_source(tmp_path, {}, [])
    with pytest.raises(ValueError, match="limt: unknown key"):
        val_source(tmp_path, record, ["limt=3"])
