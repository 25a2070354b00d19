"""Arms of one pretraining run against each other, over paired seeds, at equal steps and at equal CPU seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.compare configs/results/attention/mae_cifar10.yaml --out comparison

A plan names a configuration, arms (each a list of overrides), and pairs of arms. Every arm runs once per seed: the same
seed draws the same batches in every arm. With equal CPU seconds, an arm that costs more than the first one gets fewer
steps, one that costs less gets more; the costs are those measured with equal steps. Frozen features are scored as
`fovea probe` does.

A comparison that was stopped continues where it was; the tables contain the seeds that all arms have finished.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paired import difference
from launch.plan.memory import empty_batch
from pretrain.__main__ import main as pretrain
from pretrain.config import PretrainConfig
from pretrain.core.configlib import Config, Positive, dump, load_config, read_values, validate
from pretrain.core.files import write_text
from pretrain.models.activations import observed
from pretrain.objectives.base import Horizon
from pretrain.probes.protocol import ProbeRequest, probe
from pretrain.probes.subject import open_release
from pretrain.start import build_objective

Budget = Literal["steps", "cpu"]
Row = dict[str, dict[str, float]]  # of a seed: by arm, what `run` gives
SAME_COST = 0.03  # arms that cost as much as the first one, within this part, are not run again for equal CPU seconds
TITLES: dict[Budget, str] = {"steps": "Equal steps", "cpu": "Equal CPU seconds"}
METRICS = {"knn": "20-NN", "linear": "linear"}
UNITS = ("active", "hoyer")  # of `pretrain.models.activations.Sparsity`


class RunError(RuntimeError):
    """A run of an arm failed."""


class Comparison(Config):
    """A plan."""

    config: dict[str, Any] = Field(
        description="of `fovea pretrain`, without run_dir and seed; optim with total_steps and warmup_steps"
    )
    arms: dict[str, list[str]] = Field(
        description="overrides by arm, for instance [model.depth=5]; the first is the baseline"
    )
    pairs: list[tuple[str, str]] = Field(description="[arm, against]")
    seeds: Positive = 5
    budgets: list[Budget] = Field(
        ["steps", "cpu"], description="equal steps, which are always run, and equal CPU seconds"
    )
    train: str = Field(description="labelled shards to learn from")
    val: str = Field(description="labelled shards to classify")
    feature: str = Field(description="what is scored: cls, patch_mean or pooled")

    @model_validator(mode="after")
    def _arms_exist(self) -> Comparison:
        unknown = {arm for pair in self.pairs for arm in pair} - self.arms.keys()
        if unknown:
            raise ValueError(f"pairs: {', '.join(sorted(unknown))} is no arm")
        return self

    def of(self, arm: str, seed: int, folder: Path, steps: int) -> PretrainConfig:
        """The configuration of one run."""
        base = self.config["optim"]
        warmup = round(base["warmup_steps"] * steps / base["total_steps"])
        budget = [f"optim.total_steps={steps}", f"optim.warmup_steps={warmup}"]
        values = read_values({**self.config, "run_dir": str(folder), "seed": seed}, [*self.arms[arm], *budget])
        return validate(PretrainConfig, values, source=f"arm {arm}")


def score(plan: Comparison, release: Path) -> dict[str, float]:
    """Accuracies of the frozen features of a release, 0 to 1, by `METRICS`.

    With feed-forward networks also "active" and "hoyer" of their hidden units, 0 to 1, mean over the layers.
    """
    subject = open_release(release)
    bank, queries = (subject.images(shards, resize=max(subject.size)) for shards in (plan.train, plan.val))
    with observed(subject.network) as seen:
        found, _ = probe(bank, queries, subject.network, device=torch.device("cpu"), asked=ProbeRequest(both=False))
    of = found[plan.feature]
    assert of.linear is not None
    layers = [activity.sparsity for activity in seen.values()]
    units = {name: statistics.mean(getattr(layer, name) for layer in layers) for name in UNITS if layers}
    return {"knn": of.knn[20], "linear": of.linear.accuracy, **units}


def run(plan: Comparison, arm: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Train and score in a process of its own, once; CPU seconds are those of building, training and saving.

    Raises:
        RunError: the run failed.
    """
    kept = folder / "score.json"
    if not kept.exists():
        child = get_context("spawn").Process(target=_train_and_score, args=(plan, arm, seed, steps, folder))
        child.start()
        child.join()
        if child.exitcode:
            raise RunError(f"arm {arm}, seed {seed}: exit status {child.exitcode}; see {folder}/output.txt")
    return json.loads(kept.read_text())


def _train_and_score(plan: Comparison, arm: str, seed: int, steps: int, folder: Path) -> None:
    """In a process of its own, which it ends; not a fork, which could not use autograd after its parent did."""
    torch.set_num_threads(1)
    status = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        said = os.open(folder / "output.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(said, 1)
        os.dup2(said, 2)
        config = plan.of(arm, seed, folder / "run", steps)
        path = folder / "config.yaml"
        write_text(path, dump(config))
        start = time.process_time()
        status = pretrain([str(path)])
        spent = time.process_time() - start
        if status == 0:
            result = {"cpu_seconds": spent, "steps": steps, **score(plan, folder / "run" / "release")}
            write_text(folder / "score.json", json.dumps(result))
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def gflops(plan: Comparison, arm: str) -> float:
    """Floating-point operations of matrix products and convolutions, 1e9 per image of a training step."""
    torch.manual_seed(0)
    config = plan.of(arm, 0, Path("none"), plan.config["optim"]["total_steps"])
    objective = build_objective(config, Horizon(100, 10))
    images = 4
    batch = {
        name: torch.rand(value.shape) if value.is_floating_point() else value
        for name, value in empty_batch(config, images).items()
    }
    with FlopCounterMode(display=False) as counter:
        objective(batch, 0)["loss"].backward()
    return counter.get_total_flops() / images / 1e9


def compare(plan: Comparison, out: Path) -> Iterator[str]:
    """Run everything, seed by seed; after each seed, the tables."""
    total = int(plan.config["optim"]["total_steps"])
    done: dict[Budget, list[Row]] = {"steps": [], "cpu": []}
    cost = {arm: gflops(plan, arm) for arm in plan.arms}
    for seed in range(plan.seeds):
        done["steps"].append({arm: run(plan, arm, seed, total, out / "steps" / arm / str(seed)) for arm in plan.arms})
        yield tables(plan, done, cost)
    if "cpu" not in plan.budgets:
        return
    spent = {arm: statistics.median(row[arm]["cpu_seconds"] for row in done["steps"]) for arm in plan.arms}
    base = spent[next(iter(plan.arms))]
    for seed in range(plan.seeds):
        row = {}
        for arm in plan.arms:
            same = abs(spent[arm] / base - 1) <= SAME_COST
            steps = round(total * base / spent[arm])
            row[arm] = done["steps"][seed][arm] if same else run(plan, arm, seed, steps, out / "cpu" / arm / str(seed))
        done["cpu"].append(row)
        yield tables(plan, done, cost)


def tables(plan: Comparison, done: dict[Budget, list[Row]], cost: dict[str, float]) -> str:
    """Markdown: the arms, then the pairs, for each budget that has begun."""
    parts = []
    for budget, title in TITLES.items():
        if rows := done[budget]:
            count = f"{len(rows)} seed{'s' if len(rows) > 1 else ''}"
            parts += [f"{title}, {count}:", _arms(plan, rows, cost), _pairs(plan, rows)]
    return "\n\n".join(parts)


def _arms(plan: Comparison, rows: list[Row], cost: dict[str, float]) -> str:
    lines = ["| arm | GFLOP an image | CPU s | steps | 20-NN | linear |", "| --- | --- | --- | --- | --- | --- |"]
    for arm in plan.arms:
        spent = statistics.median(row[arm]["cpu_seconds"] for row in rows)
        means = " | ".join(f"{100 * statistics.mean(row[arm][key] for row in rows):.1f}" for key in METRICS)
        lines.append(f"| {arm} | {cost[arm]:.4f} | {spent:.0f} | {rows[0][arm]['steps']:.0f} | {means} |")
    return "\n".join(lines)


def _pairs(plan: Comparison, rows: list[Row]) -> str:
    lines = [f"| pair | {' | | '.join(METRICS.values())} | |", "| --- | --- | --- | --- | --- |"]
    for arm, against in plan.pairs:
        cells = []
        for key in METRICS:
            found = difference(*([100 * row[name][key] for row in rows] for name in (arm, against)))
            cells.append(f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] | {found.verdict}")
        lines.append(f"| {arm} - {against} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Exit status 1: a run failed. 2: a wrong plan."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("plan", type=Path, help="for instance configs/results/attention/mae_cifar10.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the plan, for instance seeds=2")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, their scores and the tables")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        plan = load_config(Comparison, chosen.plan, chosen.overrides)
        for found in compare(plan, chosen.out):
            write_text(chosen.out / "tables.md", found + "\n")
            print(found, end="\n\n", flush=True)
    except (ValueError, RunError) as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
