"""Each rule speaks of its sign and of nothing else, once, and in words that say what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.doctor.diagnosis import CALM_ROWS, CAUSE_STEPS, Diagnosis, Doctor
from pretrain.doctor.history import Facts
from pretrain.doctor.rules import RULES

K = 65536
FACTS = Facts(
    total_steps=1000, warmup_steps=10, peak_lr=1e-3, prototypes=K, centred=True, rows=64, embed_dim=400
)  # fmt: skip
LOG_K = math.log(K)
Row = dict[str, float]


def routed(*, p: float, entropy: float, use: float = 0.1) -> Row:
    """Measures of the routers of two blocks."""
    of_block = {"p/xca": p, "p/none": 1 - p, "winner": max(p, 1 - p), "entropy": entropy, "use/xca": use}
    return {f"doctor/router/blocks.{i}.attn/{name}": value for i in range(2) for name, value in of_block.items()}


def healthy(step: int) -> Row:
    """A run as it should be, of every kind at once; measured in every row."""
    wobble = math.sin(step * 1.7)
    return {
        "loss": 9.0 * math.exp(-step / 800) + 0.2 * wobble,
        "grad_norm": 2.0 + wobble,
        "lr": 1e-3 * min(1.0, step / 10),
        "teacher_entropy": 6.0 + 0.3 * wobble,
        "teacher_kl_uniform": 1.5 + 0.2 * wobble,
        "feature_std": 0.03 + 0.002 * wobble,
        "student_teacher_cosine": 0.9,
        "center_norm": 3.0 + 0.1 * wobble,
        "target_std": 0.4,
        "pred_std": 0.5,
        "codebook_perplexity": 60 + wobble,
        "doctor/weight_change": 1e-3,
        "doctor/weight_change_max": 4e-3,
        "doctor/average_change_max": 1e-4,
        "doctor/average_distance": 0.02,
        "doctor/rankme": 30 + wobble,
        "doctor/attention_entropy": 0.8,
        "doctor/grad/blocks.0": 0.5,
        "doctor/grad/blocks.1": 0.4,
        **routed(p=0.7, entropy=0.8),
    }


def told(rows: Iterable[tuple[int, Row]], facts: Facts = FACTS) -> list[Diagnosis]:
    doctor = Doctor(facts)
    return [verdict for step, row in rows for verdict in doctor.observe(step, row)]


def from_step(begin: int, end: int, sick: Mapping[str, Any]) -> list[tuple[int, Row]]:
    """Healthy until `begin`, then with the values of `sick`: numbers, or functions of the step."""
    rows = []
    for step in range(1, end + 1):
        changed = {name: value(step) if callable(value) else value for name, value in sick.items()}
        rows.append((step, healthy(step) | (changed if step >= begin else {})))
    return rows


SICK: dict[str, tuple[Mapping[str, Any], str]] = {
    "learning_rate_too_high": ({"doctor/weight_change": 0.4}, "by 40% of their norm"),
    "loss_diverged": ({"loss": lambda step: 9.0 * 1.3 ** (step - 30)}, "at most 9.1"),
    "gradient_exploded": ({"grad_norm": 5000.0}, "it is 5e+03"),
    "weights_still": ({"doctor/weight_change": 0.0, "doctor/weight_change_max": 0.0}, "0.0e+00 of its norm"),
    "teacher_one_prototype": ({"teacher_entropy": 0.1, "teacher_kl_uniform": LOG_K - 0.2}, "covers 1.2 of 65536"),
    "teacher_uniform": ({"teacher_entropy": LOG_K - 1e-4, "teacher_kl_uniform": 0.0}, "loss = ln 65536 = 11.0904"),
    "teacher_uninformative": ({"teacher_entropy": 7.0, "teacher_kl_uniform": LOG_K - 7.001}, "contains 0.0010 nats"),
    "teacher_one_hot": ({"teacher_entropy": 0.01}, "entropy of an assignment 0.010 nats"),
    "center_still": ({"center_norm": 0.0}, "its norm has been 0 since step 30"),
    "teacher_still": ({"doctor/average_change_max": 0.0}, "since step 30"),
    "teacher_identical": ({"doctor/average_distance": 0.0}, "their distance is 0.0e+00 of their norm"),
    "features_constant": ({"feature_std": 1e-5}, "two images have cosine 1.00000"),
    "few_dimensions": ({"doctor/rankme": 4.0}, "RankMe 4.0, maximum 31.0"),
    "targets_constant": ({"target_std": 1e-4}, "1.0e-04"),
    "reconstruction_constant": ({"pred_std": 1e-3}, "1.0e-03"),
    "codebook_collapsed": ({"codebook_perplexity": 1.0}, "perplexity 1.00"),
    "attention_uniform": ({"doctor/attention_entropy": 0.9999}, "was 0.80"),
    "attention_one_token": ({"doctor/attention_entropy": 0.001}, "entropy 0.0010"),
    "dead_gradients": ({"doctor/grad/blocks.1": 0.0}, "blocks.1, where the largest block has 0.5"),
}


def test_a_healthy_run_of_every_kind_is_left_in_peace():
    assert told(from_step(2000, 900, {})) == []


@pytest.mark.parametrize("rule", SICK)
def test_a_sign_is_named_within_25_steps_with_its_numbers_and_the_way_out(rule: str):
    sick, numbers = SICK[rule]
    found = told(from_step(30, 80, sick))
    assert [verdict.rule for verdict in found] == [rule], found
    assert 30 <= found[0].step <= 55
    assert found[0].text.startswith(RULES[rule].title) and found[0].text.endswith(RULES[rule].way_out)
    assert numbers in found[0].text


def test_a_loss_that_stays_where_it_began_is_named_after_500_steps_of_full_rate():
    sick = {"loss": lambda step: 9.0 + 0.02 * math.sin(step)}
    found = told(from_step(1, 900, sick))
    assert [verdict.rule for verdict in found] == ["loss_flat"] and 500 < found[0].step < 520


LATE: dict[str, tuple[Row, str]] = {
    "router_idle": (routed(p=0.5, entropy=0.9999), "0.99990 of log K"),
    "branches_unused": (routed(p=0.5, entropy=0.9999, use=2e-5), "mean p |g| of 2.0e-05"),
}


@pytest.mark.parametrize("rule", LATE)
def test_a_block_that_does_not_choose_is_named_200_steps_after_the_warm_up(rule: str):
    sick, numbers = LATE[rule]
    found = told(from_step(1, 300, sick))
    assert [verdict.rule for verdict in found] == [rule] and found[0].step == FACTS.warmup_steps + 200
    assert numbers in found[0].text
    assert told(from_step(1, 300, sick | {"doctor/router/blocks.1.attn/use/lka": 0.2, **_of_one_block()})) == []


def _of_one_block() -> Row:
    """One block that chooses is enough."""
    return {"doctor/router/blocks.1.attn/entropy": 0.7}


def test_a_router_that_chose_before_it_was_trained_is_dead_and_one_that_chose_in_training_is_not():
    dead = routed(p=0.999, entropy=0.01)
    found = told(from_step(1, 50, dead))
    assert [(verdict.rule, verdict.step) for verdict in found] == [("router_dead", 2)]
    assert "gives 0.9990 to one branch" in found[0].text
    assert told(from_step(30, 80, dead)) == []
    one_block = {"doctor/router/blocks.0.attn/winner": 0.999}
    assert told(from_step(1, 50, one_block)) == []


def test_every_rule_is_tested():
    assert set(SICK) | set(LATE) | {"loss_flat", "router_dead"} == set(RULES)


@pytest.mark.parametrize("rule", SICK)
def test_one_odd_batch_is_no_sign(rule: str):
    """Except where one measurement is proof: nothing healthy replaces its weights, or equals its average exactly."""
    rows = [(s, healthy(s) | (row if s == 30 else {})) for s, row in from_step(30, 80, SICK[rule][0])]
    found = told(rows)
    assert bool(found) == (rule in ("learning_rate_too_high", "teacher_identical"))


def test_a_verdict_is_given_once_while_it_lasts_and_again_when_it_returns():
    ill = [step for step in range(1, 120) if 30 <= step < 60 or step >= 60 + CALM_ROWS + 5]
    rows = [(s, healthy(s) | ({"teacher_entropy": 0.01} if s in ill else {})) for s in range(1, 120)]
    assert [verdict.rule for verdict in told(rows)] == ["teacher_one_hot"] * 2


def test_a_sign_that_is_away_for_a_row_or_two_is_not_said_again():
    sick = {"doctor/weight_change": lambda step: 0.01 if step % 20 < CALM_ROWS - 1 else 0.3}
    assert [verdict.rule for verdict in told(from_step(65, 200, sick))] == ["learning_rate_too_high"]


def test_a_run_that_resumes_is_told_once_more_what_stands_and_not_what_is_over():
    doctor = Doctor(FACTS)
    for step in range(1, 60):
        cold = {"teacher_entropy": 0.01} if step >= 30 else {}
        doctor.observe(step, healthy(step) | cold | ({"center_norm": 0.0} if step < 40 else {}))
    assert doctor.standing == {"teacher_one_hot"}
    doctor.say_again()
    found = [v for step in range(60, 80) for v in doctor.observe(step, healthy(step) | {"teacher_entropy": 0.01})]
    assert [(verdict.rule, verdict.step) for verdict in found] == [("teacher_one_hot", 60)]


def test_what_is_not_said_beside_its_cause_stands_all_the_same():
    doctor = Doctor(FACTS)
    for step in range(1, 60):
        ill = {"feature_std": 1e-5} if step >= 30 else {}
        doctor.observe(step, healthy(step) | ill | ({"doctor/weight_change": 0.5} if step == 25 else {}))
    assert doctor.standing == {"features_constant"}
    for step in range(60, 64):
        doctor.observe(step, healthy(step))
    assert not doctor.standing


def test_what_follows_from_a_cause_is_not_said_beside_it_and_is_said_if_it_outlives_the_cause():
    leap = {"doctor/weight_change": 0.5}
    constant = {"feature_std": 1e-5}
    rows = [
        (s, healthy(s) | (constant if s >= 30 else {}) | (leap if 20 <= s < 40 else {})) for s in range(1, 300)
    ]  # fmt: skip
    found = told(rows)
    assert [verdict.rule for verdict in found] == ["learning_rate_too_high", "features_constant"]
    assert found[1].step == 39 + CAUSE_STEPS + 1


@pytest.mark.parametrize("rule", ["teacher_identical", "teacher_still"])
def test_a_teacher_is_judged_by_the_last_known_move_of_the_student(rule: str):
    """Weights and averages may be measured in different steps."""
    rows = []
    for step, row in from_step(30, 80, SICK[rule][0]):
        left_out = "doctor/average_" if step % 2 else "doctor/weight_"
        rows.append((step, {name: value for name, value in row.items() if not name.startswith(left_out)}))
    assert [verdict.rule for verdict in told(rows)] == [rule]


def test_signs_in_a_sparse_log_are_seen_too():
    rows = [(step, row) for step, row in from_step(200, 400, {"teacher_entropy": 0.01}) if step % 10 == 0]
    assert [(v.rule, v.step) for v in told(rows)] == [("teacher_one_hot", 210)]


@pytest.mark.parametrize("rule", ["features_constant", "codebook_collapsed", "targets_constant"])
def test_what_never_grew_is_named_200_steps_after_the_warm_up(rule: str):
    found = told(from_step(1, 300, SICK[rule][0]))
    assert [verdict.rule for verdict in found] == [rule] and found[0].step == FACTS.warmup_steps + 201


def test_a_rise_to_ln_k_is_no_divergence():
    """A student starts below ln K when an untrained teacher assigns all images alike; centring takes that away."""
    loss = {"loss": lambda step: min(LOG_K, 4.7 + 0.1 * step)}
    assert told(from_step(1, 300, loss)) == []


@pytest.mark.parametrize(
    ("facts", "sick"),
    [
        (Facts(1000, 10, 1e-3, K, centred=False, rows=64, embed_dim=400), {"center_norm": 0.0}),
        (Facts(1000, 10, 1e-3, K, True, rows=2, embed_dim=400), {"teacher_kl_uniform": LOG_K, "feature_std": 0.0}),
        (Facts(1000, 900, 1.0, K, True, rows=64, embed_dim=400), SICK["weights_still"][0]),
        (FACTS, {"feature_std": 1e-6, "teacher_entropy": LOG_K, "teacher_kl_uniform": 0.0, "doctor/rankme": 1.0}),
        (FACTS, {"codebook_perplexity": 1.2, "target_std": 1e-3, "pred_std": 0.0}),
        (Facts(100, 10, 1e-3, K, True, 64, 400), {"doctor/average_change_max": lambda s: 0.0 if s > 89 else 1e-4}),
    ],
    ids=[
        "Sinkhorn has no centre",
        "rows too few",
        "a rate below 1 % of its peak",
        "LayerScale of 1e-5 before it grew",
        "a decoder and a codebook before they grew",
        "the end of a momentum schedule",
    ],
)
def test_a_number_that_means_nothing_here_is_no_sign(facts: Facts, sick: Mapping[str, Any]):
    assert told(from_step(1, 100, sick), facts) == []


def test_a_rule_can_be_turned_off():
    doctor = Doctor(FACTS, off=["teacher_one_hot"])
    assert not [v for step, row in from_step(30, 80, SICK["teacher_one_hot"][0]) for v in doctor.observe(step, row)]


@given(st.lists(st.dictionaries(st.sampled_from(sorted(healthy(1))), st.floats(), max_size=20), max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_numbers_whatever_break_the_doctor(rows: list[Row]):
    doctor = Doctor(FACTS)
    for step, row in enumerate(rows, 1):
        for verdict in doctor.observe(step, row):
            assert verdict.rule in RULES and "nan" not in verdict.text
