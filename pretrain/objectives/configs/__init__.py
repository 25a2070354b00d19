"""What can be set about each objective, and which views of an image it asks for. No torch here."""

from __future__ import annotations

from pretrain.objectives.configs.beit import BEiTConfig
from pretrain.objectives.configs.beit2 import BEiT2Config
from pretrain.objectives.configs.data2vec import Data2VecConfig
from pretrain.objectives.configs.data2vec2 import Data2Vec2Config
from pretrain.objectives.configs.dino import DINOConfig
from pretrain.objectives.configs.dinov2 import DINOv2Config
from pretrain.objectives.configs.dvae import DVAEConfig
from pretrain.objectives.configs.ibot import IBOTConfig
from pretrain.objectives.configs.ijepa import IJEPAConfig
from pretrain.objectives.configs.mae import MAEConfig
from pretrain.objectives.configs.mocov3 import MoCoV3Config
from pretrain.objectives.configs.simmim import SimMIMConfig
from pretrain.objectives.configs.vqkd import VQKDConfig

ObjectiveConfig = (
    IJEPAConfig
    | Data2VecConfig
    | Data2Vec2Config
    | MAEConfig
    | DINOConfig
    | IBOTConfig
    | DINOv2Config
    | MoCoV3Config
    | SimMIMConfig
    | BEiTConfig
    | BEiT2Config
    | DVAEConfig
    | VQKDConfig
)

__all__ = [
    "BEiT2Config",
    "BEiTConfig",
    "DINOConfig",
    "DINOv2Config",
    "DVAEConfig",
    "Data2Vec2Config",
    "Data2VecConfig",
    "IBOTConfig",
    "IJEPAConfig",
    "MAEConfig",
    "MoCoV3Config",
    "ObjectiveConfig",
    "SimMIMConfig",
    "VQKDConfig",
]
