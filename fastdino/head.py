"""The projection head of DINO: an MLP to a unit vector, then K prototypes (paper, section 3.1 and app. C)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.ops import Linear, linear


class WeightNormLinear(nn.Module):
    """x (..., D) -> x @ w.T (..., K), row k of w being weight_g[k] * weight_v[k] / ||weight_v[k]||; no bias.

    Names and shapes are those of the legacy `torch.nn.utils.weight_norm`, whose modules cannot be deepcopied.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions as `nn.Linear` draws its weight, lengths 1."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """The prototypes (K, D) as they multiply."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class DINOHead(nn.Module):
    """Features (B, in_dim) to logits (B, out_dim): Linear-[BN]-GELU-...-Linear, l2-normalise, prototypes.

    `norm_last_layer` keeps the prototypes at length 1: weight_g gets no gradient. State-dict names are those
    of official DINO: mlp.0, mlp.2, ... (mlp alone if nlayers is 1), last_layer.weight_g, last_layer.weight_v.
    Raises ValueError when nlayers is below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers {nlayers}: give 1 or more")
        layers: list[nn.Module] = []
        width = in_dim
        for _ in range(nlayers - 1):
            layers.append(Linear(width, hidden_dim))
            if use_bn:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
            width = hidden_dim
        layers.append(Linear(width, bottleneck_dim))
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter as official DINO; one that is forgotten here stays NaN, and shows."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d | WeightNormLinear):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        # A norm of 65504 and an eps of 1e-12 do not fit in fp16; float32 and wider are left as they are.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.last_layer(F.normalize(wide, dim=-1).to(x.dtype))
