"""Rules that detect why a run does not learn: each has a sign, the reason, and a remedy. No torch here.

Thresholds follow from the meaning of each number, and were corrected on healthy runs and runs with planted faults;
docs/doctor.md lists the reasons and the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pretrain.doctor import signs
from pretrain.doctor.history import Facts, History
from pretrain.doctor.signs import GRADIENT, ROUTER


@dataclass(frozen=True)
class Rule:
    """One failure mode.

    Attributes:
        title: short description of the failure.
        sign: condition of the report. reason: why the sign shows this failure. way_out: remedy.
        reads: checked only in steps that have one of these values; a name that ends in "/" means all names below it.
        check: describes the sign with its numbers; None if the sign is absent.
        is_cause: other signs follow from this one and are not reported together with it.
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


RULES: dict[str, Rule] = {
    "learning_rate_too_high": Rule(
        "learning rate too high",
        "between two measurements the median weight matrix changed by 15 % of its norm per step or more",
        "a network whose weights are replaced every seven steps cannot keep what it learned; healthy runs change by "
        "1e-3, small ones in warm-up by about 1e-2",
        "lower optim.lr (a tenth), or lengthen its warm-up",
        ("doctor/weight_change",),
        signs.weights_leap,
        is_cause=True,
    ),
    "loss_diverged": Rule(
        "the loss diverged",
        "median of five rows above three times the largest of the first ten",
        "a loss against a moving teacher may rise to ln K, which is less than three times its start; only growing "
        "outputs lead above that",
        "lower optim.lr, clip gradients (optim.clip_grad), or return to a checkpoint before it rose",
        ("loss",),
        signs.loss_diverged,
        is_cause=True,
    ),
    "gradient_exploded": Rule(
        "the gradient norm exploded",
        "median of five rows above a hundred times the largest of the first ten",
        "gradients are largest in the first steps of a healthy run",
        "lower optim.lr, clip gradients (optim.clip_grad), or return to a checkpoint before it rose",
        ("grad_norm",),
        signs.gradient_exploded,
        is_cause=True,
    ),
    "weights_still": Rule(
        "the weights do not move",
        "in two measurements no sampled matrix changed by 1e-6 of its norm per step, at 1 % of the peak lr or more",
        "fp32 resolves 6e-8: at 1e-6 a step, ten thousand steps change the weights by 1 %",
        "raise optim.lr; look for a frozen backbone, a detached loss or a loss scale of 0",
        ("doctor/weight_change_max",),
        signs.weights_still,
    ),
    "loss_flat": Rule(
        "the loss stays at its initial value",
        "500 steps after the warm-up the median of 50 rows is within 0.5 % of the first ten, while the rate is above 0",
        "noise between batches is larger than that; the loss of a model that learns changes sooner",
        "look at the pictures of the batches and at the gradient norms; raise optim.lr",
        ("loss",),
        signs.loss_flat,
    ),
    "teacher_one_prototype": Rule(
        "teacher assigns all images to the same prototype",
        "for 5 steps the mean assignment of a batch has an entropy below ln 2, and assignments were not one-hot "
        "from the start",
        "below two effective prototypes an assignment carries at most one bit; centring exists to prevent this "
        "(DINO, section 3.1)",
        "centre the teacher (lower objective.center_momentum), raise objective.teacher_temp, and check that no "
        "gradient reaches the teacher",
        ("teacher_kl_uniform",),
        signs.one_prototype,
    ),
    "teacher_uniform": Rule(
        "teacher assignments uniform",
        "for 20 steps the entropy of an assignment is within 0.01 nats of ln K, and features always differed",
        "such a target is the same for every image: the loss is ln K and carries no information",
        "lower objective.teacher_temp or lengthen its warm-up (objective.warmup_teacher_temp_epochs)",
        ("teacher_entropy",),
        signs.uniform,
    ),
    "teacher_uninformative": Rule(
        "teacher assigns all images the same way",
        "for 20 steps the entropy of the mean assignment exceeds the mean entropy by less than 0.01 nats, after it "
        "exceeded it by more, while assignments are not uniform",
        "the difference is the information between image and prototype; without it the student learns a constant",
        "lower optim.lr or lengthen its warm-up, and check that no gradient reaches the teacher; in capi set "
        "objective.positionwise to true",
        ("teacher_entropy", "teacher_kl_uniform"),
        signs.uninformative,
    ),
    "teacher_one_hot": Rule(
        "teacher assignments one-hot",
        "for 10 steps the mean entropy of an assignment is below 0.05 nats, and this held from the start or the "
        "mean assignment has more than ln 2",
        "then 99 % of an assignment is one prototype: only the largest logit counts at this temperature, and "
        "nearest prototypes become hard labels",
        "raise objective.teacher_temp (the papers use 0.04 to 0.07)",
        ("teacher_entropy",),
        signs.one_hot,
    ),
    "center_still": Rule(
        "the teacher's centre does not move",
        "for 20 steps the norm of the centre is the same to the last bit",
        "an average over batches of logits changes with every batch; uncentred logits end in one prototype",
        "objective.center_momentum must be below 1, and after_step must reach the centre",
        ("center_norm",),
        signs.center_still,
    ),
    "teacher_still": Rule(
        "the average of the weights does not change",
        "in two measurements no sampled weight of the teacher changed while the student's did; not applied in the "
        "last tenth and in objective.momentum_warmup",
        "momentum 1, or an update that does not happen: the teacher stays untrained. A schedule reaches 1 at the end",
        "lower the momentum of the teacher",
        ("doctor/average_change_max",),
        signs.teacher_still,
    ),
    "teacher_identical": Rule(
        "the average of the weights equals the student",
        "the distance of teacher and student is below 1e-6 of the student's norm while the student changes",
        "momentum 0: a teacher equal to the student cannot prevent collapse",
        "raise the momentum of the teacher (0.99 and more)",
        ("doctor/average_distance",),
        signs.teacher_identical,
    ),
    "features_constant": Rule(
        "features of all images are the same",
        "for 10 steps feature_std times the root of the width is below 0.02, after it was 0.04",
        "the square of that is 1 - cosine between two images: 0.0004; untrained networks have 0.01 and more, except"
        " those with LayerScale of 1e-5",
        "lower optim.lr; check that no gradient reaches the teacher and that it is centred",
        ("feature_std",),
        signs.features_constant,
    ),
    "few_dimensions": Rule(
        "features lose their dimensions",
        "in two measurements RankMe is below 1.2, or below a quarter of its maximum, after it was 2",
        "RankMe is the number of directions that features spread over (Garrido et al. 2023); downstream accuracy "
        "falls with it",
        "lower optim.lr or optim.weight_decay; for a teacher, centre it, or raise the weight of a spread term (KoLeo)",
        ("doctor/rankme",),
        signs.few_dimensions,
    ),
    "targets_constant": Rule(
        "the targets are the same everywhere",
        "for 10 steps the standard deviation of the targets over images and patches is below 0.01, after it was 0.05",
        "targets are normalized to about 1, so that 0.01 means one vector for all: the loss falls to 0 without "
        "learning",
        "raise the momentum of the teacher, lower optim.lr, and check that no gradient reaches the targets",
        ("target_std",),
        signs.targets_constant,
    ),
    "reconstruction_constant": Rule(
        "the reconstruction is constant",
        "for 20 steps the predicted values have a standard deviation below 0.02, after it was 0.05",
        "targets have about 1: the decoder predicts the mean of everything",
        "raise optim.lr, or lower it if the loss jumped before; check that the decoder gets the visible patches",
        ("pred_std",),
        signs.reconstruction_constant,
    ),
    "codebook_collapsed": Rule(
        "the codebook collapsed",
        "for 20 steps the perplexity of the codes is below 1.5, after it was 3",
        "every patch gets the same code, so that tokens carry no information",
        "lower optim.lr; initialize the codes by k-means, or raise the weight that spreads them",
        ("codebook_perplexity",),
        signs.codebook,
    ),
    "attention_uniform": Rule(
        "attention of the last block became uniform",
        "in two measurements the entropy of attention is above 0.999 of log T, after it was below 0.9",
        "an untrained network attends uniformly to all tokens; this one had learned not to and has lost it",
        "lower optim.lr, or return to an earlier checkpoint",
        ("doctor/attention_entropy",),
        signs.attention_uniform,
    ),
    "attention_one_token": Rule(
        "attention of the last block is on one token",
        "in two measurements the entropy of attention is below 0.02 of log T",
        "saturated softmaxes have no gradient (entropy collapse, Zhai et al. 2023)",
        "lower optim.lr or lengthen its warm-up",
        ("doctor/attention_entropy",),
        signs.attention_one,
    ),
    "dead_gradients": Rule(
        "blocks get no gradient",
        "in two measurements a block's gradient norm is below 1e-7 of the largest block's",
        "fp32 resolves 6e-8: such a block does not learn with the others",
        "check that the loss depends on these blocks; lower optim.lr if the gradients were healthy before",
        (GRADIENT,),
        signs.dead_blocks,
    ),
    "router_dead": Rule(
        "the routers of the general blocks choose nothing",
        "since the first measurement one branch has a mean p above 0.99 in every block",
        "routers start with equal shares: a choice that was made before training is none, and a softmax of 0.99 has "
        "hardly a gradient",
        "lower optim.lr; where one branch alone is wanted, place it without a router (kind: its name)",
        (ROUTER,),
        signs.router_dead,
    ),
    "router_idle": Rule(
        "the routers of the general blocks do not choose: they are an ensemble",
        "200 steps after the warm-up the entropy of p is above 0.999 of log K in every block, in two measurements",
        "shares that differ by less than 5 % are the same for every image: the branches are averaged, not chosen among",
        "train longer or raise optim.lr; choice: uniform computes the same without a router",
        (ROUTER,),
        signs.router_idle,
    ),
    "branches_unused": Rule(
        "no branch beside the attention is used",
        "200 steps after the warm-up the mean of p |g| of every branch is below 1e-4, in two measurements",
        "g starts at 0 and multiplies each branch: the network is still the one without them",
        "check that the strengths are trained (not frozen, not decayed to 0); raise optim.lr; if the branches do not "
        "help, leave them out: fovea release --prune drops them",
        (ROUTER,),
        signs.branches_unused,
    ),
}
