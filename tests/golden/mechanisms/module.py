"""One module on one golden case: its state by other names, outputs, gradients, buffers after a training pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from tests.golden.case import Case

Call = Callable[[nn.Module, Tensor], Tensor]


def run_module(
    case: Case,
    module: nn.Module,
    names: Mapping[str, str],
    *,
    call: Call = lambda module, x: module(x),
    unused: Collection[str] = (),
    own: Collection[str] = (),
) -> None:
    """Compare outputs in training and evaluation, gradients, and buffers after the training pass.

    Args:
        names: official prefixes of state names -> ours; the longest that fits counts. Tensors are reshaped: a linear
            layer is a 1x1 convolution.
        unused: names of the official state that our module computes.
        own: names of our state that the official one has not.
    """
    ours = load_state(case, module, names, unused=unused, own=own)
    suffixes = [name.removeprefix("x") for name in case.below("input") if name.startswith("x")]
    for suffix in suffixes:
        if f"expect/out_eval{suffix}" in case.tensors:
            still = copy.deepcopy(module).eval()
            case.check(f"expect/out_eval{suffix}", call(still, case[f"input/x{suffix}"]))
    inputs = {suffix: case[f"input/x{suffix}"].clone().requires_grad_() for suffix in suffixes}
    outputs = {suffix: call(module.train(), x) for suffix, x in inputs.items()}
    for suffix, out in outputs.items():
        case.check(f"expect/out{suffix}", out)
    torch.stack([(out * case[f"input/grad_out{suffix}"]).sum() for suffix, out in outputs.items()]).sum().backward()
    check_gradients(case, module, ours, {f"input/x{suffix}": x for suffix, x in inputs.items()})
    check_buffers(case, module, names)


def load_state(
    case: Case, module: nn.Module, names: Mapping[str, str], *, unused: Collection[str] = (), own: Collection[str] = ()
) -> dict[str, str]:
    """Put the state of the case into the module; returns our names by the official ones. Arguments of `run_module`."""
    state = {name: value for name, value in case.below("state").items() if name not in unused}
    ours = {name: renamed(name, names) for name in state}
    assert len(set(ours.values())) == len(ours), f"{case.name}: two official names for one of ours: {ours}"
    missing = set(module.state_dict()) - set(ours.values()) - set(own)
    assert not missing, f"{case.name}: no value for {sorted(missing)}"
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    unknown = set(ours.values()) - set(shapes)
    assert not unknown, f"{case.name}: our module has no {sorted(unknown)}"
    values = {ours[name]: value.reshape(shapes[ours[name]]) for name, value in state.items()}
    module.load_state_dict(values, strict=not own)
    return ours


def check_gradients(
    case: Case, module: nn.Module, ours: Mapping[str, str], others: Mapping[str, Tensor], suffix: str = ""
) -> None:
    """Gradients of the weights by their official name and a suffix, and of `others` (inputs, by their key)."""
    parameters = dict(module.named_parameters())
    for name, expect in case.below("grad").items():
        if not name.endswith(suffix) and name not in others:
            continue
        gradient = (others[name] if name in others else parameters[ours[name.removesuffix(suffix)]]).grad
        assert gradient is not None, f"{case.name}: no gradient reached {name}"
        case.check(f"grad/{name}", gradient.reshape(expect.shape))
    without = (case.facts.get("tables") or {}).get("parameters without gradient", [])
    wrong = [name for name in without if parameters[ours[name]].grad is not None]
    assert not wrong, f"{case.name}: a gradient reached {wrong}"


def check_buffers(case: Case, module: nn.Module, names: Mapping[str, str], key: str = "expect/after") -> None:
    """Buffers of the module as they are now."""
    after = module.state_dict()
    for name, expect in case.below(key).items():
        case.check(f"{key}/{name}", after[renamed(name, names)].reshape(expect.shape))


def renamed(name: str, names: Mapping[str, str]) -> str:
    fits = [prefix for prefix in names if name.startswith(prefix)]
    return name if not fits else names[(best := max(fits, key=len))] + name[len(best) :]
