"""`fastdino-export WEIGHTS --to FORMAT`: the trained network in a file for others, checked by loading."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdino import checkpoint, cli
from fastdino.config import Config
from fastdino.dino import DINO
from fastdino.files import write_atomically
from fastdino.vit import VisionTransformer
from fastdino.weights import Weights, load_backbone, read_weights, to_official, to_timm

FILES = {
    "official": "official.pth",
    "timm": "backbone.timm.safetensors",
    "torch": "backbone.pth",
    "safetensors": "backbone.safetensors",
    "onnx": "backbone.onnx",
}
MAX_PARAMETERS = 500_000_000  # float32 in the 2 GB of a protocol buffer


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a trained network for others, and check the file by loading it as they would."""

    weights: Annotated[str, tyro.conf.Positional]
    """A run's folder, its teacher.safetensors, or other weights that fastdino reads."""
    to: Literal["official", "timm", "torch", "safetensors", "onnx"]
    """official: a checkpoint as official DINO writes it, with student and centre where the run's folder has
    them. timm: the backbone for timm.create_model(..., checkpoint_path=FILE). torch, safetensors: the state
    dict of the backbone. onnx: the backbone as a graph, images of any batch size to features."""
    out: str = ""
    """The file to write. Default: official.pth, backbone.timm.safetensors, backbone.pth, backbone.safetensors
    or backbone.onnx beside the weights."""
    size: int = 0
    """Side in pixels of onnx's images. Default: that of the global crops, or 224."""


def export(options: Export) -> Path:
    """Write the file that `options` ask for; returns its path.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: weights that cannot be read, or a format that cannot hold this network or needs a package
            that is not installed.
        RuntimeError: what was written does not load, or gives other features: nothing is left there.
    """
    source = Path(options.weights)
    default = (source if source.is_dir() else source.parent) / FILES[options.to]
    out = Path(options.out) if options.out else default
    if out.suffix != default.suffix:
        raise ValueError(f"--out {out}: a file for {options.to} ends in {default.suffix}")
    if out.exists():
        raise ValueError(f"--out {out} exists: remove it, or name another")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}; make it first")
    weights = read_weights(source)
    backbone = load_backbone(options.weights)
    crops = weights.config.data.crops if weights.config else None
    size = options.size or (crops.global_crops_size if crops else 224)
    state = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if options.to == "official":
        file = _official(source, weights, backbone)
    elif options.to == "timm":
        file = _timm(backbone, state, weights.config)
    elif options.to == "onnx":
        file = _onnx(backbone, size)
    elif options.to == "torch":
        file = File(
            lambda path: torch.save(state, path),
            lambda path: _check_equal(_load(path), state),
            "model.load_state_dict(torch.load(FILE))",
        )
    else:
        file = File(
            lambda path: save_file(state, path),
            lambda path: _check_equal(load_file(path), state),
            "model.load_state_dict(safetensors.torch.load_file(FILE))",
        )

    def write_and_check(path: Path) -> None:
        file.write(path)
        try:
            file.check(path)
        except Exception as error:  # whatever the other side raises
            raise RuntimeError(f"{options.to} does not load what was written: {error}") from error

    write_atomically(out, write_and_check)
    cli.say(
        f"{out}  {sum(t.numel() for t in state.values()) / 1e6:.1f} M numbers, checked by loading",
        f"use it: {file.usage.replace('FILE', repr(str(out)))}",
    )
    return out


class File(NamedTuple):
    """A file to write."""

    write: Callable[[Path], Any]
    check: Callable[[Path], None]
    """Loads it; raises whatever the loader raises, ValueError on other numbers."""
    usage: str
    """The code that loads FILE, for people."""


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        raise ValueError(f"names differ: {', '.join(sorted(found.keys() ^ expected.keys()))}")
    for name, tensor in expected.items():
        if not torch.equal(found[name], tensor):
            raise ValueError(f"{name} differs")


def _check_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Features of two forms of one network in float32 differ by rounding alone."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < 1e-4:
        raise ValueError(f"{what} gives features that differ by {error:.2g} of their size")


def _images(network: nn.Module, batch: int, size: int) -> Tensor:
    channels = network.in_chans if isinstance(network, VisionTransformer) else 3
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def _official(source: Path, weights: Weights, backbone: nn.Module) -> File:
    """What official DINO's main_dino.py saves, without its optimiser; its evaluations read "teacher"."""
    plain = isinstance(backbone, VisionTransformer) and not (
        backbone.num_register_tokens or any("ls1" in n or "w12" in n for n, _ in backbone.named_parameters())
    )
    arch = weights.config.model.arch if weights.config else ""
    if not plain and ":" in arch:
        raise ValueError(f"official DINO has no {arch}: use --to torch")
    if isinstance(backbone, VisionTransformer) and not plain:
        raise ValueError("official DINO has no registers, layer scale or SwiGLU: use --to timm")
    content = to_official(weights.teacher)
    steps = checkpoint.checkpoints(source) if source.is_dir() else {}
    if weights.config and steps:
        dino = DINO(weights.config)
        step, path = list(steps.items())[-1]
        if step == checkpoint.teacher_step(source):
            checkpoint.load(path, dino.state_dict())  # fills them in place
            content = to_official(weights.teacher, dino.student.state_dict(), dino.loss.center)

    def check(path: Path) -> None:
        read = _load(path)
        for part, tensors in content.items():
            _check_equal(read[part], tensors)
        features = [network(_images(backbone, 2, 224)) for network in (load_backbone(str(path)), backbone)]
        if not torch.equal(*features):
            raise ValueError("its teacher gives other features")

    return File(lambda path: torch.save(content, path), check, "python eval_knn.py --pretrained_weights FILE")


def _timm(backbone: nn.Module, state: dict[str, Tensor], config: Config | None) -> File:
    try:
        import timm
    except ImportError:
        raise ValueError("--to timm needs timm: pip install 'fastdino[timm]'") from None
    arch = config.model.arch if config else ""
    options: dict[str, Any] = {"num_classes": 0}
    swiglu = False
    if isinstance(backbone, VisionTransformer):
        name, options, swiglu, state = to_timm(backbone, state)
    else:
        name = arch.partition("timm:")[2] or arch.rpartition(":")[2]
        if not timm.is_model(name):
            raise ValueError(f"timm has no {arch or type(backbone).__name__}: use --to torch")

    def check(path: Path) -> None:
        layers: dict[str, Any] = {"mlp_layer": timm.layers.SwiGLUPacked} if swiglu else {}
        model = timm.create_model(name, **options, **layers).eval()
        model.load_state_dict(load_file(path), strict=True)
        images = _images(backbone, 2, options.get("img_size", 224))
        with torch.no_grad():
            _check_close(model(images), backbone(images), "timm's model")

    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    arguments += ", mlp_layer=timm.layers.SwiGLUPacked" if swiglu else ""
    return File(
        lambda path: save_file(state, path),
        check,
        f"timm.create_model({name!r}{arguments}, checkpoint_path=FILE)",
    )


def _onnx(backbone: nn.Module, size: int) -> File:
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install 'fastdino[onnx]'")
    if sum(p.numel() for p in backbone.parameters()) > MAX_PARAMETERS:
        raise ValueError("an ONNX file holds 2 GB, and this network has more: use --to safetensors")

    def write(path: Path) -> None:
        batch = torch.export.Dim("batch", min=1, max=2**20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own making
            torch.onnx.export(
                backbone,
                (_images(backbone, 2, size),),
                path,
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=["images"],
                output_names=["features"],
                external_data=False,
                verbose=False,
            )

    def check(path: Path) -> None:
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        for batch in (1, 2, 5):
            images = _images(backbone, batch, size)
            (features,) = session.run(None, {"images": images.numpy()})
            with torch.no_grad():
                _check_close(torch.from_numpy(features), backbone(images), f"onnxruntime, at batch {batch},")

    usage = f"onnxruntime.InferenceSession(FILE).run(None, {{'images': (B, 3, {size}, {size})}})"
    return File(write, check, usage)


def main() -> None:
    """Entry point of `fastdino-export`."""
    options = tyro.cli(Export, prog="fastdino-export", description=__doc__)

    def command() -> None:
        export(options)

    cli.run("fastdino-export", command, errors=(RuntimeError,))


if __name__ == "__main__":
    main()
