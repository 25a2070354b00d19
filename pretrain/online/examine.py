"""`fovea doctor RUN`: apply the doctor to the metrics of a run, and print what was wrong and from which step on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pretrain.config import Plan, PretrainConfig, plan
from pretrain.core.configlib import ConfigError, validate
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output
from pretrain.core.record import read_rows
from pretrain.doctor.diagnosis import Diagnosis, Doctor
from pretrain.doctor.history import Facts
from pretrain.doctor.rules import RULES
from pretrain.engine.session.folder import last_start, read_data, run_values

HEALTHY, ALARMED, WRONG = 0, 1, 2


def facts_of(config: PretrainConfig, steps: Plan) -> Facts:
    """Properties of a run that diagnoses depend on."""
    settings = config.objective.model_dump()
    return Facts(
        total_steps=steps.total_steps,
        warmup_steps=steps.warmup_steps,
        peak_lr=steps.lr,
        prototypes=settings.get("out_dim", settings.get("num_clusters")),
        centred=settings.get("center_momentum") is not None and settings.get("centering", "centering") == "centering",
        rows=steps.micro_batch,
        embed_dim=config.model.embed_dim,
        still_steps=round(settings.get("momentum_warmup", 0) * steps.total_steps),
    )


def examine(run_dir: Path) -> tuple[list[Diagnosis], int]:
    """Diagnoses of the rows of metrics.jsonl, and the number of rows.

    The log has only every `log.every_steps`-th step, so a sign that spans fewer than two such rows is not detected.

    Raises:
        ConfigError: `run_dir` is not a run folder.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(str(run_dir), ["not a run folder: it has no config.yaml"])
    config = validate(PretrainConfig, run_values(run_dir), source=str(run_dir / "config.yaml"))
    num_samples, world_size = read_data(run_dir)["num_samples"], last_start(run_dir)["world_size"]
    steps = plan(config, num_samples=num_samples, world_size=world_size)
    doctor = Doctor(facts_of(config, steps), off=config.doctor.off if config.doctor else ())
    rows = read_rows(run_dir / "metrics.jsonl")
    verdicts = [
        verdict
        for row in rows
        for verdict in doctor.observe(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
    ]
    return [*_not_finite(run_dir), *verdicts], len(rows)


def _not_finite(run_dir: Path) -> list[Diagnosis]:
    """One diagnosis for all captured steps, since their losses are in no row."""
    captures = sorted((run_dir / "captures").glob("step-*"))
    if not captures:
        return []
    step = int(captures[0].name.split("-")[1])
    text = (
        f"{len(captures)} captured steps had no finite loss or gradient; to find the cause: fovea replay {captures[0]}"
    )
    return [Diagnosis(step, "not_finite", text)]


def rules_table() -> str:
    """All rules as a Markdown table, for docs/doctor.md."""
    lines = ["| rule | condition | reason | remedy |", "|---|---|---|---|"]
    lines += [
        f"| `{name}`{' (cause)' if rule.is_cause else ''} | {rule.sign} | {rule.reason} | {rule.way_out} |"
        for name, rule in RULES.items()
    ]
    return "\n".join(lines)


@safe_output()
def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: nothing found. 1: alarms. 2: no run folder."""
    parser = argparse.ArgumentParser(prog="fovea doctor", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a run folder")
    parser.add_argument("--rules", action="store_true", help="print the rules and their reasons, and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object per diagnosis")
    chosen = parser.parse_args(arguments)
    if chosen.rules:
        print(rules_table())
        return HEALTHY
    if chosen.run is None:
        parser.error("give a run folder")
    try:
        verdicts, rows = examine(chosen.run)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG
    for verdict in verdicts:
        row = {"step": verdict.step, "rule": verdict.rule, "verdict": verdict.text}
        print(json.dumps(row) if chosen.json else f"step {verdict.step}: {verdict.rule}: {verdict.text}")
    if not verdicts and not chosen.json:
        print(f"no alarm in {rows} rows of {chosen.run / 'metrics.jsonl'}")
    return ALARMED if verdicts else HEALTHY


if __name__ == "__main__":
    sys.exit(run_command("fovea doctor", main))
