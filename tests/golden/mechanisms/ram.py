"""Runs the classifier by glimpses on the golden case of the recurrent attention model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.heads.pooled.glimpses import GlimpseNetwork, corners, glimpse_loss, retina
from tests.golden.case import Case
from tests.golden.mechanisms.module import check_gradients, load_state
from tests.golden.mechanisms.spatial import known

NAMES = {
    "sensor.fc1": "what.0",
    "sensor.fc3": "what.2",
    "sensor.fc2": "where.0",
    "sensor.fc4": "where.2",
    "rnn.i2h": "input",
    "rnn.h2h": "recurrent",
    "locator.fc": "locator.0",
    "locator.fc_lt": "locator.2",
    "classifier.fc": "fc",
    "baseliner.fc": "baseline",
}


def run(case: Case) -> None:
    count = known(case, "ctor", "glimpses")["glimpses"]
    ctor = case.take("ctor", "g", "k", "s", "c", "h_g", "h_l", "std", "hidden_size", "num_classes")
    network = GlimpseNetwork(
        ctor["k"] * ctor["c"] * ctor["g"] ** 2,
        ctor["num_classes"],
        num_glimpses=count,
        glimpse_hidden=ctor["h_g"],
        location_hidden=ctor["h_l"],
        std=ctor["std"],
    )
    ours = load_state(case, network, NAMES)
    x, labels = case["input/x"].clone().requires_grad_(), case["input/y"]

    def see(at: Tensor) -> Tensor:
        return retina(x, at, size=ctor["g"], count=ctor["k"], factor=ctor["s"]).flatten(1)

    noise = torch.stack([case[f"draw/noise{i}"] for i in range(count)], dim=1)
    look = network(see, case["draw/l0"], noise)
    losses = glimpse_loss(look, F.one_hot(labels, ctor["num_classes"]))
    losses["loss"].backward()
    for i, glimpse in enumerate(look.glimpses):
        found = {"phi": glimpse.phi, "g": glimpse.seen, "h": glimpse.state, "l": glimpse.next}
        found |= {"log_pi": glimpse.log_pi, "baseline": glimpse.baseline}
        for name, got in found.items():
            case.check(f"expect/step{i}/{name}", got)
    case.check("expect/log_probas", look.log_probabilities)
    case.check("expect/predicted", look.log_probabilities.argmax(1))
    parts = {"loss": "loss", "loss_action": "classes", "loss_baseline": "baseline", "loss_reinforce": "reinforce"}
    for official, name in {**parts, "reward": "reward"}.items():
        case.check(f"expect/{official}", losses[name])
    check_gradients(case, network, ours, {"input/x": x})
    if "input/l_edges" in case.tensors:
        case.check("expect/edges/phi", see(case["input/l_edges"]))
        case.check("expect/edges/start", corners(x, case["input/l_edges"]))
