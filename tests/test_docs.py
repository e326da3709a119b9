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


def test_files_that_the_page_of_checks_names_exist():
    text = (DOCS / "verified.md").read_text()
    names = set(re.findall(r"`([\w/.*]+(?:/|\.py))`", text)) - {"tests/"}
    assert len(names) > 20
    for name in names:
        folders = ("", "training/", "benchmarks/")
        assert any(list((DOCS.parent / "tests").glob(f"{folder}{name.rstrip('/')}")) for folder in folders), name
