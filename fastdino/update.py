"""One update of DINO: loss and gradients of a batch, the student's step, the centre, the teacher."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from fastdino import distributed, optim, parallel
from fastdino.backbones import build_backbone
from fastdino.config import Config
from fastdino.data.crops import normalize
from fastdino.data.feed import Piece, Tally
from fastdino.diagnostics import DIAGNOSTICS, batch_diagnostics
from fastdino.dino import DINO
from fastdino.optim import StepSettings

COLUMNS = ("loss", "grad_norm", *Tally._fields, *DIAGNOSTICS)
"""Names of the numbers in the row that an update returns."""


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The compute type that --precision names; auto takes bf16 where the device computes it natively."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of the random numbers within a step (stochastic depth), so that a continued run draws the same.

    Ranks draw apart from one another: each has samples of its own.
    """
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])


class Update:
    """Student, teacher, loss and optimiser, and one call that makes one update (paper, algorithm 1).

    A trainer is a loop around it:

        schedule = fastdino.Schedule(config, steps_per_epoch)
        update = fastdino.Update(config, "cuda")
        for step in range(schedule.total_steps):
            row = update([crops], schedule.at(step))

    It seeds torch's global random generator, once from `config.run.seed` for the initial weights and in each
    update from seed, step and rank for stochastic depth: a continued run draws what it would have drawn.
    Where torch.distributed has several ranks, each makes an `Update` and calls it with its part of the batch.

    Args:
        config: the run: model, method, optim and crops; of `run` the seed, precision, compile, parallel,
            attention and activation_checkpointing. No number of it may be `auto` (see `config.resolve_auto`).
        device: where everything lives.
        load_weights: begin with `config.model.init_from`, where that is given. A run that is continued from a
            checkpoint needs no file of weights.

    Attributes:
        COLUMNS: names of the numbers in the row that an update returns.
        dino: the `DINO` with student, teacher and loss.
        student: what is called in the student's place: itself, or its DistributedDataParallel.
        optimizer: torch's fused AdamW or SGD, or LARS.
        scaler: of fp16's loss; disabled in other precisions.
        dtype: what autocast computes in.
        parallel: "ddp", "fsdp" or "hsdp"; what several ranks do.
        notes: a sentence on each thing that was taken from `init_from`, or was not.

    Raises:
        ValueError: a configuration that cannot work, or weights that do not fit; the message says why.
        FileNotFoundError: no such file of weights.
    """

    COLUMNS = COLUMNS

    def __init__(
        self, config: Config, device: torch.device | str = "cpu", *, load_weights: bool = True
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.dtype = choose_precision(config.run.precision, self.device)
        torch.manual_seed(config.run.seed)
        with distributed.raise_on_all_ranks():
            self.dino = DINO(config)
            given = config.model.init_from if load_weights else ""
            self.notes = self.dino.load_weights(given) if given else []
            self.dino.to(self.device).train()
        self.parallel = parallel.choose_parallel(config.run.parallel, self.dino.student.backbone)
        partly = config.optim.head_warmup_steps > 0
        self.student = parallel.parallelize(
            self.dino.student, config.run, self.device, self.dtype, partly=partly
        )
        parallel.parallelize(self.dino.teacher, config.run, self.device, self.dtype, trained=False)
        self.optimizer = optim.make_optimizer(self.dino.student, config.optim)
        self.sharded = any(map(distributed.is_sharded, self.dino.teacher.parameters()))
        # Over shards an overflow on any rank is one on all.
        grad_scaler = ShardedGradScaler if self.sharded else torch.amp.GradScaler
        self.scaler = grad_scaler(self.device.type, enabled=self.dtype == torch.float16)
        # Put back where a step is not finite: the centre, and the statistics of batch norm.
        self._buffers = [b for b in self.dino.buffers() if b.is_floating_point()]
        self._no_diagnostics = torch.zeros(len(DIAGNOSTICS), device=self.device)

    def __call__(self, pieces: Iterable[Piece | Sequence[Tensor]], settings: StepSettings) -> Tensor:
        """Make one update. Nothing in it waits for the device.

        Where the loss or the norm of the gradients is not finite, neither student nor optimiser change, and
        where the loss is not, neither do centre and statistics of batch norm: decided on the device.

        Args:
            pieces: this rank's part of the batch in `config.optim.accumulate` pieces of equal size, of which
                as many are taken. A piece is V crops (B, 3, side, side), the global ones first: uint8, which
                is normalised here by `config.data.crops`, or floating, which is taken as it is. Or it is a
                `data.feed.Piece`, which adds what the loader reports.
            settings: the step's, of `optim.Schedule.at`.

        Returns:
            A row of `COLUMNS`, float32 (len(COLUMNS),) on the device: the loss, mean over the batch and all
            ranks; the norm of the gradients before clipping; the loader's tally, mean over ranks; and where
            `settings.logs`, the diagnostics of the last piece, else zeros.

        Raises:
            ValueError: fewer pieces than `config.optim.accumulate`, or crops of other numbers or sizes than
                the networks take.
        """
        self._apply(settings)
        before = [b.clone() for b in self._buffers]
        wait_for_mean = self.gradients(pieces, settings)
        norm = self.clip(settings)
        loss, tally, diagnostics, teacher_mean = wait_for_mean()
        finite = torch.isfinite(loss)
        before_student = self.config.method.teacher_update == "previous_iteration"
        if before_student:
            self.move_teacher(settings)
        self.step_student(finite[0] & torch.isfinite(norm))
        self.dino.loss.move_center(teacher_mean)
        for buffer, old in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, old))
        if not before_student:
            self.move_teacher(settings)
        return torch.cat((loss, norm.reshape(1).to(loss.dtype), tally, diagnostics))

    def _apply(self, settings: StepSettings) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr
        self.optimizer.param_groups[0]["weight_decay"] = settings.weight_decay
        torch.manual_seed(step_seed(self.config.run.seed, settings.step, distributed.rank()))

    def gradients(
        self, pieces: Iterable[Piece | Sequence[Tensor]], settings: StepSettings
    ) -> Callable[[], list[Tensor]]:
        """Forward and backward passes of all pieces.

        Returns:
            A function that waits for the all-reduce, which runs behind the last backward pass, and returns
            the means over ranks: the loss (1,), the tally (len(Tally._fields),), the diagnostics
            (len(DIAGNOSTICS),), and the teacher's mean logits (K,).
        """
        n = self.config.optim.accumulate
        loss = torch.zeros((), device=self.device)
        means: list[Tensor] = []
        wait_for_mean: Callable[[], list[Tensor]] | None = None
        for i, piece in zip(range(n), pieces, strict=False):
            views, tally = piece if isinstance(piece, Piece) else (piece, Tally())
            crops = [self.normalize(view) for view in views]
            last = i == n - 1
            with parallel.gradient_sync(self.student, gradients=last):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    piece_loss, mean, diagnostics = self.forward(crops, settings, last and settings.logs)
                loss += piece_loss.detach() / n
                means.append(mean)
                if last:
                    # What all ranks must know travels while the backward pass runs.
                    wait_for_mean = self._start_mean(loss, tally, diagnostics, torch.stack(means).mean(dim=0))
                self.scaler.scale(piece_loss / n).backward()
        if wait_for_mean is None:
            raise ValueError(f"an update takes {n} pieces (--accumulate), but there were {len(means)}")
        return wait_for_mean

    def normalize(self, view: Tensor) -> Tensor:
        """A view on the device; uint8 becomes float32, normalised by `config.data.crops`."""
        view = view.to(self.device, non_blocking=True)
        return view if view.is_floating_point() else normalize(view, self.config.data.crops)

    def forward(
        self, crops: list[Tensor], settings: StepSettings, diagnose: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of one piece: the loss (), the teacher's mean logits (K,), the diagnostics (zeros unless asked)."""
        dino, temp = self.dino, settings.teacher_temp
        with torch.no_grad():
            teacher = dino.teacher(crops[: dino.n_global])
        student = self.student(crops, settings.freeze_backbone)
        diagnostics = self._no_diagnostics
        if diagnose:
            center = dino.loss.current_center(teacher, temp)
            diagnostics = batch_diagnostics(teacher, center, temp, student, dino.teacher.features)
        # The gradient is written over the student's logits: after the loss nothing reads them.
        loss, mean = dino.loss.cross_entropy(student, teacher, temp, inplace_backward=True)
        return loss, mean, diagnostics

    def _start_mean(
        self, loss: Tensor, tally: Tally, diagnostics: Tensor, teacher_mean: Tensor
    ) -> Callable[[], list[Tensor]]:
        numbers = [torch.full((), x, device=self.device) for x in tally]
        sizes = [1, len(tally), len(diagnostics), len(teacher_mean)]
        wait = distributed.all_reduce_mean_async(
            torch.cat((torch.stack((loss, *numbers)), diagnostics, teacher_mean))
        )
        return lambda: list(wait().split(sizes))

    def clip(self, settings: StepSettings) -> Tensor:
        """Clip the student's gradients; returns the norm () that they had together, on the device."""
        cfg = self.config.optim
        if settings.freeze_last_layer:
            optim.cancel_last_layer_gradients(self.dino.student)
        optim.attach_shard_gradients(self.optimizer)
        self.scaler.unscale_(self.optimizer)
        return optim.clip_gradients(self.dino.student, cfg.clip_grad, cfg.clip)

    def step_student(self, finite: Tensor) -> None:
        """The optimiser's step, which changes nothing where `finite` () is False; drops the gradients."""
        # Set here, not by scaler.step: ShardedGradScaler sums found_inf over ranks, and torch's fused
        # optimisers take a value of 2 for no overflow.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.dino.student.zero_grad(set_to_none=True)  # the sharded parameters still hold theirs

    def move_teacher(self, settings: StepSettings) -> None:
        """The teacher's update: its momentum, or what --teacher-update names."""
        self.dino.update_teacher(settings.momentum, new_epoch=settings.ends_epoch)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a checkpoint holds: networks, centre, optimiser. Writing to them restores it."""
        state = optim.optimizer_tensors(self.dino.student, self.optimizer)
        return self.dino.state_dict() | {f"optimizer.{name}": value for name, value in state.items()}

    def teacher_backbone(self) -> nn.Module:
        """The teacher's backbone in evaluation mode; a copy where it is sharded, for which all ranks call.

        `dino.teacher.train()` afterwards puts the teacher back.
        """
        backbone = self.dino.teacher.backbone
        if not self.sharded:
            return backbone.eval()
        copy = build_backbone(self.config.model, self.config.data.crops.global_crops_size)
        copy.load_state_dict({n: distributed.full_tensor(t) for n, t in backbone.state_dict().items()})
        return copy.to(self.device).eval()
