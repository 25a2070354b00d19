"""What a backbone can do for an objective, by name. No torch here: a pair that cannot work is refused before training.

image         one feature vector per image (`forward_cls`)
patches       tokens on a grid of patches
class_token   a class token before them
keep          any subset of the patches can be encoded alone
mask          patches can be replaced by a mask token before the first block
layers        the tokens after any block
"""

from __future__ import annotations

Provides = frozenset[str]

CAPABILITIES = ("image", "patches", "class_token", "keep", "mask", "layers")


def vit_provides(*, class_token: bool) -> Provides:
    """Of our own vision transformer: everything, the class token if it has one."""
    return frozenset(CAPABILITIES) - (frozenset() if class_token else {"class_token"})
