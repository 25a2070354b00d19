"""The runner must be able to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.golden.case import discover
from tests.golden.conftest import OWN_CASES
from tests.golden.dispatch import MissingObjectiveError, run


def copy(name: str, folder: Path, *, tensors: Callable | None = None, facts: Callable | None = None) -> Path:
    """A case under a name that says nothing, changed."""
    values = load_file(OWN_CASES / f"{name}.safetensors")
    about = json.loads((OWN_CASES / f"{name}.json").read_text())
    about["case"] = "x7"
    if tensors:
        tensors(values)
    if facts:
        facts(about)
    save_file(values, folder / "x7.safetensors")
    path = folder / "x7.json"
    path.write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("name", ["mae_pretrain_eps", "mae_sincos", "dino_head", "schedules_dino"])
def test_a_case_is_recognized_by_what_it_is(name: str, tmp_path: Path):
    run(copy(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mae_pretrain_eps", "expect/loss"),
        ("mae_pretrain_eps", "grad/decoder_pred.bias"),
        ("dino_head", "grad/last_layer.weight_g"),
        ("dino_vit", "expect/rect/pos_encoding"),
        ("dino_step_sgd_freelast", "expect/final/teacher.head.mlp.0.weight"),
        ("dino_step_sgd_freelast", "expect/step2/center"),
        ("mocov3_step", "expect/step0/k2_rank0"),
        ("simmim_vit", "grad/encoder.mask_token"),
    ],
)
def test_one_wrong_number_fails(name: str, key: str, tmp_path: Path):
    def change(values: dict) -> None:
        values[key].view(-1)[0] += 1e-2

    with pytest.raises(AssertionError, match=f"1 problem.*\n.*{key}: off by"):
        run(copy(name, tmp_path, tensors=change))


@pytest.mark.parametrize("name", ["mae_pretrain_eps", "dino_vit", "dino_step_sgd_freelast", "schedules_dino"])
def test_a_tensor_that_nobody_compares_fails(name: str, tmp_path: Path):
    def change(values: dict) -> None:
        values["expect/something_new"] = values[next(key for key in values if key.startswith("expect/"))].clone()

    with pytest.raises(AssertionError, match="expect/something_new: never compared"):
        run(copy(name, tmp_path, tensors=change))


@pytest.mark.parametrize(("name", "section"), [("mae_pretrain_eps", "ctor"), ("dino_step_sgd_freelast", "hyper")])
def test_an_option_that_the_runner_does_not_know_fails(name: str, section: str, tmp_path: Path):
    def change(about: dict) -> None:
        about["config"][section]["new_option"] = 3

    with pytest.raises(AssertionError, match="new_option"):
        run(copy(name, tmp_path, facts=change))


def test_a_method_that_is_missing_is_a_failure_that_says_so(tmp_path: Path):
    def change(about: dict) -> None:
        about["source"] = {"repo": "someone/else", "code": ["model.py:Novel.forward"]}

    with pytest.raises(
        MissingObjectiveError, match=r"missing objective: someone/else model.py:Novel.forward \(case x7\)"
    ):
        run(copy("dino_head", tmp_path, facts=change))


def test_an_empty_folder_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no golden case"):
        discover(tmp_path)
