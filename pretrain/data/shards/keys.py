"""Which members of a shard form one sample: the part of a member's name that is the sample's key."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pretrain.data.shards.image_files import IMAGE_EXTENSIONS, MIN_DIGITS, frame_number
from pretrain.data.shards.sidecar import ShardIndex

# "first-dot": webdataset's rule. "last-dot": for names with dots in them, such as img_1.0.jpg.
KeyRule = Literal["first-dot", "last-dot"]
_OFTEN = 0.5  # an extension with a dot that at least this share of the samples has is meant: .seg.png


def split_name(name: str, rule: KeyRule = "first-dot") -> tuple[str, str] | None:
    """(key, extension in lower case) of a member, or None where the member is not part of a sample.

    The key is the path up to the first (webdataset) or last dot of its last part. Not part of a sample: a last part
    that has no dot or begins with one, and all members below a first part `__like_this__`.
    """
    top = name.partition("/")[0]
    if len(top) >= 4 and top.startswith("__") and top.endswith("__"):
        return None
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".") if rule == "first-dot" else base.rpartition(".")
    if not stem or not dot:
        return None
    return folder + slash + stem, extension.lower()


def hidden_images(index: ShardIndex) -> list[str]:
    """Names of image members that the first-dot rule hides: a dot in the name becomes part of the extension.

    `img_1.0.jpg` and `img_1.1.jpg` become one sample `img_1` with members "0.jpg" and "1.jpg", and no image. An
    extension such as "seg.png" that most samples have, next to an image, is intended; so are the frames of a clip,
    numbered with four digits or more.
    """
    dotted = np.array([_is_dotted_image(extension) for extension in index.extensions])
    if not dotted.any():
        return []
    plain = np.array([extension in IMAGE_EXTENSIONS for extension in index.extensions])
    sample = index.first.searchsorted(np.arange(len(index.extension)), side="right") - 1
    has_image = np.bincount(sample, weights=plain[index.extension], minlength=len(index)) > 0
    share = np.bincount(index.extension, minlength=len(index.extensions)) / len(index)
    dots = np.bincount(sample, weights=dotted[index.extension], minlength=len(index))
    alone = ~has_image[sample] & (has_image.any() | (dots[sample] > 1))
    hidden = dotted[index.extension] & ((share[index.extension] < _OFTEN) | alone)
    return [f"{index.key(int(sample[i]))}.{index.extensions[index.extension[i]]}" for i in np.flatnonzero(hidden)]


def _is_dotted_image(extension: str) -> bool:
    is_image = "." in extension and extension.rpartition(".")[2] in IMAGE_EXTENSIONS
    return is_image and frame_number(extension, MIN_DIGITS) is None
