"""fastdino: DINO self-distillation with no labels (Caron et al. 2021), fast."""

__version__ = "0.1.0"
