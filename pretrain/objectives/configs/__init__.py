"""The list of objectives, by their configurations: settings, and the views that each needs. No torch here."""

from __future__ import annotations

from pretrain.objectives.configs.beit import BEiTConfig
from pretrain.objectives.configs.beit2 import BEiT2Config
from pretrain.objectives.configs.capi import CAPIConfig
from pretrain.objectives.configs.data2vec import Data2VecConfig
from pretrain.objectives.configs.data2vec2 import Data2Vec2Config
from pretrain.objectives.configs.dino import DINOConfig
from pretrain.objectives.configs.dinov2 import DINOv2Config
from pretrain.objectives.configs.distill import DistillConfig
from pretrain.objectives.configs.dvae import DVAEConfig
from pretrain.objectives.configs.ibot import IBOTConfig
from pretrain.objectives.configs.ijepa import IJEPAConfig
from pretrain.objectives.configs.lejepa import LeJEPAConfig
from pretrain.objectives.configs.mae import MAEConfig
from pretrain.objectives.configs.mocov3 import MoCoV3Config
from pretrain.objectives.configs.simmim import SimMIMConfig
from pretrain.objectives.configs.videomae import VideoMAEConfig
from pretrain.objectives.configs.vqkd import VQKDConfig

ObjectiveConfig = (
    MAEConfig
    | DINOConfig
    | IBOTConfig
    | DINOv2Config
    | MoCoV3Config
    | VideoMAEConfig
    | SimMIMConfig
    | IJEPAConfig
    | CAPIConfig
    | LeJEPAConfig
    | DistillConfig
    | Data2VecConfig
    | Data2Vec2Config
    | BEiTConfig
    | BEiT2Config
    | VQKDConfig
    | DVAEConfig
)
