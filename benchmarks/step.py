"""Training steps compared with plain ones: python -m benchmarks.step [--objectives mae dino ...] [--size vit_tiny] ...

Ours: the objective by its official recipe in the engine (forward, backward, clipping, AdamW, EMA). Baseline: the same
method written plainly from the paper (benchmarks.plain_*, paired in benchmarks.pairs), with the same weights, the same
batch and the same random numbers; the two losses are compared first. Interleaved pairs; CPU seconds on a CPU, seconds
between synchronizations on a GPU. Peak memory is that of a process that takes only one kind of step.
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

from benchmarks import plain
from benchmarks.pairs import PAIRS, STEPS, Pair, pair
from benchmarks.report import paired, print_json, print_table, summary
from pretrain.core.distributed import World
from pretrain.engine.build import build_engine
from pretrain.engine.config import EngineConfig, OptimConfig
from pretrain.engine.plan import plan_steps
from pretrain.models.backbones.sizes import SIZES

Step = Callable[[], float]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["mae", "dino"], choices=list(PAIRS))
    parser.add_argument("--size", default="vit_tiny", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--prototypes", type=int, default=65536, help="of DINO and DINOv2")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=11, help="interleaved pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        step = steps(args.objectives[0], args)[args.memory_of == "plain"]
        for _ in range(2):
            step()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would start from the parent's
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return 0
    rows, records = [], []
    for name in args.objectives:
        ours, baseline = steps(name, args)
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
    title = f"{args.size}, batch {args.batch}, {args.precision}, {args.device}, {args.threads} thread(s)"
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


def steps(name: str, args: argparse.Namespace) -> tuple[Step, Step]:
    """Ours and the plain one, from the same weights on the same batch."""
    both = pair(name, args)
    return engine_step(both, args), plain_step(both, args)


def engine_step(both: Pair, args: argparse.Namespace) -> Step:
    """The step of the engine, as `fit` takes it."""
    objective, batch = both.objective, both.batch
    clip: dict[str, Any] = {} if both.clip_mode == "none" else {"clip_grad": both.clip, "clip_mode": both.clip_mode}
    optim = OptimConfig.model_validate(
        {"lr": 1e-6, "total_steps": STEPS, "weight_decay": 0.0, "global_batch_size": args.batch, **clip}
    )
    config = EngineConfig.model_validate({"precision": args.precision})
    plan, _ = plan_steps(optim, config, num_samples=args.batch, world_size=1)
    world = World(0, 1, 0, torch.device(args.device))
    engine = build_engine(objective, optim=optim, config=config, plan=plan, world=world, seed=0)

    def step() -> float:
        result = engine.train_step(iter([batch]), engine.step_count)
        objective.after_step(engine.step_count)
        return result.losses["loss"]

    return step


def plain_step(both: Pair, args: argparse.Namespace) -> Step:
    """Loss, backward, clipping, AdamW, average."""
    parameters = [parameter for parameter in both.plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> float:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = both.plain(both.batch)
        optimizer.zero_grad()
        loss.backward()
        if both.clip_mode == "per_tensor":
            plain.plain_clip(parameters, both.clip)
        elif both.clip:
            torch.nn.utils.clip_grad_norm_(parameters, both.clip)
        optimizer.step()
        both.follow()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    sys.exit(main())
