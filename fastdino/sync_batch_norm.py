"""Batch norm over the batches of all ranks: on a CPU, where torch's own is for GPUs alone, our own."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdino.distributed import mean_over_ranks_, world_size


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks, on a CPU, where torch's own is for GPUs alone.

    Each rank has as many images.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"input of shape {tuple(x.shape)}: give (B, C, ...)")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        out, mean, var = _Standardize.apply(x, self.eps)  # type: ignore[misc]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            n = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum  # type: ignore[arg-type]
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(var * (n / max(n - 1, 1)), weight)
        if self.affine:
            shape = [1, -1] + [1] * (x.ndim - 2)
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


class _Standardize(torch.autograd.Function):
    """Each channel of x (B, C, ...) to mean 0 and variance 1 over all ranks; also mean and variance, (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims, shape = [0, *range(2, x.ndim)], [1, -1] + [1] * (x.ndim - 2)
        mean = mean_over_ranks_(wide.mean(dims))
        centred = wide - mean.view(shape)
        # What rounding left of the mean; and the variance not from squares of x: digits would be lost.
        rest = mean_over_ranks_(centred.mean(dims))
        centred -= rest.view(shape)
        var = mean_over_ranks_(centred.square().mean(dims))
        scale = (var + eps).rsqrt().view(shape)
        out = centred.mul_(scale)
        ctx.save_for_backward(out, scale)
        ctx.dims, ctx.shape, ctx.dtype = dims, shape, x.dtype
        mean += rest
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        out, scale = ctx.saved_tensors
        means = mean_over_ranks_(torch.stack((grad.mean(ctx.dims), (grad * out).mean(ctx.dims))))
        first, second = (m.view(ctx.shape) for m in means)
        return ((grad - first - out * second) * scale).to(ctx.dtype), None


def synchronize_batch_norm(network: nn.Module, device: torch.device) -> bool:
    """Have every batch norm of `network` use the batches of all ranks; whether it has any."""
    found = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    plain = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    others = {type(m).__name__ for m in found if type(m) not in plain}
    if device.type == "cuda" and others:  # timm's, which have an activation inside
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(network)
    elif device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif others:
        raise ValueError(
            f"this network's {', '.join(sorted(others))} cannot be kept in step over ranks on a CPU: train "
            "in one process, on GPUs, or with another --arch"
        )
    else:
        for module in found:
            module.__class__ = SyncBatchNorm
    return bool(found)
