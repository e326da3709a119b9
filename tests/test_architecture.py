"""The arrows between the package's parts (see CONTRIBUTING.md), read from the import statements."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import groupdetr_fast

ROOT = Path(groupdetr_fast.__file__).parent

# part: the parts it may import besides itself
ALLOWED = {
    "boxes": set(),
    "groups": set(),
    "targets": set(),
    "files": set(),
    "field_types": set(),
    "pages": set(),
    "random_state": set(),
    "spelling": set(),
    "yaml_files": set(),
    "tensor_files": set(),
    "_gpus": set(),
    "_library": {"_gpus"},
    "_eager": {"_library"},
    "testing": {"_gpus"},
    "ops": {"_eager", "_gpus", "_library", "boxes", "groups", "targets"},
    "layers": {"ops", "boxes", "groups", "targets", "tensor_files"},
    "models": {"layers", "ops", "boxes", "groups", "targets", "tensor_files"},
    "losses": {"ops", "boxes", "groups", "targets"},
    "training": {"groups", "targets", "field_types", "files", "random_state", "tensor_files"},
    "data": {"boxes", "field_types", "groups", "targets"},
    "evaluation": {"boxes", "groups", "targets", "data"},
    "build": {"models", "losses"},
    "group_check": {"build", "models", "random_state", "targets", "transformers_detector"},
    "transformers_detector": {"files", "integrations", "models", "data", "groups", "targets"},
    "prediction": {"models", "data", "spelling", "transformers_detector", "yaml_files"},
    "runs": {
        "field_types",
        "files",
        "pages",
        "random_state",
        "spelling",
        "yaml_files",
        "build",
        "prediction",
        "models",
        "losses",
        "training",
        "data",
        "evaluation",
        "transformers_detector",
    },
    "analysis": {
        "field_types",
        "files",
        "pages",
        "random_state",
        "runs",
        "build",
        "models",
        "losses",
        "training",
        "data",
        "evaluation",
        "groups",
    },
    "commands": {
        "files",
        "analysis",
        "group_check",
        "runs",
        "prediction",
        "engines",
        "exporting",
        "models",
        "training",
        "data",
        "evaluation",
        "ops",
        "transformers_detector",
        "_gpus",
        "__version__",
    },
    "engines": set(),
    "exporting": {"engines", "files", "models", "prediction"},
    "detector": {"engines", "exporting", "models", "prediction", "runs", "training", "data", "transformers_detector"},
    "cli": {"commands", "training"},
    "integrations": {"losses", "ops", "boxes", "groups", "targets", "tensor_files"},
    "__init__": {"build", "detector", "group_check", "groups", "models", "ops", "prediction", "targets"},
    "__main__": {"cli"},
}


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(path):
    """Parts of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.relative_to(ROOT).parts[:-1]
            base = folder[: len(folder) - node.level + 1]
            names = (node.module or "").split(".") if node.module else []
            if base or names:
                yield (*base, *names)[0]
            else:
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "groupdetr_fast":
            parts = node.module.split(".")[1:]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "groupdetr_fast":
                    yield parts[1] if len(parts) > 1 else "__init__"


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_arrows(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is not on the map: add it here and in CONTRIBUTING.md"
    forbidden = {name for name in imports_of(path) if name != part} - ALLOWED[part]
    assert not forbidden, f"{path.relative_to(ROOT)} must not import {', '.join(sorted(forbidden))}"


def test_the_reader_of_imports_sees_them():
    assert {"layers", "groups", "models"} <= set(imports_of(ROOT / "models" / "conditional_detr.py"))
    assert {"ops", "groups", "targets"} <= set(imports_of(ROOT / "losses" / "matcher.py"))
    assert "models" in set(imports_of(ROOT / "build.py"))


def file_of(module):
    """The file of a module, by the names that lead to it from the package; None if it is no module."""
    place = ROOT.joinpath(*module)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def files_imported_by(path):
    """Files of the package that a file imports, in functions too, but for those of which it needs types alone."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    of_types = {inner for block in blocks for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node not in of_types:
            folder = path.relative_to(ROOT).parts[:-1]
            module = (*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                found = file_of((*module, alias.name)) or file_of(module)
                if found not in (None, path):
                    yield found


def test_no_files_import_each_other():
    try:
        TopologicalSorter({path: set(files_imported_by(path)) for path in FILES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(str(path.relative_to(ROOT)) for path in reversed(error.args[1])))


def test_the_reader_of_files_sees_them():
    trainer = ROOT / "integrations" / "ultralytics" / "training.py"
    assert {path.name for path in files_imported_by(trainer)} == {"kept_groups.py", "parts.py"}
    of_model = set(files_imported_by(ROOT / "runs" / "model.py"))
    assert ROOT / "transformers_detector" / "build.py" in of_model  # in a function
    assert ROOT / "transformers_detector" / "detector.py" not in of_model  # for types alone


LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 450, 60


def is_kernel(function):
    """Whether a function is one of Triton's, which hold a whole computation."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_rooms_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_OF_A_FILE
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions if not is_kernel(node)}
    assert {name: length for name, length in lengths.items() if length > LINES_OF_A_FUNCTION} == {}


def test_the_map_names_every_header():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    headers = {path.name for path in (ROOT.parent / "csrc").rglob("*.h")}
    assert len(headers) > 5
    assert not {name for name in headers if name not in text}
