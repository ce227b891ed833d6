"""What the numbers of a run say about its health: measured on a batch, and put into words by the Doctor."""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from fastdino.config import TEACHER_IMAGES, Config, resolved

# The names of what `batch_diagnostics` returns, in its order. A new metric of an update is a name here and a
# value there: the trainer, metrics.jsonl and TensorBoard take it from this list.
DIAGNOSTICS = ("teacher_entropy", "prototypes_used", "logit_max", "feature_std", "feature_rank")
_ROWS = 16  # of logits at a time: copies of all of them would be a good part of a step's memory


@torch.no_grad()
def batch_diagnostics(
    teacher: Tensor, center: Tensor, teacher_temp: float, student: Tensor, features: Tensor
) -> Tensor:
    """The state of one batch, float32 (5,) on its device, nothing waiting for it:

    - teacher_entropy: of the teacher's probabilities, mean over rows, in nats; ln K if it says nothing
      (paper, figure 7). The loss is this plus the divergence of the student from the teacher.
    - prototypes_used: exp(entropy of the mean over rows): as many prototypes, equally used, would give it.
    - logit_max: largest absolute logit of the student.
    - feature_std: standard deviation over rows of the normalised features, mean over dimensions, times the
      root of their number: 1 for features in all directions, 0 for all the same.
    - feature_rank: directions that these spread over: (sum of variances)^2 / sum of their squares.

    Args:
        teacher: logits (n, K) before centring.
        center: (K,).
        student: logits (m, K).
        features: the teacher's backbone's (n, D).
    """
    entropy, mean = center.new_zeros((), dtype=torch.float32), torch.zeros_like(center, dtype=torch.float32)
    for rows in teacher.split(_ROWS):
        log_q = torch.log_softmax((rows.float() - center) / teacher_temp, dim=-1)
        q = log_q.exp()
        entropy -= (q * log_q).sum()
        mean += q.sum(dim=0)
    mean /= len(teacher)
    used = torch.special.entr(mean).sum().exp()
    low, high = torch.aminmax(student)
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    apart = unit - unit.mean(dim=0)
    with torch.autocast(apart.device.type, enabled=False):
        products = apart @ apart.T  # (n, n): n is the smaller side
    total, squares = products.diagonal().sum(), products.square().sum()
    spread = apart.square().mean(dim=0).sqrt().mean() * unit.shape[1] ** 0.5
    return torch.stack(
        (
            entropy / len(teacher),
            used,
            torch.maximum(high, -low).float(),
            spread,
            total.square() / squares.clamp_min(1e-30),
        )
    )


class Doctor:
    """Names what goes wrong with a run, from its logged values, in one sentence with what to try.

    A sign must hold for `PATIENCE` log lines to be said, and is said once until it has gone.

    Args:
        config: the run's.
        ranks: of those together, each has its own images; the diagnostics are means over them.
    """

    PATIENCE = 3

    def __init__(self, config: Config, ranks: int = 1) -> None:
        self.config = config
        self.rows = 2 * config.optim.batch_size // config.optim.accumulate // ranks
        self.since: list[list[int]] = [[] for _ in range(5)]  # steps in a row of each sign of `examine`
        self.first_logit, self.skipped = 0.0, deque([(0, 0)], maxlen=self.PATIENCE)

    def before(self, updates: int) -> list[str]:
        """What the configuration alone says will go wrong in a run of that many updates."""
        method, optim = self.config.method, self.config.optim
        sentences = []
        if 1 < optim.epochs <= optim.freeze_last_layer:
            sentences.append(
                f"the prototypes never learn: --freeze-last-layer {optim.freeze_last_layer} lasts all "
                f"{optim.epochs} epochs; 1 is usual"
            )
        momentum = resolved(method.momentum_teacher)
        images = optim.batch_size / max(1e-9, 1 - momentum)
        if method.teacher_update == "momentum" and images < 0.9 * TEACHER_IMAGES:
            needed = 1 - optim.batch_size / TEACHER_IMAGES
            advice = f"raise --momentum-teacher to {needed:.4g} or more" if needed > 0 else "raise it"
            sentences.append(
                f"the teacher averages over {images:.0f} images only (batch {optim.batch_size}, momentum "
                f"{momentum:g}) and follows the noise of its batches: {advice}"
            )
        # A millionth for rounding: 1 / (1 - 0.99) is above 100.
        if method.teacher_update == "momentum" and (1 - momentum) * updates < 1 - 1e-6:
            enough = updates * optim.batch_size >= 5 * TEACHER_IMAGES
            advice = f"lower --momentum-teacher to {1 - 5 / updates:.3g}" if enough else "give more --epochs"
            over = f"averages over {1 / (1 - momentum):.0f} updates" if momentum < 1 else "never moves"
            sentences.append(
                f"--momentum-teacher {momentum:g}: the teacher {over}, but the run has {updates}, so it ends "
                f"near its untrained beginning: {advice}"
            )
        return sentences

    def examine(self, step: int, values: dict[str, Any], last_of_epoch: bool = False) -> list[str]:
        """What the values of a log line, and the lines before it, show."""
        method, run, k = self.config.method, self.config.run, resolved(self.config.model.out_dim)
        entropy, used, logit, distance = (
            values.get(name, math.nan)  # a step whose loss is not finite has none
            for name in ("teacher_entropy", "prototypes_used", "logit_max", "teacher_distance")
        )
        self.first_logit = self.first_logit or logit
        self.skipped.append((step, values["skipped"]))
        (first, before), (last, now) = self.skipped[0], self.skipped[-1]
        just_copied = method.teacher_update == "previous_epoch" and last_of_epoch
        signs = [
            (
                entropy > math.log(k) - 0.1,
                f"teacher entropy is ln K = {math.log(k):.2f}: collapsed to uniform since step {{since}}. "
                f"Sharpen it: --teacher-temp (now {method.teacher_temp:g}) and --warmup-teacher-temp at 0.04 "
                "or lower; if that does not help, lower --lr or raise --momentum-teacher",
            ),
            (
                used < 3 and k >= 16 and self.rows >= 8,
                f"{used:.1f} of {k} prototypes have all images: collapsed to one dimension since step "
                "{since}. Centre: "
                f"--center-momentum at 0.9 (now {method.center_momentum:g}), or --centering sinkhorn",
            ),
            (
                distance < 1e-7 and not just_copied,
                "the teacher equals the student since step {since}, there is nothing to learn from it: "
                + (
                    "lower --momentum-teacher below 1, and see that --lr is above 0"
                    if method.teacher_update in ("momentum", "previous_epoch")
                    else f"--teacher-update {method.teacher_update} does not learn, momentum does"
                ),
            ),
            (
                logit > max(20.0, 10 * self.first_logit),
                f"logits grow, to {logit:.3g} from {self.first_logit:.3g}, since step {{since}}: NaN is on "
                "its way. Set --norm-last-layer, or lower --lr or --clip-grad",
            ),
            (
                run.precision == "fp16" and now - before > max(4, (last - first) / 2),
                f"fp16 overflowed in {now - before} of the last {last - first} steps: use --precision "
                "bf16 or fp32, or lower --lr",
            ),
        ]
        sentences = []
        for steps, (holds, sentence) in zip(self.since, signs, strict=True):
            if not holds:
                steps.clear()
                continue
            steps.append(step)
            if len(steps) == (1 if sentence.startswith("fp16") else self.PATIENCE):
                sentences.append(sentence.format(since=steps[0]))
        return sentences
