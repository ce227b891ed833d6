"""Sinkhorn-Knopp as a centre: the vector c for which softmax((t - c) / temp) are the balanced assignments.

After them these are q = softmax(t / temp + log a), with one number a_k a prototype, so c = -temp * log a:

    log a = -LSE_n(t_n / temp + log b_n),    log b = -LSE_k(t_k / temp + log a_k),    starting from log b = 0
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastdino.ops import native


def _logsumexp(x: Tensor, dim: int, group: dist.ProcessGroup | None, ranks: bool) -> Tensor:
    top = x.amax(dim)
    if ranks:
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
    total = (x - top.unsqueeze(dim)).exp_().sum(dim)
    if ranks:
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total.log_().add_(top)


@torch.no_grad()
def sinkhorn_center(
    teacher: Tensor,
    temp: float | Tensor,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Centre (K,) for `dino_loss` that makes the teacher's outputs use all prototypes alike.

    In log space, so that no temperature overflows. Rows of all ranks of `group` count (of the default group
    if torch.distributed is initialised), at the cost of two all-reduces of K numbers an iteration.

    Args:
        teacher: logits (..., K), of any floating dtype; rows are balanced together. Their number may differ
            between ranks.
        temp: the teacher's temperature, the same as for `dino_loss`.
        iterations: 1 or more. The last normalisation over prototypes is the softmax of the loss.

    Returns:
        float32, or float64 for float64 logits.

    Raises:
        ValueError: no rows, iterations below 1, or a temperature that is not above 0.

    Source: Caron et al. 2020 (SwAV), section 3.1 and appendix; Caron et al. 2021, table 7.
    """
    if teacher.ndim < 2 or 0 in teacher.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)}: give logits (..., K), none of the sizes 0"
        )
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: give 1 or more")
    native.check_temperature("temp", temp)
    ranks = dist.is_available() and dist.is_initialized()
    x = teacher.flatten(0, -2).to(torch.float64 if teacher.dtype == torch.float64 else torch.float32) / temp
    log_a = -_logsumexp(x, 0, group, ranks)
    for _ in range(iterations - 1):
        log_b = -torch.logsumexp(x + log_a, 1, keepdim=True)
        log_a = -_logsumexp(x + log_b, 0, group, ranks)
    return log_a.mul_(-temp)
