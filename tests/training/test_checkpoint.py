"""The files of a checkpoint."""

import os

import pytest
import torch

from groupdetr_fast.training.checkpoint import amend_checkpoint, save_checkpoint


@pytest.mark.parametrize("amended", [False, True])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, mode, amended):
    before = os.umask(umask)
    try:
        folder = save_checkpoint(tmp_path, 1, 0, {"a": torch.zeros(2)}, {}, {})
        if amended:
            amend_checkpoint(folder, {"epoch": 1}, history=[])
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "model.safetensors": mode,
        "state.pt": mode,
    }
