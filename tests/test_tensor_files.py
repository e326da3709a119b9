"""Files of tensors, and what is said of files that hold something else."""

import argparse
import pickle
import sys
import types
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import groupdetr_fast as gd
from groupdetr_fast.cli import main
from groupdetr_fast.layers.backbone import Backbone
from groupdetr_fast.tensor_files import ForeignObjects, read_tensors


def test_tensors_are_read_as_they_are(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.zeros(2, dtype=torch.int64)}
    torch.save({"model": tensors, "args": argparse.Namespace(layers=6)}, tmp_path / "a.pth")
    save_file(tensors, tmp_path / "a.safetensors")
    content = read_tensors(tmp_path / "a.pth", admitted=[argparse.Namespace])
    assert content["args"].layers == 6
    for found in (content["model"], read_tensors(tmp_path / "a.safetensors")):
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ForeignObjects, match=r"it holds objects \(argparse.Namespace\), which are not admitted"):
        read_tensors(tmp_path / "a.pth")  # what was admitted once is not admitted from then on


def test_modules_whose_classes_others_let_torch_load_are_refused(tmp_path):
    """As Ultralytics does once it has read a checkpoint, for the rest of the process."""
    for content in (nn.Linear(1, 1), {"epoch": 3, "model": nn.Linear(1, 1)}):
        torch.save(content, tmp_path / "a.pth")
        with torch.serialization.safe_globals([nn.Linear]):
            assert isinstance(torch.load(tmp_path / "a.pth", weights_only=True), type(content))
            with pytest.raises(ForeignObjects, match=r"\(torch.nn.modules.linear.Linear\)"):
                read_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("of_today", [True, False])
@pytest.mark.parametrize(
    ("content", "names"),
    [
        (nn.Linear(1, 1), ["torch.nn.modules.linear.Linear"]),
        ({"a": torch.zeros(1), "b": Fraction(1, 2), "c": eval}, ["fractions.Fraction", "builtins.eval"]),
    ],
)
def test_other_objects_are_named(tmp_path, content, names, of_today):
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=of_today)
    with pytest.raises(ForeignObjects) as caught:
        read_tensors(tmp_path / "a.pth")
    assert list(caught.value.names) == (names if of_today else names[:1])
    if len(caught.value.names) == 2:
        assert f"it holds objects ({names[0]} and 1 more kind), which are not" in str(caught.value)


def a_program(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
        torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)).save(path)


def half_a_file(path):
    torch.save(torch.zeros(1000), path)
    path.write_bytes(path.read_bytes()[:2000])


DAMAGED = "it is damaged or incomplete, or torch.save has not written it"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), rf"^{DAMAGED}$"),
        (lambda path: path.write_text("<html>not found</html>"), rf"^{DAMAGED}$"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=4)), rf"^{DAMAGED}$"),
        (half_a_file, rf"^{DAMAGED} \(PytorchStreamReader failed reading zip archive: [^.]*\)$"),
        (a_program, r"^it is a TorchScript program: save the state_dict\(\) of its model instead$"),
        (lambda path: path.mkdir(), r"^Is a directory$"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path, write, message):
    write(tmp_path / "a.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            read_tensors(tmp_path / "a.pth")


@pytest.fixture(params=["best.pt", "best.pkl"])
def of_ultralytics(tmp_path, monkeypatch, request):
    """A checkpoint of Ultralytics: a pickle of a whole model, after a number of numpy's."""
    module = types.ModuleType("ultralytics.nn.tasks")
    module.RTDETRDetectionModel = type("RTDETRDetectionModel", (nn.Linear,), {"__module__": module.__name__})
    content = {"best_fitness": np.float64(0.5), "model": module.RTDETRDetectionModel(1, 1)}
    with monkeypatch.context() as patch:
        for name in ("ultralytics", "ultralytics.nn", module.__name__):
            patch.setitem(sys.modules, name, module)
        path = tmp_path / request.param
        if path.suffix == ".pkl":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
    return path


def test_checkpoints_of_ultralytics_are_called_what_they_are(of_ultralytics, tmp_path, capsys):
    sentence = (
        rf"checkpoint \S*{of_ultralytics.name} is a model of Ultralytics \(it holds objects such as "
        r"ultralytics.nn.tasks.RTDETRDetectionModel\) and no [a-z ]*, and such models run in Ultralytics' code alone: "
        r"use the file there, or give another checkpoint here, such as transformers:\S*$"
    )
    for options in ({}, {"model": "dab_detr_r50"}):
        with pytest.raises(ValueError, match=sentence):
            gd.Detector.from_pretrained(of_ultralytics, **options)
    output = str(tmp_path / "output")
    (tmp_path / "a.png").touch()
    for arguments in (
        ["predict", str(of_ultralytics), str(tmp_path / "a.png"), "--output", output],
        ["eval", str(of_ultralytics), "--data-path", str(tmp_path)],
        ["export", str(of_ultralytics), "--output", f"{output}.onnx"],
    ):
        with pytest.raises(SystemExit, match=f"error: {sentence}"):
            main(arguments)


def test_weights_of_a_backbone_are_read_as_carefully(tmp_path):
    for name, content, message in (
        ("objects.pth", nn.Linear(1, 1), r"cannot be read as a file of tensors: it holds objects \(torch.nn"),
        ("list.pth", [torch.zeros(1)], r"holds a list, not a state dict"),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"^backbone_weights: .*{message}"):
            Backbone("resnet18", str(tmp_path / name))
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^backbone_weights: .*a.safetensors cannot be read as a file of tensors: "):
        Backbone("resnet18", str(tmp_path / "a.safetensors"))
