"""Whole training steps against plain ones: python -m benchmarks.step [--objectives mae dino] [--size vit_tiny] ...

Ours: the objective in the engine (forward, backward, clipping, AdamW, EMA). Baseline: the same method written plainly
from the paper (benchmarks.plain), with the same weights, the same batch and the same random numbers; the two losses
are compared first. Interleaved pairs; CPU seconds on a CPU, seconds between synchronizations on a GPU. Peak memory is
that of a process that takes only one kind of step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.report import paired, print_json, print_table, summary
from pretrain.distributed import World
from pretrain.engine.build import build_engine
from pretrain.engine.optim import OptimSettings
from pretrain.engine.trainable import EngineSettings
from pretrain.models.sizes import SIZES
from pretrain.models.vit import ViT
from pretrain.objectives import build
from pretrain.objectives.base import Horizon
from pretrain.objectives.configs import DINOConfig, MAEConfig

PATCH, SIDE, LOCAL_SIDE = 16, 224, 96
STEPS = 10**6  # the schedules do not matter here
Step = Callable[[], float]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["mae", "dino"], choices=["mae", "dino"])
    parser.add_argument("--size", default="vit_tiny", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--prototypes", type=int, default=65536, help="of DINO")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11, help="interleaved pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        step = STEP_PAIRS[args.objectives[0]](args)[args.memory_of == "plain"]
        for _ in range(2):
            step()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would start from the parent's
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return 0
    rows, records = [], []
    for name in args.objectives:
        ours, baseline = STEP_PAIRS[name](args)
        first = (ours(), baseline())
        tolerance = 1e-4 if args.precision == "fp32" else 2e-2
        if abs(first[0] - first[1]) > tolerance * abs(first[1]):
            raise RuntimeError(f"{name}: the losses differ, ours {first[0]:.6f}, plain {first[1]:.6f}")
        clock = time.process_time if args.device == "cpu" else synchronized_clock
        pairs = paired(ours, baseline, args.rounds, clock=clock)
        seconds = [sorted(times)[len(times) // 2] for times in (pairs.ours, pairs.baseline)]
        memory = [peak_memory(name, kind, args, step) for kind, step in (("ours", ours), ("plain", baseline))]
        rates = [args.batch / second for second in seconds]
        record = summary(f"step {name}", pairs, ours=rates[0], baseline=rates[1], unit="img/s")
        record |= {"size": args.size, "batch": args.batch, "precision": args.precision, "peak_mb": memory}
        records.append(record | {"seconds": seconds, "loss": first})
        rows += [
            [f"{name} {kind}", seconds[i], rates[i], memory[i], record["ratio"] if i == 0 else ""]
            for i, kind in enumerate(("ours", "plain"))
        ]
    title = f"{args.size}/{PATCH}, batch {args.batch}, {args.precision}, {args.device}, {args.threads} thread(s)"
    print_table(title, ["step", "s", "img/s", "peak MB", "x"], rows)
    for record in records:
        print_json(record)
    return 0


def synchronized_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(name: str, kind: str, args: argparse.Namespace, step: Step) -> float:
    """MB: of the device's allocator on a GPU, else of a fresh process that takes two such steps."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    command = [sys.executable, "-m", "benchmarks.step", "--objectives", name, "--memory-of", kind, "--device", "cpu"]
    for key in ("size", "batch", "prototypes", "precision", "threads"):
        command += [f"--{key}", str(getattr(args, key))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def engine_step(objective: Any, batch: dict[str, Tensor], args: argparse.Namespace, *, clip: float) -> Step:
    """The step of the engine, as `fit` takes it."""
    device = torch.device(args.device)
    optim = OptimSettings(lr=1e-6, total_steps=STEPS, clip_grad=clip, clip_mode="per_tensor" if clip else "none")
    settings = EngineSettings(precision=args.precision, micro_batch=args.batch)
    engine = build_engine(objective, optim=optim, settings=settings, world=World(0, 1, 0, device), seed=0)

    def step() -> float:
        result = engine.train_step(iter([batch]), engine.step_count)
        objective.after_step(engine.step_count)
        return result.losses["loss"]

    return step


def plain_step(
    parameters: list[Any], loss_of: Callable[[], Tensor], args: argparse.Namespace, *, clip: float = 0.0
) -> Step:
    """Loss, backward, clipping, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> float:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            plain.plain_clip(parameters, clip)
        optimizer.step()
        return float(loss.detach())

    return step


def mae_steps(args: argparse.Namespace) -> tuple[Step, Step]:
    torch.manual_seed(0)
    size, config = SIZES[args.size], MAEConfig.model_validate({})
    ours = build("mae")(config, ViT((SIDE, SIDE), PATCH, **size), Horizon(STEPS, 1000)).to(args.device)
    shape = {key: size[key] for key in ("embed_dim", "depth", "num_heads")}
    baseline = plain.PlainMAE(
        plain.plain_vit(img_size=SIDE, patch_size=PATCH, **shape),
        decoder_dim=config.decoder_embed_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_num_heads,
    ).to(args.device)
    baseline.load_state_dict({name.replace("decoder.", "decoder_"): value for name, value in ours.state_dict().items()})
    baseline.encoder.pos_embed.requires_grad_(False)
    images = torch.randn(args.batch, 3, SIDE, SIDE, device=args.device)
    noise = torch.rand(args.batch, (SIDE // PATCH) ** 2, device=args.device)
    batch = {"image": images[:, None], "mask_noise": noise}
    parameters = [parameter for parameter in baseline.parameters() if parameter.requires_grad]
    return engine_step(ours, batch, args, clip=0), plain_step(parameters, lambda: baseline(images, noise), args)


def dino_steps(args: argparse.Namespace) -> tuple[Step, Step]:
    torch.manual_seed(0)
    size, config = SIZES[args.size], DINOConfig.model_validate({"out_dim": args.prototypes, "drop_path_rate": 0.0})
    vit = ViT((SIDE, SIDE), PATCH, **size, pos_embed="learned")
    ours: Any = build("dino")(config, vit, Horizon(STEPS, 1000)).to(args.device)
    shape = {key: size[key] for key in ("embed_dim", "depth", "num_heads")}
    widths = {"hidden_dim": config.head_hidden_dim, "bottleneck_dim": config.head_bottleneck_dim}

    def branch() -> Any:
        backbone = plain.plain_vit(img_size=SIDE, patch_size=PATCH, **shape)
        made = plain.PlainBranch(backbone, plain.PlainHead(size["embed_dim"], args.prototypes, **widths))
        made.load_state_dict(ours.student.state_dict())
        return made.to(args.device)

    student, teacher = branch(), branch().requires_grad_(False)
    student.head.last_layer.weight_g.requires_grad_(False)
    center = torch.zeros(1, args.prototypes, device=args.device)
    crops = torch.randn(args.batch, 2, 3, SIDE, SIDE, device=args.device)
    local = torch.randn(args.batch, config.local_crops_number, 3, LOCAL_SIDE, LOCAL_SIDE, device=args.device)
    views = [views.transpose(0, 1).flatten(0, 1) for views in (crops, local)]

    def loss() -> Tensor:
        with torch.no_grad():
            target = teacher(views[0]).float()
        value = plain.plain_dino_loss(
            student(*views).float(), target, center, images=args.batch, student_temp=0.1, teacher_temp=0.04
        )
        center.mul_(0.9).add_(target.mean(0, keepdim=True), alpha=0.1)
        return value

    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    update = plain_step(parameters, loss, args, clip=3.0)

    def step() -> float:
        value = update()
        plain.plain_ema(list(teacher.parameters()), list(student.parameters()), 0.996)
        return value

    return engine_step(ours, {"global": crops, "local": local}, args, clip=3.0), step


STEP_PAIRS = {"mae": mae_steps, "dino": dino_steps}

if __name__ == "__main__":
    sys.exit(main())
