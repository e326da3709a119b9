"""Inference graphs: torch.export programs of every detector, and ONNX files that onnxruntime runs."""

import pytest
import torch
from small_detectors import small_detector

import groupdetr_fast as gd

DETECTORS = ["conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dab_deformable_detr_r50", "dino_4scale_r50"]
SIZE = (48, 64)


@torch.no_grad()
def expected(model, images):
    out = model.eval()(images, inference_group=1)
    assert out.boxes.std() > 0.05  # the comparison would mean little if all boxes were alike
    return out.logits[-1], out.boxes[-1]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_program_gives_the_models_outputs_for_any_number_of_images(name):
    model = small_detector(name)
    program = gd.export_program(model, SIZE, inference_group=1)
    ops = {str(node.target) for node in program.graph.nodes}
    assert "groupdetr_fast.grouped_attention.default" in ops
    assert ("groupdetr_fast.ms_deform_attn.default" in ops) == (name in DETECTORS[3:])
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, *SIZE)
        torch.testing.assert_close(program.module()(images), expected(model, images))


def test_modules_keep_their_modes():
    model = small_detector("conditional_detr_r50").train()
    model.backbone.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    gd.export_program(model, SIZE)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_what_cannot_be_exported_is_refused():
    model = small_detector("conditional_detr_r50", num_groups=2)
    with pytest.raises(ValueError, match=r"inference_group must be in \[0, 2\), got 2"):
        gd.export_program(model, SIZE, inference_group=2)
    masks = gd.build_model("mask2former_r50", num_classes=3, num_groups=1, d_model=32, num_heads=4, encoder_layers=1)
    with pytest.raises(TypeError, match="expected a detector of boxes, got Mask2Former"):
        gd.export_program(masks, SIZE)


@pytest.mark.parametrize(
    "name", [DETECTORS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS[1:])]
)
def test_onnxruntime_gives_the_models_outputs(name, tmp_path):
    """Few levels, as onnx takes its time over every one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    deformable = name in DETECTORS[3:]
    model = small_detector(name, **({"num_levels": 2, "backbone_levels": 2} if deformable else {}))
    gd.export_onnx(model, tmp_path / "model.onnx", SIZE, inference_group=1)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, *SIZE)
        logits, boxes = session.run(["logits", "boxes"], {"images": images.numpy()})
        for got, wanted in zip((logits, boxes), expected(model, images), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-4)
