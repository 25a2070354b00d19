"""Runs Hamburger on its golden cases: every option of the official constructors, from the `args` of the config."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor

from pretrain.models.mechanisms.spatial.hamburger import Hamburger
from tests.golden.case import Case
from tests.golden.mechanisms.module import check_buffers, check_gradients, load_state, renamed
from tests.golden.mechanisms.spatial import BN_MOMENTUM, known

OPTIONS = {
    "HAM_TYPE": "factorization",
    "MD_R": "num_bases",
    "MD_S": "splits",
    "TRAIN_STEPS": "train_iterations",
    "EVAL_STEPS": "eval_iterations",
    "INV_T": "sharpness",
    "BETA": "ridge",
    "ETA": "eta",
    "RAND_INIT": "random_bases",
    "SPATIAL": "vectors",
}
OFFICIAL = {"INV_T": 100, "RAND_INIT": True}  # defaults of the official classes that are not ours


def build(case: Case) -> tuple[Hamburger, dict[str, str]]:
    config = known(case, "version", "in_c", "args", "put_cheese")
    blocks = ("MD_D", "DUAL", "ZERO_HAM", "CHEESE_FACTOR", "PUT_CHEESE", "put_cheese")
    args: dict[str, Any] = OFFICIAL | case.take("args", *OPTIONS, *blocks)
    args["HAM_TYPE"] = args.get("HAM_TYPE", "NMF").lower()
    if args["HAM_TYPE"] == "nmf":
        args["INV_T"] = 1  # as the official class does
    args["SPATIAL"] = "places" if args.get("SPATIAL", True) else "channels"
    version, state = config["version"].lower(), case.below("state")
    dual = version == "v2+" and args.get("DUAL", "expect/ham_2/in" in case.tensors)
    if dual:
        del args["SPATIAL"]
    cheese = args.get("PUT_CHEESE", args.get("put_cheese", config.get("put_cheese", "cheese.conv.weight" in state)))
    lower = next(value for name, value in state.items() if re.fullmatch(r"lower_bread(\.0)?\.weight", name))
    module = Hamburger(
        config["in_c"],
        inner_dim=len(lower) // (2 if dual else 1),
        version=version,
        dual=dual,
        cheese=cheese,
        cheese_dim=len(state["cheese.conv.weight"]) if cheese and version != "v1" else None,
        zero_start=args.get("ZERO_HAM", True),
        bn_momentum=BN_MOMENTUM,
        places=case["input/x"].shape[2:].numel(),
        **{mine: args[name] for name, mine in OPTIONS.items() if name in args},
    )
    upper = {"upper_bread.0": "proj", "upper_bread.1": "norm", "upper_bread": "proj"}
    names = {"lower_bread.0": "lower", "lower_bread": "lower", "cheese.conv": "cheese.0", "cheese.bn": "cheese.1"}
    scales = {"coef_shortcut": "scale_shortcut", "coef_ham": "scale_ham"}
    hams = {"ham": "hams.0", "ham_1": "hams.0", "ham_2": "hams.1"}
    return module, {**upper, **names, **scales, **hams}


def run(case: Case) -> None:
    module, names = build(case)
    ours, given = load(module, case, names)
    first = copy.deepcopy(module).eval()
    seen = watch(module)
    x = case["input/x"].clone().requires_grad_()
    out = module.train()(x, given)
    (out * case["input/grad_out"]).sum().backward()
    case.check("expect/out", out)
    for key in sorted(case.due):
        found = re.fullmatch(r"expect/(ham(_[12])?)/(in|out)", key)
        if found:
            which = int(names[found[1]].rpartition(".")[2])
            case.check(key, seen[which][found[3] == "out"].reshape(case[key].shape))
    check_gradients(case, module, ours, {"input/x": x})
    check_buffers(case, module, names)
    if "expect/out_eval" in case.tensors:
        with torch.no_grad():
            case.check("expect/out_eval", first(x, given))
    after = case.below("expect/after_eval")
    if after:  # the official code moves running bases in evaluation, ours after a step of training
        for ham in first.train().hams:
            ham.train_iterations = ham.eval_iterations
        first(x)
        first.after_step()
    for name in after:
        if name.endswith(".bases"):
            case.check(f"expect/after_eval/{name}", dict(first.named_buffers())[renamed(name, names)])
        else:  # evaluation leaves batch statistics as they are
            case.check(f"expect/after_eval/{name}", case[f"state/{name}"])


def load(module: Hamburger, case: Case, names: dict[str, str]) -> tuple[dict[str, str], list[Tensor] | None]:
    """Put the state of the case into the module: our names of it, and the initial bases to give to the module.

    None: they are its running ones, which the official state may lack, as they come with its first pass.
    """
    official = {renamed(name, names) for name in case.below("state")}
    own = [name for name in module.state_dict() if name not in official and name.startswith("hams.")]
    ours = load_state(case, module, names, own=own)
    draws = [case[f"draw/{name}"] for name in sorted(case.below("draw"))]
    if module.hams[0].random_bases:
        return ours, draws
    for ham, draw in zip(module.hams, draws, strict=bool(draws)):
        ham.bases.copy_(draw.reshape(ham.bases.shape))
    return ours, None


def watch(module: Hamburger) -> list[tuple[Tensor, Tensor]]:
    """What goes into each ham and comes out of it, in the next pass."""
    seen: list[tuple[Tensor, Tensor]] = []
    for ham in module.hams:
        ham.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    return seen
