"""x @ weight.T + bias by the faster of torch's two matrix products for float32 on a CPU.

Where: float32 on a CPU with AVX-512 (native.ONEDNN); not under autocast, nor in a graph that is exported.
Everything else calls F.linear.
Why: for float32 torch takes MKL, which keeps to AVX2 on processors that are not Intel's. Two cores of an AMD
EPYC reach 215 GFLOP/s with MKL and 470 with oneDNN, in the same torch (torch 2.15; 2,760 x 384 by 384 x
1,536; docs/performance.md).
How: by mkldnn::_linear_pointwise, which is private to torch; torch has no public way to choose. A torch
without this operator takes F.linear: slower, and the same result up to rounding. A torch that changes the
operator fails tests/ops/test_linear.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdino.ops import native


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification: torch's own."""
    return F.linear(x, weight, bias)


@torch.library.custom_op("fastdino::linear_onednn", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.biased = inputs[2] is not None  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    need_x, need_weight, _ = ctx.needs_input_grad  # type: ignore[attr-defined]
    flat = grad.reshape(-1, grad.shape[-1])
    grad_x = _linear(grad, weight.t(), None) if need_x else None
    grad_weight = None
    if need_weight:
        rows, columns = flat.t(), x.reshape(-1, x.shape[-1]).t()
        # oneDNN copies its first operand when it is transposed: let that be the smaller.
        if rows.shape[0] <= columns.shape[0]:
            grad_weight = _linear(rows, columns, None)
        else:
            grad_weight = _linear(columns, rows, None).t()
    return grad_x, grad_weight, flat.sum(0) if ctx.biased else None  # type: ignore[attr-defined]


_linear.register_autograd(_backward, setup_context=_keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) @ weight (out, in).T + bias (out,): (..., out); autograd and autocast as of F.linear."""
    plain = (
        not native.ONEDNN
        or x.device.type != "cpu"
        or x.dtype != torch.float32
        or weight.dtype != torch.float32
        or x.numel() == 0
        or x.shape[-1:] != weight.shape[1:]  # torch's own says what does not fit
        or (bias is not None and bias.shape != weight.shape[:1])
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_exporting()  # a graph for others holds torch's operators alone
    )
    return F.linear(x, weight, bias) if plain else _linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
