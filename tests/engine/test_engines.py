"""Every engine trains as one process does, resumes bit by bit, and reads what any other engine or world size saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine import scenarios
from tests.engine.ranks import launch

pytestmark = pytest.mark.processes

CASES = [
    *[["toy", engine, "per_tensor"] for engine in ("ddp", "zero0", "zero1", "zero2")],
    *[["plain", engine, "per_tensor"] for engine in ("zero3", "zero1+offload", "zero2+offload", "zero3+offload")],
    *[["plain", engine, "sgd"] for engine in ("ddp", "zero2")],
    *[["plain", engine, "lars"] for engine in ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2+offload")],
    *[["toy", engine, "per_module"] for engine in ("ddp", "zero2")],
    *[["toy", engine, "sam"] for engine in ("ddp", "zero0")],
    *[["plain", engine, "nesterov"] for engine in ("ddp", "zero0", "zero1", "zero3")],
    *[["plain", engine, "adam"] for engine in ("ddp", "zero0", "zero1", "zero2", "zero3")],
    *[["plain", engine, "lion"] for engine in ("ddp", "zero0", "zero1", "zero2", "zero3", "zero2+offload")],
    *[["plain", engine, "lamb"] for engine in ("ddp", "zero0")],
    *[["mae", engine, "muon"] for engine in ("ddp", "zero0")],
    *[["plain", engine, "schedule_free"] for engine in ("ddp", "zero0", "zero1", "zero2", "zero2+offload")],
    *[["mae", engine, "global"] for engine in ("ddp", "zero0", "zero1", "zero2", "zero3")],
    *[["dino", engine, "per_tensor"] for engine in ("ddp", "zero0", "zero1", "zero2")],
    *[["sparse", engine, "global"] for engine in ("ddp", "zero2", "zero3")],
]
LOW_PRECISION = [
    *[["plain", engine, "global"] for engine in ("ddp+fp16", "zero1+fp16", "zero2+bf16", "zero3+fp16")],
    *[["plain", "ddp+fp16", optim] for optim in ("lamb", "schedule_free")],
]
TRAINED = {(model, optim) for model, _, optim in CASES + LOW_PRECISION}
RESUMED = [
    *[["toy", engine, "per_tensor"] for engine in ("ddp", "zero0", "zero1", "zero2")],
    ["plain", "zero3", "global"],
    ["plain", "zero2+offload", "global"],
    ["plain", "ddp", "sgd"],
    ["plain", "zero2", "sgd"],
    ["plain", "ddp", "lars"],
    ["plain", "zero2", "lars"],
    ["toy", "ddp", "sam"],
    ["plain", "ddp", "lion"],
    ["plain", "zero2", "lion"],
    ["plain", "ddp", "lamb"],
    ["mae", "ddp", "muon"],
    ["mae", "zero0", "muon"],
    ["plain", "ddp", "schedule_free"],
    ["plain", "zero2", "schedule_free"],
    ["mae", "zero2", "global"],
    ["dino", "ddp", "per_tensor"],
    ["dino", "zero2", "per_tensor"],
]


POISONED = ["ddp", "zero0", "zero1", "zero2", "zero3", "zero2+offload", "zero3+offload"]
CLOSED = ["ddp", "zero0", "zero1", "zero2", "zero2+offload"]  # of ZeRO-3 DeepSpeed keeps a part in a cache of its own
RESUMED_ALONE = [
    ["toy", "ddp", "per_tensor"],
    ["toy", "zero2", "per_tensor"],
    ["plain", "zero3", "global"],
    ["plain", "zero2", "schedule_free"],
]
ELSEWHERE = [
    ("toy", "ddp", "toy-zero2-per_tensor"),
    ("toy", "zero0", "toy-zero2-per_tensor"),
    ("toy", "zero1", "toy-zero2-per_tensor"),
    ("toy", "zero2", "toy-zero2-per_tensor"),
    ("toy", "zero2", "toy-ddp-per_tensor"),
    ("plain", "zero3", "plain-zero3-global"),
    ("plain", "zero2", "plain-zero3-global"),
    ("plain", "ddp", "plain-zero2-schedule_free"),
]


def _elsewhere(folder: Path) -> list[list[str]]:
    return [[model, engine, saved.rpartition("-")[2], str(folder / saved)] for model, engine, saved in ELSEWHERE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    """By rank: trained, resumed."""
    todo = [
        ["train", "trained", {"cases": CASES + LOW_PRECISION, "accumulation": 2}],
        ["resume", "resumed", {"cases": RESUMED}],
    ]
    ranks = launch(scenarios.several, world=2, out=folder / "two", scenarios=todo)
    return [dict(zip(("trained", "resumed"), found, strict=True)) for found in ranks]


@pytest.fixture(scope="module")
def one(folder: Path, two: Any) -> dict[str, Any]:
    """One process, the whole batch at once: what the others must equal; and going on with what two ranks saved."""
    reference = [[model, "ddp", optim] for model, optim in sorted(TRAINED)]
    todo = [
        ["train", "trained", {"cases": reference, "accumulation": 1}],
        ["resume", "resumed", {"cases": RESUMED_ALONE}],
        ["resume_from", "elsewhere", {"cases": _elsewhere(folder / "two" / "resumed")}],
        ["refusals", "refused", {}],
    ]
    found = launch(scenarios.several, world=1, out=folder / "one", scenarios=todo)[0]
    return dict(zip(("trained", "resumed", "elsewhere", "refused"), found, strict=True))


@pytest.fixture(scope="module")
def two_again(folder: Path, one: Any) -> list[dict[str, Any]]:
    """By rank: going on with what one process saved, a nan on one rank, requests to stop."""
    todo = [
        ["resume_from", "elsewhere", {"cases": _elsewhere(folder / "one" / "resumed")}],
        ["poisoned", "poisoned", {"engines": POISONED}],
        ["closed", "closed", {"engines": CLOSED}],
        ["asked_to_stop", "asked", {}],
        ["stopped_waiting", "waited", {"engines": list(scenarios.ENGINES)}],
        ["storage_trouble", "trouble", {}],
    ]
    ranks = launch(scenarios.several, world=2, out=folder / "two-again", scenarios=todo)
    names = ("elsewhere", "poisoned", "closed", "asked", "waited", "trouble")
    return [dict(zip(names, found, strict=True)) for found in ranks]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_and_two_micro_batches_train_as_one_process_with_the_whole_batch(case, folder, one, two):
    model, _, optim = case
    reference, name = f"{model}-ddp-{optim}", "-".join(case)
    expected, found = one["trained"][reference], two[0]["trained"][name]
    assert len(found["losses"]) == scenarios.STEPS
    loss, norm = (1e-4, 1e-3) if optim == "muon" else (1e-5, 1e-4)
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), atol=loss, rtol=0)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), atol=norm, rtol=norm)
    # Muon amplifies the smallest parts of a gradient, in bf16: their rounding shows in the weights, not in the loss.
    atol = 2e-2 if optim == "muon" else 1e-5
    weights = load_file(folder / "one/trained" / f"{reference}.safetensors")
    for key, value in load_file(folder / "two/trained" / f"{name}.safetensors").items():
        torch.testing.assert_close(value, weights[key], atol=atol, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_teacher_and_centre_are_the_same_bits_on_every_rank(case, two):
    name = "-".join(case)
    assert two[0]["trained"][name] == two[1]["trained"][name]


@pytest.mark.parametrize("case", LOW_PRECISION, ids="-".join)
def test_low_precision_follows_fp32(case, one, two):
    expected, found = (
        one["trained"][f"plain-ddp-{case[2]}"]["losses"],
        two[0]["trained"]["-".join(case)]["losses"],
    )
    assert found == pytest.approx(expected, abs=2e-2)
    assert found != pytest.approx(expected, abs=1e-6), "the precision took part"


def test_clipping_took_part_in_those_runs(one):
    for case, limit in (("toy-ddp-per_tensor", 0.3), ("mae-ddp-global", 0.3), ("dino-ddp-per_tensor", 1.0)):
        assert sum(norm > limit for norm in one["trained"][case]["norms"]) >= 3, case


@pytest.mark.parametrize("case", RESUMED, ids="-".join)
def test_a_resumed_run_ends_with_the_same_bits(case, two):
    for rank in two:
        found = rank["resumed"]["-".join(case)]
        assert found["different_files"] == []
        assert found["equal_losses"]


@pytest.mark.parametrize("case", RESUMED_ALONE, ids="-".join)
def test_a_resumed_run_alone_ends_with_the_same_bits(case, one):
    assert one["resumed"]["-".join(case)]["different_files"] == []
    assert one["resumed"]["-".join(case)]["equal_losses"]


@pytest.mark.parametrize(("model", "engine", "saved"), ELSEWHERE)
def test_what_two_ranks_saved_goes_on_in_one(model, engine, saved, folder, one, two):
    expected = two[0]["resumed"][saved]["losses"][7:]
    assert one["elsewhere"][f"{engine} {folder / 'two/resumed' / saved}"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("model", "engine", "saved"), ELSEWHERE)
def test_what_one_process_saved_goes_on_in_two(model, engine, saved, folder, one, two_again):
    expected = one["resumed"][saved]["losses"][7:]
    found = two_again[0]["elsewhere"][f"{engine} {folder / 'one/resumed' / saved}"]
    assert found == pytest.approx(expected, abs=1e-5)


def test_zero_3_refuses_a_teacher_by_name(one):
    assert "DINO keeps an averaged teacher" in one["refused"]["dino"]
    assert "use zero_stage 2" in one["refused"]["toy"]


@pytest.mark.parametrize("engine", POISONED)
def test_a_nan_on_one_rank_skips_the_step_on_all_and_changes_nothing(engine, two_again):
    for rank in two_again:
        found = rank["poisoned"][engine]
        assert found["skipped"]
        assert found["kept"], "weights, teacher, centre, optimizer state"
        assert found["bad_ranks"] == [1]
        assert found["bad_positions"] == [36, 37]  # the micro-batch with the nan


@pytest.mark.parametrize("engine", POISONED)
def test_training_goes_on_after_a_skipped_step(engine, two_again):
    for rank in two_again:
        found = rank["poisoned"][engine]
        assert [skipped for skipped, _, _ in found["later"]] == [False, False, False]
        assert found["moved"]
    later = [[numbers for _, *numbers in rank["poisoned"][engine]["later"]] for rank in two_again]
    assert later[0] == later[1]
    reference = two_again[0]["poisoned"]["ddp"]["later"]
    if not engine.startswith("zero3"):  # trains another model
        torch.testing.assert_close(
            torch.tensor(later[0]), torch.tensor([row[1:] for row in reference]), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("engine", POISONED)
def test_three_skipped_steps_in_a_row_stop_the_run_and_name_the_samples(engine, two_again):
    for rank in two_again:
        step, message = rank["poisoned"][engine]["stopped"]
        assert step == 11
        assert "ranks [0, 1]" in message
        assert "positions [80," in message


@pytest.mark.parametrize("engine", POISONED)
def test_a_gradient_that_is_not_finite_skips_the_step(engine, two_again):
    for rank in two_again:
        assert rank["poisoned"][engine]["gradient"] == [False, False, True, False, False]


def test_a_signal_to_one_rank_makes_all_save_the_same_step(two_again):
    assert two_again[0]["asked"]["signal"] == [4, 4, ""]
    assert two_again[1]["asked"]["signal"] == [4, 4, "SIGTERM"]


def test_files_ask_for_a_save_and_for_a_stop_and_are_taken_away(two_again):
    for rank in two_again:
        saved, reached, files = rank["asked"]["files"]
        assert saved == [6, 10]
        assert reached == 10
        assert not {"save", "stop"} & set(files)


@pytest.mark.parametrize("engine", scenarios.ENGINES)
def test_when_one_rank_stops_waiting_for_data_all_save_the_step_before(engine, two_again):
    assert [rank["waited"][engine] for rank in two_again] == [[[0, 2], True]] * 2


def test_when_one_rank_stops_waiting_in_a_pass_over_data_all_leave_it(two_again):
    assert [rank["waited"].get("pass") for rank in two_again] == [[0, 1, 2, 3], [0, 1]]


def test_all_ranks_take_the_same_older_checkpoint_when_one_rank_s_file_is_damaged(two_again):
    for rank in two_again:
        assert rank["trouble"]["step"] == 2
        [note] = rank["trouble"]["skipped"]
        assert note.startswith("00000004: optim-rank00001.safetensors has changed since it was written: sha256 ")


def test_when_one_rank_cannot_write_all_say_so_and_nothing_is_left_behind(two_again):
    for rank in two_again:
        assert "rank 1: [Errno 27] File too large" in rank["trouble"]["message"]
        assert rank["trouble"]["folders"] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("engine", CLOSED)
def test_a_closed_engine_lets_go_of_the_model_and_the_optimizer(engine, two_again):
    assert [rank["closed"][engine] for rank in two_again] == [[], []]
