"""Flags that are read before the others, whose defaults depend on them."""

from pathlib import Path
from typing import get_type_hints

import pytest

from groupdetr_fast.commands.flags import DetectorFlags, ImageFlags
from groupdetr_fast.commands.parsing import WrongCommandLine, read_flags
from groupdetr_fast.data.config import DataPaths
from groupdetr_fast.data.transforms import EVAL_SETTINGS
from groupdetr_fast.runs.config import ModelConfig


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--lr", "2e-4", "--help"], DataPaths()),
        (["analyze", "cost", "--groups", "1", "2", "--coco-path", "a"], DataPaths(coco_path=Path("a"))),
        (["--data_path=a", "--no-decode", "b"], DataPaths(data_path=Path("a"))),
    ],
)
def test_flags_are_found_among_others(arguments, expected):
    found = read_flags(DataPaths, arguments)
    assert found == expected
    assert found.given == (expected != DataPaths())


def test_a_flag_without_a_value_is_refused():
    with pytest.raises(WrongCommandLine, match="--data-path takes a path or None, and got nothing"):
        read_flags(DataPaths, ["train", "--data-path"])


def test_flags_of_images_are_what_checkpoints_say_of_them():
    assert tuple(get_type_hints(ImageFlags)) == EVAL_SETTINGS
    assert ImageFlags().given() == {}
    assert ImageFlags(square=False, eval_max_size=8).given() == {"square": False, "eval_max_size": 8}


def test_flags_of_a_detector_are_settings_of_its_training():
    """A common base of the two would put the flags of training into another order, which its files of settings have."""
    flags, settings = get_type_hints(DetectorFlags), get_type_hints(ModelConfig)
    assert flags.keys() - {"num_classes"} <= settings.keys()
    assert {name: flags[name] for name in flags.keys() & settings.keys() - {"model"}} == {
        name: settings[name] for name in flags.keys() & settings.keys() - {"model"}
    }
