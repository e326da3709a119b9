"""Inference graphs: torch.export programs of every detector, and ONNX files that onnxruntime runs."""

import pytest
import torch
from small_detectors import normalize_like_trained, small_detector

import groupdetr_fast as gd
from groupdetr_fast.layers import attention

DETECTORS = ["conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dab_deformable_detr_r50", "dino_4scale_r50"]
DEFORMABLE = DETECTORS[3:]
FIXED = (48, 64)
ABOUT = {"class_names": '["a"]'}
SHAPES = ((1, 48, 64), (3, 50, 71))  # images, height, width; no graph is traced at these
TOLERANCE = {False: (1e-4, 1e-4), True: (2e-2, 3e-3)}  # of logits and boxes, by whether the file is of float16


def exported_detector(name, **settings):
    """Few levels, as onnx takes its time over every one."""
    levels = {"num_levels": 2, "backbone_levels": 2} if name in DEFORMABLE else {}
    return small_detector(name, **levels, **settings)


def batch(count, height, width, *, masks):
    """Images, and masks of padding below and to the right of the last one."""
    images = torch.randn(count, 3, height, width)
    if not masks:
        return (images,)
    padding = torch.zeros(count, height, width, dtype=torch.bool)
    padding[-1, height - 11 :] = True
    padding[-1, :, width - 17 :] = True
    return images, padding


@torch.no_grad()
def expected(model, inputs):
    out = model.eval()(*inputs, inference_group=1)
    assert out.boxes.std() > 0.05  # the comparison would mean little if all boxes were alike
    return out.logits[-1], out.boxes[-1]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_program_takes_any_number_and_size_of_padded_images(name):
    model = exported_detector(name)
    program = gd.export_program(model, masks=True, inference_group=1)
    ops = {str(node.target) for node in program.graph.nodes}
    assert "groupdetr_fast.grouped_attention.default" in ops
    assert ("groupdetr_fast.ms_deform_attn.default" in ops) == (name in DEFORMABLE)
    for shape in SHAPES:
        inputs = batch(*shape, masks=True)
        torch.testing.assert_close(program.module()(*inputs), expected(model, inputs))
    with pytest.raises(Exception, match="Guard failed: masks"):
        program.module()(inputs[0], inputs[1][:, :-1])


@pytest.mark.parametrize("name", [DETECTORS[0], DETECTORS[4]])
def test_a_program_of_one_size_takes_any_number_of_images(name):
    model = exported_detector(name)
    program = gd.export_program(model, FIXED, inference_group=1)
    for count in (1, 3):
        inputs = batch(count, *FIXED, masks=False)
        torch.testing.assert_close(program.module()(*inputs), expected(model, inputs))
    with pytest.raises(Exception, match="Guard failed: images"):
        program.module()(torch.randn(1, 3, 50, 71))


def test_modules_keep_their_modes():
    model = small_detector("conditional_detr_r50").train()
    model.backbone.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    gd.export_program(model, FIXED)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_what_cannot_be_exported_is_refused():
    model = small_detector("conditional_detr_r50", num_groups=2)
    with pytest.raises(ValueError, match=r"inference_group must be in \[0, 2\), got 2"):
        gd.export_program(model, inference_group=2)
    with pytest.raises(ValueError, match=r"image_size must be a height and a width from 1 on, got \(0, 64\)"):
        gd.export_program(model, (0, 64))
    masks = gd.build_model("mask2former_r50", num_classes=3, num_groups=1, d_model=32, num_heads=4, encoder_layers=1)
    with pytest.raises(TypeError, match="expected a detector of boxes, got Mask2Former"):
        gd.export_program(masks)
    pytest.importorskip("timm")
    padding = small_detector("conditional_detr_r50", backbone="timm:tf_efficientnet_lite0", backbone_stages=2)
    with pytest.raises(ValueError, match="'timm:tf_efficientnet_lite0' pads by the size of the image: give image_size"):
        gd.export_program(padding)


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True], ids=["images", "masks"])
@pytest.mark.parametrize("name", DETECTORS)
def test_onnxruntime_gives_the_models_outputs(name, masks, tmp_path):
    check_onnx(exported_detector(name), tmp_path / "model.onnx", None, SHAPES, masks=masks)


def test_onnxruntime_gives_the_outputs_of_a_model_that_attends_as_on_a_gpu(tmp_path, monkeypatch):
    """There, and in half precision, the op takes the place of torch's attention."""
    model = exported_detector(DETECTORS[0])
    inputs = batch(*SHAPES[1], masks=True)
    before = expected(model, inputs)
    monkeypatch.setattr(attention, "is_preferred", lambda *_: True)
    torch.testing.assert_close(expected(model, inputs), before)
    program = gd.export_program(model, masks=True, inference_group=1)
    assert "groupdetr_fast.cross_attention.default" in {str(node.target) for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), before)
    check_onnx(model, tmp_path / "model.onnx", None, SHAPES, masks=True)


@pytest.mark.parametrize("name", [DETECTORS[0], pytest.param(DETECTORS[3], marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_models_outputs_at_one_size(name, tmp_path):
    model = exported_detector(name)
    check_onnx(model, tmp_path / "model.onnx", FIXED, [(count, *FIXED) for count in (1, 3)], masks=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFORMABLE)
def test_onnx_of_four_levels_of_resnet50(name, tmp_path):
    """At full width and with the weights that a training starts from.

    Few queries: of 900 sorted scores, two may be so close that rounding decides about their order.
    """
    model = gd.build_model(name, num_classes=5, num_groups=2, encoder_layers=2, decoder_layers=2, num_queries=20)
    check_onnx(model, tmp_path / "model.onnx", None, ((1, 224, 300), (2, 130, 97)), masks=False)


def test_half_onnx_of_a_small_detector(tmp_path):
    """Inputs and outputs as in float32, and between them nothing of it where a weight is used."""
    onnx = pytest.importorskip("onnx")
    model, path = exported_detector(DETECTORS[0]), tmp_path / "model.onnx"
    check_onnx(model, path, FIXED, [(count, *FIXED) for count in (1, 3)], masks=False, half=True)
    graph = onnx.load(path).graph
    types = {initializer.name: initializer.data_type for initializer in graph.initializer}
    uses = [(node.op_type, types.get(name)) for node in graph.node for name in node.input]
    weights = {(op, kind) for op, kind in uses if op in ("Conv", "MatMul") and kind is not None}
    assert weights == {("Conv", onnx.TensorProto.FLOAT16), ("MatMul", onnx.TensorProto.FLOAT16)}
    norms = {kind for op, kind in uses if op == "LayerNormalization"} - {None}
    assert norms == {onnx.TensorProto.FLOAT}
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True], ids=["images", "masks"])
@pytest.mark.parametrize("name", DETECTORS)
def test_half_onnx_of_a_resnet_has_half_the_size_and_the_models_outputs(name, masks, tmp_path):
    """Few queries: of DINO's sorted scores, two may be so close that rounding decides about their order."""
    model, path = exported_detector(name, backbone="resnet18", num_queries=4), tmp_path / "model.onnx"
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():  # box heads that pass errors on as they are, and no larger
        if "bbox_embed" in key and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    normalize_like_trained(model)
    sizes = [(2, 128, 160)] if masks else [(1, 128, 160), (2, 97, 130)]
    check_onnx(model, path, (128, 160) if masks else None, sizes, masks=masks, half=True)
    values = sum(tensor.numel() for tensor in model.state_dict().values())
    assert path.stat().st_size < 0.54 * 4 * values


def check_onnx(model, path, image_size, shapes, *, masks, half=False):
    """Write the graph, and compare what onnxruntime makes of it with the model."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    gd.export_onnx(model, path, image_size, masks=masks, inference_group=1, half=half, metadata=ABOUT)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}  # standard operators alone
    session = onnxruntime.InferenceSession(path)
    height, width = image_size or ("height", "width")
    signature = {"images": ["batch", 3, height, width], "masks": ["batch", height, width]}
    names = ["images", "masks"] if masks else ["images"]
    assert {given.name: given.shape for given in session.get_inputs()} == {name: signature[name] for name in names}
    assert session.get_modelmeta().custom_metadata_map == ABOUT
    for shape in shapes:
        inputs = batch(*shape, masks=masks)
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        got = map(torch.from_numpy, session.run(["logits", "boxes"], given))
        for output, wanted, atol in zip(got, expected(model, inputs), TOLERANCE[half], strict=True):
            torch.testing.assert_close(output, wanted, rtol=0, atol=atol)
