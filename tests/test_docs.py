"""The pages in docs/ keep up with the code."""

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


def test_the_notes_on_ultralytics_name_flags_that_exist(capsys):
    page = (DOCS / "migration.md").read_text()
    section = re.search(r"^## Ultralytics\n(.*?)^## ", page, re.MULTILINE | re.DOTALL)[1]
    known = {"--nproc-per-node"}  # of torchrun
    for command in ("train", "predict", "eval"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    flags = set(re.findall(r"(?<!\w)--[a-z][\w-]+", section))
    assert len(flags) > 25
    assert not flags - known


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
