"""Every number of a run as one frozen dataclass tree, and the presets as Python values.

The docstring under a field is its `--help`. Values that cannot work raise when the config is made, naming the
flag and what to do. Defaults are those of official DINO (Caron et al. 2021, arXiv:2104.14294) for ViT-S/16.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")
Number = TypeVar("Number", int, float)
Range = tuple[float, float]
Auto = Literal["auto"]  # `resolve_auto` puts a number in its place


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def flag(name: str) -> str:
    """The flag of a field by its name, or its dotted name."""
    return f"--{name.rpartition('.')[2].replace('_', '-')}"


def _check_each(config: Any, names: str, ok: Callable[[Any], bool], advice: str) -> None:
    """Check the fields of these names, one after the other; a number that is still `auto` passes."""
    for name in names.split():
        value = getattr(config, name)
        _check(value == "auto" or ok(value), f"{flag(name)} {value}: {advice}")


def _check_least(config: Any, least: int, names: str, unit: str = "") -> None:
    """Check that the fields of these names are `least` or more."""
    _check_each(config, names, lambda value: value >= least, f"give {least} or more{unit}")


@dataclass(frozen=True, kw_only=True)
class CropPolicy:
    """The multi-crop augmentation as a value: sizes, scales, probabilities, strengths (paper, section 3 and
    appendix B)."""

    global_crops_size: int = 224
    """Side of the two global crops in pixels; the teacher sees these."""
    global_crops_scale: Range = (0.4, 1.0)
    """Smallest and largest share of the image's area in a global crop. Without local crops, 0.14 1 is
    advised."""
    local_crops_number: int = 8
    """Local crops per image; only the student sees them. 0 turns multi-crop off."""
    local_crops_size: int = 96
    """Side of the local crops in pixels."""
    local_crops_scale: Range = (0.05, 0.4)
    """Smallest and largest share of the image's area in a local crop."""
    aspect_ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest width-to-height ratio of a crop, before it is resized to a square."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Colour jitter draws the brightness factor from 1 - this to 1 + this."""
    contrast: float = 0.4
    """Colour jitter draws the contrast factor from 1 - this to 1 + this."""
    saturation: float = 0.2
    """Colour jitter draws the saturation factor from 1 - this to 1 + this."""
    hue: float = 0.1
    """Colour jitter shifts the hue by up to this share of the colour circle."""
    grayscale: float = 0.2
    """Probability of removing colour."""
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur in the first global, the second global and the local crops."""
    blur_radius: Range = (0.1, 2.0)
    """Smallest and largest radius of the blur in pixels of the crop (Pillow's radius: the standard
    deviation)."""
    solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarisation in the first global, the second global and the local crops."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channel, subtracted from pixels in 0 to 1."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the red, green and blue channel, divided by."""

    def __post_init__(self) -> None:
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            _check(
                0 < low <= high <= 1,
                f"{flag(name)} {low} {high}: give two shares of the area, 0 < low <= high <= 1",
            )
        low, high = self.aspect_ratio
        _check(0 < low <= high, f"--aspect-ratio {low} {high}: give two positive ratios, the smaller first")
        low, high = self.blur_radius
        _check(0 <= low <= high, f"--blur-radius {low} {high}: give two radii in pixels, the smaller first")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            values = getattr(self, name)
            values = values if isinstance(values, tuple) else (values,)
            _check(
                all(0 <= p <= 1 for p in values),
                f"--{name} {' '.join(map(str, values))}: a probability lies between 0 and 1",
            )
        _check_each(self, "brightness contrast saturation", lambda x: x >= 0, "a strength is 0 or more")
        _check(0 <= self.hue <= 0.5, f"--hue {self.hue}: the shift lies between 0 and 0.5")
        _check(all(s > 0 for s in self.std), f"--std {self.std}: a standard deviation is above 0")
        _check_least(self, 0, "local_crops_number")
        sizes = "global_crops_size local_crops_size"
        _check_each(self, sizes, lambda x: 1 <= x <= 4096, "a crop has 1 to 4096 pixels a side")
        _check(
            self.local_crops_number == 0 or self.local_crops_size <= self.global_crops_size,
            f"--local-crops-size {self.local_crops_size} is above --global-crops-size "
            f"{self.global_crops_size}: local crops are the smaller ones",
        )

    @property
    def n_global(self) -> int:
        """Views that the teacher sees, always the first ones."""
        return 2

    @property
    def n_views(self) -> int:
        """Views of one image: the global crops, then the local ones."""
        return self.n_global + self.local_crops_number


CROPS: dict[str, CropPolicy] = {
    "dino": CropPolicy(),
    "two-crop": CropPolicy(local_crops_number=0, global_crops_scale=(0.14, 1.0)),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they are cropped."""

    data: str = ""
    """The images: a folder (searched recursively; class sub-folders become labels, none are needed), a text
    file with one path a line, or tar shards: a folder of them, 'DIR/{000..127}.tar' or 'DIR/*.tar'."""
    val: str = ""
    """Labelled images to test k-NN on, with --data as the neighbours; where --data has no labels, each by the
    others of --val. Without it, each image of --data is classified by the others."""
    include: tuple[str, ...] = ()
    """Patterns as 'photos/*', where * stands for slashes too: of --data and --val only images are taken whose
    path below them fits one."""
    exclude: tuple[str, ...] = ()
    """Patterns as 'masks/*' '*_depth.png': images of --data and --val whose path below them fits one are left
    out."""
    loader: Literal["auto", "torchvision", "dali"] = "auto"
    """What makes the crops, by the same arithmetic. torchvision: the CPU's cores. dali: the device, where
    DALI decodes. auto: dali on a GPU, if it is installed."""
    workers: int = -1
    """Processes that read and crop images; 0 loads in the training process, -1 chooses by the machine's
    cores."""
    shuffle_buffer: int = 16384
    """Shards are read one after the other, in another order each epoch, and their images are mixed within a
    window of about N images; 0 mixes all, which reads at random places. Folders are always mixed whole."""
    jpeg_scaling: bool = False
    """Decode a JPEG at a half, quarter or eighth of its size where that leaves every crop's box as large as
    the crop: several times faster for photographs of many megapixels, with slightly other pixels. Not with
    --loader dali, which decodes at full size."""
    max_unreadable: float = 0.01
    """Unreadable files are skipped and named; the run stops when more than this share of an epoch is
    unreadable."""
    crops: CropPolicy = field(default_factory=CropPolicy)

    def __post_init__(self) -> None:
        _check(
            self.workers >= -1, f"--workers {self.workers}: give 0 or more, or -1 to choose by the machine"
        )
        _check_least(self, 0, "shuffle_buffer", " images")
        _check(
            0 <= self.max_unreadable <= 1,
            f"--max-unreadable {self.max_unreadable}: a share lies between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone and its projection head (paper, section 3.1 and appendix C)."""

    arch: str = "vit_small"
    """Backbone: vit_nano, vit_tiny, vit_small, vit_base, vit_large, vit_huge or vit_giant; a ResNet of
    torchvision (resnet18 ... resnet152, resnext50_32x4d, wide_resnet50_2, ...); torchvision:NAME or timm:NAME
    for any other classifier of those, as torchvision:convnext_tiny or timm:xcit_small_12_p16_224."""
    patch_size: int = 16
    """Side of the patches of vit_* in pixels. Half the patch means four times the tokens."""
    num_register_tokens: int = 0
    """Extra tokens of vit_* that belong to no patch and clean up attention maps; 4 is usual."""
    layer_scale: float = 0.0
    """Start of a learnt factor per channel on each branch of vit_*; 0: none. DINOv2 has 1e-5."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the student's last block, where the backbone has any; it grows linearly from 0 at
    the first."""
    init_from: str = ""
    """File of weights to begin with: official DINO's (a full checkpoint or a backbone), DINOv2's, timm's, a
    run's folder or its teacher.safetensors. A head that fits is taken too, else a new one begins. Position
    embeddings are resized."""
    out_dim: int | Auto = 65536
    """Prototypes K: outputs of the head. Fewer suit small data sets; auto: one for about eight images."""
    norm_last_layer: bool = True
    """Keep the prototypes at length 1. True is steadier; False can do better with ViT-S."""
    use_bn_in_head: bool = False
    """Batch normalisation in the head. Helps small batches on small data leave the uniform solution."""
    head_layers: int = 3
    """Layers of the head's MLP."""
    head_hidden_dim: int = 2048
    """Width of the head's hidden layers."""
    bottleneck_dim: int = 256
    """Width of the l2-normalised vector before the prototypes."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "patch_size out_dim head_layers head_hidden_dim bottleneck_dim")
        _check_least(self, 0, "num_register_tokens layer_scale")
        _check(
            0 <= self.drop_path_rate < 1,
            f"--drop-path-rate {self.drop_path_rate}: give 0 up to, not including, 1",
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Self-distillation: temperatures, centre, teacher (paper, section 3.1, appendix D)."""

    student_temp: float = 0.1
    """Softmax temperature of the student."""
    teacher_temp: float = 0.04
    """Softmax temperature of the teacher after its warm-up. Above 0.07 training tends to collapse."""
    warmup_teacher_temp: float = 0.04
    """Teacher temperature at the start; lower it if the loss does not fall."""
    warmup_teacher_temp_epochs: int | Auto = 0
    """Epochs over which the teacher temperature rises linearly. auto: 30, official DINO's, or three tenths of
    the run where that is less. If longer than the run: three tenths of it."""
    centering: Literal["ema", "sinkhorn"] = "ema"
    """What keeps the teacher from collapsing to one prototype: a centre that follows its outputs, or
    Sinkhorn-Knopp on each batch (on each piece of it with --accumulate)."""
    center_momentum: float = 0.9
    """Momentum of the centre subtracted from the teacher's outputs (centering ema)."""
    momentum_teacher: float | Auto = 0.996
    """Teacher momentum at the start; rises to 1 along a cosine. Small batches want more: 0.9995 at 256; short
    runs less. auto: by batch and length of the run."""
    teacher_update: Literal["momentum", "previous_epoch", "previous_iteration", "student_copy"] = "momentum"
    """Where the teacher's weights come from. All but momentum are for study (paper, figure 6); the last two
    do not learn."""

    def __post_init__(self) -> None:
        temperatures = "student_temp teacher_temp warmup_teacher_temp"
        _check_each(self, temperatures, lambda x: x > 0, "a temperature is above 0")
        momenta = "center_momentum momentum_teacher"
        _check_each(self, momenta, lambda x: 0 <= x <= 1, "a momentum lies between 0 and 1")
        _check_least(self, 0, "warmup_teacher_temp_epochs")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation (paper, section 3.2)."""

    epochs: int = 100
    """Passes over the images."""
    batch_size: int = 64
    """Images per update, over all devices (official DINO's flag counts those of one: its 64 on 8 GPUs are
    512). The learning rate scales with it."""
    accumulate: int = 1
    """Pieces each batch is run in, one after the other: same mathematics, that much less memory."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """adamw for ViT; sgd or lars for convolutional networks."""
    lr: float | Auto = 5e-4
    """Peak learning rate at batch 256; scaled linearly with --batch-size. auto: by network and batch, for
    adamw."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine; not scaled."""
    warmup_epochs: float | Auto = "auto"
    """Epochs over which the learning rate rises linearly from 0. auto: 10, official DINO's, or a tenth of the
    run where that is less. If longer than the run: a tenth of it."""
    weight_decay: float = 0.04
    """Weight decay at the start; biases and one-dimensional parameters have none."""
    weight_decay_end: float = 0.4
    """Weight decay at the end of its cosine."""
    clip_grad: float = 3.0
    """Largest gradient norm; 0 turns clipping off."""
    clip: Literal["per_tensor", "global"] = "per_tensor"
    """per_tensor clips each parameter's gradient by its own norm, as official DINO; global all of them by one
    norm."""
    freeze_last_layer: int = 1
    """Epochs during which the prototypes get neither gradient nor decay."""
    head_warmup_steps: int = 0
    """Updates before the others in which the head alone learns, the backbone of --init-from held still; the
    learning rate rises to its peak over them, and begins anew after them. If the run has no more: a tenth of
    them."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "epochs batch_size accumulate")
        _check(
            self.batch_size % self.accumulate == 0,
            f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}: change one",
        )
        _check_least(self, 0, "lr min_lr warmup_epochs weight_decay weight_decay_end clip_grad")
        _check(
            self.lr != "auto" or self.optimizer == "adamw",
            f"--lr auto is for adamw: give {self.optimizer} a number",
        )
        _check_least(self, 0, "freeze_last_layer", " epochs")
        _check_least(self, 0, "head_warmup_steps", " updates")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where and how it runs; none of it changes what is learnt but by rounding, except the seed."""

    out: str = ""
    """Folder of the run. If it holds a run of the same configuration, that run is continued."""
    extend: bool = False
    """Continue the run in --out with another number of --epochs. The schedules span all of them, so the
    learning rate jumps."""
    change: bool = False
    """Continue the run in --out with other flags, images or precision, as long as its tensors keep their
    shapes. What changed is kept in changes.jsonl."""
    device: str = "auto"
    """auto (a CUDA GPU if there is one), cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Compute type; parameters and loss stay fp32. auto: bf16 where the device computes it natively, else
    fp16 on a GPU and fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block of a ViT, or of another backbone as a whole. auto: on a GPU. The first step
    then takes a minute."""
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several ranks share a model. ddp: each holds all of it. fsdp: each holds a part, gathered when
    needed. hsdp: fsdp within a node, ddp between nodes. auto: ddp up to ViT-B; from ViT-L on fsdp, over
    several nodes hsdp."""
    attention: Literal["auto", "sdpa", "varlen", "xformers"] = "auto"
    """Kernel for the attention of vit_*. auto tries on a GPU what is installed and takes the fastest."""
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and compute the block again there: far less
    memory, a quarter more time. vit_* and timm's."""
    seed: int = 0
    """Initial weights, image order, crops and stochastic depth follow from it alone."""
    log_every: int = 10
    """Updates between two lines of metrics.jsonl; only these wait for the GPU. Where there are several ranks
    they stop for a signal at these."""
    save_every: int = 500
    """Updates between two checkpoints. One is also written after each epoch of --keep-every-epochs, and at
    the end."""
    keep: int = 2
    """Newest checkpoints to keep."""
    keep_every_epochs: int = 20
    """Keep one checkpoint every N epochs for good, beside the newest; 0 keeps none."""
    knn_every_epochs: int = 10
    """Epochs between two k-NN evaluations of the teacher, where there are labels; 0 turns them off."""
    knn_images: int = 20000
    """Take N images, evenly spread, on either side of those k-NN evaluations; 0 takes all.
    fastdino-eval takes all."""
    max_nonfinite: int = 20
    """Stop after N non-finite steps in a row. Each is skipped and reported."""
    wandb: str = ""
    """Weights & Biases project to log to, beside metrics.jsonl and TensorBoard; needs pip install
    'fastdino[wandb]'."""

    def __post_init__(self) -> None:
        _check_least(self, 1, "log_every save_every keep max_nonfinite")
        _check_least(self, 0, "keep_every_epochs knn_every_epochs knn_images seed")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `to_dict` and `from_dict` carry it through config.json and teacher.safetensors."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        crops, patch = self.data.crops, self.model.patch_size
        if self.model.arch.startswith("vit"):
            sizes = [crops.global_crops_size] + [crops.local_crops_size] * (crops.local_crops_number > 0)
            _check(
                min(sizes) >= patch,
                f"a crop of {min(sizes)} pixels holds no patch of {patch}: lower --patch-size",
            )
        _check(
            not self.optim.head_warmup_steps or bool(self.model.init_from),
            f"--head-warmup-steps {self.optim.head_warmup_steps} holds the backbone still, and a new one has "
            "learnt nothing: give --init-from, or 0",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The config of class `cls` from what `to_dict` gave.

    Raises:
        ValueError: on anything else: a field this version does not know, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} is {reprlib.repr(values)}, not its fields: was the file changed?")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := set(values) - set(fields):
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(sorted(unknown))[:200]}: written by another version?"
        )
    made: dict[str, Any] = {}
    for name, value in values.items():
        kind = fields[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            value = from_dict(kind, value)
        elif not _is_of(value, kind):
            raise ValueError(f"{flag(name)} is {reprlib.repr(value)}, which it cannot be")
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return cls(**made)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of the type of a field; whole numbers are floats too, and lists are tuples."""
    inner = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in inner
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return len(value) == len(kinds) and all(map(_is_of, value, kinds))
    if inner:
        return any(_is_of(value, one) for one in inner)
    if kind in (int, float):
        return type(value) in (int, kind) and -(2**62) < value < 2**62  # neither NaN nor infinite
    return type(value) is kind and not (kind is str and "\0" in value)


# Flags of official DINO, solo-learn, lightly and timm, and what is given here in their place; by underscores.
ELSEWHERE: dict[str, str] = {
    "data_path data_dir data_root train_data_path dataset_path imagenet": "--data",
    "val_dir val_data_path": "--val",
    "output_dir out_dir output save_dir checkpoint_dir log_dir default_root_dir": "--out",
    "resume resume_from resume_from_checkpoint checkpoint auto_resume": "not needed: the same command "
    "with the same --out goes on",
    "batch_size_per_gpu batch_size_per_device": "--batch-size, of all GPUs together",
    "accum_iter grad_accum_steps accumulate_grad_batches": "--accumulate, the pieces that --batch-size is "
    "divided into",
    "num_workers n_workers": "--workers, of each process; it is chosen by the machine",
    "saveckp_freq save_freq save_frequency checkpoint_frequency": "--keep-every-epochs, or --save-every in "
    "updates",
    "max_epochs num_epochs": "--epochs",
    "max_steps total_steps": "--epochs, which counts passes over the images",
    "learning_rate base_lr": "--lr, at a batch of 256",
    "lr_min eta_min": "--min-lr",
    "wd": "--weight-decay",
    "opt": "--optimizer",
    "gradient_clip_val max_grad_norm": "--clip-grad",
    "use_fp16 fp16 amp": "--precision fp16, bf16 or fp32; it is chosen by the machine",
    "model backbone": "--arch, or another preset",
    "drop_path": "--drop-path-rate",
    "img_size image_size crop_size input_size": "--global-crops-size and --local-crops-size",
    "num_small_crops n_local_crops num_local_crops": "--local-crops-number",
    "pretrained pretrained_weights checkpoint_path load_weights": "--init-from",
    "num_prototypes": "--out-dim",
    "base_tau_momentum momentum_start": "--momentum-teacher",
    "devices num_gpus gpus world_size local_rank dist_url num_nodes": "torchrun --nproc-per-node N -m "
    "fastdino.train, or srun",
    "print_freq log_interval log_every_n_steps": "--log-every",
    "wandb_project project": "--wandb",
}


def hints(arguments: list[str]) -> list[str]:
    """A sentence on each flag of other trainers in a command line, and on each value of a switch."""
    here = {name: text for names, text in ELSEWHERE.items() for name in names.split()}
    switches = {name for name, default in _leaves(Config()).items() if isinstance(default, bool)}
    sentences = []
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        word, _, value = given.partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            continue
        if name in here:
            sentences.append(f"{word} of other trainers is here {here[name]}")
        elif name in switches and (value or following).lower() in ("true", "false", "0", "1"):
            sentences.append(f"{word} takes no value here: give {flag(name)} or {flag(f'no_{name}')}")
    return list(dict.fromkeys(sentences))


def _leaves(config: Any) -> dict[str, Any]:
    """All flags, by underscores, with their values."""
    leaves: dict[str, Any] = {}
    for name, value in vars(config).items():
        leaves |= _leaves(value) if dataclasses.is_dataclass(value) else {name: value}
    return leaves


def warmup_length(asked: float | Auto, published: float, share: float, epochs: int) -> float:
    """Epochs of a warm-up: as asked for, or its share of a run that is shorter than that.

    auto: as published, or its share of the run where that is less. A fixed number would make a short run one
    long warm-up.
    """
    if asked == "auto":
        return min(published, share * epochs)
    return asked if asked <= epochs else share * epochs


def lr_warmup(config: OptimConfig) -> float:
    """Epochs of learning-rate warm-up; official DINO's are 10, a tenth of 100."""
    return warmup_length(config.warmup_epochs, 10, 0.1, config.epochs)


def temperature_warmup(config: Config) -> int:
    """Epochs of teacher-temperature warm-up; the published recipe's are 30, three tenths of 100."""
    return round(warmup_length(config.method.warmup_teacher_temp_epochs, 30, 0.3, config.optim.epochs))


IMAGES_A_PROTOTYPE = 8
TEACHER_IMAGES = 2000  # that a teacher should average over at the least


def resolve_auto(config: Config, images: int, updates: int, width: int) -> tuple[Config, list[str]]:
    """The config with a number for each `auto`, and a sentence on each with the reason.

    Official DINO's numbers are for 1.28 million images in batches of 512 and more. On a few thousand in small
    batches, 65,536 prototypes are more than there are images to tell apart, a teacher of momentum 0.996 or
    above is still near its beginning when the run ends, and a rate scaled linearly with the batch hardly
    moves.

    Args:
        images: N, of the set.
        updates: of the whole run.
        width: of the tokens, or 384 for networks without.
    """
    model, method, optim, sentences = config.model, config.method, config.optim, []
    if model.out_dim == "auto":
        k = 2 ** round(math.log2(max(1, images / IMAGES_A_PROTOTYPE)))
        k = min(max(k, 256), 65536)
        sentences.append(f"--out-dim {k}: about one prototype for {IMAGES_A_PROTOTYPE} images, 256 to 65536")
        model = replace(model, out_dim=k)
    if method.momentum_teacher == "auto":
        # As many images as official DINO's teacher averages over: 0.996 at a batch of 1024.
        whole = 256_000 / optim.batch_size
        steps = max(min(whole, updates / 5), TEACHER_IMAGES / optim.batch_size, 2.0)
        momentum = 1 - float(f"{1 / steps:.2g}")
        why = "as official DINO's at a batch of 1024" if steps == whole else f"of {updates} in the run"
        sentences.append(
            f"--momentum-teacher {momentum:g}: the teacher averages over {steps:.0f} updates, {why}"
        )
        method = replace(method, momentum_teacher=momentum)
    if optim.lr == "auto":
        # Official DINO's 2e-3 for ViT-S at a batch of 1024, by the square root of the batch and by the width,
        # as Adam's step wants it (Malladi et al. 2022, arXiv:2205.10287; Yang et al. 2022, arXiv:2203.03466).
        peak = 2e-3 * math.sqrt(optim.batch_size / 1024) * 384 / width
        lr = float(f"{peak * 256 / optim.batch_size:.2g}")
        sentences.append(
            f"--lr {lr:g}, a peak of {lr * optim.batch_size / 256:.2g}: official DINO's for ViT-S at a batch "
            f"of 1024, by the root of the batch {optim.batch_size} and the inverse of the width {width}"
        )
        optim = replace(optim, lr=lr)
    if optim.warmup_epochs == "auto":
        optim = replace(optim, warmup_epochs=float(f"{lr_warmup(optim):.3g}"))
        if optim.epochs < 100:
            sentences.append(
                f"--warmup-epochs {optim.warmup_epochs:g}: a tenth of the {optim.epochs} epochs, as official "
                "DINO's 10 of 100"
            )
    if method.warmup_teacher_temp_epochs == "auto":
        method = replace(method, warmup_teacher_temp_epochs=temperature_warmup(config))
        if optim.epochs < 100:
            sentences.append(
                f"--warmup-teacher-temp-epochs {method.warmup_teacher_temp_epochs}: three tenths of the "
                f"{optim.epochs} epochs, as the published 30 of 100"
            )
    return replace(config, model=model, method=method, optim=optim), sentences


def resolved(value: Number | Auto) -> Number:
    """A number that is no longer `auto`."""
    if value == "auto":
        raise ValueError("a number of the config is still auto: resolve_auto(config, ...) chooses it")
    return value


def _vit(arch: str, patch_size: int, **model: Any) -> Config:
    return Config(model=ModelConfig(arch=arch, patch_size=patch_size, **model))


_small = _vit("vit_small", 16)

# name: (one line for --help, the whole configuration)
PRESETS: dict[str, tuple[str, Config]] = {
    "demo": (
        "a small ViT on 32-pixel images: minutes on two CPU cores",
        Config(
            data=DataConfig(
                crops=CropPolicy(
                    global_crops_size=32,
                    global_crops_scale=(0.3, 1.0),
                    local_crops_number=4,
                    local_crops_size=16,
                    local_crops_scale=(0.1, 0.3),
                    blur_radius=(0.1, 0.5),  # official 2.0 is for 224 pixels; here it would wipe the textures
                )
            ),
            model=ModelConfig(
                arch="vit_nano",
                patch_size=4,
                out_dim="auto",
                use_bn_in_head=True,
                head_hidden_dim=512,
                bottleneck_dim=128,
            ),
            method=MethodConfig(momentum_teacher="auto"),
            optim=OptimConfig(epochs=9, warmup_epochs=1, lr="auto"),
            run=RunConfig(save_every=200, knn_every_epochs=3),
        ),
    ),
    "small-data": (
        "ViT-S/16 on one GPU and a thousand to some 100,000 images: numbers chosen by the set",
        Config(
            model=ModelConfig(out_dim="auto", use_bn_in_head=True),
            method=MethodConfig(momentum_teacher="auto"),
            optim=OptimConfig(epochs=200, lr="auto"),
        ),
    ),
    "vit-tiny-16": ("ViT-tiny, 16-pixel patches, official settings", _vit("vit_tiny", 16)),
    "vit-small-16": ("ViT-S/16, official DINO's default run: 100 epochs", _small),
    "vit-small-16-boost": (
        "ViT-S/16, official DINO's 300-epoch recipe",
        replace(
            _small,
            model=replace(_small.model, norm_last_layer=False),
            method=replace(_small.method, teacher_temp=0.07, warmup_teacher_temp_epochs="auto"),
            optim=replace(_small.optim, epochs=300),
        ),
    ),
    "vit-small-16-two-crop": (
        "ViT-S/16 without local crops, as published: 300 epochs, no clipping",
        replace(
            _small,
            data=DataConfig(crops=CROPS["two-crop"]),
            optim=replace(_small.optim, epochs=300, clip_grad=0.0, min_lr=1e-5),
        ),
    ),
    "vit-small-8": ("ViT-S/8: better features, about five times the time", _vit("vit_small", 8)),
    "vit-base-16": ("ViT-B/16", _vit("vit_base", 16)),
    "vit-base-8": ("ViT-B/8", _vit("vit_base", 8)),
    "resnet50": (
        "ResNet-50, official DINO's settings: SGD, no growing weight decay",
        Config(
            data=DataConfig(
                crops=CropPolicy(global_crops_scale=(0.14, 1.0), local_crops_scale=(0.05, 0.14)),
            ),
            model=ModelConfig(arch="resnet50"),
            optim=OptimConfig(optimizer="sgd", lr=0.03, weight_decay=1e-4, weight_decay_end=1e-4),
        ),
    ),
}
