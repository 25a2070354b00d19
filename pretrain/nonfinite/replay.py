"""`fovea replay CAPTURE`: recompute a non-finite step and print the samples, module and precision that cause it."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.config import PretrainConfig, plan
from pretrain.core.configlib import ConfigError, read_values, validate
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.datasets import open_data
from pretrain.engine.checkpoint.commit import CheckpointError, verify
from pretrain.engine.session.folder import located, run_values, started_in
from pretrain.nonfinite import capture
from pretrain.nonfinite.capture import Capture

# Keys of the paths that a step needs.
_PATHS = tuple(f"data.{part}{key}" for part in ("", "mixture.") for key in ("shards", "index", "exclude"))
_PATHS += ("objective.tokenizer", "objective.teacher", "objective.teachers.weights", "objective.gram.release")


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: non-finite again. 1: finite this time. 2: wrong input."""
    parser = argparse.ArgumentParser(prog="fovea replay", description=__doc__)
    parser.add_argument("capture", type=Path, help="a folder RUN/captures/step-N")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for instance data.shards=/other/place"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    chosen = parser.parse_intermixed_args(arguments)
    try:
        return replay(chosen.capture, chosen.overrides, device=chosen.device)
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def replay(folder: Path, overrides: list[str], *, device: str = "auto") -> int:
    """Print the findings; return the exit status.

    Raises:
        ValueError: no capture, different data, or no weights.
    """
    captured = capture.read(folder)
    run_dir = folder.resolve().parent.parent
    values = located(run_values(run_dir), _PATHS, started_in(run_dir))
    config = validate(PretrainConfig, read_values(values, overrides), source=str(run_dir / "config.yaml"))
    dataset = open_data(config.data)
    if dataset.fingerprint != captured.fingerprint:
        raise ValueError(
            f"{config.data.key}: the data differ from those of the run (fingerprint {dataset.fingerprint[:12]}, "
            f"captured {captured.fingerprint[:12]}); give the folder with {config.data.key}=..."
        )
    print(f"step {captured.step + 1} of {run_dir}: {captured.first_bad} was not finite")
    if hashlib.sha256((run_dir / "config.yaml").read_bytes()).hexdigest() != captured.config_sha256:
        print("the run's config.yaml was changed since")
    weights, note = _weights(folder, captured)
    print(note)
    from pretrain.nonfinite.recompute import Recompute
    from pretrain.objectives.base import Horizon
    from pretrain.start import build_objective

    steps = plan(config, num_samples=dataset.num_samples, world_size=1)
    objective = build_objective(config, Horizon(steps.total_steps, steps.steps_per_epoch))
    objective.load_state_dict(weights)
    return Recompute(captured, config, dataset, objective, device=device).run()


def _weights(folder: Path, captured: Capture) -> tuple[Mapping[str, Any], str]:
    """The weights of the step, or of a checkpoint before it."""
    from safetensors.torch import load_file

    if captured.weights is not None:
        size = f"{captured.weights_bytes / 2**20:.1f} MiB"
        return load_file(folder / captured.weights), f"weights of that step: {captured.weights}, {size}"
    if captured.checkpoint is None:
        raise ValueError(f"{folder}: holds no weights, and there was no checkpoint before; set engine.capture_weights")
    # By its path inside the run: the run may have been moved since, or the replay started from another folder.
    source = folder.resolve().parent.parent / "checkpoints" / Path(captured.checkpoint["folder"]).name
    age = captured.step - captured.checkpoint["step"]
    if not (source / "model.safetensors").exists():
        raise ValueError(f"{folder}: holds no weights, and {source} no longer exists; set engine.capture_weights")
    note = f"weights of {source}" + (f", {age} steps older: the failure may not recur" if age else "")
    try:
        verify(source)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    return load_file(source / "model.safetensors"), note


if __name__ == "__main__":
    sys.exit(run_command("fovea replay", main))
