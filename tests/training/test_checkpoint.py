"""The files of a checkpoint."""

import os

import pytest
import torch

from groupdetr_fast.training.checkpoint import amend_checkpoint, mark_best, save_checkpoint


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


def test_texts_beside_the_weights_are_in_every_checkpoint_and_in_the_best(tmp_path):
    for epoch in (1, 2):
        folder = save_checkpoint(tmp_path, epoch, 0, {"a": torch.zeros(2)}, {}, {}, files={"config.json": f"{epoch}"})
        assert (folder / "config.json").read_text() == f"{epoch}"
        mark_best(tmp_path, epoch)
    best = tmp_path / "checkpoints" / "best"
    assert sorted(path.name for path in best.iterdir()) == ["config.json", "model.safetensors"]
    assert (best / "config.json").read_text() == "2"
