"""The presets' figures, what each impossible value is told, JSON, and the command line of every preset."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdino import config as config_module
from fastdino import train as train_module
from fastdino.config import (
    CROPS,
    PRESETS,
    Config,
    CropPolicy,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    from_dict,
    resolve_auto,
    to_dict,
)
from fastdino.dino import DINO

NAMES = list(PRESETS)


def leaves(node: Any) -> dict[str, Any]:
    """All fields of a config, at any depth, by their names."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        more = leaves(value) if dataclasses.is_dataclass(value) else {field.name: value}
        assert not found.keys() & more.keys()  # two flags of one name
        found |= more
    return found


# Official DINO's defaults, and what its recipes change.
DEFAULTS = {
    "arch": "vit_small",
    "patch_size": 16,
    "out_dim": 65536,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "use_bn_in_head": False,
    "student_temp": 0.1,
    "center_momentum": 0.9,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "teacher_update": "momentum",
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "clip": "per_tensor",
    "batch_size": 64,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "global_crops_size": 224,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 8,
    "local_crops_size": 96,
    "local_crops_scale": (0.05, 0.4),
    "aspect_ratio": (3 / 4, 4 / 3),
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale": 0.2,
    "blur": (1.0, 0.1, 0.5),
    "blur_radius": (0.1, 2.0),
    "solarize": (0.0, 0.2, 0.0),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "head_layers": 3,
    "head_hidden_dim": 2048,
    "bottleneck_dim": 256,
    "accumulate": 1,
    "seed": 0,
    # what official DINO does not have is off
    "num_register_tokens": 0,
    "layer_scale": 0.0,
    "init_from": "",
    "head_warmup_steps": 0,
    "activation_checkpointing": False,
}
RECIPES: dict[str, dict[str, Any]] = {
    "vit-tiny-16": {"arch": "vit_tiny"},
    "vit-small-16": {},
    "vit-small-16-boost": {
        "epochs": 300,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
    },
    "vit-small-16-two-crop": {
        "clip_grad": 0.0,
        "epochs": 300,
        "global_crops_scale": (0.14, 1.0),
        "local_crops_number": 0,
        "min_lr": 1e-5,
    },
    "vit-small-8": {"patch_size": 8},
    "vit-base-16": {"arch": "vit_base"},
    "vit-base-8": {"arch": "vit_base", "patch_size": 8},
    "resnet50": {
        "arch": "resnet50",
        "optimizer": "sgd",
        "lr": 0.03,
        "weight_decay": 1e-4,
        "weight_decay_end": 1e-4,
        "global_crops_scale": (0.14, 1.0),
        "local_crops_scale": (0.05, 0.14),
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_published_recipes(name):
    settled, said = resolve_auto(PRESETS[name][1], 1_281_167, 2_001_800, 384)
    given = leaves(settled)
    expected = DEFAULTS | RECIPES[name]
    assert {key: given[key] for key in expected} == expected
    assert said == []


def test_every_preset_is_a_published_recipe_or_for_small_data():
    assert set(PRESETS) == {*RECIPES, "demo", "small-data"}
    for name in ("demo", "small-data"):
        given = leaves(PRESETS[name][1])
        assert (given["student_temp"], given["teacher_temp"], given["center_momentum"]) == (0.1, 0.04, 0.9)
        assert [given[key] for key in ("out_dim", "momentum_teacher", "lr")] == ["auto"] * 3
        assert given["use_bn_in_head"]
    assert (PRESETS["demo"][1].model.arch, PRESETS["demo"][1].model.patch_size) == ("vit_nano", 4)
    assert CROPS["dino"] == CropPolicy()
    assert CROPS["two-crop"].n_views == CROPS["two-crop"].n_global == 2
    assert CROPS["dino"].n_views == 10


@pytest.mark.parametrize("name", NAMES)
def test_presets_survive_json(name):
    config = PRESETS[name][1]
    again = from_dict(Config, json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)  # tuples again, not lists


@pytest.mark.parametrize(
    ("images", "batch", "updates", "width", "expected"),
    [
        # the demo; a set of 50,000; ImageNet as official DINO trains on it
        (4000, 64, 558, 128, (512, 1 - 0.009, 6e-3)),
        (50_000, 64, 156_200, 384, (8192, 1 - 0.00025, 2e-3)),
        (1_281_167, 1024, 125_100, 384, (65536, 0.996, 5e-4)),
        # their ends: few images, a run of a few updates, a batch larger than what a teacher should average
        (10, 1, 20, 384, (256, 1 - 0.0005, 1.6e-2)),
        (10, 10, 1, 384, (256, 1 - 0.005, 5.1e-3)),
        (100_000, 4096, 24, 768, (16384, 1 - 0.21, 1.3e-4)),
    ],
)
def test_numbers_left_open_follow_from_images_batch_and_length(images, batch, updates, width, expected):
    names = ("out_dim", "momentum_teacher", "lr")
    config = Config(
        model=ModelConfig(out_dim="auto"),
        method=MethodConfig(momentum_teacher="auto"),
        optim=OptimConfig(lr="auto", batch_size=batch, warmup_epochs=1),
    )
    settled, said = resolve_auto(config, images, updates, width)
    found = leaves(settled)
    assert [found[name] for name in names] == pytest.approx(expected)
    assert leaves(config) | {name: found[name] for name in names} == found  # and nothing else
    for name, sentence in zip(names, said, strict=True):  # what to type for the same
        assert sentence.startswith(f"--{name.replace('_', '-')} {found[name]:g}")
    assert not (found["momentum_teacher"] < 1 - batch / 1800 and updates > 30)  # or the doctor would complain
    assert resolve_auto(settled, images, updates, width) == (settled, [])


def test_a_run_made_shorter_says_how_long_its_warmups_are():
    config = PRESETS["vit-small-16-boost"][1]
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=12))
    settled, said = resolve_auto(config, 1000, 180, 384)
    assert (settled.optim.warmup_epochs, settled.method.warmup_teacher_temp_epochs) == (1.2, 4)
    assert said == [
        "--warmup-epochs 1.2: a tenth of the 12 epochs, as official DINO's 10 of 100",
        "--warmup-teacher-temp-epochs 4: three tenths of the 12 epochs, as the published 30 of 100",
    ]
    assert resolve_auto(settled, 1000, 180, 384) == (settled, [])


def test_a_number_left_open_is_not_computed_with():
    with pytest.raises(ValueError, match="still auto"):
        DINO(PRESETS["demo"][1])


def test_changed_fields_of_every_depth_survive_json():
    config = Config(
        data=DataConfig(data="a b/ü", crops=CropPolicy(blur=(0.0, 0.25, 1.0), hue=0.5)),
        optim=OptimConfig(warmup_epochs=0.5),
        run=RunConfig(out="x", seed=7),
    )
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"colour": 1}, "Config has no field colour: written by another version?"),
        ({"data": {"crops": {"zoom": 1, "angle": 2}}}, "CropPolicy has no field angle, zoom: written by"),
        ({"optim": {"batch_size": 3, "accumulate": 2}}, "--batch-size 3 is not a multiple of --accumulate 2"),
    ],
)
def test_from_dict_refuses_unknown_fields_and_impossible_values(changed, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        from_dict(Config, changed)
    assert str(error.value).startswith(message)


def test_missing_fields_take_their_defaults():
    assert from_dict(Config, {"optim": {"lr": 0.1}}) == Config(optim=OptimConfig(lr=0.1))


NAN = float("nan")
BAD: list[tuple[type, dict[str, Any], str]] = [
    (
        CropPolicy,
        {"global_crops_scale": (0.0, 1.0)},
        "--global-crops-scale 0.0 1.0: give two shares of the area",
    ),
    (
        CropPolicy,
        {"global_crops_scale": (0.5, 0.4)},
        "--global-crops-scale 0.5 0.4: give two shares of the area",
    ),
    (
        CropPolicy,
        {"local_crops_scale": (0.05, 1.1)},
        "--local-crops-scale 0.05 1.1: give two shares of the area",
    ),
    (
        CropPolicy,
        {"aspect_ratio": (2.0, 1.0)},
        "--aspect-ratio 2.0 1.0: give two positive ratios, the smaller",
    ),
    (
        CropPolicy,
        {"blur_radius": (-0.1, 1.0)},
        "--blur-radius -0.1 1.0: give two radii in pixels, the smaller",
    ),
    *((CropPolicy, {n: 1.5}, f"--{n} 1.5: a probability lies between 0 and 1") for n in ("flip", "jitter")),
    (CropPolicy, {"grayscale": -0.1}, "--grayscale -0.1: a probability lies between 0 and 1"),
    (CropPolicy, {"blur": (1.0, 0.1, 5.0)}, "--blur 1.0 0.1 5.0: a probability lies between 0 and 1"),
    (CropPolicy, {"solarize": (0.0, NAN, 0.0)}, "--solarize 0.0 nan 0.0: a probability lies between 0 and 1"),
    *(
        (CropPolicy, {n: -0.1}, f"--{n} -0.1: a strength is 0 or more")
        for n in ("brightness", "contrast", "saturation")
    ),
    (CropPolicy, {"hue": 0.6}, "--hue 0.6: the shift lies between 0 and 0.5"),
    (CropPolicy, {"std": (0.2, 0.0, 0.2)}, "--std (0.2, 0.0, 0.2): a standard deviation is above 0"),
    (CropPolicy, {"local_crops_number": -1}, "--local-crops-number -1: give 0 or more"),
    (CropPolicy, {"global_crops_size": 0}, "--global-crops-size 0: a crop has 1 to 4096 pixels a side"),
    (CropPolicy, {"local_crops_size": 5000}, "--local-crops-size 5000: a crop has 1 to 4096 pixels a side"),
    (DataConfig, {"workers": -2}, "--workers -2: give 0 or more, or -1 to choose by the machine"),
    (DataConfig, {"max_unreadable": 2.0}, "--max-unreadable 2.0: a share lies between 0 and 1"),
    *(
        (ModelConfig, {n: 0}, f"--{n.replace('_', '-')} 0: give 1 or more")
        for n in ("patch_size", "out_dim", "head_layers", "head_hidden_dim", "bottleneck_dim")
    ),
    (ModelConfig, {"num_register_tokens": -1}, "--num-register-tokens -1: give 0 or more"),
    (ModelConfig, {"layer_scale": -1e-5}, "--layer-scale -1e-05: give 0 or more"),
    (ModelConfig, {"layer_scale": NAN}, "--layer-scale nan: give 0 or more"),
    (ModelConfig, {"drop_path_rate": 1.0}, "--drop-path-rate 1.0: give 0 up to, not including, 1"),
    *(
        (MethodConfig, {n: 0.0}, f"--{n.replace('_', '-')} 0.0: a temperature is above 0")
        for n in ("student_temp", "teacher_temp", "warmup_teacher_temp")
    ),
    *(
        (MethodConfig, {n: 1.1}, f"--{n.replace('_', '-')} 1.1: a momentum lies between 0 and 1")
        for n in ("center_momentum", "momentum_teacher")
    ),
    (MethodConfig, {"warmup_teacher_temp_epochs": -1}, "--warmup-teacher-temp-epochs -1: give 0 or more"),
    *(
        (OptimConfig, {n: 0}, f"--{n.replace('_', '-')} 0: give 1 or more")
        for n in ("epochs", "batch_size", "accumulate")
    ),
    (
        OptimConfig,
        {"batch_size": 64, "accumulate": 3},
        "--batch-size 64 is not a multiple of --accumulate 3: change",
    ),
    *(
        (OptimConfig, {n: -1.0}, f"--{n.replace('_', '-')} -1.0: give 0 or more")
        for n in ("lr", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad")
    ),
    (OptimConfig, {"lr": NAN}, "--lr nan: give 0 or more"),
    (OptimConfig, {"lr": "auto", "optimizer": "sgd"}, "--lr auto is for adamw: give sgd a number"),
    (OptimConfig, {"freeze_last_layer": -1}, "--freeze-last-layer -1: give 0 or more epochs"),
    (OptimConfig, {"head_warmup_steps": -1}, "--head-warmup-steps -1: give 0 or more updates"),
    *(
        (RunConfig, {n: 0}, f"--{n.replace('_', '-')} 0: give 1 or more")
        for n in ("log_every", "save_every", "keep", "max_nonfinite")
    ),
    *(
        (RunConfig, {n: -1}, f"--{n.replace('_', '-')} -1: give 0 or more")
        for n in ("keep_every_epochs", "knn_every_epochs", "knn_images", "seed")
    ),
    (
        Config,
        {"model": ModelConfig(patch_size=128)},
        "a crop of 96 pixels holds no patch of 128: lower --patch-size",
    ),
    (
        Config,
        {"model": ModelConfig(patch_size=256), "data": DataConfig(crops=CROPS["two-crop"])},
        "a crop of 224 pixels holds no patch of 256: lower --patch-size",
    ),
    (
        Config,
        {"optim": OptimConfig(head_warmup_steps=3)},
        "--head-warmup-steps 3 holds the backbone still, and a new one has learnt nothing: give --init-from",
    ),
]


@pytest.mark.parametrize(("cls", "values", "message"), BAD, ids=[f"{c.__name__}-{v}" for c, v, _ in BAD])
def test_impossible_values_are_told_their_flag(cls, values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared
        cls(**values)
    assert str(error.value).startswith(message)


def test_limits_themselves_are_allowed():
    CropPolicy(
        global_crops_scale=(1.0, 1.0), flip=0.0, jitter=1.0, hue=0.5, local_crops_number=0, brightness=0.0
    )
    DataConfig(workers=0, max_unreadable=1.0)
    MethodConfig(center_momentum=0.0, momentum_teacher=1.0)
    OptimConfig(batch_size=6, accumulate=3, lr=0.0, clip_grad=0.0, warmup_epochs=1000.0)
    RunConfig(keep_every_epochs=0, knn_every_epochs=0, knn_images=0)
    # without local crops their size says nothing, and a ResNet has no patches
    Config(model=ModelConfig(patch_size=128), data=DataConfig(crops=CROPS["two-crop"]))
    Config(model=ModelConfig(arch="resnet50", patch_size=512))
    # nor has timm's network patches of this size
    Config(model=ModelConfig(arch="timm:vit_tiny_patch16_224", patch_size=512))
    Config(model=ModelConfig(init_from="a.pth"), optim=OptimConfig(head_warmup_steps=3))
    Config(model=ModelConfig(init_from="a.pth"))


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    """What fastdino-train would train with these arguments."""
    trained: list[Config] = []
    monkeypatch.setattr(train_module, "train", trained.append)
    monkeypatch.setattr(sys, "argv", ["fastdino-train", *arguments])
    monkeypatch.setenv("COLUMNS", "110")  # a narrow terminal would break the lines that are compared
    train_module.main()
    (config,) = trained
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_parses_to_itself(name, monkeypatch: pytest.MonkeyPatch):
    preset = PRESETS[name][1]
    expected = dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, data="images"),
        run=dataclasses.replace(preset.run, out="runs/a"),
    )
    assert parse(monkeypatch, name, "--data", "images", "--out", "runs/a") == expected


# A flag of each kind: number, two numbers, three, truth, choice, path, and one of each nested config.
OTHERS = {
    "global-crops-scale": ("0.2 0.9", (0.2, 0.9)),
    "solarize": ("0 0.1 0.3", (0.0, 0.1, 0.3)),
    "max-unreadable": ("0.5", 0.5),
    "lr": ("auto", "auto"),
    "out-dim": ("4096", 4096),
    "no-norm-last-layer": ("", False),
    "teacher-update": ("previous_epoch", "previous_epoch"),
    "optimizer": ("lars", "lars"),
    "batch-size": ("128", 128),
    "precision": ("fp16", "fp16"),
    "val": ("some where", "some where"),
    "arch": ("timm:convnext_atto", "timm:convnext_atto"),
    "num-register-tokens": ("4", 4),
    "layer-scale": ("1e-5", 1e-5),
    "init-from": ("weights.pth", "weights.pth"),
    "compile": ("off", "off"),
    "attention": ("varlen", "varlen"),
    "activation-checkpointing": ("", True),
}


@pytest.mark.parametrize("flag", OTHERS)
def test_flags_override_one_field_and_no_other(flag, monkeypatch: pytest.MonkeyPatch):
    text, value = OTHERS[flag]
    arguments = [text] if flag == "val" else text.split()
    config = parse(monkeypatch, "vit-small-16", f"--{flag}", *arguments)
    name = flag.removeprefix("no-").replace("-", "_")
    assert leaves(config) == leaves(PRESETS["vit-small-16"][1]) | {name: value}
    assert leaves(PRESETS["vit-small-16"][1])[name] != value


def test_flags_named_in_readme_and_in_messages_are_flags(monkeypatch, capsys):
    """A switch takes no word after it, and what we tell people to type is to be typed."""
    parse_help = pytest.raises(SystemExit)
    with parse_help:
        parse(monkeypatch, "vit-small-16", "--help")
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    root = Path(__file__).parents[1]
    for path in (root / "README.md", *(root / "fastdino").rglob("*.py")):
        text = path.read_text()
        assert not re.findall(r"--[a-z-]+ (?:True|False)\b", text), path
    lines = re.findall(r"fastdino-train (?:[a-z0-9-]+) (.*(?:\\\n.*)*)", (root / "README.md").read_text())
    named = {flag for line in lines for flag in re.findall(r"--[a-z][a-z-]+", line)}
    assert {"--data", "--out", "--init-from"} <= named
    assert named <= known


@pytest.mark.parametrize("name", NAMES)
def test_help_of_every_preset_mentions_each_flag_without_prefix(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, name, "--help")
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert " ".join(PRESETS[name][0].split()[:3]) in out
    lines = re.findall(
        r"^[│ ] {1,2}(--[a-z][\w.-]*(?:, --[\w.-]+)?)", out, re.M
    )  # the flags' texts begin further right
    fields = leaves(PRESETS[name][1])
    expected = {f"--{field.replace('_', '-')}" for field in fields}
    expected |= {f"--no-{k.replace('_', '-')}" for k, v in fields.items() if isinstance(v, bool)}
    assert {flag for line in lines for flag in line.split(", ")} == expected


def test_every_field_is_explained():
    """The docstring under a field is its --help: one left out shows as a flag without a text."""
    source = Path(sys.modules["fastdino.config"].__file__ or "").read_text()
    for name in leaves(Config()):
        assert re.search(rf'^    {name}: [^\n]*\n    """\S', source, re.M), name


def test_an_unknown_preset_names_the_known_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, "vit-huge")
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert "vit-huge" in shown
    assert all(name in shown for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr -1", "--lr -1.0: give 0 or more"),
        ("--num-register-tokens -1", "--num-register-tokens -1: give 0 or more"),
        ("--layer-scale -1", "--layer-scale -1.0: give 0 or more"),
        ("--head-warmup-steps 3", "give --init-from, or 0"),
        ("--compile maybe", "one of ('auto', 'on', 'off')"),
        ("--attention flash", "one of ('auto', 'sdpa', 'varlen', 'xformers')"),
    ],
)
def test_an_impossible_value_on_the_command_line_is_told_its_flag(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(monkeypatch, "demo", *arguments.split())
    assert exit_.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())  # without its frame
    assert message in shown
    assert arguments.split()[0] in shown


# Flags of other trainers

OFFICIAL = """
--arch vit_small --patch_size 16 --out_dim 65536 --norm_last_layer false --momentum_teacher 0.996
--use_bn_in_head true --warmup_teacher_temp 0.04 --teacher_temp 0.04 --warmup_teacher_temp_epochs 0
--use_fp16 true --weight_decay 0.04 --weight_decay_end 0.4 --clip_grad 3.0 --batch_size_per_gpu 64
--epochs 100 --freeze_last_layer 1 --lr 0.0005 --warmup_epochs 10 --min_lr 1e-6 --optimizer adamw
--drop_path_rate 0.1 --global_crops_scale 0.4 1.0 --local_crops_number 8 --local_crops_scale 0.05 0.4
--data_path X --output_dir Y --saveckp_freq 20 --seed 0 --num_workers 10 --dist_url env:// --local_rank 0
"""


def test_every_flag_of_official_dino_is_ours_or_has_a_hint() -> None:
    given = OFFICIAL.split()
    flags = {flag.removeprefix("--") for flag in given if flag.startswith("--")}
    hinted = {hint.split()[0].removeprefix("--") for hint in config_module.hints(given)}
    ours = set(config_module._leaves(Config()))
    assert flags - ours == hinted - {"norm_last_layer", "use_bn_in_head"}
    assert hinted - ours == {
        *("use_fp16", "batch_size_per_gpu", "data_path", "output_dir", "saveckp_freq", "num_workers"),
        *("dist_url", "local_rank"),
    }


def test_hints_shadow_no_flag_of_ours_and_point_to_ones_that_are() -> None:
    ours = {name.replace("_", "-") for name in config_module._leaves(Config())}
    for names, text in config_module.ELSEWHERE.items():
        assert ours.isdisjoint(name.replace("_", "-") for name in names.split())
        assert set(re.findall(r"--([\w-]+)", text)) <= ours | {"nproc-per-node"}
    assert config_module.hints(["demo", "--data", "X", "--norm-last-layer", "--lr=0.1", "data_path"]) == []
    assert config_module.hints(["--data-path=X", "--no-norm-last-layer", "true"]) == [
        "--data-path of other trainers is here --data"
    ]


def test_the_command_gives_hints_after_its_error_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for arguments, said in {
        "vit-small-16 --data_path X --batch_size_per_gpu 64": 2,
        "vit-small-16 --use_bn_in_head true": 1,
        "vit-small-16 --lr x": 0,
        "vit-small-16 --help": 0,
    }.items():
        monkeypatch.setattr(sys, "argv", ["fastdino-train", *arguments.split()])
        with pytest.raises(SystemExit):
            train_module.main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdino-train: ")]
        assert len(lines) == said
    assert config_module.hints(["--batch_size_per_gpu", "64"]) == [
        "--batch_size_per_gpu of other trainers is here --batch-size, of all GPUs together"
    ]
