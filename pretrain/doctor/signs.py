"""Signs of the doctor's rules: functions of a run's history that return a text with the numbers, or None.

A sign must be present in every row of an interval of steps, so that one unusual batch does not count. The
meaning of each number is given with its rule in `rules.py`. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import takewhile

from pretrain.doctor.history import FIRST, Facts, History

GRADIENT = "doctor/grad/"  # prefix; the name of the block follows
ROUTER = "doctor/router/"  # prefix; the name of the block and what is measured follow
UNUSED = 1e-4  # mean of p |g|: below it a branch adds nothing
ONE_HOT = 0.05  # nats: an assignment with lower entropy counts as one-hot
SPREAD = 0.02  # spread of features below which all images have the same features


def held(history: History, name: str, sign: Callable[[float], bool], *, steps: int, rows: int = 2) -> int | None:
    """First step of the latest consecutive rows in which `name` shows the sign, if they span at least `steps` steps."""
    last = first = None
    count = 0
    for step, value in history.back(name):
        if not sign(value):
            break
        last, first, count = step if last is None else last, step, count + 1
    if first is None or last is None or count < rows or last - first + 1 < steps:
        return None
    return first


def sank(history: History, facts: Facts, name: str, *, below: float, was: float, steps: int) -> bool:
    """Has `name` been below `below` for `steps` steps, after it was at least `was`, or without ever rising?

    Some healthy networks start low: with LayerScale factors of 1e-5, the features of all images are almost equal. So a
    value that never rose counts only from 200 steps after the warm-up on.
    """
    if held(history, name, lambda value: value < below, steps=steps) is None:
        return False
    return history.most[name] >= was or history.step > facts.warmup_steps + 200


def weights_leap(h: History, f: Facts) -> str | None:
    change = h.now["doctor/weight_change"]
    if change < 0.15:
        return None
    return f"each step changes the weights by {change:.0%} of their norm (healthy: below 5%)"


def loss_diverged(h: History, f: Facts) -> str | None:
    known, now = h.first["loss"], h.middle("loss", 5)
    if len(known) < FIRST or not (max(known) > 0 and now > 3 * max(known)):
        return None
    return f"it is {now:.3g}, and was at most {max(known):.3g} in the first {FIRST} rows"


def gradient_exploded(h: History, f: Facts) -> str | None:
    known, now = h.first["grad_norm"], h.middle("grad_norm", 5)
    if len(known) < FIRST or not now > 100 * max(known):
        return None
    return f"it is {now:.3g}, and was at most {max(known):.3g} in the first {FIRST} rows"


def weights_still(h: History, f: Facts) -> str | None:
    if not h.middle("lr", 1) >= 0.01 * f.peak_lr or not held(
        h, "doctor/weight_change_max", lambda change: change < 1e-6, steps=1
    ):
        return None
    return f"the fastest weight matrix changes by {h.now['doctor/weight_change_max']:.1e} of its norm per step"


def loss_flat(h: History, f: Facts) -> str | None:
    known, now = h.first["loss"], h.middle("loss", 50)
    if len(known) < FIRST or h.step < f.warmup_steps + 500 or math.isnan(now):
        return None
    start = sum(known) / len(known)
    if abs(now - start) > 0.005 * abs(start) or not h.middle("lr", 1) > 0:
        return None
    return f"it is {now:.4g} after {h.step} steps, and {start:.4g} in the first {FIRST} rows"


def _assigns(f: Facts) -> bool:
    """Does the teacher assign to prototypes, with enough rows for a meaningful mean assignment?"""
    return f.prototypes is not None and f.prototypes > 2 and f.rows >= 16


def one_prototype(h: History, f: Facts) -> str | None:
    if not _assigns(f):
        return None
    log_k = math.log(f.prototypes or 1)
    if held(h, "teacher_kl_uniform", lambda kl: log_k - kl < math.log(2), steps=5) is None:
        return None
    if h.most.get("teacher_entropy", log_k) < ONE_HOT:
        return None  # one-hot from the start: caused by the temperature, reported by one_hot
    share = math.exp(log_k - h.middle("teacher_kl_uniform", 1))
    return f"the mean assignment of a batch covers {share:.1f} of {f.prototypes}"


def _is_one_prototype(h: History, f: Facts) -> bool:
    return _assigns(f) and math.log(f.prototypes or 1) - h.middle("teacher_kl_uniform", 1) < math.log(2)


def uniform(h: History, f: Facts) -> str | None:
    if f.prototypes is None or f.prototypes <= 2:
        return None
    log_k = math.log(f.prototypes)
    if held(h, "teacher_entropy", lambda entropy: log_k - entropy < 0.01, steps=20) is None:
        return None
    if h.least.get("feature_std", 1.0) * math.sqrt(f.embed_dim) < SPREAD and h.step <= f.warmup_steps + 200:
        return None  # features were equal at the start and may still be in the teacher: not caused by the temperature
    return f"loss = ln {f.prototypes} = {log_k:.4f}, entropy of an assignment {h.middle('teacher_entropy', 1):.4f}"


def uninformative(h: History, f: Facts) -> str | None:
    if not _assigns(f):
        return None
    log_k = math.log(f.prototypes or 1)
    told = {step: log_k - kl for step, kl in h.back("teacher_kl_uniform")}
    entropies = dict(h.back("teacher_entropy"))
    both = sorted(told.keys() & entropies.keys(), reverse=True)
    stretch = list(takewhile(lambda step: told[step] - entropies[step] < 0.01, both))
    if len(stretch) < 2 or stretch[0] - stretch[-1] + 1 < 20 or log_k - entropies[stretch[0]] < 0.01:
        return None
    if _is_one_prototype(h, f):
        return None
    if len(stretch) == len(both) and h.step <= f.warmup_steps + 200:
        return None
    information = max(0.0, told[stretch[0]] - entropies[stretch[0]])
    return (
        f"an assignment contains {information:.4f} nats about its image, its entropy is {entropies[stretch[0]]:.2f} of "
        f"at most {log_k:.2f}"
    )


def one_hot(h: History, f: Facts) -> str | None:
    if held(h, "teacher_entropy", lambda entropy: entropy < ONE_HOT, steps=10) is None:
        return None
    if h.most["teacher_entropy"] >= ONE_HOT and _is_one_prototype(h, f):
        return None  # caused by collapse, which is reported
    return f"entropy of an assignment {max(0.0, h.middle('teacher_entropy', 1)):.3f} nats"


def center_still(h: History, f: Facts) -> str | None:
    if not f.centred:
        return None
    now = h.now["center_norm"]
    since = held(h, "center_norm", lambda norm: norm == now, steps=20, rows=5)
    return None if since is None else f"its norm has been {now:.4g} since step {since}"


def teacher_still(h: History, f: Facts) -> str | None:
    since = held(h, "doctor/average_change_max", lambda change: change == 0, steps=1)
    if not f.still_steps < h.step <= 0.9 * f.total_steps or not _moving(h) or since is None:
        return None
    return f"none of its sampled weights changed since step {since}, those of the student did"


def teacher_identical(h: History, f: Facts) -> str | None:
    if not _moving(h) or h.now["doctor/average_distance"] > 1e-6:
        return None
    return f"their distance is {h.now['doctor/average_distance']:.1e} of their norm"


def _moving(h: History) -> bool:
    return h.middle("doctor/weight_change", 1) > 1e-5  # may be measured in different steps


def _spread(h: History, f: Facts) -> float:
    """Spread of features over images: 1 for random directions, 0 for identical features."""
    return h.middle("feature_std", 1) * math.sqrt(f.embed_dim)


def features_constant(h: History, f: Facts) -> str | None:
    scale = math.sqrt(f.embed_dim)
    if f.rows < 8 or not sank(h, f, "feature_std", below=SPREAD / scale, was=2 * SPREAD / scale, steps=10):
        return None
    spread = _spread(h, f)
    return f"spread {spread:.4f} (random directions: 1): two images have cosine {1 - spread * spread:.5f}"


def few_dimensions(h: History, f: Facts) -> str | None:
    best = h.most["doctor/rankme"]
    if not sank(h, f, "doctor/rankme", below=max(1.2, 0.25 * best), was=2.0, steps=1):
        return None
    return f"RankMe {h.now['doctor/rankme']:.1f}, maximum {best:.1f}"


def targets_constant(h: History, f: Facts) -> str | None:
    if not sank(h, f, "target_std", below=0.01, was=0.05, steps=10):
        return None
    return f"their standard deviation over images and patches is {h.now['target_std']:.1e}"


def reconstruction_constant(h: History, f: Facts) -> str | None:
    if not sank(h, f, "pred_std", below=0.02, was=0.05, steps=20):
        return None
    return f"standard deviation of the predicted values {h.now['pred_std']:.1e}, of the targets about 1"


def codebook(h: History, f: Facts) -> str | None:
    if not sank(h, f, "codebook_perplexity", below=1.5, was=3.0, steps=20):
        return None
    return f"perplexity {h.now['codebook_perplexity']:.2f}"


def attention_uniform(h: History, f: Facts) -> str | None:
    best = h.least["doctor/attention_entropy"]
    if best > 0.9 or held(h, "doctor/attention_entropy", lambda entropy: entropy > 0.999, steps=1) is None:
        return None
    return f"entropy {h.now['doctor/attention_entropy']:.4f} of its maximum, and was {best:.2f}"


def attention_one(h: History, f: Facts) -> str | None:
    if held(h, "doctor/attention_entropy", lambda entropy: entropy < 0.02, steps=1) is None:
        return None
    return f"entropy {h.now['doctor/attention_entropy']:.4f} of its maximum"


def router_dead(h: History, f: Facts) -> str | None:
    names = _of_routers(h, "winner")
    if not names or any(held(h, name, lambda p: p > 0.99, steps=1) is None for name in names):
        return None
    if any(h.first[name][0] <= 0.99 for name in names):
        return None  # chosen in training
    return f"the least decided block gives {min(h.now[name] for name in names):.4f} to one branch"


def router_idle(h: History, f: Facts) -> str | None:
    names = _of_routers(h, "entropy")
    if not names or h.step < f.warmup_steps + 200 or _most_used(h) < UNUSED:
        return None
    if any(held(h, name, lambda entropy: entropy > 0.999, steps=1) is None for name in names):
        return None
    return f"its entropy is {min(h.now[name] for name in names):.5f} of log K or more in every block"


def branches_unused(h: History, f: Facts) -> str | None:
    names = _of_routers(h, "use/")
    if not names or h.step < f.warmup_steps + 200:
        return None
    if any(held(h, name, lambda use: use < UNUSED, steps=1) is None for name in names):
        return None
    return f"the most used has a mean p |g| of {_most_used(h):.1e}"


def _of_routers(h: History, what: str) -> list[str]:
    return [name for name in h.now if name.startswith(ROUTER) and f"/{what}" in name]


def _most_used(h: History) -> float:
    return max((h.now[name] for name in _of_routers(h, "use/")), default=0.0)


def dead_blocks(h: History, f: Facts) -> str | None:
    norms = {name.removeprefix(GRADIENT): value for name, value in h.now.items() if name.startswith(GRADIENT)}
    largest = max(norms.values(), default=0.0)
    dead = [
        block
        for block, norm in norms.items()
        if norm <= 1e-7 * largest and held(h, GRADIENT + block, lambda n: n <= 1e-7 * largest, steps=1) is not None
    ]
    if not dead:
        return None
    return f"{', '.join(dead[:6])}{', ...' if len(dead) > 6 else ''}, where the largest block has {largest:.2g}"
