"""Every attention mechanism, by its debug configuration on samples/: killed at any moment, it ends bitwise the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain import release
from pretrain.models.mechanisms import ATTENTION, MECHANISMS
from tests.runs import ROOT, check_resume, finish, losses, short

DEBUG = ROOT / "configs" / "debug" / "attention"
KINDS = [name for name, entry in MECHANISMS.items() if name != ATTENTION and entry.slots]
STEPS = 6
SHORT = short(STEPS)


@pytest.mark.processes
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_bitwise_as_an_undisturbed_one(kind: str, tmp_path: Path):
    check_resume(DEBUG / f"{kind}.yaml", SHORT, tmp_path, steps=STEPS)


@pytest.mark.processes
def test_a_hard_choice_draws_the_same_noise_after_a_kill_and_is_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = yaml.safe_load((DEBUG / "general.yaml").read_text())
    config["model"]["attention"][0]["choice"] = "hard"
    config["model"]["activation_checkpointing"] = True
    (tmp_path / "hard.yaml").write_text(yaml.safe_dump(config))
    check_resume(tmp_path / "hard.yaml", SHORT, tmp_path, steps=STEPS)
    arguments = [str(tmp_path / "killed"), str(tmp_path / "release")]
    assert release.main([*arguments, "--prune", "0.02", "--prune-bound", "0"]) == 2, "a bound that nothing holds"
    assert not (tmp_path / "release").exists()
    assert release.main([*arguments, "--prune", "0.02", "--prune-images", "8"]) == 0
    said = capsys.readouterr()
    assert "more than 0; lower --prune" in said.err and "images): the tokens of an image change by at most" in said.out
    assert (tmp_path / "release" / "config.json").exists(), "in six steps no branch comes to be used"
    assert release.main([*arguments, "--prune-bound", "1"]) == 2


def test_each_has_a_debug_configuration_that_places_it_and_says_how_to_run_it():
    assert {path.stem for path in DEBUG.glob("*.yaml")} == set(KINDS)
    for kind in KINDS:
        text = (DEBUG / f"{kind}.yaml").read_text()
        assert kind in [entry["kind"] for entry in yaml.safe_load(text)["model"]["attention"]]
        assert f"fovea pretrain configs/debug/attention/{kind}.yaml" in text


# What could differ between ranks: state that is no weight, batch norms, random bases, a choice.
DIVIDED = {
    "ema_unit": "zero2",
    "hamburger": "ddp",
    "dynamic_conv": "zero1",
    "bam": "ddp",
    "external": "zero2",
    "se": "zero2",
}


@pytest.mark.processes
@pytest.mark.parametrize("kind", DIVIDED)
def test_two_ranks_have_the_losses_of_one(kind: str, tmp_path: Path):
    config, alone, divided = DEBUG / f"{kind}.yaml", tmp_path / "alone", tmp_path / "divided"
    status, said = finish(config, f"run_dir={alone}", *SHORT)
    assert status == 0, said
    zero = ["engine.name=deepspeed", f"engine.zero_stage={DIVIDED[kind][-1]}"]
    chosen = ["engine.name=accelerate"] if DIVIDED[kind] == "ddp" else zero
    status, said = finish(config, f"run_dir={divided}", *SHORT, *chosen, processes=2)
    assert status == 0, said
    assert losses(divided) == pytest.approx(losses(alone), abs=2e-5)
