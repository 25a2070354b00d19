"""What the ranks of the tests do. Many configurations in one launch: imports cost more than the steps."""

from __future__ import annotations

import copy
import gc
import os
import resource
import signal
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.core import distributed
from pretrain.core.distributed import World
from pretrain.core.machine.failures import StoppedWaitingError
from pretrain.core.tensorfile import write_tensors
from pretrain.engine.build import build_engine
from pretrain.engine.checkpoint.checkpoints import Checkpoints
from pretrain.engine.checkpoint.commit import CheckpointError
from pretrain.engine.loop import fit
from pretrain.engine.nonfinite import NonFiniteError
from pretrain.engine.protocol import StepResult
from pretrain.engine.session import preempt
from pretrain.engine.step import StepEngine
from tests.engine.settings import settings
from tests.engine.toys import GLOBAL_BATCH, Plain, Toy, batches, tiny_dino, tiny_mae, tiny_sparse

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "accelerate"},
    "zero0": {"name": "deepspeed", "zero_stage": 0},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
STEPS = 20
OPTIMS: dict[str, dict[str, Any]] = {
    "global": {"clip_mode": "global", "clip_grad": 0.3},
    "per_tensor": {"clip_mode": "per_tensor", "clip_grad": 0.1},
    "per_module": {"clip_mode": "per_module", "clip_grad": 0.1},
    "none": {},
    "lars": {"name": "lars", "lr": 3.0, "trust_coefficient": 0.02, "clip_mode": "global", "clip_grad": 0.3},
    "sgd": {"name": "sgd", "lr": 0.1, "clip_mode": "per_tensor", "clip_grad": 0.1},
    "nesterov": {"name": "sgd", "lr": 0.1, "nesterov": True},
    "adam": {"name": "adam", "clip_mode": "global", "clip_grad": 0.3},
    "lamb": {"name": "lamb", "lr": 0.02, "clip_mode": "global", "clip_grad": 0.3},
    "lion": {"name": "lion", "lr": 1e-3, "clip_mode": "per_tensor", "clip_grad": 0.1},
    "muon": {"name": "muon", "lr": 1e-2},
    "schedule_free": {"name": "schedule_free_adamw", "schedule": "constant", "lr": 1e-2},
    "sam": {"sam": {"rho": 0.2}, "clip_mode": "global", "clip_grad": 0.3},
}
MODELS = {"toy": Toy, "plain": Plain, "mae": tiny_mae, "sparse": tiny_sparse, "dino": tiny_dino}


def build(world: World, model: nn.Module, engine: str, optim: str = "global", *, accumulation: int = 1) -> StepEngine:
    name, *extras = engine.split("+")
    optims = {"lr": 3e-3, "weight_decay": 0.1, "weight_decay_end": 0.3, "warmup_steps": 3}
    optims |= {} if OPTIMS[optim].get("name") in ("sgd", "lars", "lion") else {"eps": 1e-6}
    section = {
        **ENGINES[name],
        "accumulation_steps": accumulation,
        "deepspeed": OFFLOAD if "offload" in extras else {},
        "precision": next((extra for extra in extras if extra in ("bf16", "fp16")), "fp32"),
    }
    chosen = settings(
        total_steps=STEPS,
        micro_batch=GLOBAL_BATCH // world.world_size // accumulation,
        world_size=world.world_size,
        engine=section,
        **{**optims, **OPTIMS[optim]},
    )
    return build_engine(model, **chosen, world=world, seed=5)


def run(
    engine: StepEngine, *, kind: str, poison: set[int] | None = None, feed: Any = None, **options: Any
) -> list[StepResult]:
    """fit from where the engine is; every step's result."""
    results: list[StepResult] = []
    feed = feed or batches(
        kind,
        start=engine.step_count,
        accumulation=engine.accumulation_steps,
        world=engine.world.world_size,
        rank=engine.world.rank,
        poison=poison,
    )
    given = {"save": lambda step: None, "requests": lambda: 0, "save_every": 0, "total_steps": STEPS, **options}
    fit(
        engine,
        engine.trainable,
        feed,
        log=lambda step, result: results.append(result),
        probe=lambda step: None,
        log_every=1,
        **given,
    )
    return results


def whole_state(engine: StepEngine) -> dict[str, Tensor]:
    """A copy of the model as a checkpoint has it (complete on rank 0 only under ZeRO-3)."""
    return {name: tensor.detach().clone() for name, tensor in engine._model_state().items()}


def several(world: World, out: Path, *, scenarios: list[list[Any]]) -> list[Any]:
    """Run (function name, folder, arguments) one after the other."""
    found = []
    for name, folder, arguments in scenarios:
        (out / folder).mkdir(exist_ok=True)
        found.append(globals()[name](world, out / folder, **arguments))
    return found


def train(world: World, out: Path, *, cases: list[list[str]], accumulation: int) -> dict[str, Any]:
    """Train each (model, engine, optim) case and keep its final state in `out`; losses and norms by case."""
    found = {}
    for kind, engine_name, optim in cases:
        name = "-".join((kind, engine_name, optim))
        engine = build(world, MODELS[kind](), engine_name, optim, accumulation=accumulation)
        results = run(engine, kind=kind)
        state = whole_state(engine)
        teacher = [tensor.double().sum().item() for name, tensor in engine.trainable.named_buffers()]
        found[name] = {
            "losses": [result.losses["loss"] for result in results],
            "norms": [result.grad_norm for result in results],
            "buffers": teacher,
        }
        if world.rank == 0:
            write_tensors(out / f"{name}.safetensors", state)
    return found


def resume(world: World, out: Path, *, cases: list[list[str]]) -> dict[str, Any]:
    """Save at step 7 of 20 on the way, load that into a fresh model, finish again: what differs bit by bit."""
    found = {}
    for kind, engine_name, optim in cases:
        name = "-".join((kind, engine_name, optim))
        root = Checkpoints(out / name)
        engine = build(world, MODELS[kind](), engine_name, optim)
        first = run(
            engine, kind=kind, save=lambda step, e=engine, r=root: r.save(e, step, {"step": step}), save_every=7
        )
        again = build(world, _disturbed(MODELS[kind]()), engine_name, optim)
        again.load(out / name / "step-00000007")
        second = run(again, kind=kind)
        folder = Checkpoints(out / (name + "-again")).save(again, STEPS, {})
        wrong = [file.name for file in folder.glob("*.safetensors") if not _same_file(file, out / name / folder.name)]
        losses = [result.losses for result in first[7:]] == [result.losses for result in second]
        found[name] = {"different_files": wrong, "equal_losses": losses, "losses": [r.losses["loss"] for r in first]}
    return found


def resume_from(world: World, out: Path, *, cases: list[list[str]]) -> dict[str, Any]:
    """Losses from step 7 on of each (model, engine, optim, folder of another world or engine)."""
    found = {}
    for kind, engine_name, optim, folder in cases:
        engine = build(world, _disturbed(MODELS[kind]()), engine_name, optim)
        engine.load(Path(folder) / "step-00000007")
        found[f"{engine_name} {folder}"] = [result.losses["loss"] for result in run(engine, kind=kind)]
    return found


def poisoned(world: World, out: Path, *, engines: list[str]) -> dict[str, Any]:
    """A nan in rank 1's part of step 4 (global batch 8: its positions are 36 to 39)."""
    found = {}
    for name in engines:
        kind = "plain" if name.startswith("zero3") else "toy"
        engine = build(world, MODELS[kind](), name, "per_tensor", accumulation=2)
        before: dict[str, Tensor] = {}
        run(engine, kind=kind, total_steps=4)
        before = copy.deepcopy(whole_state(engine))
        optimizer = {f.name: {k: f.of(v).clone() for k, v in _state(engine, f).items()} for f in engine.fragments}
        bad = run(engine, kind=kind, total_steps=5, poison={37})[0]
        after = whole_state(engine)
        kept = all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        for fragment in engine.fragments:
            for key, value in _state(engine, fragment).items():
                kept = kept and torch.equal(fragment.of(value), optimizer[fragment.name][key])
        later = run(engine, kind=kind, total_steps=8)
        found[name] = {
            "skipped": bad.skipped,
            "bad_ranks": bad.bad_ranks,
            "bad_positions": bad.bad_positions,
            "kept": kept,
            "later": [[result.skipped, result.losses["loss"], result.grad_norm] for result in later],
            "moved": not torch.equal(whole_state(engine)["last.weight"], after["last.weight"]) or world.rank > 0,
            "stopped": _stops_after_three(engine, kind),
            "gradient": _skips_broken_gradient(world, name),
        }
    return found


def _stops_after_three(engine: StepEngine, kind: str) -> list[Any]:
    try:
        run(engine, kind=kind, poison=set(range(64, 200)))
    except NonFiniteError as error:
        return [engine.step_count, str(error)]
    return [engine.step_count, ""]


class BrokenGradient(Plain):
    """A finite loss whose gradient is not, at step 2."""

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        losses = super().forward(batch, step)
        if step == 2:
            losses["loss"] = losses["loss"] + (self.last.weight * 0.0).sum().sqrt()
        return losses


def _skips_broken_gradient(world: World, name: str) -> list[bool]:
    engine = build(world, BrokenGradient(), name)
    return [result.skipped for result in run(engine, kind="plain", total_steps=5)]


def closed(world: World, out: Path, *, engines: list[str]) -> dict[str, Any]:
    """What is still there of an engine that was closed: a run that rewinds builds another in the same process."""
    found = {}
    for name in engines:
        engine = build(world, Toy(), name)
        run(engine, kind="toy", total_steps=2)
        parts = {"model": weakref.ref(engine.trainable), "optimizer": weakref.ref(engine.optimizer)}
        engine.close()
        del engine
        gc.collect()
        found[name] = [part for part, there in parts.items() if there() is not None]
    return found


def asked_to_stop(world: World, out: Path) -> dict[str, Any]:
    """Rank 1 gets SIGTERM before step 3; then files ask: `save` first, `stop` later."""
    found: dict[str, Any] = {}
    root = Checkpoints(out / "checkpoints")

    def signalled() -> int:
        if world.rank == 1 and engine.step_count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return watch.poll()

    watch = preempt.Watch(out, rank=world.rank)
    engine = build(world, Toy(), "zero2")
    run(engine, kind="toy", requests=signalled, save=lambda step: root.save(engine, step, {}))
    watch.close()
    newest = root.find_latest()
    found["signal"] = [engine.step_count, newest.step if newest else None, watch.reason if world.rank == 1 else ""]

    def filed() -> int:
        if world.rank == 0 and engine.step_count in (5, 9):
            (out / ("save" if engine.step_count == 5 else "stop")).touch()
            watch._next_look = 0.0
        return watch.poll()

    saved: list[int] = []
    watch = preempt.Watch(out, rank=world.rank)
    run(engine, kind="toy", requests=filed, save=saved.append)
    watch.close()
    found["files"] = [saved, engine.step_count, sorted(path.name for path in out.iterdir() if path.is_file())]
    return found


class Normed(Toy):
    """With running statistics, which every forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.norm(batch["x"][:, :5])
        return super().forward(batch, step)


def stopped_waiting(world: World, out: Path, *, engines: list[str]) -> dict[str, Any]:
    """The last rank's data does not come: none of it; the second of two micro-batches of its third step. The steps that
    were saved, and whether the state is then that of a run of two steps."""
    found = {}
    for name in engines:
        model = Plain if name.startswith("zero3") else Normed
        undisturbed = build(world, model(), name, accumulation=2)
        run(undisturbed, kind="toy", total_steps=2)
        saved: list[int] = []
        for available in (0, 5):  # micro-batches of the last rank
            engine = build(world, model(), name, accumulation=2)
            feed = batches("toy", start=0, accumulation=2, world=world.world_size, rank=world.rank)
            if world.rank == world.world_size - 1:
                feed = _until(feed, available)
            run(engine, kind="toy", save=saved.append, feed=feed)
        state, expected = whole_state(engine), whole_state(undisturbed)
        found[name] = [saved, all(torch.equal(state[key], value) for key, value in expected.items())]
    seen = []
    try:
        for number in distributed.until_stopped(_until(iter(range(4)), 2) if world.rank else range(4)):
            seen.append(number)
    except StoppedWaitingError:
        found["pass"] = seen
    return found


def _until(feed: Iterator[Any], available: int) -> Iterator[Any]:
    yield from islice(feed, available)
    raise StoppedWaitingError


def storage_trouble(world: World, out: Path) -> dict[str, Any]:
    """One rank's file of the newest checkpoint is damaged; later one rank cannot write."""
    root = Checkpoints(out)
    engine = build(world, Plain(), "zero2")
    run(engine, kind="plain", total_steps=4, save=lambda step: root.save(engine, step, {}), save_every=2)
    if world.rank == 0:
        target = out / "step-00000004" / "optim-rank00001.safetensors"
        whole = bytearray(target.read_bytes())
        whole[-3] ^= 1
        target.write_bytes(whole)
    distributed.barrier()
    found = root.find_latest()
    assert found is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        root.save(engine, 6, {})
        message = ""
    except CheckpointError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    distributed.barrier()
    return {
        "step": found.step,
        "skipped": [line.partition("step-")[2] for line in found.skipped],
        "message": message,
        "folders": sorted(path.name for path in out.iterdir() if path.is_dir()),
    }


def refusals(world: World, out: Path) -> dict[str, str]:
    """Messages of what must not start."""
    found = {}
    for name, model in (("toy", Toy()), ("dino", tiny_dino())):
        try:
            build(world, model, "zero3")
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def _state(engine: StepEngine, fragment: Any) -> dict[str, Tensor]:
    return {k: v for k, v in engine.optimizer.state[fragment.owner].items() if k != "step" and v is not None}


def _disturbed(model: nn.Module) -> nn.Module:
    """Other weights, so that loading has something to do."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1)
    return model


def _same_file(one: Path, other_folder: Path) -> bool:
    return one.read_bytes() == (other_folder / one.name).read_bytes()
