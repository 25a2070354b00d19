from __future__ import annotations

import inspect
import typing

import pytest
import torch

from pretrain.models.backbones.contract import Backbone, ImageEncoder
from pretrain.models.backbones.timm_backbone import TimmBackbone
from pretrain.models.backbones.vit import ViT
from pretrain.models.tokenizers.dvae import ConvEncoder

SIDE = 32
BACKBONES = {
    "ViT": lambda: ViT((SIDE, SIDE), 8, 3, 16, 2, 2),
    "timm ViT": lambda: TimmBackbone("vit_tiny_patch16_224", (SIDE, SIDE), embed_dim=16, depth=2, num_heads=2),
    "timm ConvNeXt": lambda: TimmBackbone("test_convnext", (SIDE, SIDE)),
}
ENCODERS = BACKBONES | {"ConvEncoder": lambda: ConvEncoder((SIDE, SIDE), 8, embed_dim=8)}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_every_attribute_and_gives_the_promised_shapes(name: str):
    encoder = ENCODERS[name]()
    contract = Backbone if isinstance(encoder, Backbone) else ImageEncoder
    of_transformers = set() if "layers" in encoder.provides else {"num_heads", "mlp_ratio"}
    named = {n for kind in contract.__mro__ for n in vars(kind).get("__annotations__", {}) if not n.startswith("_")}
    named -= set(torch.nn.Module.__annotations__) | of_transformers
    assert [attribute for attribute in sorted(named) if not hasattr(encoder, attribute)] == []
    images = torch.randn(2, 3, SIDE, SIDE)
    rows, columns = encoder.grid_size
    assert encoder(images).shape == (2, encoder.num_prefix_tokens + rows * columns, encoder.embed_dim)
    assert encoder.forward_cls(images).shape == (2, encoder.embed_dim)


@pytest.mark.parametrize("kind", [ViT, TimmBackbone, ConvEncoder])
def test_a_backbone_overrides_what_the_contract_leaves_open(kind: type[ImageEncoder]):
    contract = Backbone if issubclass(kind, Backbone) else ImageEncoder
    opens = {
        name
        for name, member in inspect.getmembers(contract)
        if "raise NotImplementedError" in _source(member) and name in vars(contract) | vars(ImageEncoder)
    }
    assert {"forward", "forward_cls", "release_model"} <= opens
    assert [name for name in sorted(opens) if getattr(kind, name) is getattr(contract, name)] == []


@pytest.mark.parametrize("kind", [ViT, TimmBackbone])
@pytest.mark.parametrize("method", ["forward", "forward_cls", "layers", "intermediate", "set_drop_path"])
def test_a_backbone_takes_the_arguments_of_the_contract(kind: type[Backbone], method: str):
    ours, promised = inspect.signature(getattr(kind, method)), inspect.signature(getattr(Backbone, method))
    assert list(ours.parameters)[: len(promised.parameters)] == list(promised.parameters)
    own = [p for name, p in ours.parameters.items() if name not in promised.parameters]
    assert all(p.default is None for p in own) and (kind is ViT or not own), (
        "only our ViT has more, which may be left out"
    )
    hints, found = typing.get_type_hints(getattr(Backbone, method)), typing.get_type_hints(getattr(kind, method))
    assert {name: hint for name, hint in found.items() if name in hints} == hints


def test_positions_and_class_token_are_started_through_the_contract():
    vit, timm = BACKBONES["ViT"](), BACKBONES["timm ViT"]()
    assert vit.pos_embed is not None and not vit.pos_embed.requires_grad
    before = {name: tensor.clone() for name, tensor in timm.state_dict().items()}
    for backbone in (vit, timm):
        backbone.train_positions()
        backbone.initialize_tokens(std=1e-6)
        backbone.divide_block_outputs()
    assert vit.pos_embed.requires_grad and vit.pos_kind == "learned"
    assert vit.cls_token.abs().max() < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in timm.state_dict().items())
    assert vit.last_attention(torch.randn(1, 3, SIDE, SIDE)).shape == (1, 2, 17, 17)
    assert timm.last_attention(torch.randn(1, 3, SIDE, SIDE)) is None


def _source(member: object) -> str:
    function = member.fget if isinstance(member, property) else member
    return inspect.getsource(function) if inspect.isfunction(function) else ""
