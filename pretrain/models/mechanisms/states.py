"""State of mechanisms that is no weight: it moves once per optimizer step, and not in a skipped one."""

from __future__ import annotations

from torch import nn

from pretrain.models.mechanisms.placement import mechanisms_of


class MechanismStates:
    """The mechanisms below a module, found once."""

    def __init__(self, module: nn.Module):
        self._mechanisms = mechanisms_of(module)

    def settle(self, *, taken: bool) -> None:
        """After an optimizer step they take what its forward passes left for their state. After a skipped step, and
        where they are frozen, they drop it. Those of an EMA teacher, whose weights are buffers, count the step too."""
        for mechanism in self._mechanisms:
            trained = [parameter.requires_grad for parameter in mechanism.parameters()]
            if taken and (not trained or any(trained)):
                mechanism.after_step()
            else:
                mechanism.discard_pending()
