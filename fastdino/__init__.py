"""fastdino: DINO self-distillation with no labels (Caron et al. 2021, arXiv:2104.14294), fast."""

from fastdino.dino import DINO, load_backbone
from fastdino.head import DINOHead
from fastdino.loss import DINOLoss
from fastdino.ops import ema_
from fastdino.vit import VisionTransformer, vit_base, vit_large, vit_small, vit_tiny

__version__ = "0.1.0"
__all__ = [
    "DINO",
    "DINOHead",
    "DINOLoss",
    "VisionTransformer",
    "ema_",
    "load_backbone",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
