"""Dynamic loss scale of fp16 (Micikevicius et al. 2018, section 3.2)."""

from __future__ import annotations

_GROWTH_INTERVAL = 2000


class LossScaler:
    """Doubles after 2,000 finite steps, halves on an overflow; `enabled=False` keeps it at 1 (fp32, bf16)."""

    def __init__(self, *, enabled: bool, scale: float = 65536.0):
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.good_steps = 0

    @property
    def at_floor(self) -> bool:
        return self.scale <= 1.0

    def good(self) -> None:
        if not self.enabled:
            return
        self.good_steps += 1
        if self.good_steps % _GROWTH_INTERVAL == 0:
            self.scale *= 2.0

    def overflow(self) -> None:
        self.good_steps = 0
        if self.enabled:
            self.scale = max(1.0, self.scale / 2.0)

    def state(self) -> dict[str, float]:
        return {"enabled": self.enabled, "scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        """Restore the scale; ignored if the state was saved in fp32 or bf16, whose scale is 1."""
        if self.enabled and state.get("enabled", state["scale"] > 1.0):
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
