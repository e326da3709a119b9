"""Wrong command lines: one sentence each, whatever the command."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import tyro

from groupdetr_fast import cli
from groupdetr_fast.commands import analyze, parsing
from groupdetr_fast.commands.find_rate import FindRateCommand
from groupdetr_fast.commands.train import TrainCommand

COMMANDS = {
    "train": TrainCommand,
    "find-rate": FindRateCommand,
    **cli._COMMANDS,
    **{f"analyze {name}": kind for name, kind in analyze._COMMANDS.items()},
    "analyze report": analyze.ReportCommand,
}
OTHERWISE_RIGHT = {
    "eval": ["a.pth"],
    "predict": ["a.pth", "b.jpg"],
    "check": ["folder"],
    "check-groups": ["model"],
    "export": ["a.pth", "--output=a.onnx"],
    "recipes": ["name"],
}

READ_FIRST = ("--model", "--recipe", "--config")  # whose values may be refused before those of other flags are seen


def sentence(line, capsys):
    """What a command line ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(line)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", printed.err), f"{line}: {printed.err}"
    return printed.err[len("error: ") : -1]


def sort_of(kind):
    """Types whose values are wrong in the same ways."""
    if parsing._is_repeated(kind):
        return "repeated"
    inner = [each for each in get_args(kind) if each is not type(None)] if type(None) in get_args(kind) else [kind]
    first = inner[0]
    if get_origin(first) is tuple:
        return f"{'any' if Ellipsis in get_args(first) else len(get_args(first))} {get_args(first)[0]}"
    return "choice" if get_origin(first) is Literal else getattr(first, "__name__", str(first))


def wrong_values(kind):
    """Values that a flag does not take."""
    sort = sort_of(kind)
    if sort == "bool":
        return [["maybe"]]
    if sort[0].isdigit():
        return [[], ["1"], ["1"] * 5, ["1", "x", "1"][: int(sort[0])]]
    if sort.startswith("any"):
        return [["x"]] if "str" not in sort else []
    return [[], ["1", "2"]] if sort in ("str", "Path", "PosixPath", "repeated") else [[], ["x"], ["1", "2"]]


def test_flags_of_every_type_are_among_those_that_are_tried():
    flags = [kind for command in COMMANDS.values() for kind in parsing._flags_of(command).values()]
    assert {sort_of(kind) for kind in flags} >= {
        "bool",
        "int",
        "float",
        "str",
        "Path",
        "choice",
        "repeated",
        f"2 {int}",
        f"3 {int}",
    }
    assert all(parsing._takes(kind) for kind in flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_values_of_every_command_end_in_one_sentence(command, capsys):
    given = OTHERWISE_RIGHT.get(command, [])
    flags = {flag: kind for flag, kind in parsing._flags_of(COMMANDS[command]).items() if flag not in READ_FIRST}
    first = {sort_of(kind): (flag, kind) for flag, kind in reversed(flags.items())}
    for flag, kind in first.values():
        for values in wrong_values(kind):
            text = sentence([*command.split(), *given, flag, *values], capsys)
            takes, got = parsing._takes(kind), " ".join(values[: parsing._most(kind)]) or "nothing"
            assert text in (
                f"{flag} takes {takes}, and got {got}",
                f"there is no place for {values[-1:] and values[-1]} behind {flag}, which takes {takes}",
            )


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_of_every_command_ends_in_one_sentence(command, capsys):
    lists = f"groupdetr {command} --help lists all"
    assert sentence([*command.split(), "--nonesuch", "3"], capsys) == f"there is no flag --nonesuch: {lists}"
    for flag in list(parsing._flags_of(COMMANDS[command]))[:1]:
        misspelt = flag + "x"
        expected = f"there is no flag {misspelt}: did you mean {flag}? {lists}"
        assert sentence([*command.split(), f"{misspelt}=3"], capsys) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("export a.pth --output a.onnx --image-size 640", "--image-size takes 2 whole numbers, and got 640"),
        ("export --output a --image-size 8 b", "--image-size takes 2 whole numbers, and got 8 b"),
        ("export a.pth --output a.onnx --min-shape", "--min-shape takes 3 whole numbers, and got nothing"),
        ("export a.pth", "give --output: groupdetr export --help says what that is"),
        ("export a.pth --masks=yes", "there is no place for yes behind --masks, which takes no value"),
        ("export a b --output c", "there is no place for b: groupdetr export --help lists what there is one for"),
        ("export --output a -- b --masks", "--masks follows --, behind which nothing is a flag"),
        ("predict a b --batch_size=x", "--batch-size takes a whole number, and got x"),
        ("predict --batch-size x a b", "--batch-size takes a whole number, and got x"),
        ("predict a b --classes 0 2", "there is no place for 2 behind --classes, which takes a text each time"),
        ("predict a b --batch-size 3 3", "there is no place for 3 behind --batch-size, which takes a whole number"),
        ("predict a b --tile-merge all", "--tile-merge takes nmm or nms, and got all"),
        ("predict a b --square maybe", "--square takes True, False or None, and got maybe"),
        ("train --lr 3 --lr", "--lr takes a number, and got nothing"),
        ("train --lr-drop 3 x", "--lr-drop takes numbers or None, and got 3 x"),
        ("train --batch-size all", "--batch-size takes a whole number or auto, and got all"),
        ("train --config --lr 3", "--config takes a path or None, and got nothing"),
        (
            "train --track all",
            "--track takes any of tensorboard, wandb, mlflow, trackio or none, and got all",
        ),
        ("check-groups", "give MODEL: groupdetr check-groups --help says what that is"),
        (
            "check-groups --batch-siz 3 m",
            "there is no flag --batch-siz: did you mean --batch-size? groupdetr check-groups --help lists all",
        ),
        (
            "check-groups --no-json --batch-siz 3 m",
            "there is no flag --batch-siz: did you mean --batch-size? groupdetr check-groups --help lists all",
        ),
        ("--nonesuch", "there is no flag --nonesuch: groupdetr --help lists all"),
        ("export --output y x z", "there is no place for z: groupdetr export --help lists what there is one for"),
        ("export x --output y z", "there is no place for z behind --output, which takes a path"),
        (
            "export --output y --masks x z",
            "there is no place for z: groupdetr export --help lists what there is one for",
        ),
        ("check --limit 5 a b", "there is no place for b: groupdetr check --help lists what there is one for"),
        ("train --lr -1 -2", "there is no place for -2 behind --lr, which takes a number"),
        ("train -1.5e3", "there is no place for -1.5e3: groupdetr train --help lists what there is one for"),
        ("train -x", "there is no flag -x: groupdetr train --help lists all"),
        ("--version --json", "there is no place for --json behind --version, which stands alone"),
        ("--version x", "there is no place for x behind --version, which stands alone"),
        ("--version=3", "there is no place for 3 behind --version, which stands alone"),
        *(
            (f"{command} --version", "--version stands alone, without a command: groupdetr --version")
            for command in ("train", "eval a.pth", "predict a.pth b.jpg", "recipes", "env", "analyze", "analyze cost")
        ),
    ],
)
def test_what_the_sentence_says(line, expected, capsys):
    assert sentence(line.split(), capsys) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "predict --image-mean 0.5 0.4 0.3 a.pth b.jpg c.jpg",
            {"checkpoint": Path("a.pth"), "images": ("b.jpg", "c.jpg")},
        ),
        ("predict a.pth --image-std 1 1 1 b.jpg", {"checkpoint": Path("a.pth"), "images": ("b.jpg",)}),
        ("eval --image-mean 0 0 0 --image-std 1 1 1 a.pth", {"checkpoint": Path("a.pth")}),
        ("export --output a.onnx --image-size 64 48 a.pth", {"checkpoint": Path("a.pth"), "image_size": (64, 48)}),
        ("export --output a.engine --max-shape 1 8 8 a.pth", {"checkpoint": Path("a.pth")}),
        ("check-groups --image-size 64 48 model", {"model": "model", "image_size": (64, 48)}),
    ],
)
def test_a_flag_of_some_values_leaves_what_follows_them(line, expected):
    command, *rest = line.split()
    found = parsing.parse(COMMANDS[command], rest, prog="groupdetr")
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "name a command: groupdetr has train, "),
        ("--", "name a command: groupdetr has train, "),
        ("-- train", "name a command: groupdetr has train, "),
        ("analyze --", "name a command: groupdetr analyze has assignment, "),
        ("analyze", "name a command: groupdetr analyze has assignment, "),
        ("trian --lr 3", "there is no command trian: did you mean train? groupdetr has train, "),
        ("analyze grop-ap", "there is no command grop-ap: did you mean group-ap? groupdetr analyze has assignment, "),
        ("bogus", "there is no command bogus: groupdetr has train, "),
    ],
)
def test_misspelt_commands_call_up_the_commands(line, said, capsys):
    text = sentence(line.split(), capsys)
    assert text.startswith(said)
    listed = re.fullmatch(r".* has (.+) and (\S+)", text)
    names = {*listed[1].split(", "), listed[2]}
    assert names == {name.split()[-1] for name in COMMANDS if name.startswith("analyze ")} or names == {
        *(name for name in COMMANDS if " " not in name),
        "analyze",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --group-init-noise -1", "group_init_noise must be at least 0, got -1.0"),
        ("predict a b --batch-size 0", "batch_size must be at least 1, got 0"),
        ("analyze sweep-groups --seeds 0", "seeds must be at least 1, got 0"),
        ("analyze sweep-groups --groups 1 0", "groups must be numbers from 1 on, got 1, 0"),
        ("analyze assignment --groups", "groups must be numbers from 1 on, got none"),
        ("analyze cost --groups", "groups must be numbers from 1 on, got none"),
        ("analyze cost --steps 0", "steps must be at least 1, got 0"),
        ("analyze cost --warmup -1", "warmup must be at least 0, got -1"),
        ("analyze agreement --threads 0", "threads must be positive, got 0"),
        ("train --lr nan", "lr must not be negative and must be finite, got nan"),
        ("train --lr inf", "lr must not be negative and must be finite, got inf"),
        ("train --clip-norm nan", "clip_norm must not be negative, got nan"),
        ("train --clip-norm -1", "clip_norm must not be negative, got -1.0"),
        ("train --image-std 1 nan 1", "image_std must be positive and finite, got (1.0, nan, 1.0)"),
        ("train --image-mean nan 0 0", "image_mean must be finite, got (nan, 0.0, 0.0)"),
        ("train --pictures -1", "pictures must not be negative, got -1"),
        ("train --checkpoint-every -1", "checkpoint_every must not be negative, got -1"),
        ("train --max-skipped-steps -1", "max_skipped_steps must not be negative, got -1"),
        ("train --max-unreadable-images -1", "max_unreadable_images must not be negative, got -1"),
        ("check data --workers 0", "workers must be at least 1, got 0"),
        ("check data --limit -1", "limit must be at least 0, got -1"),
        ("check data --num-queries 0", "num_queries must be at least 1, got 0"),
    ],
)
def test_values_that_the_settings_refuse_end_as_those_that_are_found_later(line, message):
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == f"error: {message}"


@pytest.mark.parametrize(("command", "argument"), [("check", "FOLDER"), ("recipes", "NAME")])
def test_the_help_tells_which_arguments_may_be_left_out(command, argument, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f" [{argument}]\n" in capsys.readouterr().out


@pytest.mark.parametrize("hook", [None, lambda refuse: nullcontext(), lambda refuse: refuse(object()) or nullcontext()])
def test_another_version_of_tyro_speaks_for_itself(hook, capsys, monkeypatch):
    """The hook is private to tyro."""
    monkeypatch.setattr(tyro._errors, "on_parse_error", hook)
    with pytest.raises(SystemExit) as end:
        cli.main(["export", "a.pth", "--image-size", "640", "--output", str(Path("a.onnx"))])
    assert end.value.code == 2
    assert "--image-size" in capsys.readouterr().err


@pytest.mark.parametrize("is_said", [False, True])
@pytest.mark.parametrize(
    ("line", "flag"), [("export a --output b --image-size 640", "--image-size"), ("train --model", "--model")]
)
def test_what_tyro_says_itself_is_said_by_the_first_process_alone(line, flag, is_said, capsys, monkeypatch):
    heard = []
    monkeypatch.setattr(tyro._errors, "on_parse_error", None)
    monkeypatch.setattr(parsing, "first_says", lambda text: heard.append(text) or is_said)
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert end.value.code == 2
    assert len(heard) == 1
    assert flag in heard[0]
    assert capsys.readouterr().err == ("" if is_said else heard[0])
