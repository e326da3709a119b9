"""Prints the lower bounds of pyproject.toml as constraints for pip: ``torch>=2.11`` becomes ``torch==2.11``.

    python tests/lower_bounds.py >constraints.txt

What the package needs to be built, to run with every extra and to be tested: of several bounds of one package the
highest. Requirements without a bound (wheel, ninja) are left out.
"""

import re
from collections.abc import Iterator
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("train", "export", "serve", "supervision", "transformers", "video", "test")


def requirements() -> list[str]:
    """What pyproject.toml asks for, without references from one extra to others."""
    content = tomllib.loads(PYPROJECT.read_text())
    project = content["project"]
    lists = [content["build-system"]["requires"], project["dependencies"]]
    lists += [project["optional-dependencies"][extra] for extra in EXTRAS]
    return [line for lines in lists for line in lines if not line.startswith(f"{project['name']}[")]


def constraints() -> Iterator[str]:
    bounds: dict[str, str] = {}
    for requirement in sorted(set(requirements())):
        if bound := re.fullmatch(r"([\w.-]+)>=([\w.]+)(?:;.*)?", requirement):
            name, version = bound.groups()
            bounds[name] = max(bounds.get(name, version), version, key=_numbers)
    for name, version in bounds.items():
        yield f"{name}=={version}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


if __name__ == "__main__":
    print(*constraints(), sep="\n")
