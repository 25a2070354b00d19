"""Checks of settings that several objectives share; each returns messages for the user. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from pretrain.data.views.specs import Mask
from pretrain.objectives.configs.shape import ModelShape


def scale_problems(key: str, scale: tuple[float, float]) -> list[str]:
    """A range whose low end exceeds its high end."""
    return [] if scale[0] <= scale[1] else [f"objective.{key}: {scale[0]} is larger than {scale[1]}; give (low, high)"]


def jitter_problems(jitter: tuple[float, float, float, float], model: ModelShape) -> list[str]:
    """Changes of saturation or hue for images that are not RGB."""
    if model.in_chans == 3 or not any(jitter[2:]):
        return []
    return [f"objective.color_jitter: needs RGB, but model.in_chans is {model.in_chans}; set its last two values to 0"]


def rgb_problems(
    jitter: tuple[float, float, float, float], jitter_prob: float, grayscale_prob: float, model: ModelShape
) -> list[str]:
    """Changes of colour for images that are not RGB."""
    colours = {
        "color_jitter": ("its last two values to 0", bool(jitter_prob and any(jitter[2:]))),
        "grayscale_prob": ("it to 0", bool(grayscale_prob)),
    }
    return [
        f"objective.{key}: needs RGB, but model.in_chans is {model.in_chans}; set {way_out}"
        for key, (way_out, on) in colours.items()
        if on and model.in_chans != 3
    ]


def mask_problems(key: str, make: Callable[[], Mask]) -> list[str]:
    """The error of a mask that cannot be built, reported under the setting that most often causes it."""
    try:
        make()
    except ValueError as error:
        return [f"objective.{key}: {error}"]
    return []
