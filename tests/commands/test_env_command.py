"""The command ``groupdetr env``."""

import re

import groupdetr_fast as gd
from groupdetr_fast import cli


def test_env_tells_versions_and_kernels(capsys):
    cli.main(["env"])
    text = capsys.readouterr().out
    assert f"groupdetr_fast  {gd.__version__}" in text
    for op, kernels in gd.ops.backends().items():
        assert re.search(rf"^{op} +cpu: {re.escape(kernels['cpu'])}, cuda: {kernels['cuda']}$", text, re.MULTILINE)
