"""fastdino: DINO self-distillation with no labels (Caron et al. 2021, arXiv:2104.14294), fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdino.dino import DINO
    from fastdino.head import DINOHead
    from fastdino.loss import DINOLoss
    from fastdino.ops import ema_
    from fastdino.optim import Schedule
    from fastdino.update import Update
    from fastdino.vit import VisionTransformer, vit_base, vit_large, vit_small, vit_tiny
    from fastdino.weights import load_backbone

__version__ = "0.1.0"
__all__ = [
    "DINO",
    "DINOHead",
    "DINOLoss",
    "Schedule",
    "Update",
    "VisionTransformer",
    "ema_",
    "load_backbone",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]
_MODULES = {
    "DINO": "dino",
    "DINOHead": "head",
    "DINOLoss": "loss",
    "Schedule": "optim",
    "Update": "update",
    "ema_": "ops",
    "load_backbone": "weights",
}


def __getattr__(name: str) -> Any:
    # on first use, so that fastdino.ops needs torch alone, and fastdino.DINOLoss no data loader
    if name not in __all__:
        raise AttributeError(f"module 'fastdino' has no attribute {name!r}")
    return getattr(import_module(f"fastdino.{_MODULES.get(name, 'vit')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
