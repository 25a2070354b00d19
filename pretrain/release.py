"""`fovea release RUN OUT`: the backbone of a run's newest checkpoint, as a folder that timm loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, load_config
from pretrain.core.record import read_rows
from pretrain.engine.checkpoint.commit import CheckpointError, newest_complete, read_manifest
from pretrain.engine.session.folder import last_start, read_data


def from_run(run_dir: Path, out: Path) -> str:
    """Write the release of the newest complete checkpoint of `run_dir` into `out`; return a one-line report.

    Raises:
        ConfigError: `run_dir` is not a run folder. CheckpointError: no complete checkpoint.
        ValueError: `out` contains other files.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(str(run_dir), ["not a run folder: it has no config.yaml"])
    config = load_config(PretrainConfig, run_dir / "config.yaml")
    data, start = read_data(run_dir), last_start(run_dir)
    checkpoint = newest_complete(run_dir / "checkpoints")
    from safetensors.torch import load_file

    from pretrain.models.release.folder import write_release
    from pretrain.objectives.base import Horizon
    from pretrain.start import build_objective

    steps = plan(config, num_samples=data["num_samples"], world_size=1)
    objective = build_objective(config, Horizon(steps.total_steps, steps.steps_per_epoch))
    objective.load_state_dict(load_file(checkpoint / "model.safetensors"))
    step = read_manifest(checkpoint).step
    record = {
        "recipe": config.model_dump(mode="json"),
        "data": {"fingerprint": data["fingerprint"], "images": data["num_samples"]},
        "metrics": {"step": step, **_last_metrics(run_dir / "metrics.jsonl", step, config)},
        "commit": start["commit"],
        "versions": start["versions"],
    }
    write_release(
        out,
        objective.backbone,
        objective=config.objective.name,
        extra_state=objective.heads_state(),
        record=record,
        mean=config.mean,
        std=config.std,
    )
    opened = f"timm.create_model('local-dir:{out}', pretrained=True)"
    if not (out / "config.json").is_file():
        opened = f"pretrain.models.release.folder.read_release('{out}').build()"
    return f"released step {step} as {out}: {opened}"


def _last_metrics(path: Path, step: int, config: PretrainConfig) -> dict[str, float]:
    """The last measured accuracies of the online probe up to `step`, by the name of their protocol."""
    if config.probe is None:
        return {}
    protocols = {
        "knn": f"{config.probe.k}-NN top-1, cosine, T={config.probe.temperature}, {config.probe.val_shards}",
        "linear": f"linear top-1, logistic regression, L2 chosen on a fifth of train, {config.probe.val_shards}",
    }
    scores: dict[str, float] = {}
    for row in read_rows(path):
        for name, value in row.items() if row["step"] <= step else ():
            probe, _, kind = name.partition("/")
            if probe in protocols and kind != "pixels":
                scores[f"{kind} {protocols[probe]}"] = value
    return scores


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: written. 2: wrong folder. 3: no complete checkpoint."""
    parser = argparse.ArgumentParser(prog="fovea release", description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("out", type=Path, help="the folder to write; a release in it is replaced")
    chosen = parser.parse_args(arguments)
    try:
        print(from_run(chosen.run, chosen.out))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 3
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
