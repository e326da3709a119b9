"""The command ``groupdetr env``."""

import re
from pathlib import Path

import pytest

import groupdetr_fast as gd
from groupdetr_fast import cli
from groupdetr_fast.commands.env import running_version


def test_env_tells_versions_and_kernels(capsys):
    cli.main(["env"])
    text = capsys.readouterr().out
    assert f"groupdetr_fast  {running_version()}\n" in text
    for op, kernels in gd.ops.backends().items():
        assert re.search(rf"^{op} +cpu: {re.escape(kernels['cpu'])}, cuda: {kernels['cuda']}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("package", "metadata", "expected"),
    [
        ("this", "groupdetr_fast-9.8.7+cpu.dist-info/METADATA", "9.8.7+cpu"),
        ("another", "groupdetr_fast-9.8.7+cpu.dist-info/METADATA", gd.__version__),  # this one runs from its source
        (None, "groupdetr_fast-9.8.7+cpu.dist-info/METADATA", gd.__version__),  # this one is installed as editable
        ("this", "groupdetr_fast.egg-info/PKG-INFO", gd.__version__),  # left behind by the building of a wheel
    ],
)
def test_the_version_is_that_of_the_build_that_runs(tmp_path, monkeypatch, capsys, package, metadata, expected):
    if package == "this":
        (tmp_path / "groupdetr_fast").symlink_to(Path(gd.__file__).parent)
    elif package == "another":
        (tmp_path / "groupdetr_fast").mkdir()
    (tmp_path / metadata).parent.mkdir()
    (tmp_path / metadata).write_text("Metadata-Version: 2.1\nName: groupdetr_fast\nVersion: 9.8.7+cpu\n")
    if "dist-info" in metadata:
        (tmp_path / metadata).with_name("RECORD").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert running_version() == expected
    cli.main(["--version"])
    assert capsys.readouterr().out == f"groupdetr_fast {expected}\n"
    cli.main(["env"])
    assert capsys.readouterr().out.startswith(f"groupdetr_fast  {expected}\nbuilt for       ")
