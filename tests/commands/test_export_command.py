"""``groupdetr export`` on a small detector with random weights."""

import json
import logging

import pytest
import torch
from small_checkpoint import write_checkpoint

import groupdetr_fast as gd
from groupdetr_fast import cli

DESCRIPTION = {
    "class_names": ["cat", "dog", "bird"],
    "category_ids": [4, 9, 11],
    "eval_short_side": 32,
    "eval_max_size": 1333,
    "square": False,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def export(*arguments):
    cli.main(["export", *map(str, arguments)])


@torch.no_grad()
def outputs(checkpoint, images):
    out = gd.load_model(checkpoint, device="cpu")(images)
    return out.logits[-1], out.boxes[-1]


def test_a_program_is_written_and_runs(tmp_path, capsys):
    checkpoint, path = write_checkpoint(tmp_path), tmp_path / "new" / "model.pt2"
    export(checkpoint, "--output", path, "--masks")
    assert capsys.readouterr().out.startswith(f"{path}: ")
    files = dict.fromkeys(DESCRIPTION, "")
    program = torch.export.load(path, extra_files=files)
    images = torch.randn(2, 3, 40, 52)
    masks = torch.zeros(2, 40, 52, dtype=torch.bool)
    torch.testing.assert_close(program.module()(images, masks), outputs(checkpoint, images))
    assert {name: json.loads(value) for name, value in files.items()} == DESCRIPTION


def test_an_onnx_file_is_written_and_runs(tmp_path, caplog):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    checkpoint, path = write_checkpoint(tmp_path), tmp_path / "model.onnx"
    with caplog.at_level(logging.INFO):
        export(checkpoint, "--output", path, "--image-size", "40", "52")
    assert {record.name.partition(".")[0] for record in caplog.records} <= {"groupdetr_fast"}
    session = onnxruntime.InferenceSession(path)
    described = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(value) for name, value in described.items()} == DESCRIPTION
    images = torch.randn(2, 3, 40, 52)
    for got, wanted in zip(session.run(None, {"images": images.numpy()}), outputs(checkpoint, images), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        ("conditional_detr_r50", "model.pth", "error: output must end in .onnx, .pt2 or .engine"),
        ("mask2former_r50", "model.pt2", "error: models that predict masks cannot be exported"),
    ],
)
def test_what_cannot_be_exported_ends_in_one_sentence(name, output, message, tmp_path):
    settings = {} if name == "conditional_detr_r50" else {"num_levels": 1, "backbone": "conv:8-8-16-16"}
    checkpoint = write_checkpoint(tmp_path, name, **settings)
    with pytest.raises(SystemExit, match=message):
        export(checkpoint, "--output", tmp_path / output)
    assert not (tmp_path / output).exists()
