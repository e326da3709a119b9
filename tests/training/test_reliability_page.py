"""The page on reliability names tests; each of them exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").glob("**/test_*.py")}
    defined = set(re.findall(r"^def (test_\w+)\(", "\n".join(files.values()), re.MULTILINE))
    named = {name for name in re.findall(r"\b(test_\w+)\b(?!\.py)", text) if f"{name}.py" not in files}
    assert len(named) > 20
    assert named <= defined, named - defined
    for name in re.findall(r"\b(test_\w+\.py)\b", text):
        assert name in files
