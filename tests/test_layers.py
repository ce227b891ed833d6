"""Who may import whom: a module of fastdino imports only from layers below its own."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from imports import imports

PACKAGE = Path(__file__).parents[1] / "fastdino"
LAYERS = (
    ("ops", "config", "files"),
    ("checkpoint_reader", "distributed"),
    ("cli", "optim", "sync_batch_norm"),
    ("parallel",),
    ("adapter", "checkpoint", "data", "diagnostics", "head", "loss", "monitor", "torch_saved", "vit"),
    ("backbones",),
    ("weights",),
    ("dino",),
    ("update",),
    ("run",),
    ("health",),
    ("eval", "export"),
    ("train",),
    ("__init__",),
)
LAYER = {stem: i for i, stems in enumerate(LAYERS) for stem in stems}
FILES = [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in PACKAGE.rglob("*.py")]


def violations(stem: str, source: str) -> list[str]:
    """What a module (or folder) `stem` of the package imports against the rule."""
    if stem not in LAYER:
        return [f"{stem} is in no layer"]
    bad = []
    for name in imports(source):
        root, _, rest = name.partition(".")
        # Relative, or from outside the package.
        if root in ("", "kernels", "benchmarks", "experiments", "tests"):
            bad.append(name)
        elif root == "fastdino":
            target = rest.partition(".")[0]
            target = target if target in LAYER else "__init__"  # a public name comes from the package itself
            inside = target == stem and (PACKAGE / stem).is_dir()
            if LAYER[target] >= LAYER[stem] and not inside:
                bad.append(name)
        elif stem == "ops" and root not in sys.stdlib_module_names | {"numpy", "torch", "triton", "xformers"}:
            bad.append(name)
    return bad


@pytest.mark.parametrize(("stem", "path"), FILES, ids=[str(path.relative_to(PACKAGE)) for _, path in FILES])
def test_modules_import_only_from_layers_below(stem: str, path: Path) -> None:
    assert violations(stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("vit", "import fastdino.dino"),
        ("vit", "from fastdino.train import train"),
        ("vit", "def f():\n    from fastdino import head"),
        ("vit", "from fastdino import DINO"),
        ("vit", "import fastdino"),
        ("vit", "import fastdino.vit"),
        ("export", "from fastdino.eval import knn"),
        ("vit", "from fastdino.nowhere import x"),
        ("head", "from . import vit"),
        ("data", "from .crops import View"),
        ("loss", "from kernels import dino_loss"),
        ("train", "import benchmarks.ops"),
        ("train", "from experiments import ablation"),
        ("train", "from tests import conftest"),
        ("ops", "from PIL import Image"),
        ("ops", "from torchvision import models"),
        ("ops", "from fastdino.config import Config"),
        ("utils", "import torch"),
    ],
)
def test_a_wrong_import_is_seen(stem: str, source: str) -> None:
    assert violations(stem, source)


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("train", "from fastdino.dino import DINO\nfrom fastdino import config"),
        ("ops", "import torch, triton, math\nfrom fastdino.ops.native import library"),
        ("data", "import numpy\nfrom fastdino.data.crops import View"),
    ],
)
def test_a_right_import_is_let_through(stem: str, source: str) -> None:
    assert violations(stem, source) == []


# The same for the files within a folder; * alone stands for all that nothing else stands for.
WITHIN = {
    "data": (
        ("images", "machine", "crops", "samples"),
        ("sources",),
        ("tars", "loader"),
        ("shards", "dali", "feed"),
        ("__init__",),
        ("tool",),
    ),
    # a command imports no other command
    "eval": (
        ("common", "similarity"),
        ("maps",),
        ("video",),
        ("attention", "features", "knn", "linear", "retrieval", "segmentation"),
        ("__init__",),
        ("__main__",),
    ),
    # an op imports its launchers
    "ops": (("native", "multi_crop_row"), ("*_cpu", "*_triton"), ("*",), ("__init__",)),
}


def place_within(folder: str, stem: str) -> int | None:
    """The layer of a file within its folder; None if it has none."""
    layers = WITHIN[folder]
    found = [i for i, patterns in enumerate(layers) for pattern in patterns if fnmatch(stem, pattern)]
    exact = [i for i in found if "*" not in layers[i]]
    return (exact or found or [None])[0]


def violations_within(folder: str, stem: str, source: str) -> list[str]:
    """What the file `stem` of a folder imports from that folder against the order of its files."""
    if (place := place_within(folder, stem)) is None:
        return [f"{stem} is in no layer of {folder}"]
    bad = []
    for name in imports(source):
        if f"{name}.".startswith(f"fastdino.{folder}."):
            target = name.split(".")[2] if name.count(".") > 1 else "__init__"
            target = target if (PACKAGE / folder / f"{target}.py").exists() else "__init__"
            target_place = place_within(folder, target)
            if target_place is None or target_place >= place:
                bad.append(name)
    return bad


@pytest.mark.parametrize(
    ("folder", "path"),
    [(folder, path) for folder in WITHIN for path in sorted((PACKAGE / folder).glob("*.py"))],
    ids=lambda x: x if isinstance(x, str) else x.stem,
)
def test_files_import_only_from_layers_below_within_their_folder(folder: str, path: Path) -> None:
    assert violations_within(folder, path.stem, path.read_text()) == []


@pytest.mark.parametrize(
    ("folder", "stem", "source"),
    [
        ("data", "sources", "def f():\n    from fastdino.data import shards"),
        ("data", "sources", "from fastdino.data import Batch"),
        ("data", "shards", "from fastdino.data import cores"),
        ("data", "dali", "import fastdino.data"),
        ("data", "dali", "from fastdino import data"),
        ("data", "__init__", "from fastdino.data.tool import Pack"),
        ("data", "nowhere", "import torch"),
        ("eval", "linear", "from fastdino.eval.knn import knn_correct"),
        ("ops", "native", "from fastdino.ops.ema import ema_"),
        ("ops", "ema_triton", "from fastdino.ops.ema import ema_ref_"),
        ("ops", "ema_cpu", "from fastdino.ops import ema_"),
        ("ops", "ema", "from fastdino.ops import multi_crop"),
    ],
)
def test_a_wrong_import_within_a_folder_is_seen(folder: str, stem: str, source: str) -> None:
    assert violations_within(folder, stem, source)


@pytest.mark.parametrize(
    ("folder", "stem", "source"),
    [
        ("data", "shards", "from fastdino.data.machine import cores\nfrom fastdino.data import sources"),
        ("data", "tool", "from fastdino.data import open_source, shards"),
        ("ops", "new", "from fastdino.ops import native\nfrom fastdino.ops.ema_triton import ema_triton_"),
        ("ops", "new_cpu", "from fastdino.ops import native"),
    ],
)
def test_a_right_import_within_a_folder_is_let_through(folder: str, stem: str, source: str) -> None:
    assert violations_within(folder, stem, source) == []


LONGEST = 80  # lines: what fits on a screen


def test_no_function_is_longer_than_a_screen() -> None:
    """ruff's PLR0915 and C901 hold statements and branches, this holds lines, docstring included."""
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for _, path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST
    ]
    assert long == []


IMPORT_ALL = """
import importlib, sys
import fastdino
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an optional dependency
        if error.name.partition(".")[0] == "fastdino":
            raise
"""


@pytest.mark.parametrize("code", ["import fastdino", IMPORT_ALL], ids=["the package", "every module"])
def test_importing_starts_nothing_and_says_nothing(code: str) -> None:
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for _, path in FILES]
    code += "\nimport torch\nassert not torch.cuda.is_initialized(), 'a CUDA context'"
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
