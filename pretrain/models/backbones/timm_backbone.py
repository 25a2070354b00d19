"""A timm model as a backbone, called like our own vision transformer, for what its family provides.

Stochastic depth is timm's and draws from torch's generator, which the engine seeds by step and rank: unlike that of
`ViT`, it depends on how a batch is divided over processes, and the uniform random numbers `drop` are not read. All
other random numbers of a step come with the batch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import DropPath  # pyright: ignore[reportPrivateImportUsage]
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from pretrain.models.backbones import families, swin_options
from pretrain.models.backbones.contract import Backbone, Trunk
from pretrain.models.mechanisms import placement, settings
from pretrain.models.mechanisms.settings import Placed

_CLASSIFIER = "a classifier"  # the name of no parameter
SHARE = 0.5  # the drop rate that a model is built with, to learn each branch's share of it


class TimmBackbone(Backbone):
    """Images to normalized tokens [b, P + N, D] on the model's last grid, P of them class token and registers.

    Initial weights are timm's; nothing is downloaded.

    Args:
        name: of timm's registry. arguments: of `timm.create_model`; of a Swin also those of `swin_options`.
        attention: entries of `mechanisms.settings`: mechanisms on the outputs of its modules, or in place of its
            convolutions.
        img_size: (height, width) in pixels; families that take other sizes resample their positions.

    Attributes:
        model: timm's model. family: see `families`. arguments: given to `timm.create_model`, without name and sizes.
        takes_img_size: it was built for `img_size`.
        the others: see `Backbone`; mlp_ratio is 4 where the network in a block is no MLP; a mask token of width
        mask_dim replaces positions of the stem's output.

    Raises:
        ValueError: timm has no such model, it cannot be built so, or it is not of the family that its name matches.
    """

    blocks_prefix = "model."

    def __init__(
        self,
        name: str,
        img_size: tuple[int, int],
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        attention: Sequence[Mapping[str, Any] | Placed] = (),
        **arguments: Any,
    ):
        super().__init__()
        self.name, self.arguments = name, arguments
        self.img_size, self.in_chans = (img_size[0], img_size[1]), in_chans
        self.family = families.family_of(name)
        self.attention = settings.parse_all(attention)
        self.provides = families.timm_provides(name, arguments) - families.lost(self.attention)
        self.patch_size = families.timm_stride(name, arguments)
        self.class_token = "class_token" in self.provides
        self.grid_size = (img_size[0] // self.patch_size, img_size[1] // self.patch_size)
        of_timm, ours = swin_options.split(self.family.name, arguments)
        self.model, self.takes_img_size = _create(self.family, name, img_size, in_chans, of_timm)
        swin_options.apply(self.model, **ours)
        expected = self.family.class_name
        if expected and type(self.model).__name__ != expected:
            raise ValueError(
                f"timm/{name}: timm built a {type(self.model).__name__}, but the name matches family {expected}"
            )
        self.num_prefix_tokens = 0
        if "layers" in self.provides:
            self.num_prefix_tokens = self.model.num_prefix_tokens
        elif self.class_token:
            self.num_prefix_tokens = 1
        if self.class_token != (getattr(self.model, "cls_token", None) is not None):
            raise ValueError(
                f"timm/{name}: its name does not show whether it has a class token; set class_token in model.args"
            )
        self.embed_dim = self.model.num_features if "patches" in self.provides else self.model.head_hidden_size
        self.depth = len(self.model.blocks) if "layers" in self.provides else 1
        if "layers" in self.provides:
            block = self.model.blocks[0]
            if not hasattr(block, "attn"):
                raise ValueError(
                    f"timm/{name}: its {type(block).__name__} has no attention and MLP one after the other; choose a "
                    "plain vision transformer"
                )
            self.num_heads = block.attn.num_heads
            fc1 = getattr(block.mlp, "fc1", None)
            self.mlp_ratio = fc1.out_features / self.embed_dim if fc1 is not None else 4.0
        self.mask_dim = self._mask_dim() if "mask" in self.provides else 0
        self._shares = [
            (module, module.drop_prob / SHARE) for module in self.model.modules() if isinstance(module, DropPath)
        ]
        self.set_drop_path(drop_path_rate)
        if self.attention:
            front = placement.front(self.attention, in_chans)
            last = self.family.layout == "rows"
            placement.into_network(self.model, self.attention, (in_chans, *self.img_size), channels_last=last)
            if front is not None:
                self.model.add_module("front", front)

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Images [b, C, H, W] -> normalized tokens [b, P + N, D].

        Args:
            keep: int64 [b, k]: encode only these patches; k replaces N. Of plain ViTs only.
            mask: bool [b, n], of the grid of the output or any other that divides that of the stem: there, `mask_token`
                [1, 1, mask_dim] replaces the stem's output.

        Raises:
            ValueError: the family does not provide it.
        """
        self._need("patches")
        x = self._seen(x)
        with self._replaced(x, keep, mask, mask_token):
            return self._tokens(x)

    def forward_cls(
        self,
        x: Tensor,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Images -> one vector each [b, D]: the class token; without one the mean of the patches, as timm pools."""
        x = self._seen(x)
        with self._replaced(x, None, mask, mask_token):
            if self.class_token:
                return self._tokens(x)[:, 0]
            if "layers" in self.provides:
                return self._tokens(x)[:, self.num_prefix_tokens :].mean(1)
            return self.model.forward_head(self.model.forward_features(x), pre_logits=True)

    def layers(
        self,
        x: Tensor,
        indices: Sequence[int],
        *,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> list[Tensor]:
        """The raw tokens [b, P + N, D] after each of the blocks `indices` (ascending from 0), no further than the last.

        Raises:
            ValueError: the family does not provide it, or the indices do not ascend within the depth.
        """
        self._need("layers")
        if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < self.depth:
            raise ValueError(f"indices must ascend within 0 to {self.depth - 1}, got {list(indices)}")
        x, outputs = self._seen(x), list[Tensor]()
        blocks: Any = self.model.blocks
        handles = [blocks[i].register_forward_hook(lambda _, __, out: outputs.append(out)) for i in indices]
        try:
            with self._replaced(x, keep, mask, mask_token):
                self.model.forward_intermediates(
                    x, indices=[indices[-1]], stop_early=True, intermediates_only=True, norm=False
                )
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    def intermediate(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """The normalized tokens after each of the last `n` blocks; models without `layers` have only their last."""
        if n == 1:
            return [self(x)]
        self._need("layers")
        if not 1 <= n <= self.depth:
            raise ValueError(f"n must be between 1 and the depth {self.depth}, got {n}")
        norm: Any = self.model.norm
        return [norm(tokens) for tokens in self.layers(x, range(self.depth - n, self.depth))]

    @property
    def trunk(self) -> Trunk:
        self._need("layers")
        return self.model

    def set_drop_path(self, rate: float, *, uniform: bool = False, subset: bool = False) -> None:
        """timm's stochastic depth, rising from 0 in the first block to `rate`; `uniform`: equal in all but the first.

        Raises:
            ValueError: the model has none, or `subset`, which is of our own ViT.
        """
        if rate and not self._shares:
            raise ValueError(f"timm/{self.name} has no stochastic depth; set the drop path rate to 0")
        if subset:
            raise ValueError(f"timm/{self.name}: stochastic depth by subset is of our own ViT only")
        for module, share in self._shares:
            module.drop_prob = rate if uniform else rate * share

    @property
    def title(self) -> str:
        return f"timm/{self.name}"

    @property
    def num_stages(self) -> int:
        return len(getattr(self.model, "feature_info", ())) or 1

    def layer_numbers(self) -> tuple[dict[str, int], int]:
        """As timm counts them: the stem, each block of each stage; the last layer is that of a classifier."""
        names = [name for name, _ in self.model.named_parameters()]
        matcher = self.model.group_matcher(coarse=False)
        # Names that no rule of timm's matches are in its last layer, as its classifier is, which this model lacks.
        layers: Any = group_with_matcher(((name, name) for name in [*names, _CLASSIFIER]), matcher, reverse=True)
        return layers, layers.pop(_CLASSIFIER)

    def release_model(self) -> dict[str, Any]:
        """What rebuilds it, see `release`."""
        given = {"class": "timm", "name": self.name, "img_size": list(self.img_size), "in_chans": self.in_chans}
        placed = {"attention": [entry.arguments() for entry in self.attention]} if self.attention else {}
        return given | placed | self.arguments

    def set_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them, as far as timm does for this model."""
        self.model.set_grad_checkpointing(enabled)

    def _seen(self, x: Tensor) -> Tensor:
        """The images after the mechanism before the network, if there is one."""
        front = getattr(self.model, "front", None)
        return x if front is None else front(x)

    def _tokens(self, x: Tensor) -> Tensor:
        model = self.model
        match self.family.layout:
            case "tokens":
                return model.forward_features(x)
            case "rows":
                return model.forward_features(x).flatten(1, 2)
            case "conv":
                return model.head.norm(model.forward_features(x)).flatten(2).transpose(1, 2)
            case "stages":
                last = model.forward_features(x, return_intermediates=True)[1][-1]
                return model.head.norm(last.flatten(1, 2))

    @contextmanager
    def _replaced(
        self, x: Tensor, keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None
    ) -> Iterator[None]:
        """In this context mask tokens replace positions of the stem's output, and blocks see the kept patches only."""
        handles = []
        if mask is not None:
            self._need("mask")
            assert mask_token is not None, "a mask needs its mask_token"
            stem: Any = self.model.get_submodule(self.family.stem)
            handles.append(stem.register_forward_hook(_masking(mask, mask_token, self._stem_grid(x))))
        if keep is not None:
            self._need("keep")
            handles.append(self.model.patch_drop.register_forward_hook(_keeping(keep, self.num_prefix_tokens)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stem_grid(self, x: Tensor) -> tuple[int, int]:
        stride = self.patch_size
        if self.family.stem_stride:
            stride = self.arguments.get("patch_size", self.family.stem_stride)
        return x.shape[2] // stride, x.shape[3] // stride

    def _mask_dim(self) -> int:
        embed: Any = self.model.get_submodule(self.family.stem)
        convolutions = [module for module in embed.modules() if isinstance(module, nn.Conv2d)]
        return convolutions[-1].out_channels

    def _need(self, capability: str) -> None:
        if capability not in self.provides:
            raise ValueError(f"timm/{self.name} ({self.family.name}) does not provide {capability!r}")


def facts(name: str, *, img_size: tuple[int, int], in_chans: int, **arguments: Any) -> dict[str, Any]:
    """What the configuration derives from it: patch_size, embed_dim, depth and class_token of timm's model `name`.

    Raises:
        ValueError: as `TimmBackbone`.
    """
    with torch.device("meta"):
        built = TimmBackbone(name, img_size, in_chans, **arguments)
    return {key: getattr(built, key) for key in ("patch_size", "embed_dim", "depth", "class_token")}


def building_problem(arguments: Mapping[str, Any]) -> str | None:
    """Why a model cannot be built with these arguments of `TimmBackbone`; None: it can."""
    try:
        with torch.device("meta"):
            TimmBackbone(**arguments)
    except ValueError as error:
        return str(error)
    return None


def _create(
    family: families.Family, name: str, img_size: tuple[int, int], in_chans: int, arguments: dict[str, Any]
) -> tuple[Any, bool]:
    """The model, and whether it was built for the image size."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ValueError(f"timm has no model {name!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    given = {**family.arguments, **arguments, "in_chans": in_chans, "num_classes": 0}
    sized: dict[str, Any] = {"img_size": img_size} if family.takes_img_size else {}
    options = [{**sized, "drop_path_rate": SHARE}]
    if not family.class_name:  # a network of any kind: with as many of these arguments as its class takes
        options += [{"img_size": img_size}, {"drop_path_rate": SHARE}, {}]
    problem: Exception | None = None
    for option in options:
        try:
            return timm.create_model(name, pretrained=False, **given, **option), "img_size" in option
        except (TypeError, ValueError, AssertionError, RuntimeError, LookupError) as error:
            problem = problem or error
    raise ValueError(f"timm/{name} cannot be built with {given}: {' '.join(str(problem).split())[:300]}") from problem


def _masking(mask: Tensor, mask_token: Tensor, grid: tuple[int, int]) -> Callable[..., Any]:
    """A hook that puts `mask_token` into a stem's output [b, N, C], [b, h, w, C] or [b, C, h, w]; XCiT's is a pair."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (hook(_, __, out[0]), *out[1:])
        token = mask_token.to(out.dtype)
        hidden = _on_grid(mask, grid)
        if out.ndim == 3:
            return torch.where(hidden.flatten(1)[..., None], token, out)
        if out.shape[-1] == mask_token.shape[-1] and out.shape[1:3] == grid:
            return torch.where(hidden[..., None], token[0], out)
        return torch.where(hidden[:, None], token.reshape(1, -1, 1, 1), out)

    return hook


def _on_grid(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask bool [b, n] of a grid that divides `grid`, repeated to it: [b, h, w]."""
    factor = math.isqrt(grid[0] * grid[1] // mask.shape[1])
    coarse = (grid[0] // max(factor, 1), grid[1] // max(factor, 1))
    if (
        not factor
        or coarse[0] * factor != grid[0]
        or coarse[1] * factor != grid[1]
        or math.prod(coarse) != mask.shape[1]
    ):
        raise ValueError(f"a mask of {mask.shape[1]} positions does not divide the stem's grid {grid[0]} x {grid[1]}")
    return mask.unflatten(1, coarse).repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _keeping(keep: Tensor, num_prefix: int) -> Callable[..., Tensor]:
    """A hook that leaves the prefix and the patches `keep` of tokens [b, P + N, D]."""

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        patches = out[:, num_prefix:].gather(1, keep[..., None].expand(-1, -1, out.shape[2]))
        return torch.cat([out[:, :num_prefix], patches], dim=1)

    return hook
