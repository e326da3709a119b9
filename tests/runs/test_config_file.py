import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from groupdetr_fast.analysis.run import Run
from groupdetr_fast.data import AugmentationConfig
from groupdetr_fast.data.config import DataConfig
from groupdetr_fast.field_types import from_plain
from groupdetr_fast.runs.config import CocoTrainingConfig, ModelConfig
from groupdetr_fast.runs.config_file import from_yaml, to_json, to_yaml
from groupdetr_fast.runs.demo import digits_demo
from groupdetr_fast.training.config import OptimizationConfig


@dataclass
class Inner:
    rate: float = 0.1
    count: int = 3
    precision: Literal["no", "bf16"] = "no"
    size: int | None = 4
    pair: tuple[float, float] = (0.0, 1.0)
    sides: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    folder: Path | None = None
    name: str = "a"
    flag: bool = False
    names: tuple[Literal["a", "b"], ...] = ()


def read(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return from_yaml(Outer, tmp_path / "c.yaml")


def test_the_way_there_and_back(tmp_path):
    config = CocoTrainingConfig(
        data=DataConfig(data_path=Path("some where/ü"), labels="category_id"),
        model=ModelConfig(model="dino_4scale_r50", dropout=1e-7, dilation=True, load=Path("a.pth")),
        augmentation=AugmentationConfig(max_size=None, jitter_size=64, image_mean=(0.5, 0.25, 1 / 3)),
        optimization=OptimizationConfig(schedule="12e", lr=3e-5, lr_drop=(), precision="no"),
        positives=3,
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert from_yaml(CocoTrainingConfig, tmp_path / "c.yaml") == config


# What YAML 1.1 or 1.2 takes for a number, a truth value, nothing, a time or a date, or has a meaning of its own for.
AMBIGUOUS = (
    *("1e-4", "1E5", "-1e-4", "+.1e1", "0e0", "1.5", ".5", "5.", "1", "017", "0o17", "0x1f", "0b1", "1_000", ".inf"),
    *(".nan", "yes", "no", "on", "off", "y", "n", "true", "False", "null", "Null", "~", "", "12:30", "1:2:3.5"),
    *("2026-11-27", "2026-11-27 10:00:00", "=", "<<", "-", "- a", "? a", ":", "a: b", "a:", "# x", "a #b", "*x", "&x"),
    *("!x", "%x", "@x", "`x", "{a}", "[a]", "a, b", "|", ">", " a", "a ", "a\nb", "a\tb", "'a'", '"a"', "a\\b", "---"),
    *("...", "1e\u0664", "\u2028", "\ufeff", "\udc80", "b" * 100 + "  c" * 100),
)


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_texts_stay_texts(text, tmp_path):
    config = CocoTrainingConfig(
        model=ModelConfig(backbone_weights=text),
        optimization=OptimizationConfig(freeze=(text, "a")),
        class_weights=text,
        output=Path(text),
    )
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    assert from_yaml(CocoTrainingConfig, tmp_path / "c.yaml") == config


def test_values_as_people_write_them(tmp_path):
    text = "inner: {rate: 1e-4, precision: no, size: null, pair: [0, 1e3], sides: [5]}\nfolder: runs/x\nflag: true\n"
    config = read(tmp_path, text)
    assert config == Outer(Inner(1e-4, 3, "no", None, (0.0, 1000.0), (5,)), Path("runs/x"), "a", True)
    assert type(config.inner.pair[0]) is float
    assert read(tmp_path, "") == Outer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iner: {}", "unknown key iner; perhaps inner"),
        ("inner: {xyz: 1}", r"unknown key inner.xyz\Z"),
        ("inner: {count: many}", r"inner.count must be an integer, got 'many'"),
        ("inner: {count: 1.5}", "inner.count must be an integer, got 1.5"),
        ("inner: {count: true}", "inner.count must be an integer, got True"),
        ("inner: {count: 0}", "inner: count must be at least 1, got 0"),
        ("inner: {rate: fast}", "inner.rate must be a number, got 'fast'"),
        ("inner: {size: [1]}", r"inner.size must be an integer or null, got \[1\]"),
        ("inner: {precision: fp8}", "inner.precision must be one of no, bf16, got 'fp8'"),
        ("inner: {pair: [1]}", r"inner.pair must be a list of length 2, each entry a number, got \[1\]"),
        ("inner: {sides: [1, x]}", "each entry of inner.sides must be an integer, got 'x'"),
        ("inner: 3", "inner must have keys and values, got 3"),
        ("- a", "the file must have keys and values"),
        ("flag: 1", "flag must be true or false, got 1"),
        ("folder: 7", "folder must be a path or null, got 7"),
        ("names: yolo", "names must be a list, each entry one of a, b, got 'yolo'"),
        ("a: [", "cannot be read as yaml"),
    ],
)
def test_faults_name_file_and_key(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"c.yaml:? {message}"):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, r"a\.yaml cannot be read as yaml: it is nested too deeply"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: [" + "*b, " * 5000 + "]", r"a\.yaml: .{,200}$"),
        ("model: {model: [" + "x, " * 5000 + "]}", r"a\.yaml: model\.model must be a text, got .{,200}$"),
    ],
)
def test_yaml_without_bounds_ends_in_a_short_sentence(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_yaml(CocoTrainingConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "config",
    [
        CocoTrainingConfig(data=DataConfig(coco_path=Path("coco")), assignment="one_to_many", positives=3),
        replace(digits_demo(compose=False), output=Path("elsewhere")),
        Run(CocoTrainingConfig(), 0.5),
    ],
    ids=["paper", "demo", "run"],
)
def test_json_and_back(config):
    assert from_plain(type(config), json.loads(json.dumps(to_json(config))), complete=True) == config


def test_equal_settings_have_equal_texts():
    texts = [
        json.dumps(
            to_json(replace(CocoTrainingConfig(), optimization=OptimizationConfig(lr_drop=drop, clip_norm=norm)))
        )
        for drop, norm in [((40,), 1), ((40.0,), 1.0)]
    ]
    assert texts[0] == texts[1]


def test_a_missing_setting_is_named():
    values = to_json(CocoTrainingConfig())
    del values["model"]["num_groups"]
    with pytest.raises(ValueError, match=r"key model\.num_groups is missing"):
        from_plain(CocoTrainingConfig, values, complete=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"early_stopping_delta": float("nan")}, "early_stopping_delta must not be negative, got nan"),
    ],
)
def test_limits_of_a_run(settings, message):
    with pytest.raises(ValueError, match=message):
        CocoTrainingConfig(**settings)
