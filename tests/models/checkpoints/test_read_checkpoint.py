"""Reading files, without running anything in them."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import build

import groupdetr_fast as gd
from groupdetr_fast.models.checkpoints import CheckpointHeader, read_header
from groupdetr_fast.models.checkpoints.read import read_checkpoint


def test_unreadable_files_are_refused_in_one_sentence(tmp_path):
    model = build()
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        gd.load_checkpoint(model, tmp_path / "none.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            gd.load_checkpoint(model, tmp_path / name)
    torch.save(Intruder(tmp_path / "ran"), tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"objects.pth cannot be read as a file of tensors"):
        gd.load_checkpoint(model, tmp_path / "objects.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has neither"):
        gd.load_checkpoint(model, tmp_path / "empty")


class Intruder:
    """A pickle that would create a file when it is read carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_headers_of_own_files_alone(tmp_path):
    content = {"model": "dab_detr_r50", "labels": "category_id"}
    own, other = tmp_path / "own", tmp_path / "other.safetensors"
    own.mkdir()
    save_file({"a": torch.zeros(1)}, own / "model.safetensors", metadata={"groupdetr_fast": json.dumps(content)})
    save_file({"a": torch.zeros(1)}, other)
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pth")
    header = CheckpointHeader(model="dab_detr_r50", labels="category_id")
    assert read_header(own) == read_header(own / "model.safetensors") == header
    with pytest.raises(FileNotFoundError, match=r"checkpoint: there is nothing at .*nothing"):
        read_header(tmp_path / "nothing")
    for path in (other, tmp_path / "pickle.pth", tmp_path):
        assert read_header(path) == CheckpointHeader()
    other.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"other.safetensors cannot be read as safetensors"):
        read_header(other)


@pytest.mark.parametrize("value", ["300", [300], 10**12, -1])
def test_sizes_of_queries_that_are_none_are_refused(tmp_path, value):
    arguments = argparse.Namespace(num_queries=value, group_detr=1)
    torch.save({"model": {"a": torch.zeros(1)}, "args": arguments}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"the checkpoint says num_queries = .*, which is no number of queries"):
        read_checkpoint(tmp_path / "a.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_queries": value}))
    with pytest.raises(ValueError, match="the checkpoint says num_queries = "):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_settings_of_transformers_that_are_no_json_are_refused(tmp_path, text):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json, beside the weights, (cannot be read|must hold)"):
        read_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"^\S+config\.json, beside the weights, (cannot be read|must hold)"):
        read_header(tmp_path)


def test_the_folder_of_a_run_stands_for_its_best_checkpoint_or_the_newest(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for epoch, name in enumerate(("epoch_0001", "epoch_0002", "best"), start=1):
        (folder / name).mkdir(parents=True)
        save_file({"epoch": torch.tensor(epoch)}, folder / name / "model.safetensors")
        for path in (tmp_path / "run", folder):
            assert read_checkpoint(path).state["epoch"] == epoch
    assert read_checkpoint(folder / "epoch_0001").state["epoch"] == 1
