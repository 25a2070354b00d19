"""One training step of detection: python -m benchmarks.detection [--heads mask_rcnn cascade ...] [--model vit_base] ...

Forward, backward, clipping and AdamW of the task in the engine, random weights, synthetic images with rectangles to
find. Seconds are the median of the steps after the first: CPU seconds on a CPU, between synchronizations on a GPU.
Every row is a process of its own; the peak memory is that of the process, or of the device's allocator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import print_json, print_table
from finetune.data.batches import move
from finetune.predictions import Classes
from finetune.tasks.configs.detection import DetectionConfig
from finetune.tasks.detection import Detection
from finetune.tasks.opened import OpenedBackbone
from pretrain.core.distributed import World
from pretrain.core.images import IMAGENET_MEAN, IMAGENET_STD
from pretrain.engine.build import build_engine
from pretrain.engine.config import EngineConfig, OptimConfig
from pretrain.engine.plan import plan_steps
from pretrain.models.backbones.sizes import SIZES
from pretrain.models.backbones.vit import ViT

PATCH = 16
HEADS: dict[str, dict[str, Any]] = {
    "faster_rcnn": {"name": "faster_rcnn"},
    "mask_rcnn": {"name": "mask_rcnn"},
    "cascade": {"name": "mask_rcnn", "cascade": True},
    "eomt": {"name": "eomt"},
    "detr": {"name": "detr"},
}


def main(argv: list[str] | None = None) -> int:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", default=["mask_rcnn"], choices=list(HEADS))
    parser.add_argument("--model", default="vit_base", choices=list(SIZES))
    parser.add_argument("--img-size", type=int, default=1024 if has_gpu else 512)
    parser.add_argument("--window", type=int, default=16, help="tokens along a side; 0: every block is global")
    parser.add_argument("--no-rel-pos", action="store_true", help="without ViTDet's relative positions")
    parser.add_argument("--batch", type=int, default=4 if has_gpu else 1, help="images of a step")
    parser.add_argument("--objects", type=int, default=8, help="of an image")
    parser.add_argument("--precision", default="bf16" if has_gpu else "fp32", choices=["fp32", "bf16"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute the backbone's activations")
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=20 if has_gpu else 2, help="measured, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=list(HEADS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return 0
    given = sys.argv[1:] if argv is None else argv
    records = []
    for head in args.heads:
        command = [sys.executable, "-m", "benchmarks.detection", *given, "--one", head]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        records.append(json.loads(done.stdout.splitlines()[-1]))
    windows = f"windows of {args.window}" if args.window else "no windows"
    title = f"{args.model}, {args.img_size} px, batch {args.batch}, {windows}, {args.precision}, {args.device}"
    columns = ["head", "parameters M", "s / step", "img/s", "peak MB"]
    keys = ("head", "parameters_m", "seconds", "images_per_second", "peak_mb")
    print_table(title, columns, [[record[key] for key in keys] for record in records])
    for record in records:
        print_json(record)
    return 0


def measure(head: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times and peak memory of one head, in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    task: Any = detection(head, args).train()
    batch = made_up_batch(task, args, device)
    optim = OptimConfig.model_validate(
        {"lr": 1e-6, "total_steps": args.steps + 1, "weight_decay": 0.0, "global_batch_size": args.batch}
    )
    config = EngineConfig.model_validate({"precision": args.precision})
    plan, _ = plan_steps(optim, config, num_samples=args.batch, world_size=1)
    engine = build_engine(task, optim=optim, config=config, plan=plan, world=World(0, 1, 0, device), seed=0)
    clock = time.process_time if args.device == "cpu" else _synchronized
    seconds, losses = [], []
    for _ in range(args.steps + 1):
        start = clock()
        losses.append(engine.train_step(iter([batch]), engine.step_count).losses["loss"])
        task.after_step(engine.step_count)
        seconds.append(clock() - start)
    median = statistics.median(seconds[1:])
    return {
        "benchmark": "detection step",
        "head": head,
        "model": args.model,
        "img_size": args.img_size,
        "batch": args.batch,
        "window": args.window,
        "rel_pos": not args.no_rel_pos,
        "precision": args.precision,
        "checkpointing": args.checkpointing,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "parameters_m": sum(p.numel() for p in task.parameters()) / 1e6,
        "seconds": median,
        "images_per_second": args.batch / median,
        "peak_mb": _peak_mb(args.device),
        "losses": [float(loss) for loss in losses],
    }


def detection(head: str, args: argparse.Namespace) -> Detection:
    """The task on an untrained backbone with learned positions, as ViTDet has it, of 80 classes."""
    side = args.img_size
    backbone = ViT((side, side), PATCH, **SIZES[args.model], pos_embed="learned", drop_path_rate=0.1)
    backbone.set_checkpointing(args.checkpointing)
    options: dict[str, Any] = {"head": HEADS[head], "size": side, "rel_pos": not args.no_rel_pos}
    if args.window:
        options["window"] = args.window
    if head == "eomt":  # its queries go through the last four blocks, which are global
        options |= {"rel_pos": False, "global_blocks": sorted({2, 5, *range(backbone.depth - 4, backbone.depth)})}
    opened = OpenedBackbone(backbone, IMAGENET_MEAN, IMAGENET_STD, "untrained")
    return Detection(DetectionConfig.model_validate(options), opened, Classes([f"class {i}" for i in range(80)]))


def made_up_batch(task: Detection, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A batch as workers give it, on the device: noise with rectangles, and random numbers for drop path."""
    side, samples = args.img_size, []
    for _ in range(args.batch):
        corners = torch.rand(args.objects, 2) * side * 0.6
        boxes = torch.cat([corners, corners + (0.05 + 0.3 * torch.rand(args.objects, 2)) * side], dim=1)
        masks = torch.zeros(args.objects, side, side, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8)
        sample = {"image": image, "boxes": boxes, "labels": torch.randint(1, 81, (args.objects,))}
        if task.config.with_masks:
            sample["masks"] = masks
        if task.head.reads_crowds:
            sample["valid"] = torch.ones(side, side, dtype=torch.bool)
        samples.append(sample | {name: torch.rand(shape) for name, shape in task.noises.items()})
    return move(task.collate(samples), device)


def _peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _synchronized() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
