"""`fovea export RELEASE_OR_RUN OUT`: a fine-tuned task as graphs that run without Fovea.

    model.pt2          torch.export, always
    model.onnx         with --onnx or --int8
    example.py         beside it: a program that runs it with onnxruntime, numpy and Pillow alone
    model.int8.onnx    with --int8; both ONNX models are evaluated on the validation set
    export.json        inputs, outputs, classes, preparation of images, and the result of every comparison
    MANIFEST.json      size and sha256 of these files: `fovea release verify OUT`

`fovea export --budget MS RELEASE...` measures releases on this machine and names the largest that is fast enough.

Every graph is compared with the task itself, on batches of 1, 2 and 5 and, unless its size is fixed, on the smallest
image size, that of the task and four times its side; what is compared is printed. Detectors, segmenters and depth are
also compared as tasks: the AP, mIoU or error of the graph beside the task's own, on photos of the validation set at
three sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finetune.config import DataSource, FinetuneConfig
from finetune.data.examples import Examples
from finetune.data.reading import Reading
from finetune.export.example import EXAMPLE, write_example
from finetune.locate import check_task_folder
from finetune.tasks import open_examples
from pretrain.core.configlib import ConfigError, validate
from pretrain.core.files import write_json
from pretrain.core.images import DataOrientation
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.manifest import MANIFEST
from pretrain.data.views.orientation import recorded_orientation
from pretrain.data.views.values import recorded_range
from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.engine.session.folder import located, run_values, started_in
from pretrain.models.release.manifest import EXPORT, RECORD, write_manifest

if TYPE_CHECKING:
    from finetune.tasks.base import Task
    from pretrain.models.export.graph import Size

Say = Callable[[str], None]
ON_IMAGES = ("detection", "segmentation", "depth")  # compared as tasks
_NEEDED = "graphs are compared on photos of the validation set: {error}; give --val images=... annotations=..."
_PATHS = {"images", "annotations", "masks", "depth", "classes"}  # keys of data.val
# ONNX: the weights of a large graph are in a file of their own
GRAPHS = ("model.pt2", "model.onnx", "model.onnx.data", "model.int8.onnx", "model.int8.onnx.data")


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Export. Exit status 2: no task, not exportable, or wrong arguments; 1: a graph differs from the task."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument.partition("=")[0] == "--budget" for argument in arguments):
        from finetune.export import budget

        return budget.main(arguments)
    parser = argparse.ArgumentParser(
        prog="fovea export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", metavar="RELEASE_OR_RUN", help="folder of a fine-tuned release, or of a run")
    parser.add_argument("out", metavar="OUT", help="folder, created if it does not exist")
    parser.add_argument("--onnx", action="store_true", help="also ONNX (pip install onnx onnxscript onnxruntime)")
    parser.add_argument("--int8", action="store_true", help="also ONNX with int8 weights, and its accuracy")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels; default: those of the task"
    )
    parser.add_argument("--val", nargs="+", default=[], metavar="key=value", help="keys of data.val, such as limit=500")
    parser.add_argument("--images", type=int, default=20, help="photos on which graphs are compared (default 20)")
    parser.add_argument("--batch-size", type=int, default=16, help="images per batch when int8 is evaluated")
    chosen = parser.parse_args(arguments)
    try:
        check_task_folder(Path(chosen.task))
        from finetune.release import open_task

        task, record = open_task(chosen.task)
        val = None
        if chosen.int8 or task.config.name in ON_IMAGES:
            try:
                val = _open_val(task, record, Path(chosen.task), chosen.val)
            except (ValueError, OSError) as error:
                if chosen.int8 or chosen.val or task.detects:
                    raise ConfigError("--val", [_NEEDED.format(error=error)]) from error
                print(f"compared on random pixels only: {error}", file=sys.stderr)
        size = None if chosen.size is None else (chosen.size[0], chosen.size[1])
        export(task, Path(chosen.out), record=record, onnx=chosen.onnx or chosen.int8, int8=chosen.int8, size=size,
               val=val, images=chosen.images, batch_size=chosen.batch_size, say=print)  # fmt: skip
    except NotEqualError as error:
        print(f"fovea export: {error}", file=sys.stderr)
        return 1
    except (ValueError, CheckpointError) as error:
        print(f"fovea export: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"fovea export: {error.name} is not installed; pip install onnx onnxscript onnxruntime", file=sys.stderr)
        return 2
    return 0


class NotEqualError(ValueError):
    """A graph does not compute what the task computes; its file was removed."""


def _open_val(task: Task, record: dict[str, Any], folder: Path, overrides: Sequence[str]) -> Examples:
    source, orientation = val_source(folder, record, overrides)
    how = Reading(task.bare_backbone.in_chans, orientation, recorded_range(record))
    return open_examples(task.config, source, classes=task.classes, reading=how)


def val_source(folder: Path, record: dict[str, Any], overrides: Sequence[str]) -> tuple[DataSource, DataOrientation]:
    """The validation set that the task was evaluated on, with `overrides` of its keys, and how its photos were read.

    Raises:
        ValueError: neither the task's record nor the overrides name it, or a key is wrong.
    """
    recipe = record.get("recipe")
    if recipe is None and (folder / "config.yaml").is_file():
        recipe = validate(FinetuneConfig, run_values(folder), source=str(folder)).model_dump()
    values = dict((recipe or {}).get("data", {}).get("val", {}))
    of_run = folder if (folder / "config.yaml").is_file() else folder.parent  # whose release it may be
    values = located(values, _PATHS, started_in(of_run))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError("--val", [f"{override}: expected key=value"])
        values[key] = yaml.safe_load(text)
    if "images" not in values:
        raise ConfigError("--val", ["the task's record names no validation set; give images=... and annotations"])
    orientation = (recipe or {}).get("data", {}).get("orientation") or recorded_orientation(record)
    return validate(DataSource, values, source="--val"), orientation


def export(
    task: Task,
    out: Path,
    *,
    record: dict[str, Any],
    onnx: bool = False,
    int8: bool = False,
    size: Size | None = None,
    val: Examples | None = None,
    images: int = 20,
    batch_size: int = 16,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the graphs and export.json to `out`; returns the content of export.json.
    Graphs of an earlier export are removed first.

    Args:
        size: (height, width) at which the graph is traced, rounded up to multiples of the patch size; the only size
            if it is fixed.
        val: the validation set: `images` of its photos compare the graphs of detectors, segmenters and depth, and all
            of it measures int8, which needs it.

    Raises:
        ValueError: a detector or int8 without `val`, or `out` holds a release, or cannot be written.
        NotExportableError: the task cannot become a graph. NotEqualError: a graph computes something else.
    """
    import torch

    from finetune.export.budget import random_image
    from finetune.export.facts import facts_of
    from finetune.export.graph import Graph
    from finetune.export.measure import int8_cost, speeds
    from finetune.export.on_images import OnImages
    from finetune.export.quantize import SizeError, quantize
    from pretrain.models.export import graph as graphs
    from pretrain.models.export.outputs import NotExportableError

    if size is not None and task.config.name in ON_IMAGES:
        task = task.at_size(size)
    graph = Graph(task)
    size = _in_patches(task.input_size if size is None else size, graph.patch)
    free, least = graph.fixed is None, graph.min_patches * graph.patch
    if free and min(size) < least:
        raise ValueError(f"{size[0]} x {size[1]} px: the graph takes images from {least} px on; give a larger --size")
    say(f"image size: {graphs.sides(graph, size)} px" + ("" if free else f" ({graph.fixed})"))
    if (out / RECORD).exists():
        raise ValueError(f"{out}: holds a release; choose another folder for its export")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, EXPORT, EXAMPLE, *GRAPHS):  # of an earlier export: nothing of two exports is mixed
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{out}: not a folder to write to: {error}") from error
    facts = facts_of(task, graph, size, record)
    if val is None and (graph.detects or int8):
        raise ValueError("a detector and int8 are compared on photos: give the validation set")
    photos = None
    if val is not None and task.config.name in ON_IMAGES:
        photos = OnImages(task, graph, size, val, images)
    program = graphs.trace(graph, size)

    def checked(name: str, write: Callable[[Path], None], run: Callable[[Path], Any]) -> None:
        path = out / name
        try:
            write(path)
            opened = run(path)
            found = [] if graph.detects else graphs.compare(graph, opened, graphs.cases(graph, size))
            on_photos, problem = [], None
            try:
                on_photos = [] if photos is None else photos.compare(opened)
            except SizeError as error:
                problem = f"not compared on photos: {error}"
        except NotExportableError:
            path.unlink(missing_ok=True)
            raise
        except (ValueError, RuntimeError) as error:
            path.unlink(missing_ok=True)
            raise NotEqualError(f"{name} was removed: {error}") from error
        say(f"{name}: {path.stat().st_size / 1e6:.1f} MB")
        for one in (*found, *on_photos, *([problem] if problem else [])):
            say(f"  {one}")
        facts["files"][name] = [one.facts() for one in found]
        facts["on_photos"][name] = [one.facts() for one in on_photos]

    checked("model.pt2", lambda path: torch.export.save(program, path), graphs.run_program)
    if onnx:
        checked("model.onnx", lambda path: graphs.write_onnx(graph, program, path), graphs.session)
        missing = write_example(task, out, facts)
        say(missing or f"{EXAMPLE}: python {out / EXAMPLE} PHOTO...")
    write_json(out / EXPORT, facts)
    if int8:
        assert val is not None
        quantize(out / "model.onnx", out / "model.int8.onnx")
        facts["int8"] = int8_cost(task, graph, out, val, None if free else size, batch_size, say)
        write_json(out / EXPORT, facts)
    if onnx:
        one = graph.inputs(random_image(size, graph.backbone.in_chans)) if photos is None else photos.first()
        facts["latency"] = speeds(out, one, say)
        write_json(out / EXPORT, facts)
    write_manifest(out, [name for name in (EXPORT, EXAMPLE, *GRAPHS) if (out / name).is_file()])
    return facts


def _in_patches(size: Size, patch: int) -> Size:
    return size[0] + -size[0] % patch, size[1] + -size[1] % patch


if __name__ == "__main__":
    sys.exit(run_command("fovea export", main))
