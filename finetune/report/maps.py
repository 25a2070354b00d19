"""Class maps and depth maps next to their truth, with their errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.report import canvas
from finetune.report.canvas import FALSE
from pretrain.core.page.colours import RGB, colour

VOID = 255
VOID_TINT: RGB = (40, 40, 40)
_SHOWN_CLASSES = 24  # of the legend


def segmentation_picture(
    image: np.ndarray,
    truth: np.ndarray | None,
    prediction: np.ndarray | None,
    classes: Sequence[str],
    *,
    caption: str = "",
) -> np.ndarray:
    """The image, its true classes, the predicted ones, and the wrong pixels in red: uint8 [h, w, 3].

    Args:
        image: uint8 [H, W, 3]. truth, prediction: class ids [H, W]; 255 is void and not evaluated.
    """
    scale = canvas.view_scale(*image.shape[:2])
    image, brighter = canvas.brightened(image)
    view = canvas.resized(image, scale)
    parts = [(f"image{brighter}", view)]
    for name, values in (("truth", truth), ("prediction", prediction)):
        if values is not None:
            parts.append((name, overlay_classes(view, canvas.resized_map(values, scale), classes, alpha=0.65)))
    if truth is not None and prediction is not None:
        valid = truth != VOID
        wrong = valid & (truth != prediction)
        errors = (view * 0.35 + 160).round().astype(np.uint8)
        canvas.blend(errors, canvas.resized_map(wrong, scale), FALSE, alpha=0.9)
        canvas.blend(errors, canvas.resized_map(~valid, scale), VOID_TINT, alpha=0.8)
        share = wrong.sum() / max(valid.sum(), 1)
        parts.append((f"wrong: {share:.1%} of pixels", errors))
    return canvas.panels(parts, legend=_legend(truth, prediction, classes), caption=caption)


def overlay_classes(
    image: np.ndarray, values: np.ndarray, classes: Sequence[str], *, alpha: float = 0.55
) -> np.ndarray:
    """uint8 [H, W, 3] tinted by class ids [H, W] of the same size; void is dark, a class "background" has no tint."""
    tints = np.array([colour(i) for i in range(VOID)] + [VOID_TINT], dtype=np.float32)
    strength = np.array([alpha * (not _is_background(classes, i)) for i in range(VOID + 1)], dtype=np.float32)
    values = np.minimum(values, VOID)
    share = strength[values][..., None]
    return (image * (1 - share) + tints[values] * share).round().astype(np.uint8)


def _is_background(classes: Sequence[str], index: int) -> bool:
    return index < len(classes) and classes[index].lower() == "background"


def depth_picture(
    image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None, *, caption: str = ""
) -> np.ndarray:
    """The image, true and predicted depth in the same colours, and the relative error: uint8 [h, w, 3].

    Args:
        image: uint8 [H, W, 3]. truth, prediction: metres, float [H, W]; a true depth of 0 is unknown.
    """
    scale = canvas.view_scale(*image.shape[:2])
    given = [depth[depth > 0] for depth in (truth, prediction) if depth is not None and (depth > 0).any()]
    # The truth determines the colours: a prediction on another scale must look wrong.
    near, far = np.percentile(given[0], [2, 98]) if given else (0.0, 1.0)
    parts = [("image", canvas.resized(image, scale))]
    for name, depth in (("truth", truth), ("prediction", prediction)):
        if depth is not None:
            colours = depth_colours(canvas.resized_map(depth, scale), float(near), float(far))
            parts.append((f"{name}: {_span(depth)}", colours))
    legend = [(_colour_at(share), f"{near + share * (far - near):.3g} m") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    if truth is not None and prediction is not None:
        valid = truth > 0
        error = np.where(valid, np.abs(prediction - truth) / np.where(valid, truth, 1), 0)
        view = _hot(np.clip(canvas.resized_map(error, scale) / 0.5, 0, 1))
        view[~canvas.resized_map(valid, scale)] = VOID_TINT
        mean = error[valid].mean() if valid.any() else 0.0
        parts.append((f"relative error: {mean:.1%}", view))
        legend += [(FALSE, "error of 50 % or more"), (VOID_TINT, "depth unknown")]
    return canvas.panels(parts, legend=legend, caption=caption)


def depth_colours(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Metres [H, W] as uint8 [H, W, 3], matplotlib's turbo reversed: near is red, far is blue, 0 is dark."""
    import matplotlib

    share = np.clip((depth - near) / max(far - near, 1e-9), 0, 1)
    view = np.array((matplotlib.colormaps["turbo_r"](share)[..., :3] * 255).round(), dtype=np.uint8)
    view[depth <= 0] = VOID_TINT
    return view


def _colour_at(share: float) -> RGB:
    red, green, blue = (int(value) for value in depth_colours(np.array([[1.0 + share]]), 1.0, 2.0)[0, 0])
    return red, green, blue


def _hot(share: np.ndarray) -> np.ndarray:
    """0 to 1 as white to FALSE."""
    white, red = np.full(3, 250.0), np.array(FALSE, dtype=np.float64)
    return (white + share[..., None] * (red - white)).round().astype(np.uint8)


def _span(depth: np.ndarray) -> str:
    known = depth[depth > 0]
    return f"{known.min():.3g} to {known.max():.3g} m" if len(known) else "none"


def _legend(truth: np.ndarray | None, prediction: np.ndarray | None, classes: Sequence[str]) -> list[tuple[RGB, str]]:
    """The classes that occur, the largest in the truth first, each with its IoU."""
    maps = [m for m in (truth, prediction) if m is not None]
    if not maps:
        return []
    counts = np.bincount(maps[0].ravel().astype(np.int64), minlength=256)
    for other in maps[1:]:
        counts = counts + np.bincount(other.ravel().astype(np.int64), minlength=256) * 1e-6
    present = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i] > 0]
    legend: list[tuple[RGB, str]] = []
    for index in [i for i in present if i != VOID][:_SHOWN_CLASSES]:
        name = classes[index] if index < len(classes) else f"class {index}"
        if truth is not None and prediction is not None:
            name += f" IoU {_iou(truth, prediction, index)}"
        legend.append((canvas.PAPER if _is_background(classes, index) else colour(index), name))
    if VOID in present:
        legend.append((VOID_TINT, "void, not evaluated"))
    return legend


def _iou(truth: np.ndarray, prediction: np.ndarray, index: int) -> str:
    valid = truth != VOID
    true, predicted = (truth == index) & valid, (prediction == index) & valid
    union = (true | predicted).sum()
    return f"{(true & predicted).sum() / union:.2f}" if union else "-"
