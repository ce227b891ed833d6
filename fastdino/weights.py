"""Weights of others in our networks, and ours in the formats of others.

A file is read (`read_weights`), its tensors get our names (`vit_names`), and a network loads them
(`load_backbone_state`). A new format is its types in torch_saved.py, the keys of its networks in PAIRS, and
its names as a function `from_NAME` and, for exporting, `to_NAME`.
"""

import math
import re
import reprlib
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastdino.backbones import VITS, build_backbone, flags_of, network_of, register_options
from fastdino.checkpoint import is_ours, read_teacher
from fastdino.config import Config, ModelConfig, resolved
from fastdino.torch_saved import read_torch_saved
from fastdino.vit import VisionTransformer, resize_positions

# Keys under which files keep their networks: the moving average, and the one that it follows.
PAIRS = (
    ("teacher", "student"),
    ("target_encoder", "encoder"),
    ("state_dict_ema", "state_dict"),
    ("model_ema", "model"),
)
# What torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What names in one state dict tell of its networks, as solo-learn, lightly, MoCo and others put it: the
# moving average, or the network that it follows.
PART = r"(?=[._](?:\w*head|backbone|encoder|projector)\.)"
ROLES = re.compile(
    rf"(?:(teacher(?=\.)|(?:teacher|momentum|target){PART})|(student(?=\.)|(?:student|online|base){PART}))[._]"
)
# Tensors that are not of a backbone: classifiers, as torchvision, timm and official DINO call them, and
# DINOv2's mask token.
NO_BACKBONE = re.compile(
    r"(heads?|head_dist|heads_dist|aux_head|fc|classifier|classif|last_linear)\.|mask_token$"
)


@dataclass(frozen=True)
class Weights:
    """What a file of weights holds, by our names: `backbone.*` and `head.*`."""

    kind: str
    """What the file is, for people."""
    teacher: dict[str, Tensor]
    student: dict[str, Tensor]
    """The same as `teacher` where the file has one network."""
    center: Tensor | None = None
    """The loss's centre, (1, K)."""
    config: Config | None = None
    """Of our own files."""
    note: str = ""
    """Which of several networks `teacher` is, where the file does not call it teacher."""


# Reading.


def read_weights(path: str | Path) -> Weights:
    """The networks in a file of weights: ours, official DINO's, DINOv2's, timm's, or a backbone.

    Torch-saved or as safetensors. Nothing in the file is executed. All tensors are read; prefixes are removed
    (`module.`, `_orig_mod.`) or replaced (`dino_head.`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is damaged, that holds code, or no tensors.
    """
    path = Path(path)
    if is_ours(path):
        state, config = read_teacher(path)
        return Weights("teacher of a run of fastdino", state, state, config=config)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} {'is no file' if path.exists() else 'does not exist'}: give a file of weights"
        )
    content = _content(path)
    found = {"": content}
    if isinstance(content, dict):
        for pair in PAIRS:
            if networks := {key: content[key] for key in pair if isinstance(content.get(key), dict)}:
                found = networks
                break
    states = {key: _tensors(path, network) for key, network in found.items()}
    if len(states) == 1:
        states = _by_role(*states.values()) or states
    names, both = list(states), [_our_prefixes(state) for state in states.values()]
    kind, note = f"full checkpoint, {' and '.join(names)}", ""
    if len(names) == 1 and names[0] in ("", "encoder", "state_dict", "model"):
        kind = "network" if any(n.startswith("head.") for n in both[0]) else "backbone"
    elif len(names) > 1 and names != ["teacher", "student"]:
        note = f"{names[0]} is taken for the teacher, the moving average of {names[1]}"
    return Weights(kind, both[0], both[-1], _official_center(content), note=note)


def _content(path: Path) -> Any:
    """What a file holds, whatever that is; ValueError if it cannot be read."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else read_torch_saved(path)
    except Exception as error:  # a damaged file can make torch's reader raise anything
        # what follows the first sentence is torch's advice to run the file's code
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {why}") from None


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """A state dict, without what wrappers put into its names.

    Raises:
        ValueError: it is none, or has tensors that are not plain, or of more numbers than the file.
    """
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in content.items())
    ):
        keys: Any = type(content)
        if isinstance(content, dict):
            some = list(content)[:8]
            keys = f"keys {', '.join(k[:80] if isinstance(k, str) else reprlib.repr(k) for k in some)}"
        raise ValueError(f"{path} holds no tensors by name, nor under teacher or student: it has {keys}")
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            kind = f"{tensor.dtype} {tensor.layout}".replace("torch.", "")
            raise ValueError(f"{path}: {name} is {kind}, and weights here are plain real numbers: convert it")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: {name} is of shape {tuple(tensor.shape)}, and the file has but "
                f"{tensor.untyped_storage().nbytes()} bytes of it: save a copy (clone) of the tensor"
            )
    if sum(tensor.nbytes for tensor in content.values()) > 2 * path.stat().st_size:
        raise ValueError(f"{path}: its tensors share their memory: save copies (clone) of them")
    state = {re.sub(r"^((module|model)\.)+", "", WRAPPERS.sub("", n)): t for n, t in content.items()}
    if len(state) < len(content):
        raise ValueError(f"{path} has several networks, some inside wrappers: save the state_dict of one")
    return state


def _by_role(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The networks in one state dict whose names tell them apart, the moving average first; or none.

    In lightly's benchmarks the one without a prefix is the average of the student.
    """
    roles: dict[str, dict[str, Tensor]] = {}
    averages: set[str | None] = set()
    for name, tensor in state.items():
        name = re.sub(r"^(\w+)_(?:momentum|k)\.", r"momentum_\1.", name)
        name = re.sub(r"^encoder_q\.", "base_encoder.", name)
        match = ROLES.match(name)
        average, follower = match.groups() if match else (None, None)
        rest = name[match.end() :] if match else name
        rest = re.sub(r"^(?:module\.)*(encoder|backbone)\.(?:module\.)*", "backbone.", rest)
        roles.setdefault(average or follower or "backbone", {})[rest] = tensor
        averages.add(average)
    head = re.compile(r"\w*head\.|projector\.")
    networks = [
        role
        for role, tensors in roles.items()
        if any(n.startswith("backbone.") or not (role == "backbone" or head.match(n)) for n in tensors)
    ]
    networks.sort(key=lambda role: (role not in averages, role != "backbone"))
    return {role: roles[role] for role in networks[:1] + networks[-1:]} if networks != ["backbone"] else {}


def _our_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a backbone, or of backbone and head, by the names `backbone.*` and `head.*`."""
    if not any(name.startswith("backbone.") for name in state):
        return {f"backbone.{name}": tensor for name, tensor in state.items()}
    state = {re.sub(r"^backbone\.module\.", "backbone.", name): tensor for name, tensor in state.items()}
    return {re.sub(r"^(dino_head|projection_head)\.", "head.", name): t for name, t in state.items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# Formats. Our names are official DINO's where official DINO has the tensor.


def vit_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's tensors by our names; the given dict stays as it is.

    Each function changes only tensors of its format, so a backbone of any format can be given.

    Raises:
        ValueError: tensors of a format whose shapes are not.
    """
    try:
        for rename in (from_dinov2, from_timm, from_sequential):
            state = rename(state)
    except (IndexError, RuntimeError):  # tensors of these names may have any shape
        raise ValueError("its registers, positions or SwiGLU are of shapes that no ViT has") from None
    return state


def to_official(
    teacher: dict[str, Tensor], student: dict[str, Tensor] | None = None, center: Tensor | None = None
) -> dict[str, Any]:
    """The checkpoint that official DINO's main_dino.py saves, without the optimiser."""
    content: dict[str, Any] = {"teacher": dict(teacher)}
    if student is not None:  # saved out of DistributedDataParallel
        content["student"] = {f"module.{name}": tensor for name, tensor in student.items()}
    if center is not None:
        content["dino_loss"] = {"center": center}
    return content


def _official_center(content: Any) -> Tensor | None:
    """The loss's centre in a checkpoint of official DINO."""
    loss = content.get("dino_loss") if isinstance(content, dict) else None
    center = loss.get("center") if isinstance(loss, dict) else None
    plain = isinstance(center, Tensor) and center.is_floating_point() and center.layout == torch.strided
    return center if plain else None


def from_dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's training saves its blocks in chunks: blocks.0.11.* is block 11."""
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): t for name, t in state.items()}


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm has other names for a SwiGLU's halves and for registers.

    Class token, registers and patches have positions there, or only patches.
    """
    fc1, fc2 = (state.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and fc1.shape[:1] == (2 * fc2.shape[-1],):
        state = {
            n.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): t for n, t in state.items()
        }
    if "reg_token" in state and "pos_embed" in state:
        state = dict(state)
        registers, positions = state.pop("reg_token"), state["pos_embed"]
        first, r = positions[:, :1], registers.shape[1]
        n = positions.shape[1]
        if math.isqrt(n) ** 2 == n and positions[:, 1 : 1 + r].any():
            state["pos_embed"] = torch.cat((torch.zeros_like(first), positions), dim=1)
        else:
            registers = registers + positions[:, 1 : 1 + r]
            state["pos_embed"] = torch.cat((first, positions[:, 1 + r :]), dim=1)
        state["register_tokens"] = registers
    return state


def from_sequential(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """lightly's examples take a ResNet apart, and call its parts by their numbers."""
    if "0.weight" not in state or "4.0.conv1.weight" not in state:
        return state
    parts = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    return {re.sub(r"^\d+", lambda m: parts.get(m[0], m[0]), name): t for name, t in state.items()}


class TimmModel(NamedTuple):
    """A ViT of ours as a model of timm."""

    name: str
    options: dict[str, Any]
    """Arguments of timm.create_model that differ from what the name says."""
    swiglu: bool
    """Whether timm.create_model also needs mlp_layer=timm.layers.SwiGLUPacked."""
    state: dict[str, Tensor]


def to_timm(vit: VisionTransformer, state: dict[str, Tensor]) -> TimmModel:
    """timm's model for a ViT, and its tensors by timm's names."""
    block: Any = vit.blocks[0]
    sizes = {192: ("tiny", 12, 3), 384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16)}
    width = vit.embed_dim if vit.embed_dim in sizes else 192
    size, depth, heads = sizes[width]
    registers, swiglu = vit.num_register_tokens, hasattr(block.mlp, "w12")
    h, w = (n * vit.patch_size for n in vit.grid)
    arguments: dict[str, tuple[Any, Any]] = {  # for this ViT, and by the name
        "img_size": (h if h == w else (h, w), 224),
        "patch_size": (vit.patch_size, 16),
        "in_chans": (vit.in_chans, 3),
        "embed_dim": (vit.embed_dim, width),
        "depth": (len(vit.blocks), depth),
        "num_heads": (vit.num_heads, heads),
        "mlp_ratio": ((block.mlp.w12 if swiglu else block.mlp.fc1).out_features / vit.embed_dim, 4.0),
        "qkv_bias": (block.attn.qkv.bias is not None, True),
        "init_values": (block.ls1.init_value if hasattr(block.ls1, "gamma") else None, None),
        "reg_tokens": (registers, 0),
    }
    options: dict[str, Any] = {"num_classes": 0}
    options |= {key: value for key, (value, default) in arguments.items() if value != default}
    if swiglu:
        options["act_layer"] = "silu"
        state = {n.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): t for n, t in state.items()}
    if registers:
        # timm adds positions to the registers too: zeros.
        state = {"reg_token" if name == "register_tokens" else name: t for name, t in state.items()}
        first, patches = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
        none = torch.zeros_like(state["reg_token"])
        state["pos_embed"] = torch.cat((first, none, patches), dim=1)
    return TimmModel(f"vit_{size}_patch16_224", options, swiglu, state)


# Loading.


def load_backbone_state(network: nn.Module, state: dict[str, Tensor], path: str) -> list[str]:
    """Load a backbone's tensors into `network`; returns a sentence on each thing that is not as in the file.

    A position embedding of another grid is resized as for images of another size, so that the features are
    those that the file's own network gives for them. Classifiers and DINOv2's mask token are left out.

    Args:
        path: the file's, for messages.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, all listed.
    """
    state, notes = _fitted(network, state, path)
    notes += _not_finite(state)
    own = network.state_dict()
    own.update(state)  # keeps the versions by which some modules of torchvision read their tensors
    network.load_state_dict(own)
    return notes


def _fitted(network: nn.Module, state: dict[str, Tensor], path: str) -> tuple[dict[str, Tensor], list[str]]:
    """What `load_backbone_state` loads and says; `network` may be on the meta device."""
    own, notes = network.state_dict(), []
    try:
        state = (vit_names if isinstance(network, VisionTransformer) else from_sequential)(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(network, VisionTransformer):
        notes += _resize_positions(network, state)
    left_out = [name for name in state if name not in own and NO_BACKBONE.match(name)]
    if left_out:
        notes.append(f"left out, no part of a backbone: {', '.join(left_out)}")
    state = {name: tensor for name, tensor in state.items() if name not in left_out}
    both = [(name, state[name], tensor) for name, tensor in own.items() if name in state]
    problems = [
        *(f"missing: {name}" for name in own if name not in state),
        *(f"unexpected: {name}" for name in state if name not in own),
        *(
            f"of another shape: {name} is {tuple(theirs.shape)}, not {tuple(tensor.shape)}"
            for name, theirs, tensor in both
            if theirs.shape != tensor.shape
        ),
        *(
            f"of another type: {name} is {theirs.dtype}, not {tensor.dtype}"
            for name, theirs, tensor in both
            if theirs.is_floating_point() != tensor.is_floating_point()
        ),
    ]
    if problems:
        flags = ""
        with suppress(ValueError):  # of shapes that no ViT has
            flags = flags_of(vit_names(state))
        raise ValueError(
            f"the backbone of {path} does not fit:\n  "
            + "\n  ".join(problems)
            + (f"\nThe file is {flags}." if flags else "")
        )
    return state, notes


def _not_finite(state: dict[str, Tensor]) -> list[str]:
    """A sentence on tensors with NaN or infinite numbers, if there are any."""
    names = [
        name for name, tensor in state.items() if not (tensor.is_meta or tensor.float().isfinite().all())
    ]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [f"not finite: {', '.join(names[:4])}{more}"] if names else []


def _resize_positions(network: VisionTransformer, state: dict[str, Tensor]) -> list[str]:
    """Resize the position embedding in `state` to the network's grid; returns a sentence if that was needed.

    One that is not of a square grid, or of another width, stays as it is.
    """
    old, new = state.get("pos_embed"), network.pos_embed
    if old is None or old.ndim != 3 or old.shape == new.shape or old.shape[-1] != new.shape[-1]:
        return []
    side = math.isqrt(max(old.shape[1] - 1, 0))
    if not side or side * side != old.shape[1] - 1:
        return []
    options = register_options(1 if "register_tokens" in state else 0)  # as the file's network resizes
    offset, antialias = options.get("interpolate_offset", 0.1), "interpolate_antialias" in options
    state["pos_embed"] = resize_positions(old.float(), (side, side), network.grid, offset, antialias)
    rows, columns = network.grid
    return [f"position embedding resized from {side} x {side} to {rows} x {columns} patches"]


def load_backbone(path: str, device: str | torch.device = "cpu", arch: str = "") -> nn.Module:
    """The backbone in `path`, in evaluation mode.

    A warning names what is left out of a file of others, such as a classifier.

    Args:
        path: a run's folder, its teacher.safetensors, or weights of official DINO (a full checkpoint, of
            which the teacher is taken, or a backbone), DINOv2, or timm's ViTs, torch-saved or as safetensors.
        device: where to put it.
        arch: the network, as `fastdino-train --arch`, for weights of others that are no ViT or ResNet; else
            it is built after the tensors' shapes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or tensors that fit no known network; the message lists all
            that are missing, unexpected or of another shape.
    """
    weights = read_weights(path)
    state = _part(weights.teacher, "backbone.")
    if weights.config:
        _check_configuration(weights.config, weights.teacher, path)
    backbone = _network_for(weights.config, arch, state, path)
    notes = [weights.note] if weights.note else []
    for note in notes + load_backbone_state(backbone, state, path):
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return backbone.to(device).eval().requires_grad_(False)


def _network_for(config: Config | None, arch: str, state: dict[str, Tensor], path: str) -> nn.Module:
    """The untrained network for a backbone's tensors.

    It is made without memory first: a file can claim any size, and its tensors must have it.
    """
    model = config.model if config else ModelConfig(arch=arch)
    size = config.data.crops.global_crops_size if config else 224
    by_name = config or arch

    def make() -> nn.Module:
        return build_backbone(model, size) if by_name else network_of(vit_names(state))

    if not by_name or model.arch in VITS:
        try:
            with torch.device("meta"):
                network = make()
        except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:
            raise ValueError(f"{path}: {error}") from None
        _fitted(network, state, path)
        if config and state["pos_embed"].shape != network.pos_embed.shape:
            raise ValueError(f"{path}: its configuration is of another network than its tensors")
    return make()


def _check_configuration(config: Config, state: dict[str, Tensor], path: str) -> None:
    """Raise ValueError if the head that a teacher's configuration describes is larger than its tensors."""
    model, numbers = config.model, sum(tensor.numel() for tensor in state.values())
    hidden, bottleneck = model.head_hidden_dim, model.bottleneck_dim
    head = hidden**2 * max(model.head_layers - 2, 0) + bottleneck * resolved(model.out_dim)
    if head > numbers:
        raise ValueError(f"{path}: its configuration is of a head of {head} numbers, and it holds {numbers}")


def load_networks(path: str, student: nn.Module, teacher: nn.Module, center: Tensor) -> list[str]:
    """Load student and teacher, each a `backbone` and a `head`, and the loss's centre (1, K) from `path`.

    Heads are loaded only where both fit, and the centre only with them. Returns what was loaded and what was
    not, for people.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read, or a backbone that does not fit.
    """
    weights = read_weights(path)
    notes = [f"{path}: {weights.kind}", *([weights.note] if weights.note else [])]
    unfit: list[str] = []
    heads: list[tuple[nn.Module, dict[str, Tensor]]] = []
    for network, tensors in ((teacher, weights.teacher), (student, weights.student)):
        notes += load_backbone_state(network.get_submodule("backbone"), _part(tensors, "backbone."), path)
        head, state = network.get_submodule("head"), _part(tensors, "head.")
        heads.append((head, state))
        unfit += _unlike(state, head.state_dict())
        if others := [name for name in tensors if not name.startswith(("backbone.", "head."))]:
            notes.append(f"left out: {', '.join(others)}")
    if not any(state for _, state in heads):
        notes.append("a new head")
    elif unfit:
        notes.append(f"a new head, for the file's does not fit: {'; '.join(dict.fromkeys(unfit))}")
    else:
        for head, state in heads:
            head.load_state_dict(state)
            notes += _not_finite(state)
        notes.append("with its head")
        if weights.center is not None and weights.center.shape == center.shape:
            center.copy_(weights.center)
            notes += ["with its centre", *_not_finite({"the centre": center})]
    return list(dict.fromkeys(notes))  # teacher and student mostly say the same


def _unlike(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """The tensors of a head that differ in name, shape or kind of number, each with both."""
    file, here = (
        {n: f"{tuple(x.shape)}{'' if x.is_floating_point() else f' {x.dtype}'}" for n, x in tensors.items()}
        for tensors in (state, own)
    )
    return [
        f"{name} {file.get(name, 'missing')}, here {here.get(name, 'none')}"
        for name in here | file
        if file.get(name) != here.get(name)
    ]
