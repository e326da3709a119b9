"""The pages in docs/ keep up with the code."""

import csv
import re
from pathlib import Path

import pytest

import groupdetr_fast as gd
from groupdetr_fast import cli

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("module", [gd, gd.ops])
def test_the_api_page_lists_every_public_name(module):
    listed = set(re.findall(r"\[`(\w+)`\]", (DOCS / "api.md").read_text()))
    assert set(module.__all__) - {"__version__", "ops"} <= listed


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]), ids=lambda page: page.name)
def test_commands_and_flags_in_the_pages_exist(page, capsys):
    """``groupdetr ...`` in blocks of code: its command, and the names of its flags."""
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    used: dict[tuple[str, ...], set[str]] = {}
    for line in lines:
        found = re.match(r"\s*groupdetr ((?:analyze )?[\w-]+)(.*)", line.partition("#")[0])
        if found:
            used.setdefault(tuple(found.group(1).split()), set()).update(re.findall(r"--[\w-]+", found.group(2)))
    for command, flags in used.items():
        with pytest.raises(SystemExit) as done:
            cli.main([*command, "--help"])
        assert done.value.code == 0
        assert flags <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_flags_in_the_notes_for_those_who_come_from_elsewhere_exist(capsys):
    """Those of this package: in tables they stand on the right, and commands of others in the text are left out."""
    known = {"--nproc-per-node"}  # of torchrun
    for command in ("train", "predict", "eval", "export", "check"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    sections = re.split(r"^## ", (DOCS / "migration.md").read_text(), flags=re.MULTILINE)[1:]
    named = {section.partition("\n")[0]: flags_of_this_package(section) for section in sections}
    assert {name for name, flags in named.items() if len(flags) > 20} >= {"RF-DETR (and LW-DETR)", "transformers"}
    assert len(named["Ultralytics"]) > 25
    assert {name: flags - known for name, flags in named.items() if flags - known} == {}


def flags_of_this_package(section):
    lines = [
        line.partition("|")[2].partition("|")[2] if line[0] == "|" else line for line in section.splitlines() if line
    ]
    text = re.sub(r"`python main.py [^`]*`", "", "\n".join(lines))
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))


def test_ratios_of_the_models_of_transformers_are_those_that_were_measured():
    """Who measures some of the models again keeps the rows of the others."""
    with (DOCS.parent / "benchmarks" / "results" / "transformers_step.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["contender"] == "transformers"]
    measured = {
        row["case"].replace("x2x320", ""): "{ratio:.2f} ({ratio_q1:.2f}-{ratio_q3:.2f})".format(
            **{name: float(row[name]) for name in ("ratio", "ratio_q1", "ratio_q3")}
        )
        for row in rows
    }
    section = (DOCS / "integrations.md").read_text().partition("| model | step ratio on the CPU |")[2]
    stated = dict(re.findall(r"^\| (\w+)[^|]*? \| ([\d.]+ \([\d.]+-[\d.]+\)) \| not yet", section, re.MULTILINE))
    stated["Mask2Former"] = measured["Mask2Former"]  # of three numbers of objects
    assert len(stated) == 6
    assert {name: measured.get(name) for name in stated} == stated


def test_pages_say_what_is_wrong_in_silence():
    """The order of colours, and which way up photographs are seen."""
    pages = {name: (DOCS / f"{name}.md").read_text() for name in ("migration", "predict", "training")}
    assert 'channel_order="bgr"' in pages["predict"]
    assert 'channel_order="bgr"' in pages["migration"]
    assert all("EXIF orientation" in text for text in pages.values())


def test_files_that_the_page_of_checks_names_exist():
    text = (DOCS / "verified.md").read_text()
    names = set(re.findall(r"`([\w/.*]+(?:/|\.py))`", text)) - {"tests/"}
    assert len(names) > 20
    for name in names:
        folders = ("", "training/", "benchmarks/")
        assert any(list((DOCS.parent / "tests").glob(f"{folder}{name.rstrip('/')}")) for folder in folders), name
