"""Why a run is not learning: each rule is a sign, a reason why it is one, and a way out. Pure functions; no torch here.

A sign must hold in every row of a stretch of steps, so that one odd batch is none. Thresholds come from what the number
means, not from runs; docs/doctor.md lists them with their reasons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pretrain.probes.history import FIRST, Facts, History

GRADIENT = "doctor/grad/"  # then the block


@dataclass(frozen=True)
class Rule:
    """One way to fail.

    Attributes:
        title: what is wrong, in few words.
        sign: when it is said. reason: why that sign means this. way_out: what to change.
        reads: asked only in steps that have one of these values; a name that ends in "/" stands for all below it.
        check: the numbers of the sign, in words, or None where it is not given.
        is_cause: the other signs follow from this one and are not said beside it.
    """

    title: str
    sign: str
    reason: str
    way_out: str
    reads: tuple[str, ...]
    check: Callable[[History, Facts], str | None]
    is_cause: bool = False

    def asked(self, values: Mapping[str, float]) -> bool:
        return any(
            any(name.startswith(read) for name in values) if read.endswith("/") else read in values
            for read in self.reads
        )


def held(history: History, name: str, sign: Callable[[float], bool], *, steps: int, rows: int = 2) -> int | None:
    """First step of the unbroken stretch of rows whose `name` shows the sign, if it spans `steps` steps up to now."""
    last = first = None
    count = 0
    for step, value in history.back(name):
        if not sign(value):
            break
        last, first, count = step if last is None else last, step, count + 1
    if first is None or last is None or count < rows or last - first + 1 < steps:
        return None
    return first


def _weights_leap(h: History, f: Facts) -> str | None:
    change = h.now["doctor/weight_change"]
    if change < 0.15:
        return None
    return f"each step moves the weights by {change:.0%} of their own length (healthy: below 5%)"


def _loss_diverged(h: History, f: Facts) -> str | None:
    known, now = h.first["loss"], h.middle("loss", 5)
    if len(known) < FIRST or not (max(known) > 0 and now > 3 * max(known)):
        return None
    return f"it is {now:.3g}, and was at most {max(known):.3g} in the first {FIRST} rows"


def _gradient_exploded(h: History, f: Facts) -> str | None:
    known, now = h.first["grad_norm"], h.middle("grad_norm", 5)
    if len(known) < FIRST or not now > 100 * max(known):
        return None
    return f"it is {now:.3g}, and was at most {max(known):.3g} in the first {FIRST} rows"


def _weights_still(h: History, f: Facts) -> str | None:
    if not h.middle("lr", 1) >= 0.01 * f.peak_lr or not held(
        h, "doctor/weight_change_max", lambda change: change < 1e-6, steps=1
    ):
        return None
    return f"the fastest weight matrix moves by {h.now['doctor/weight_change_max']:.1e} of its length a step"


def _loss_flat(h: History, f: Facts) -> str | None:
    known, now = h.first["loss"], h.middle("loss", 50)
    if len(known) < FIRST or h.step < f.warmup_steps + 500 or math.isnan(now):
        return None
    start = sum(known) / len(known)
    if abs(now - start) > 0.005 * abs(start) or not h.middle("lr", 1) > 0:
        return None
    return f"it is {now:.4g} after {h.step} steps and was {start:.4g} in the first {FIRST} rows"


def _assigns(f: Facts) -> bool:
    """Does the teacher assign to prototypes, and are there rows enough for a mean assignment to say something?"""
    return f.prototypes is not None and f.prototypes > 2 and f.rows >= 16


def _one_prototype(h: History, f: Facts) -> str | None:
    if not _assigns(f):
        return None
    log_k = math.log(f.prototypes or 1)
    if held(h, "teacher_kl_uniform", lambda kl: log_k - kl < math.log(2), steps=5) is None:
        return None
    share = math.exp(log_k - h.middle("teacher_kl_uniform", 1))
    return f"the mean assignment of a batch covers {share:.1f} of {f.prototypes}"


def _uniform(h: History, f: Facts) -> str | None:
    if f.prototypes is None or f.prototypes <= 2:
        return None
    log_k = math.log(f.prototypes)
    if held(h, "teacher_entropy", lambda entropy: log_k - entropy < 0.01, steps=20) is None:
        return None
    return f"loss = ln {f.prototypes} = {log_k:.4f}, entropy of an assignment {h.middle('teacher_entropy', 1):.4f}"


def _uninformative(h: History, f: Facts) -> str | None:
    if not _assigns(f):
        return None
    log_k = math.log(f.prototypes or 1)
    told = {step: log_k - kl for step, kl in h.back("teacher_kl_uniform")}
    entropies = dict(h.back("teacher_entropy"))
    stretch = []
    for step in sorted(told.keys() & entropies.keys(), reverse=True):
        if told[step] - entropies[step] >= 0.01:
            break
        stretch.append(step)
    if len(stretch) < 2 or stretch[0] - stretch[-1] + 1 < 20 or log_k - entropies[stretch[0]] < 0.01:
        return None
    return (
        f"an assignment tells {max(0.0, told[stretch[0]] - entropies[stretch[0]]):.4f} nats about its image, "
        f"its entropy is {entropies[stretch[0]]:.2f} of at most {log_k:.2f}"
    )


def _one_hot(h: History, f: Facts) -> str | None:
    if held(h, "teacher_entropy", lambda entropy: entropy < 0.05, steps=10) is None:
        return None
    return f"entropy of an assignment {max(0.0, h.middle('teacher_entropy', 1)):.3f} nats"


def _center_still(h: History, f: Facts) -> str | None:
    if not f.centred:
        return None
    now = h.now["center_norm"]
    since = held(h, "center_norm", lambda norm: norm == now, steps=20, rows=5)
    return None if since is None else f"its length is {now:.4g} since step {since}"


def _teacher_still(h: History, f: Facts) -> str | None:
    since = held(h, "doctor/average_change_max", lambda change: change == 0, steps=1)
    if h.step > 0.9 * f.total_steps or not _moving(h) or since is None:
        return None
    return f"no sampled weight of it changed since step {since}, those of the student did"


def _teacher_identical(h: History, f: Facts) -> str | None:
    if not _moving(h) or h.now["doctor/average_distance"] > 1e-6:
        return None
    return f"they are {h.now['doctor/average_distance']:.1e} of their length apart"


def _moving(h: History) -> bool:
    return h.now.get("doctor/weight_change", 0.0) > 1e-5


def _features_constant(h: History, f: Facts) -> str | None:
    scale = math.sqrt(f.embed_dim)
    if f.rows < 8 or held(h, "feature_std", lambda std: std * scale < 0.02, steps=10) is None:
        return None
    spread = h.middle("feature_std", 1) * scale
    return f"spread {spread:.4f} where random directions have 1: two images have cosine {1 - spread * spread:.5f}"


def _few_dimensions(h: History, f: Facts) -> str | None:
    rank, best = h.now["doctor/rankme"], max(value for _, value in h.back("doctor/rankme"))
    low = max(1.5, 0.25 * best)
    if held(h, "doctor/rankme", lambda now: now < low, steps=1) is None:
        return None
    return f"RankMe {rank:.1f}, at best {best:.1f}"


def _targets_constant(h: History, f: Facts) -> str | None:
    if held(h, "target_std", lambda std: std < 0.01, steps=10) is None:
        return None
    return f"their standard deviation over images and patches is {h.middle('target_std', 1):.1e}"


def _reconstruction_constant(h: History, f: Facts) -> str | None:
    if held(h, "pred_std", lambda std: std < 0.02, steps=20) is None:
        return None
    return f"standard deviation of the predicted values {h.middle('pred_std', 1):.1e}, of the targets about 1"


def _codebook(h: History, f: Facts) -> str | None:
    if held(h, "codebook_perplexity", lambda perplexity: perplexity < 1.5, steps=20) is None:
        return None
    return f"perplexity {h.middle('codebook_perplexity', 1):.2f}"


def _attention_uniform(h: History, f: Facts) -> str | None:
    best = min(value for _, value in h.back("doctor/attention_entropy"))
    if best > 0.9 or held(h, "doctor/attention_entropy", lambda entropy: entropy > 0.999, steps=1) is None:
        return None
    return f"entropy {h.now['doctor/attention_entropy']:.4f} of its largest, and was {best:.2f}"


def _attention_one(h: History, f: Facts) -> str | None:
    if held(h, "doctor/attention_entropy", lambda entropy: entropy < 0.02, steps=1) is None:
        return None
    return f"entropy {h.now['doctor/attention_entropy']:.4f} of its largest"


def _dead_blocks(h: History, f: Facts) -> str | None:
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


RULES: dict[str, Rule] = {
    "learning_rate_too_high": Rule(
        "learning rate too high",
        "between two measurements the median weight matrix moved by 15 % of its length per step or more",
        "a network whose weights are replaced every seven steps cannot keep what it learnt; healthy runs move by "
        "1e-3, small ones in warm-up by some 1e-2",
        "lower optim.lr (a tenth), or lengthen its warm-up",
        ("doctor/weight_change",),
        _weights_leap,
        is_cause=True,
    ),
    "loss_diverged": Rule(
        "the loss diverged",
        "median of five rows above three times the largest of the first ten",
        "a loss against a moving teacher may rise to ln K, which is not three times where it starts; above that only "
        "growing outputs lead",
        "lower optim.lr, clip gradients (optim.clip_grad), or go back to a checkpoint before it rose",
        ("loss",),
        _loss_diverged,
        is_cause=True,
    ),
    "gradient_exploded": Rule(
        "the gradient norm exploded",
        "median of five rows above a hundred times the largest of the first ten",
        "gradients are largest in the first steps of a healthy run",
        "lower optim.lr, clip gradients (optim.clip_grad), or go back to a checkpoint before it rose",
        ("grad_norm",),
        _gradient_exploded,
        is_cause=True,
    ),
    "weights_still": Rule(
        "the weights do not move",
        "in two measurements no sampled matrix moved by 1e-6 of its length per step, at 1 % of the peak rate or more",
        "fp32 resolves 6e-8: at 1e-6 a step, ten thousand steps change the weights by 1 %",
        "raise optim.lr; look for a frozen trunk, a detached loss or a loss scale of 0",
        ("doctor/weight_change_max",),
        _weights_still,
    ),
    "loss_flat": Rule(
        "the loss stays where it began",
        "500 steps after the warm-up the median of 50 rows is within 0.5 % of the first ten, while the rate is above 0",
        "noise between batches is larger than that; a loss that learns anything leaves its first value sooner",
        "look at the pictures of the batches and at the gradient norms; raise optim.lr",
        ("loss",),
        _loss_flat,
    ),
    "teacher_one_prototype": Rule(
        "teacher assigns all images to the same prototype",
        "for 5 steps the mean assignment of a batch has an entropy below ln 2",
        "below two effective prototypes an assignment cannot tell more than one bit; centring exists to prevent this "
        "(DINO, section 3.1)",
        "centre the teacher (lower objective.center_momentum), raise objective.teacher_temp, and see that no gradient "
        "reaches the teacher",
        ("teacher_kl_uniform",),
        _one_prototype,
    ),
    "teacher_uniform": Rule(
        "teacher assignments uniform",
        "for 20 steps the entropy of an assignment is within 0.01 nats of ln K",
        "such a target is the same for every image, so the loss is ln K and has nothing to teach",
        "lower objective.teacher_temp or lengthen its warm-up (objective.warmup_teacher_temp_epochs)",
        ("teacher_entropy",),
        _uniform,
    ),
    "teacher_uninformative": Rule(
        "teacher assigns every image alike",
        "for 20 steps the entropy of the mean assignment exceeds the mean entropy by less than 0.01 nats, while "
        "assignments are not uniform",
        "the difference is the information between image and prototype; without it the student learns a constant",
        "lower optim.lr or lengthen its warm-up, and see that no gradient reaches the teacher",
        ("teacher_entropy", "teacher_kl_uniform"),
        _uninformative,
    ),
    "teacher_one_hot": Rule(
        "teacher assignments one-hot",
        "for 10 steps the mean entropy of an assignment is below 0.05 nats",
        "then 99 % of an assignment is one prototype: the temperature leaves only the largest logit, and nearest "
        "prototypes are copied as hard labels",
        "raise objective.teacher_temp (0.04 to 0.07 are the papers')",
        ("teacher_entropy",),
        _one_hot,
    ),
    "center_still": Rule(
        "the teacher's centre does not move",
        "for 20 steps its length is the same to the last bit",
        "an average over batches of logits changes with every batch; uncentred logits end in one prototype",
        "objective.center_momentum must be below 1, and after_step must reach the centre",
        ("center_norm",),
        _center_still,
    ),
    "teacher_still": Rule(
        "the average of the weights stands still",
        "in two measurements no sampled weight of it changed while the student's did; not asked in the last tenth",
        "momentum 1, or an update that does not happen: the teacher stays untrained. A schedule reaches 1 at the end",
        "lower the momentum of the teacher",
        ("doctor/average_change_max",),
        _teacher_still,
    ),
    "teacher_identical": Rule(
        "the average of the weights equals the student",
        "their distance is below 1e-6 of the student's length while the student moves",
        "momentum 0: a teacher that is the student cannot hold it back from collapse",
        "raise the momentum of the teacher (0.99 and more)",
        ("doctor/average_distance",),
        _teacher_identical,
    ),
    "features_constant": Rule(
        "features of all images are the same",
        "for 10 steps feature_std times the root of the width is below 0.02",
        "the square of that is 1 - cosine between two images: 0.0004; untrained networks have 0.01 and more",
        "lower optim.lr; see that no gradient reaches the teacher and that it is centred",
        ("feature_std",),
        _features_constant,
    ),
    "few_dimensions": Rule(
        "features lose their dimensions",
        "in two measurements RankMe is below 1.5, or below a quarter of its largest",
        "RankMe is the number of directions that features spread over (Garrido et al. 2023); downstream accuracy "
        "falls with it",
        "lower optim.lr or optim.weight_decay; for a teacher, centre it, or raise the weight of a spread term (KoLeo)",
        ("doctor/rankme",),
        _few_dimensions,
    ),
    "targets_constant": Rule(
        "the targets are the same everywhere",
        "for 10 steps their standard deviation over images and patches is below 0.01",
        "targets are normalized to about 1, so that 0.01 means one vector for all: the loss falls to 0 and teaches "
        "nothing",
        "raise the momentum of the teacher, lower optim.lr, and see that no gradient reaches the targets",
        ("target_std",),
        _targets_constant,
    ),
    "reconstruction_constant": Rule(
        "the reconstruction is constant",
        "for 20 steps the predicted values have a standard deviation below 0.02",
        "targets have about 1: the decoder says the mean of everything",
        "raise optim.lr or lower it if the loss jumped before; see that the decoder gets the visible patches",
        ("pred_std",),
        _reconstruction_constant,
    ),
    "codebook_collapsed": Rule(
        "the codebook collapsed",
        "for 20 steps the perplexity of the codes is below 1.5",
        "every patch gets the same code, so that tokens carry nothing",
        "lower optim.lr; start the codes by k-means, or raise the weight that spreads them",
        ("codebook_perplexity",),
        _codebook,
    ),
    "attention_uniform": Rule(
        "attention of the last block became uniform",
        "in two measurements its entropy is above 0.999 of log T, after it was below 0.9",
        "an untrained network attends alike to all tokens; one that learnt not to has lost it",
        "lower optim.lr, or go back to a checkpoint before",
        ("doctor/attention_entropy",),
        _attention_uniform,
    ),
    "attention_one_token": Rule(
        "attention of the last block sees one token",
        "in two measurements its entropy is below 0.02 of log T",
        "saturated softmaxes have no gradient (entropy collapse, Zhai et al. 2023)",
        "lower optim.lr or lengthen its warm-up",
        ("doctor/attention_entropy",),
        _attention_one,
    ),
    "dead_gradients": Rule(
        "blocks get no gradient",
        "in two measurements a block's gradient norm is below 1e-7 of the largest block's",
        "fp32 resolves 6e-8: such a block does not learn beside the others",
        "see that the loss reads these blocks; lower optim.lr if it was healthy before",
        (GRADIENT,),
        _dead_blocks,
    ),
}
